"""A bigram language model: the smallest program that learns to write.

It guesses the next character from the current one alone, by looking it up in a table of 65 x 65
numbers. The table is a poor writer, but everything around it is the real thing: text turned into
numbers, batches, a loss (how surprised the model is by the text; training makes it small), gradient
descent, a test on text held back, and sampling. char_gpt.py keeps all of that, and puts a
transformer in the table's place.

    python bigram.py                        # a few seconds on any machine
    python bigram.py --data my_text.txt     # learn from another text
    python bigram.py --help                 # every setting

On Tiny Shakespeare the loss falls from 4.17 to 2.49, and the babble begins to look like words.
Read next: char_gpt.py; `diff bigram.py char_gpt.py` shows what a transformer adds.
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
import re
import sys
import tempfile
import textwrap
import time
import urllib.request
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass
class BigramConfig:
    """Every setting. Each is also a flag, as in `--max_iters 100`; only vocab_size comes from the
    text itself."""

    vocab_size: int = 65  # how many different characters there are
    data: str = ""  # text file to learn from (UTF-8); if none is given, Tiny Shakespeare
    offline: bool = False  # never fetch Tiny Shakespeare from the network
    out: str = "out/bigram.pt"  # where to save the trained model, for sample.py to use
    seed: int = 1337  # the same seed gives the same run
    batch_size: int = 32  # sequences in a batch
    block_size: int = 256  # characters in a sequence (a table could do with 1, a GPT cannot)
    max_iters: int = 300  # training steps, one batch each
    eval_interval: int = 100  # training steps between evaluations
    learning_rate: float = 0.3  # how far the first step goes; later ones shrink towards zero

    # Of the numbers. (Without a type, this is not a setting itself.)
    may_be_zero = {"seed"}

    def __post_init__(self):
        check_numbers(type(self), vars(self))


# How a setting becomes a flag: those who read for the idea can skip to the next heading.

CLEAR_LINE = "\r\033[K" if sys.stdout.isatty() else ""  # erases a terminal's current line


def fail(message):
    """A mistake that the user can mend ends in one line on standard error, and exit status 2."""
    print(CLEAR_LINE, end="", flush=True)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# More than this could only fill the memory. (Of all other numbers, 2**31 is too much.)
LIMITS = {"n_layer": 1000, "batch_size": 1_000_000, "total_batch_size": 100_000_000}


def check_numbers(Config, settings):
    """Raise ValueError for a setting that is not of its type, or a number that is not above zero
    (or at zero, where it may be)."""
    for field in fields(Config):
        value = settings.get(field.name, field.default)
        if type(value) is not field.type and not (field.type is float and type(value) is int):
            raise ValueError(f"--{field.name} must be of type {field.type.__name__}: {value!r}")
        if field.type in (int, float):
            zero = field.name in Config.may_be_zero
            most = LIMITS.get(field.name, 2**31 - 1)
            if not (0 < value <= most or (value == 0 and zero)):
                rule = f"{'0 or more' if zero else 'above 0'}, and {most} at most"
                raise ValueError(f"--{field.name} must be {rule}; it is {value}")


def parse_flags(Config):
    """A flag for each field of Config, explained by the comment beside the field. Returns a dict of
    those that were given; a mistake in them ends the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    comments = dict(re.findall(r"^    (\w+): .* # (.*)", inspect.getsource(Config), re.MULTILINE))
    for field in fields(Config):
        if field.name == "vocab_size":
            continue
        text = f"{comments[field.name]} [{field.default}]"
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": field.type, "metavar": field.type.__name__}
        parser.add_argument(f"--{field.name}", help=text, default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args())
    try:
        check_numbers(Config, given)
    except ValueError as error:
        fail(error)
    return given


if __name__ == "__main__":
    parse_flags(BigramConfig)  # a mistake is told at once: the imports below take seconds

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------
# Text, tokens, batches


class CharTokenizer:
    """Turns text into integers and back. Each distinct character of `text` is a token, and its
    place in sorted order is its number. The set of tokens is the vocabulary."""

    def __init__(self, text):
        self.chars = sorted(set(text))
        self.vocab_size = len(self.chars)
        self.number = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text):
        """Text to a list of integers. Raises ValueError for a character outside the vocabulary."""
        try:
            return [self.number[char] for char in text]
        except KeyError as error:
            raise ValueError(
                f"the character {error} is not in the vocabulary: {''.join(self.chars)!r}"
            ) from None

    def decode(self, ids):
        """Integers to text."""
        return "".join(self.chars[i] for i in ids)


def split_text(text):
    """The first 90% of the text to train on, and the last 10% to validate on: a model that merely
    knows its text by heart does badly on text that it has never seen."""
    n = int(0.9 * len(text))
    return text[:n], text[n:]


