"""Bigram language model: predict the next character from the current one alone.

The model is a table of 65 x 65 scores, one row for each character. Everything around the table is
what GPT-2 needs too: text turned into integers, batches, a loss, gradient descent, validation,
sampling. Read char_gpt.py next: it keeps all of this and puts a transformer in the table's place.

    python bigram.py                       # 4 seconds on two CPU cores
    python bigram.py --data my_text.txt    # any text in UTF-8
    python bigram.py --help                # every setting

On Tiny Shakespeare the validation loss falls from ln(65) = 4.17 to 2.49. The best table can also be
found without training, by counting pairs of characters; it reaches 2.48.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy"]
# ///

import argparse
import hashlib
import http.client
import inspect
import math
import os
import sys
import urllib.request
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

# ---- Configuration ------------------------------------------------------------------------------

@dataclass
class BigramConfig:
    vocab_size: int = 65  # number of distinct characters; taken from the text
    block_size: int = 256  # characters in a training sequence
    batch_size: int = 32  # sequences in a step
    max_iters: int = 300  # steps of gradient descent
    eval_interval: int = 100  # steps between evaluations
    learning_rate: float = 0.3  # size of the first step; it falls linearly to zero
    seed: int = 1337  # the same seed gives the same run
    data: str = ""  # text file to learn from; default: Tiny Shakespeare
    out: str = "out/bigram.pt"  # checkpoint, for sample.py

# ---- Data ---------------------------------------------------------------------------------------

class CharTokenizer:
    """Characters to integers and back. The vocabulary is the sorted list of distinct characters; a
    token is a character's place in it."""
    def __init__(self, chars):
        self.chars = sorted(set(chars))
        self.stoi = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text):
        if unknown := set(text) - self.stoi.keys():
            raise ValueError(f"characters that are not in the vocabulary: {sorted(unknown)}")
        return [self.stoi[char] for char in text]

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)


def split_data(data, config):
    """Train on the first 90%, validate on the rest. A model can lower its training loss by learning
    the text by heart (overfitting). Only other text shows what it has really learned."""
    n = int(0.9 * len(data))
    if len(data) - n <= config.block_size:
        raise ValueError(f"{len(data)} characters are too few for --block_size {config.block_size}")
    return data[:n], data[n:]


def get_batch(data, config, step):
    """Inputs x and targets y for one step, both of shape (B, T): B = batch_size stretches of
    T = block_size tokens, and the same stretches one token later. y[b, t] is the token that follows
    x[b, t], so each row is T exercises. Depends on (seed, step) alone: a run can be repeated."""
    windows = data.unfold(0, config.block_size + 1, 1)  # views of all stretches of T + 1 tokens
    # Random places would visit some parts of the text more often than others. Going round it by the
    # golden ratio again and again visits all equally: each place is in one of the widest gaps left.
    numbers = step * config.batch_size + np.arange(config.batch_size)
    rounds = np.random.default_rng(config.seed).random() + numbers * 0.6180339887498949
    tokens = windows[(rounds % 1 * len(windows)).astype(int)]  # (B, T + 1)
    return tokens[:, :-1], tokens[:, 1:]

# ---- Model --------------------------------------------------------------------------------------

def cross_entropy(logits, targets):
    """The loss: -ln of the probability that the model gives to the token that really comes next,
    averaged over all places. Being sure and right costs 0; a uniform guess costs -ln(1/65) = 4.17.

    The logits (B, T, V) are scores, one for each of the V tokens of the vocabulary. Softmax turns
    them into probabilities: exp(score), divided by the sum of all exp(score). targets: (B, T)."""
    log_probs = logits.log_softmax(-1)  # (B, T, V): ln of softmax, along the last dimension
    return -log_probs.gather(-1, targets[..., None]).mean()  # of V entries, that of the target


class BigramLanguageModel(nn.Module):
    """Row i of the table holds the scores of every character that may follow character i. The table
    is an nn.Embedding: rows of parameters, looked up by number."""
    block_size = 1  # context: how many tokens the model sees, however long its training sequences

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
    """The best table for data, found without training: count how often each character follows each
    other character, and make the scores ln(count). Softmax turns these back into frequencies.

    No table does better: averaged over the places of character i, the gradient with respect to row
    i is softmax(row i) minus the frequencies of what follows, zero when the two agree. The loss
    that remains, the conditional entropy, is what one character leaves open about the next, which
    depends on more. add=1 keeps a pair that is not in data from getting probability 0."""
    pairs = data[:-1] * vocab_size + data[1:]  # a number for each pair of neighbours
    counts = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size)
    model = BigramLanguageModel(BigramConfig(vocab_size))
    model.table.weight.data = (counts + add).log()
    return model

# ---- Generation ---------------------------------------------------------------------------------

def sample(logits):
    """Draw a token from the distribution: (B, vocab_size) to (B, 1)."""
    return torch.multinomial(logits.softmax(-1), num_samples=1)


@torch.no_grad()  # gradients are for training only
def generate(model, idx, max_new_tokens, choose=sample):
    """Continue idx (B, T): predict, choose a token, append it, repeat. Yields each new (B, 1)."""
    model.eval()
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.block_size :])
        new = choose(logits[:, -1])  # the scores at the last place are for the token to come
        idx = torch.cat((idx, new), dim=1)
        yield new

