"""Bigram language model: predict the next character from the current one alone.

The model is a table of 65 x 65 scores: row i says how likely each character is to follow the i-th.
The rest is needed for OpenAI's GPT-2, too: text as integers, batches, a loss, gradient descent,
validation and sampling. char_gpt.py replaces the table with a transformer, GPT-2's kind of network.

    python bigram.py                       # 4 seconds on two CPU cores
    python bigram.py --data my_text.txt    # any text file in UTF-8

The validation loss says how badly the model predicts text that it has not seen. On Tiny Shakespeare
it falls from 4.17 to 2.49. A table made by counting pairs of characters reaches 2.48.
"""

import argparse
import inspect
import math
import socket
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

# ---- Configuration ------------------------------------------------------------------------------

@dataclass
class BigramConfig:
    vocab_size: int = 65  # number of distinct characters; taken from the text
    block_size: int = 256  # length of a training sequence, in characters (as in char_gpt.py)
    batch_size: int = 32  # sequences per step
    max_iters: int = 1000  # steps of gradient descent
    eval_interval: int = 250  # steps between evaluations
    learning_rate: float = 200.0  # the gradient is multiplied by this, which falls to zero
    seed: int = 1337  # for the random numbers: on a CPU, the same seed gives the same run
    data: str = ""  # text file to learn from; default: Tiny Shakespeare
    out: str = "out/bigram.pt"  # checkpoint: the trained model, for sample.py

# ---- Data ---------------------------------------------------------------------------------------

class CharTokenizer:
    """Turns characters into integers and back. The vocabulary is the sorted list of the distinct
    characters; a token is a position in that list."""
    def __init__(self, chars):
        self.chars = sorted(set(chars))
        self.stoi = {char: i for i, char in enumerate(self.chars)}  # "string to integer"
        self.tokens = [char.encode() for char in self.chars]  # as bytes, for sample.py
        self.end_of_text = -1  # for sample.py: no token marks the end of a text

    def encode(self, text):
        unknown = set(text) - set(self.chars)
        if unknown:
            raise UserError(f"characters that are not in the vocabulary: {sorted(unknown)}")
        return [self.stoi[char] for char in text]

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)


def split_data(data, config):
    """Train on the first 90%, validate on the rest. A model can lower its training loss simply by
    memorizing the text (overfitting). Only text it has never seen shows what it has learned."""
    n = int(0.9 * len(data))
    if len(data) - n <= config.block_size:
        raise UserError(f"{len(data)} characters are too few for --block_size {config.block_size}")
    return data[:n], data[n:]


def get_batch(data, config, step):
    """The batch for one training step: inputs x and targets y, both (B, T), with B = batch_size. A
    row of x is a window of T = block_size tokens, and the row of y is the same window one token
    later: y[b, t] is the token that follows x[b, t]. So every row holds T tokens to predict.

    An epoch is one pass through the data, taking the windows in random order. With 21 tokens and
    T = 4, for example, they begin at 0, 4, 8, 12, or at 3, 7, 11, 15: each epoch has a new random
    offset, and so new windows. All of this depends only on seed and step: a run can be repeated."""
    B = config.batch_size
    T = config.block_size
    n_windows = (len(data) - 1) // T - 1  # one fewer than would fit, to leave room for the offset
    steps_per_epoch = max(1, n_windows // B)  # drops a partial last batch unless it is the only one
    epoch, i = divmod(step, steps_per_epoch)  # this is batch number i of its epoch
    rng = np.random.default_rng((config.seed, epoch))  # separate from PyTorch's random numbers
    offset = rng.integers(len(data) - n_windows * T)  # at random: from 0 to 4 in the example
    order = rng.permutation(n_windows)  # at random, so that a batch mixes parts of the whole text
    starts = [offset + T * n for n in order[i * B : (i + 1) * B]]
    rows = torch.stack([data[start : start + T + 1] for start in starts])  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]

# ---- Model --------------------------------------------------------------------------------------

def cross_entropy(logits, targets):
    """The loss: minus the logarithm of the probability that the model gave to the token that really
    came next, averaged over all positions. (The probability of a whole text is a product of such
    probabilities. The logarithm turns it into a sum.) A model that is certain and right has a loss
    of 0; one that guesses uniformly among 65 characters has -ln(1/65) = ln(65) = 4.17. Accuracy
    (the share of right guesses) is no use as a loss: small changes in the scores rarely change it.

    The logits (B, T, V) are scores, one for each of the V tokens in the vocabulary. Softmax turns
    them into probabilities: exp(score), divided by the sum of all exp(score). targets is (B, T)."""
    log_probs = logits.log_softmax(dim=-1)  # (B, T, V): the logarithms of these probabilities
    # At each position, gather() picks the target's entry. It needs targets in the shape (B, T, 1).
    log_probs_of_targets = log_probs.gather(-1, targets.unsqueeze(-1))  # (B, T, 1)
    return -log_probs_of_targets.mean()