def get_batch(data, config, step):
    """Inputs x and targets y for one training step. Both are (B, T): B = batch_size rows of
    T = block_size tokens. Shapes will be written like this from here on.

    A row of x is a stretch of the text from a random place on, and the row of y is the same stretch
    one token later: y[b, t] is what follows x[b, t], the right answer at that place. The batch
    depends on (seed, step) alone, so that a run can be repeated exactly.
    """
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(len(data) - config.block_size, size=(config.batch_size, 1))  # (B, 1)
    places = torch.from_numpy(starts + np.arange(config.block_size + 1))  # (B, T + 1)
    tokens = data[places.to(data.device)]  # (B, T + 1)
    return tokens[:, :-1], tokens[:, 1:]


# ---------------------------------------------------------------------------------------------
# Model


def cross_entropy(logits, targets):
    """How surprised the model is, on average, by what really comes next: the loss.

    logits (..., vocab_size) are scores, one for each token that might come next. Softmax makes them
    probabilities: exp(score), divided by the sum of all exp(score). The loss is -ln of the
    probability given to the right token, averaged over all of targets (...). A sure and right guess
    costs 0; an even guess among 65 costs ln(65) = 4.17; a sure and wrong one can cost any amount.
    (The three dots stand for any dimensions that come before the last, here B and T.)
    """
    # ln(exp(score) / sum) is score - ln(sum); logsumexp computes ln(sum) over the last dimension.
    log_probs = logits - logits.logsumexp(dim=-1, keepdim=True)  # (..., vocab_size)
    # gather takes from each row of log_probs the one entry whose number stands in targets.
    return -log_probs.gather(-1, targets.unsqueeze(-1)).mean()


class BigramLanguageModel(nn.Module):
    """A table: row i holds the scores of every token that may follow token i. PyTorch's Embedding
    is such a table, whose rows are looked up by number, and whose numbers (the parameters) can be
    trained. Calling a module, as in model(idx), runs its forward method."""

    block_size = 1  # the most tokens that the model can make use of, however long the rows are

    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.table.weight)  # equal scores: at first, all tokens are equally likely

    def forward(self, idx, targets=None):
        """Token numbers idx (B, T) to logits (B, T, vocab_size), and the loss if targets (B, T) are
        given (else None)."""
        logits = self.table(idx)  # (B, T, vocab_size): for each token, its row of the table
        loss = None if targets is None else cross_entropy(logits, targets)
        return logits, loss


def count_bigrams(data, config, add=0):
    """The table with the least loss on this data, found without training, to compare with: count
    how often each token follows each other. The scores are the logs of the counts, which softmax
    turns into shares of their row. For use on other data, add=1 to each count keeps a pair that was
    never seen (a count of 0, a score of minus infinity) from being thought impossible."""
    V = config.vocab_size
    pairs = data[:-1] * V + data[1:]  # token a, then token b: pair number a * V + b
    counts = torch.bincount(pairs, minlength=V * V).view(V, V)
    model = BigramLanguageModel(config)
    model.table.weight.data = (counts + add).float().log()
    return model


# ---------------------------------------------------------------------------------------------
# Generation


def draw(logits):
    """Pick a token at random, each as often as its probability says: (B, vocab_size) to (B, 1)."""
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


@torch.no_grad()  # gradients are for training only
def generate(model, idx, max_new_tokens, choose=draw):
    """Continue each row of idx (B, T): guess the next token, append the guess, guess again.

    Yields each column of new tokens (B, 1) as it is chosen, so that the text can be watched as it
    grows. `choose` turns the scores for the next token (B, vocab_size) into that token (B, 1).
    """
    model.eval()  # tells a model that behaves otherwise in training that this is not training
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.block_size :])  # (B, T, vocab_size): scores at each place
        idx_next = choose(logits[:, -1, :])  # those at the last place are for the token to come
        idx = torch.cat((idx, idx_next), dim=1)  # (B, T + 1)
        yield idx_next


# ---------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, data, config):
    """The mean loss over all of data, cut into windows of block_size tokens, end to end. (A few
    random windows would be quicker, but would give a different number each time.)"""
    model.eval()
    T = config.block_size

    def windows(tokens):  # batches of whole windows (B, T), then the rest as one shorter window
        n = len(tokens) // T * T
        return [*tokens[:n].view(-1, T).split(config.batch_size), tokens[n:].view(1, -1)]

    total = 0.0  # of the loss, over tokens: the windows count by their length
    for x, y in zip(windows(data[:-1]), windows(data[1:])):
        if y.numel() > 0:
            _, loss = model(x, y)
            total += loss.item() * y.numel()
    return total / (len(data) - 1)