# ---- Training -----------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, data, config):
    """Mean loss over all of data, in windows of block_size tokens, end to end."""
    model.eval()
    windows = data.unfold(0, config.block_size + 1, config.block_size)  # (n, T + 1)
    rest = data[None, len(windows) * config.block_size :]  # a shorter window at the end
    batches = [*windows.split(config.batch_size), rest]
    pairs = [(w[:, :-1], w[:, 1:]) for w in batches if w.shape[1] > 1]
    return sum(model(x, y)[1].item() * y.numel() for x, y in pairs) / (len(data) - 1)


def train(model, train_data, val_data, tokenizer, config, checkpoint):
    """Gradient descent. The gradient says how the loss changes with each parameter p: move them all
    a little against it, p -= lr * p.grad, and the loss falls. Repeat with the next batch. Each
    evaluation adds (step, training loss, validation loss) to the checkpoint's history."""
    # Adam (Kingma & Ba 2015) moves p by the running mean of its gradients, less noisy than the last
    # one, divided by their root mean square. So the rows of rare characters, whose gradients are
    # small, learn as fast as the others.
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for step in range(config.max_iters):
        for group in optimizer.param_groups:  # long steps to get near a minimum, short to settle
            group["lr"] = config.learning_rate * (1 - step / config.max_iters)
        x, y = get_batch(train_data, config, step)
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()  # the backward pass: the gradient, by the chain rule from loss to table
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % config.eval_interval == 0 or step + 1 == config.max_iters:
            val_loss = evaluate(model, val_data, config)
            checkpoint["history"].append((step + 1, sum(losses) / len(losses), val_loss))
            losses = []
            report(checkpoint, model, tokenizer, val_data, config)


def report(checkpoint, model, tokenizer, val_data, config):
    """Print the latest losses, and what the model writes by now."""
    step, train_loss, val_loss = checkpoint["history"][-1]
    # In bits (a bit is ln 2) per byte of text, losses compare between vocabularies.
    bits = val_loss / math.log(2) / checkpoint["bytes_per_token"]
    print(f"step {step}: loss {train_loss:.4f} train, {val_loss:.4f} val; {bits:.3f} bits/byte")
    torch.manual_seed(config.seed)
    ids = [new.item() for new in generate(model, val_data.new_zeros(1, 1), 100)]  # from token 0 on
    print("    | " + tokenizer.decode(ids).strip().replace("\n", "\n    | "))

# ---- Files and flags ----------------------------------------------------------------------------

DATA = Path(__file__).resolve().parent / "data"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def write_whole(path, write):
    """Let write(file) fill a file of another name, then rename it: path is never half written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # a name unique to this process
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only on its way there
        temporary.replace(path)
    except RuntimeError as error:  # what torch.save makes of an OSError
        raise OSError(f"cannot write {path}: is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_text(path):
    """The text at path, or Tiny Shakespeare, downloaded once, or else a play that comes with it."""
    if path:
        return Path(path).read_text(encoding="utf-8")
    path = DATA / "tinyshakespeare.txt"
    try:
        if not path.exists():
            content = urllib.request.urlopen(URL, timeout=10).read()
            if hashlib.sha256(content).hexdigest() != SHA256:
                raise OSError("the download is damaged")
            write_whole(path, lambda file: file.write(content))
    except (OSError, http.client.HTTPException) as error:
        print(f"no Tiny Shakespeare ({error}): using data/the-glass-harbour.txt")
        path = DATA / "the-glass-harbour.txt"
    return path.read_text(encoding="utf-8")


def check_out(path):
    """Find out before training, not after it, whether a checkpoint can be saved at path."""
    if Path(path).suffix != ".pt" or Path(path).is_dir():
        raise ValueError(f"--out {path} must be a file whose name ends in .pt")
    write_whole(f"{path}.test", lambda file: None)
    Path(f"{path}.test").unlink(missing_ok=True)  # another process may have been quicker


def parse_flags(Config):
    """Every field of Config as a flag, as in --max_iters 100. Returns those given, as a dict."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--setting value ...]", argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__}\n{inspect.getsource(Config)}")
    for f in fields(Config):
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", help=argparse.SUPPRESS, **how)
    return vars(parser.parse_args())


def main():
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # any character, line by line
    config = BigramConfig(**parse_flags(BigramConfig))
    check_out(config.out)
    text = load_text(config.data)
    tokenizer = CharTokenizer(text)
    config.vocab_size = V = len(tokenizer.chars)
    train_data, val_data = split_data(torch.tensor(tokenizer.encode(text)), config)
    model = BigramLanguageModel(config)
    print(f"{len(text):,} characters, {V} distinct: {V**2:,} parameters")
    val_loss = evaluate(model, val_data, config)
    print(f"before training: val loss {val_loss:.4f}; uniform: ln({V}) = {math.log(V):.4f}")
    checkpoint = dict(script="bigram", config=vars(config), vocab=tokenizer.chars, history=[],
                      bytes_per_token=len(text[len(train_data) :].encode()) / len(val_data))
    train(model, train_data, val_data, tokenizer, config, checkpoint)
    checkpoint["model"] = model.state_dict()
    write_whole(config.out, lambda file: torch.save(checkpoint, file))
    for name, data, add in ("train", train_data, 0), ("val", val_data, 1):
        learned = evaluate(model, data, config)
        counted = evaluate(count_bigrams(train_data, V, add), data, config)
        print(f"{name} loss: learned {learned:.4f}, counted {counted:.4f}")
    print(f"saved {config.out}; next: python sample.py {config.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