class BigramLanguageModel(nn.Module):
    """Row i of the table holds the scores of all characters that may follow character i. The table
    is an nn.Embedding, a matrix of parameters whose rows are looked up by number. (Looking up row i
    is the same as multiplying a vector with a 1 at i and zeros elsewhere by the matrix.) An
    nn.Module keeps track of its parameters; calling it, as in model(idx), calls its forward()."""
    context_size = 1  # how many tokens the model looks at to predict the next one

    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.table.weight)  # equal scores: a uniform guess

    def forward(self, idx, targets=None):
        """Tokens idx (B, T) to logits (B, T, vocab_size); with targets (B, T), also the loss."""
        logits = self.table(idx)
        if targets is None:
            return logits, None
        return logits, cross_entropy(logits, targets)


def count_bigrams(data, vocab_size, add=0):
    """The best table for this data, found without training: count how often each bigram (a pair of
    characters) occurs, and use the logarithms of the counts as scores. Softmax turns them into
    frequencies: exp(ln(count)) is the count, and it is divided by the sum of all counts in its row.

    No table has a lower loss on this data: of all ways to assign probabilities to what follows a
    character, the observed frequencies make the data most probable. A table that looks
    further back would be too large, so better models are not tables, and need training.
    add=1 adds one to every count. Without it, the probability of a pair that is not in data would
    be 0, and one such pair in the validation text would make the loss infinite."""
    # The number of the pair (a, b) is its position in the table, with the rows laid end to end.
    pairs = data[:-1] * vocab_size + data[1:]
    counts = torch.bincount(pairs, minlength=vocab_size**2)  # how often each number occurs
    model = BigramLanguageModel(BigramConfig(vocab_size))
    model.table.weight.data = (counts + add).log().view(vocab_size, vocab_size)
    return model

# ---- Generation ---------------------------------------------------------------------------------

def sample(logits):
    """Draw a token from the predicted distribution: (B, vocab_size) to (B, 1)."""
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


@torch.no_grad()  # gradients are needed for training only
def generate(model, idx, max_new_tokens, choose=sample):
    """Continue idx (B, T) token by token. Yields each new column (B, 1) as soon as it is chosen."""
    model.eval()  # evaluation mode: turns off what only training uses
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.context_size :])
        new = choose(logits[:, -1])  # the last position's scores are for the token to come
        idx = torch.cat((idx, new), dim=1)
        yield new

# ---- Training -----------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, data, config):
    """Mean loss over data, in windows of block_size tokens. (A short remainder is left out.)"""
    model.eval()
    T = config.block_size
    n = (len(data) - 1) // T
    xs = data[: n * T].view(n, T).split(config.batch_size)
    ys = data[1 : n * T + 1].view(n, T).split(config.batch_size)
    total = 0.0
    for x, y in zip(xs, ys):
        _, loss = model(x, y)
        total += loss.item() * len(x)  # the last batch may be smaller, and counts for less
    return total / n


def train(model, train_data, val_data, tokenizer, config, checkpoint):
    """Gradient descent. The gradient says how the loss changes if a parameter is changed a little:
    move each one a small step against its gradient, and the loss falls. Then comes the next batch.
    The history of losses is kept in checkpoint, the dict that main() makes and saves."""
    losses = []  # of the steps since the last evaluation: their mean is the training loss
    for step in range(config.max_iters):
        x, y = get_batch(train_data, config, step)
        _, loss = model(x, y)
        # PyTorch has recorded how the loss was computed. backward() goes through that in reverse
        # and finds, by the chain rule, the gradient of the loss for every parameter p: p.grad.
        model.zero_grad()  # or the gradients would be added to those of the step before
        loss.backward()
        # Large steps to get near the minimum, then smaller ones to settle in it. (200 is large, but
        # a row's gradient is small: on average, only 1/65 of the positions use that row.)
        learning_rate = config.learning_rate * (1 - step / config.max_iters)
        with torch.no_grad():  # the update is not part of the loss, and must not be recorded
            for p in model.parameters():
                p -= learning_rate * p.grad
        losses.append(loss.item())
        if (step + 1) % config.eval_interval == 0 or step + 1 == config.max_iters:
            val_loss = evaluate(model, val_data, config)
            n_read = (step + 1) * y.numel()  # tokens so far
            checkpoint["history"].append((step + 1, n_read, sum(losses) / len(losses), val_loss))
            losses = []
            report(checkpoint, model, tokenizer, config)