def bits_per_byte(loss, data, tokenizer):
    """The loss in a unit that is the same for every vocabulary, to compare models by: not per token
    but per byte of the text behind the tokens, and with logarithms of base 2 (bits)."""
    n_bytes = len(tokenizer.decode(data.tolist()).encode("utf-8"))
    return loss / math.log(2) * len(data) / n_bytes


# ---------------------------------------------------------------------------------------------
# Training


def train(model, tokenizer, train_data, val_data, config):
    """Gradient descent: ask how the loss of one batch changes with each number in the table (the
    gradient), move every number a little the way that lowers the loss, and do it again.
    Returns the history: [step, training loss, validation loss] at each evaluation, where the
    training loss is the mean over the batches since the previous evaluation."""
    # If numbers simply moved in proportion to their gradients, the rows of rare characters, which
    # have little part in the loss, would hardly move. Adam (Kingma & Ba 2015) divides each move by
    # the usual size of the number's gradient, so that all move by about the learning rate ("lr").
    optimizer = torch.optim.Adam(model.parameters())
    history, losses, started = [], [], time.perf_counter()
    for step in range(config.max_iters):
        for group in optimizer.param_groups:  # far at first, to get near; then less, to settle
            group["lr"] = config.learning_rate * (1 - step / config.max_iters)
        x, y = get_batch(train_data, config, step)
        logits, loss = model(x, y)
        check_finite("loss", loss.item(), step, config)
        loss.backward()  # PyTorch has kept track: the chain rule, from the loss back to the table
        optimizer.step()  # moves the numbers in the table
        optimizer.zero_grad()  # forgets the gradient; the next backward() would add to it
        losses.append(loss.item())

        done = step + 1
        print_progress(done, done, y.numel(), loss.item(), started, config)
        if done % config.eval_interval == 0 or done == config.max_iters:
            history.append([done, sum(losses) / len(losses), evaluate(model, val_data, config)])
            losses = []
            check_finite("validation loss", history[-1][2], step, config)
            print_evaluation(history, model, tokenizer, val_data, config)
    return history


def check_finite(name, value, step, config):
    """Raise ValueError for a loss or gradient that is infinite or not a number (NaN): a step by it
    would spoil all weights."""
    if not math.isfinite(value):
        saved = (
            f"{config.out} is as it was" if Path(config.out).exists() else "nothing is saved yet"
        )
        raise ValueError(
            f"the {name} became {value} in step {step + 1} ({saved}): try a lower --learning_rate"
        )


def print_evaluation(history, model, tokenizer, val_data, config):
    """The losses of the latest evaluation, and what the model writes by now."""
    step, train_loss, val_loss = history[-1]
    bits = bits_per_byte(val_loss, val_data, tokenizer)
    torch.manual_seed(config.seed)
    # Token 0, the first in sorted order, stands at the start: in the plays, the line break.
    start = torch.zeros((1, 1), dtype=torch.long, device=val_data.device)
    ids = [column.item() for column in generate(model, start, max_new_tokens=120)]
    print(
        f"{CLEAR_LINE}step {step}/{config.max_iters}: training loss {train_loss:.4f}, "
        f"validation loss {val_loss:.4f} ({bits:.3f} bits per byte)\n"
        + textwrap.indent(tokenizer.decode(ids).strip(), "    | ", lambda line: True)
    )


def print_progress(step, steps_here, n_tokens, loss, started, config):
    """How far the run is, how fast it goes (n_tokens in a step), and how much time is left."""
    seconds = (time.perf_counter() - started) / steps_here  # per step
    print_live(
        f"step {step}/{config.max_iters}: loss {loss:.3f}, {n_tokens / seconds:,.0f} tokens/s, "
        f"{duration((config.max_iters - step) * seconds)} to go"
    )


def print_live(text):
    """One line, written over and over on a terminal, and left out where output goes to a file."""
    if sys.stdout.isatty():
        print(CLEAR_LINE + text, end="", flush=True)


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# ---------------------------------------------------------------------------------------------
# Files

# Those who read for the idea can skip to main(). What lies between keeps files safe, reads flags.

DATA = Path(__file__).resolve().parent / "data"
SHAKESPEARE = DATA / "tinyshakespeare.txt"  # 1 MB of the plays, put together by Andrej Karpathy
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHIPPED_PLAY = DATA / "the-glass-harbour.txt"


def load_text(config):
    """The text to learn from: the file named by --data, or else Tiny Shakespeare, fetched once, or
    else the play that comes with these scripts. Raises ValueError where the file is of no use."""
    path = Path(config.data) if config.data else find_shakespeare(config)
    text = read_text(path)
    train_text, val_text = split_text(text)
    if len(set(text)) < 2 or len(train_text) <= config.block_size or len(val_text) < 2:
        raise ValueError(
            f"{path} is too little to learn from ({len(text):,} characters, {len(set(text))} "
            f"distinct): it takes 2 distinct ones, and more than --block_size in the first 90%"
        )
    print(f"text: {path.name}, {len(text):,} characters, {len(set(text))} distinct")
    return text