def report(checkpoint, model, tokenizer, config):
    """Print the latest losses, and a sample of what the model writes so far."""
    step, _, train_loss, val_loss = checkpoint["history"][-1]
    # The loss is a natural logarithm, in nats; divided by ln 2 it is in bits. Bits per byte of text
    # can be compared between models whose tokens differ in length: characters, or parts of words.
    bits = val_loss / math.log(2) / checkpoint["bytes_per_token"][1]  # [1]: of the validation text
    print(f"step {step}: loss {train_loss:.4f} train, {val_loss:.4f} val; {bits:.3f} bits/byte")
    torch.manual_seed(config.seed)  # the same random numbers each time, to compare the samples
    # The model needs a token to start from: token 0, which in Shakespeare is the line break.
    first = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    ids = [new.item() for new in generate(model, first, 100)]
    print("    | " + tokenizer.decode(ids).strip().replace("\n", "\n    | "))

# ---- Files and flags ----------------------------------------------------------------------------

# The rest is not about language models. On a first reading, skip to main(), which runs it all.

DATA = Path(__file__).resolve().parent / "data"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class UserError(ValueError):
    """A mistake by the user, shown as one line. Errors in the code still show a full traceback."""


def load_text(path):
    """The text file at path; by default Tiny Shakespeare or, without a network, a play."""
    default = DATA / "tinyshakespeare.txt"
    if not path and not default.exists():
        try:
            DATA.mkdir(exist_ok=True)
            socket.setdefaulttimeout(30)  # seconds to wait for an answer
            torch.hub.download_url_to_file(URL, str(default), SHA256, progress=False)
        except Exception as error:  # there are many ways in which a download can fail
            default = DATA / "the-glass-harbour.txt"
            print(f"cannot download Tiny Shakespeare ({error}): using data/{default.name}")
    try:
        return Path(path or default).read_text(encoding="utf-8-sig")  # drops a byte order mark
    except UnicodeDecodeError:
        raise UserError(f"{path} is not in UTF-8: save it in this encoding") from None


def parse_flags(Config):
    """Makes every field of Config a flag, as in --max_iters 100. Returns those given, as a dict."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--setting value ...]", argument_default=argparse.SUPPRESS,
        allow_abbrev=False, description=f"{__doc__}\n{inspect.getsource(Config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        switch = {"action": argparse.BooleanOptionalAction}  # such as --full and --no-full
        kind = switch if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{field.name}", help=argparse.SUPPRESS, **kind)
    flags = vars(parser.parse_args())
    if "out" in flags and not flags["out"].endswith(".pt"):
        raise UserError(f"--out {flags['out']}: the name of a checkpoint must end in .pt")
    return flags


def main():
    if hasattr(sys.stdout, "reconfigure"):  # unprintable characters become ?; lines appear at once
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    config = BigramConfig(**parse_flags(BigramConfig))
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)  # fail now, not after training
    text = load_text(config.data)
    tokenizer = CharTokenizer(text)
    config.vocab_size = V = len(tokenizer.chars)
    train_data, val_data = split_data(torch.tensor(tokenizer.encode(text)), config)
    model = BigramLanguageModel(config)
    print(f"{len(text):,} characters, {V} of them distinct: a table of {V**2:,} parameters")
    loss = evaluate(model, val_data, config)
    print(f"before training: val loss {loss:.4f}; a uniform guess: ln({V}) = {math.log(V):.4f}")
    parts = [text[: len(train_data)], text[len(train_data) :]]  # training, validation
    checkpoint = dict(written_by="bigram", config=vars(config), vocab=tokenizer.chars, history=[],
                      bytes_per_token=[len(part.encode()) / len(part) for part in parts])
    train(model, train_data, val_data, tokenizer, config, checkpoint)
    checkpoint["model"] = model.state_dict()  # the parameters, by their names
    for name, data, add in ("train", train_data, 0), ("val", val_data, 1):
        learned = evaluate(model, data, config)
        counted = evaluate(count_bigrams(train_data, V, add), data, config)
        print(f"{name} loss: learned {learned:.4f}, counted {counted:.4f}")
    with open(config.out, "wb") as file:
        torch.save(checkpoint, file)
    print(f"saved {config.out}; next: python sample.py {config.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, UserError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing has been saved")