def read_text(path):
    """The text of a file. Raises ValueError for one that cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (at byte {error.start}): convert it") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): name another file") from None


def find_shakespeare(config):
    """The path of Tiny Shakespeare, downloaded if need be, or else of the play shipped here."""
    if SHAKESPEARE.exists():
        if sha256_of(SHAKESPEARE) != SHAKESPEARE_SHA256:
            raise ValueError(f"{SHAKESPEARE} is damaged: delete it, to have it fetched again")
        return SHAKESPEARE
    try:
        if config.offline:
            raise OSError("--offline was given")
        download(SHAKESPEARE_URL, SHAKESPEARE, SHAKESPEARE_SHA256)
        return SHAKESPEARE
    except OSError as error:
        print(f"no Tiny Shakespeare ({error}): using a shorter play, written for these scripts")
        return SHIPPED_PLAY


def download(url, path, sha256):
    """Fetch url to path, going on where an earlier try broke off. The file gets its name only when
    its SHA-256 is right: a bad or partial one is never used. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            request = urllib.request.Request(url)
            if file.tell():
                request.add_header("Range", f"bytes={file.tell()}-")
            with urllib.request.urlopen(request, timeout=10) as response:
                if response.status != 206:  # 206: what is missing. Any other: the whole file anew
                    file.truncate(0)
                    file.seek(0)
                size = file.tell() + int(response.headers["Content-Length"] or 0)
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    print_live(f"{path.name}: {file.tell():,} of {size:,} bytes")
                if file.tell() < size:
                    raise OSError(f"broke off at byte {file.tell():,}; run again to go on")
        if sha256_of(part) != sha256:
            part.unlink()
            raise OSError("what came is something else")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:  # nothing is there from that byte on: start anew
            part.unlink()
        raise OSError(f"cannot fetch {url} ({getattr(error, 'reason', error)})") from None
    finally:
        print(CLEAR_LINE, end="")
        if part.exists() and part.stat().st_size == 0:
            part.unlink()


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path):
    """Find out before training, not after it, that the checkpoint cannot be saved. What a run that
    was killed while saving has left behind goes."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        Path(f"{path}.tmp").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write --out {path} ({error.strerror}): name another") from None
    if path.is_dir():
        raise ValueError(f"--out {path} is a directory: name a file in it")


def save_checkpoint(path, checkpoint):
    """Write to another name, then rename: at any moment the old file or the new one is whole."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only on its way there
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save() may hide the one behind the other
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"cannot save {path} ({reason}); what was there before is whole") from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# Command line


def main():
    config = BigramConfig(**parse_flags(BigramConfig))
    check_writable(config.out)

    text = load_text(config)
    tokenizer = CharTokenizer(text)
    config.vocab_size = tokenizer.vocab_size
    train_data, val_data = [torch.tensor(tokenizer.encode(part)) for part in split_text(text)]
    model = BigramLanguageModel(config)
    n_params = sum(p.numel() for p in model.parameters())
    n_tokens = config.batch_size * config.block_size
    print(
        f"model: bigram table, {n_params:,} parameters, on cpu in float32\n"
        f"plan: {config.max_iters:,} steps of {n_tokens:,} tokens; 300 take a few seconds\n"
        f"before training: validation loss {evaluate(model, val_data, config):.4f}; "
        f"an even guess costs ln({tokenizer.vocab_size}) = {math.log(tokenizer.vocab_size):.4f}"
    )

    history = train(model, tokenizer, train_data, val_data, config)

    learned = evaluate(model, train_data, config), history[-1][2]
    counts = count_bigrams(train_data, config)
    counts_plus_one = count_bigrams(train_data, config, add=1)
    counted = evaluate(counts, train_data, config), evaluate(counts_plus_one, val_data, config)
    save_checkpoint(
        config.out,
        {
            "script": "bigram",
            "config": asdict(config),
            "vocab": "".join(tokenizer.chars),
            "model": model.state_dict(),
            "history": history,
        },
    )
    print(
        f"loss on all training text: learned {learned[0]:.4f}, counted {counted[0]:.4f}\n"
        f"on all validation text: learned {learned[1]:.4f}, counted (plus one) {counted[1]:.4f}\n"
        f"saved {config.out}; to sample from it: python sample.py {config.out}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except (OSError, ValueError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|allocate|MemoryError", repr(error)):
            raise
        fail("out of memory: lower --batch_size, --block_size or the size of the model")
