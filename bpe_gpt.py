"""GPT-2: the model of char_gpt.py at its real size, on a vocabulary of word parts.

What is new since char_gpt.py (`diff char_gpt.py bpe_gpt.py` shows it line by line): tokens that are
learned by byte-pair encoding, a cache that makes writing fast, the weights that OpenAI published,
from 124 million to 1.5 billion, and training in small parts, to go on with these or to start anew.

    python bpe_gpt.py                           # fine-tune GPT-2 on Shakespeare, if it can be had;
                                                # if not, train a small GPT-2 from scratch
    python bpe_gpt.py --init scratch            # train from scratch anyway
    python bpe_gpt.py --init gpt2-medium --data my_text.txt
    python bpe_gpt.py --init gpt2 --eval_only --stride 512
    python bpe_gpt.py --init gpt2 --instructions data/instructions.json    # teach it to answer
    python bpe_gpt.py --help                    # every setting

GPT-2 comes as a file of 548 MB, fetched once. What to expect stands in README.md.
Read next: sample.py, which lets the models speak.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "tiktoken"]
# ///

import argparse
import contextlib
import copy
import functools
import hashlib
import http.client
import inspect
import itertools
import json
import math
import mmap
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass
class GPTConfig:
    """Every setting. Each is also a flag, as in `--max_iters 100`; only vocab_size comes from the
    tokenizer. The values are for training GPT-2 124M from scratch; below stand those that differ
    where it is fine-tuned, and where a CPU trains a smaller one."""

    vocab_size: int = 50257  # how many different tokens there are
    n_layer: int = 12  # blocks, one after the other, through which each token passes
    n_head: int = 12  # attention heads in each block
    n_embd: int = 768  # numbers that stand for a token on its way through the blocks
    tied: bool = True  # one table for the tokens that go in and those that come out
    dropout: float = 0.1  # share of results zeroed at random in training, so that none is vital
    init: str = ""  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, folder or file of weights, or scratch
    tokenizer: str = "gpt2"  # from scratch: gpt2, or learned, which is made from the text itself
    learned_vocab_size: int = 1024  # tokens in a vocabulary that is learned
    data: str = ""  # text (UTF-8), or folder with train.bin and val.bin; if none, Tiny Shakespeare
    instructions: str = ""  # file of tasks with their answers (JSON), to learn to answer from
    stride: int = 0  # tokens from one sequence to the next; 0: random places, or all end to end
    offline: bool = False  # never fetch anything from the network
    out: str = "out/bpe_gpt.pt"  # where to save the trained model, for sample.py to use
    resume: bool = False  # go on with the run saved there, with its settings
    eval_only: bool = False  # print the loss over the whole text, in windows by --stride, and end
    export: str = ""  # write the model to this folder, for Hugging Face's transformers, and end
    full: bool = False  # from scratch: train the model of these settings on a CPU too
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is there
    dtype: str = "auto"  # of matrix products: float32 or bfloat16; auto: whichever is fast here
    compile: bool = True  # on a CUDA GPU, use torch.compile where it works
    seed: int = 1337  # the same seed gives the same run
    batch_size: int = 16  # sequences that pass through the model at once, as memory allows
    block_size: int = 1024  # tokens in a sequence: how far back the model can look
    total_batch_size: int = 16384  # tokens in a training step
    max_iters: int = 400  # training steps
    minutes: float = 0.0  # train for about so long, in as many steps as fit in; 0: by max_iters
    eval_interval: int = 50  # training steps between evaluations
    learning_rate: float = 0.001  # of AdamW, which trains embeddings, gains and biases
    muon_learning_rate: float = 0.02  # of Muon, which trains the matrices of the blocks; 0: AdamW
    warmup_iters: int = 50  # steps in which the learning rates rise from zero
    weight_decay: float = 0.1  # pull of the matrices towards zero, per unit of learning rate
    grad_clip: float = 1.0  # a gradient (of all weights together) longer than this is shortened

    # Of the numbers. (Without a type, this is not a setting itself.)
    may_be_zero = {"dropout", "stride", "seed", "warmup_iters", "weight_decay"}
    may_be_zero |= {"minutes", "muon_learning_rate"}

    def __post_init__(self):
        check_numbers(type(self), vars(self))
        for name, good, rule in (
            ("dropout", self.dropout < 1, "below 1"),
            ("n_head", self.n_embd % self.n_head == 0, f"a divisor of --n_embd, {self.n_embd}"),
            ("stride", self.stride <= self.block_size, f"--block_size, {self.block_size}, at most"),
            ("instructions", not (self.data and self.instructions), "alone, without --data"),
            ("tokenizer", self.tokenizer in ("gpt2", "learned"), "gpt2 or learned"),
            ("learned_vocab_size", self.learned_vocab_size > 256, "above 256, the single bytes"),
        ):
            if not good:
                raise ValueError(f"--{name} must be {rule}; it is {getattr(self, name)}")


# The published models, and how many numbers they have learned.
SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124,439,808
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 354,823,168
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774,030,080
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1,557,611,200
}
# Fine-tuning: a few small steps, so that the model learns the text and forgets little else.
FINE_TUNING_SETTINGS = dict(
    batch_size=1,
    total_batch_size=2048,
    max_iters=40,
    eval_interval=20,
    learning_rate=5e-5,
    muon_learning_rate=0,
    warmup_iters=5,
)
# The same with --instructions: 8 records at a time, three times over those in data/.
INSTRUCTION_SETTINGS = dict(
    FINE_TUNING_SETTINGS, batch_size=8, total_batch_size=8192, max_iters=130, eval_interval=65
)
# What a CPU trains from scratch unless told otherwise: the same model, smaller, done in minutes.
CPU_SETTINGS = dict(
    n_layer=4,
    n_head=4,
    n_embd=128,
    tokenizer="learned",
    batch_size=32,
    block_size=64,
    total_batch_size=2048,
    max_iters=2400,
    eval_interval=400,
    learning_rate=0.002,
    muon_learning_rate=0.025,
)
# The same with --instructions. A record is not cut into pieces, so sequences are longer. So few
# records teach so small a model no English, but it can learn them by heart: nothing is dropped.
CPU_INSTRUCTION_SETTINGS = dict(
    CPU_SETTINGS,
    dropout=0.0,
    block_size=256,
    batch_size=16,
    total_batch_size=4096,
    max_iters=600,
    eval_interval=600,
)


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
    parse_flags(GPTConfig)  # a mistake is told at once: the imports below take seconds

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------
# Text, tokens, batches

# Characters make long sequences, and each says little; words are too many to list. A token of GPT-2
# lies between: a piece of text that occurs often, from a single byte to a long word. tiktoken cuts
# text into such tokens; what they are is learned once, from a large text, in this way:

# Cut a text into words first, so that no token reaches from one word into the next. GPT-2's rule:
# a word is letters (\p{L}), or digits (\p{N}), or other marks, with the space before it, if any.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The first 256 tokens are the single bytes, so that every text can be written: first those that are
# visible as characters of that number, then the others. (It is GPT-2's order, for no deep reason.)
VISIBLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
BYTES = VISIBLE + [b for b in range(256) if b not in VISIBLE]
END_OF_TEXT = "<|endoftext|>"  # a token of its own, which stands between texts


def train_bpe(text, vocab_size):
    """Learns a vocabulary from text by byte-pair encoding (Sennrich et al. 2016): begin with single
    bytes, and over and over make one new token of the two that most often stand side by side.

    Returns a tiktoken.Encoding of vocab_size tokens: 256 bytes, those learned, and the end of text.
    They are fewer where no two tokens are left that meet twice.
    """
    letters = {"L": "a", "N": "0"}  # Python's re does not know \p{L}: list those of this text
    for char in sorted(set(text)):
        if (kind := unicodedata.category(char)[0]) in letters:
            letters[kind] += char
    pattern = WORDS.replace(r"\p{L}", letters["L"]).replace(r"\p{N}", letters["N"])
    counts = Counter(word.encode("utf-8") for word in re.findall(pattern, text))

    # `ids` has the tokens of all different words end to end, with a -1 on both sides of each word,
    # and `often` how often the word occurs in the text. For "to to be":
    #     ids    -1   t   o  -1   b   e  -1
    #     often   0   2   2   2   1   1   1
    # To merge two tokens is to give one the new number and to drop the other.
    number = np.argsort(BYTES)  # the place of each byte in BYTES
    ids = np.concatenate([[-1], *(np.append(number[list(word)], -1) for word in counts)])
    often = np.repeat([0, *counts.values()], [1, *(len(word) + 1 for word in counts)])
    tokens = [bytes([b]) for b in BYTES]
    while len(tokens) < vocab_size - 1:
        places = np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0))  # where two tokens meet
        both = ids[places] * vocab_size + ids[places + 1]  # a pair, as a single number
        pairs, which = np.unique(both, return_inverse=True)
        totals = np.bincount(which, weights=often[places], minlength=1)
        best = totals.argmax()  # among equals the first: the same text gives the same tokens
        if totals[best] < 2:
            break
        merged = []
        for place in places[which == best]:
            if not merged or place > merged[-1] + 1:  # in "aaa", the first two only
                merged.append(place)
        left, right = divmod(pairs[best], vocab_size)  # two numbers again
        ids[merged] = len(tokens)
        rest = np.delete(np.arange(len(ids)), np.add(merged, 1))
        ids, often = ids[rest], often[rest]
        tokens.append(tokens[left] + tokens[right])
    return make_tokenizer([*tokens, END_OF_TEXT.encode()])


def make_tokenizer(tokens):
    """A tiktoken.Encoding of the tokens (bytes) in the order in which they were learned: a token's
    place in the list is its number. To encode a word, it starts with single bytes, and merges what
    training merged, in the same order: of all neighbours that make a token, those of the lowest
    number come first."""
    number = {token: i for i, token in enumerate(tokens)}
    needed = {END_OF_TEXT.encode(), *(bytes([b]) for b in BYTES)}
    if len(number) < len(tokens) or not needed <= number.keys():
        raise ValueError("a vocabulary has every byte, the end of text, and no token twice")
    special = {END_OF_TEXT: number.pop(END_OF_TEXT.encode())}
    return tiktoken.Encoding(
        "bpe_gpt", pat_str=WORDS, mergeable_ranks=number, special_tokens=special
    )


def encode(tokenizer, text):
    """Text to an array of token numbers; "<|endoftext|>" becomes the token of that name."""
    return np.array(tokenizer.encode(text, allowed_special="all"), dtype=np.int32)


def split_text(text):
    """The first 90% of the text to train on, and the last 10% to validate on: a model that merely
    knows its text by heart does badly on text that it has never seen."""
    n = int(0.9 * len(text))
    return text[:n], text[n:]


def get_batch(data, config, step):
    """Inputs x and targets y for one training step, both (B, T), from an array of token numbers.
    Here B is the number of sequences in the whole step, total_batch_size / block_size.

    The rows start at random places; or, with a stride, at all its multiples, which are shuffled
    anew for each epoch and seen once in it. So are the records of instructions (see below), if the
    data is a list of these. All depends on (seed, step) alone.
    """
    T = config.block_size
    B = max(config.total_batch_size // T, 1)
    is_records = isinstance(data, list)
    if config.stride == 0 and not is_records:
        rng = np.random.default_rng((config.seed, step))
        starts = rng.integers(len(data) - T, size=B)
    else:
        n = len(data) if is_records else (len(data) - 1 - T) // config.stride + 1  # in an epoch
        epochs, places = np.divmod(np.arange(step * B, (step + 1) * B), n)
        chosen = [shuffled(n, config.seed, epoch)[p] for epoch, p in zip(epochs, places)]
        if is_records:
            return pad([data[i] for i in chosen])
        starts = np.multiply(chosen, config.stride)
    tokens = data[np.reshape(starts, (B, 1)) + np.arange(T + 1)]  # (B, T + 1)
    tokens = torch.from_numpy(tokens.astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]


@functools.lru_cache(maxsize=2)  # it is the same for a whole epoch
def shuffled(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


# ---------------------------------------------------------------------------------------------
# Instructions

# GPT-2 goes on with a text; it was never asked to answer. With --instructions it learns to: from
# records of an instruction, often an input, and the right output, set in a fixed layout (that of
# Stanford Alpaca, Taori et al. 2023), which tells the model that here an answer is due.
LAYOUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
LAYOUT_WITH_INPUT = """Below is an instruction that describes a task, \
paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""


def lay_out(record, layouts=(LAYOUT, LAYOUT_WITH_INPUT)):
    """The text that asks for the record's output."""
    layout = layouts[1] if record.get("input") else layouts[0]
    return re.sub(r"{(instruction|input)}", lambda match: record[match[1]], layout)


def encode_record(tokenizer, record):
    """A record as inputs x and targets y, one token later, two arrays (T,). The model is to learn
    the answer, not the questions: of the targets only the output and its end count. In the place of
    the others y has -100, the number that cross_entropy() leaves out."""
    prompt = tokenizer.encode_ordinary(lay_out(record))
    ids = prompt + tokenizer.encode_ordinary(record["output"]) + [tokenizer.eot_token]
    x, y = np.array(ids[:-1]), np.array(ids[1:])
    y[: len(prompt) - 1] = -100
    return x, y


def pad(records):
    """Records, as encode_record() makes them, as one batch x and y (B, T), with T that of the
    longest. What fills up the others comes after their end, where no token sees it, and it does not
    count in the loss: it may be any token."""
    shape = len(records), max(len(x) for x, _ in records)
    xs, ys = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for row, (x, y) in enumerate(records):
        xs[row, : len(x)], ys[row, : len(y)] = torch.from_numpy(x), torch.from_numpy(y)
    return xs, ys


def read_records(path):
    """The records in a file: a list in JSON, or one record in each line. Raises ValueError, which
    names the record (the first is 0) and the field, for one that is not as it should be."""
    text = read_text(Path(path))
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is neither JSON nor lines of JSON ({error})") from None
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {i} is not an object with an instruction and output")
        for name in ("instruction", "input", "output"):
            value = record.get(name)
            if name == "input" and value in (None, ""):
                continue
            if not isinstance(value, str) or not value.strip():
                what = "is missing" if value is None else f"is not a text, or empty: {value!r:.50}"
                raise ValueError(f"{path}: record {i}: its {name} {what}")
    return records


# ---------------------------------------------------------------------------------------------
# Model

# C stands for n_embd: every token is a row of C numbers, so that x is (B, T, C) on its whole way.
# LayerNorm and GELU, which char_gpt.py writes out, are PyTorch's own from here on.


def attention(q, k, v):
    """Lets each token gather what it needs from itself and the tokens before it, as char_gpt.py
    explains. q and the result are (B, n_head, T, head_size). k and v are of S tokens, the last T of
    which are those that ask: (B, n_head, S, head_size)."""
    T, S, head_size = q.shape[-2], *k.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, S): row asks column
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = scores.masked_fill(~visible, -math.inf)
    return F.softmax(scores, dim=-1) @ v


class Cache:
    """The keys and values, in all layers, of the tokens that the model has read. They stay as they
    are when the text goes on, as no token sees its future. So only a new token has to pass through
    the model; without the cache, all those before it would have to pass again, each time."""

    def __init__(self, model, batch_size, room):
        c, weight = model.config, model.transformer.wte.weight
        shape = (c.n_layer, 2, batch_size, c.n_head, room, c.n_embd // c.n_head)
        self.kv = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0  # tokens read so far


class CausalSelfAttention(nn.Module):
    """Tokens talk to each other. Attention runs n_head times side by side, and each of these heads
    has queries, keys and values of its own, so that one can look for the speaker's name and another
    for where the word began."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # nn.Linear multiplies by a learned matrix and adds a learned bias. The names of all parts
        # that learn are those of GPT-2's published weights.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # makes q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads have gathered
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, kv=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        # Heads go before tokens, so that each head's matrix product is done by itself.
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_size)
        if kv is not None:  # the cache's room for S tokens, (2, B, n_head, S, head_size)
            kv[0, ..., -T:, :], kv[1, ..., -T:, :] = k, v  # the last T of them are new
            k, v = kv[0], kv[1]  # (B, n_head, S, head_size)
        # PyTorch's own code for attention() is faster, but on a CPU for long texts only, or for one
        # token (which needs no mask, as all others were before it).
        if T == 1 or (T == k.shape[2] and (T > 512 or x.device.type != "cpu")):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        else:
            y = attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)  # the results of the heads, end to end
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token thinks by itself about what it has gathered: widen, bend, narrow."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Talk, then think. Both read a normalised copy of x and add what they find to x itself, which
    runs through all blocks like a shared notebook: the residual stream (He et al. 2015). Gradients,
    which would fade on the way back through many layers, pass through a sum unchanged."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, kv=None):
        x = x + self.attn(self.ln_1(x), kv)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The transformer of GPT-2 (Radford et al. 2019). Two tables, the embeddings, hold a row of C
    numbers for each token and one for each position. The sum of both rows enters the blocks; the
    dot products of what comes out with the rows of all tokens are the scores for the next one."""

    def __init__(self, config):
        super().__init__()
        self.config, self.block_size = config, config.block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),  # of tokens
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # of positions
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight  # one table for input and output
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # Two in each block add to x: made smaller, so that all of them together add
                # about as much as one would. (Variances add up; hence the root of their number.)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @classmethod
    def from_pretrained(cls, name_or_path, **settings):
        """GPT-2 with weights that have learned: a published size ("gpt2", "gpt2-medium",
        "gpt2-large", "gpt2-xl", fetched once), a folder in Hugging Face's layout, or a file in it.
        Other settings are fields of GPTConfig. Raises ValueError for what is not a whole GPT-2, and
        OSError where it cannot be had."""
        return load_pretrained(name_or_path, **settings)[0]

    def forward(self, idx, targets=None, cache=None):
        """Token numbers idx (B, T) to logits (B, T, vocab_size), and the loss if targets (B, T) are
        given (else None); a target of -100 does not count. With a cache, idx are the tokens after
        those that it has. Raises ValueError for more than block_size tokens."""
        B, T = idx.shape
        start = cache.length if cache else 0
        if start + T > self.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size, {self.block_size}")
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            # Each block gets its part of the cache, not a copy: what it writes there stays there.
            x = block(x, cache.kv[i, ..., : start + T, :] if cache else None)
        if cache:
            cache.length += T
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, vocab_size)
        loss = None
        if targets is not None:  # the function that bigram.py writes out
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


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

    The model reads the prompt once, and then one token at a time. A text longer than block_size
    must move past the model's positions, by one for each token: every token is at a new position,
    the cache is worth nothing, and the model reads the last block_size tokens anew each time.
    """
    model.eval()  # tells a model that behaves otherwise in training that this is not training
    cache = Cache(model, len(idx), room=min(idx.shape[1] + max_new_tokens, model.block_size))
    new = idx
    for _ in range(max_new_tokens):
        if cache.length + new.shape[1] > model.block_size:
            cache.length, new = 0, idx[:, -model.block_size :]
        logits, _ = model(new, cache=cache)  # (B, T, vocab_size): scores at each place
        new = choose(logits[:, -1, :])  # those at the last place are for the token to come
        idx = torch.cat((idx, new), dim=1)  # (B, T + 1)
        yield new


# ---------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, data, config, stride=0):
    """The mean loss over all of data: records of instructions, or an array of token numbers, each
    guessed once (but the first). Several processes (see below) share the batches among them."""
    model.eval()
    device = model.transformer.wte.weight.device
    rank, n_processes = processes()
    total, count = 0.0, 0
    for x, y in itertools.islice(windows(data, config, stride), rank, None, n_processes):
        _, loss = model(x.to(device), y.to(device))  # the mean over those that count
        n = (y != -100).sum().item()
        total, count = total + loss.item() * n, count + n
    total, count = sum_over_processes(total, count, device=device)
    return total / count


def windows(data, config, stride=0):
    """All of data in batches of x and y (B, T). Through text one looks in windows of block_size
    tokens, which start every `stride` tokens (if 0, end to end). Where windows overlap, a token
    counts in the first only (its target elsewhere is -100, the sign for: does not count), and in
    the others helps to guess those after it: a smaller stride gives each token more to go by, and
    takes longer."""
    if isinstance(data, list):
        for i in range(0, len(data), config.batch_size):
            yield pad(data[i : i + config.batch_size])
        return
    T = min(config.block_size, len(data) - 1)
    last = len(data) - 1 - T  # the last window ends with the text
    starts = [*range(0, last, stride or T), last]
    ends = [0, *(start + T for start in starts)]  # window i counts from ends[i] on
    for i in range(0, len(starts), config.batch_size):
        batch = starts[i : i + config.batch_size]
        tokens = data[np.reshape(batch, (-1, 1)) + np.arange(T + 1)]  # (B, T + 1)
        tokens = torch.from_numpy(tokens.astype(np.int64))
        x, y = tokens[:, :-1], tokens[:, 1:].clone()  # a copy: what is crossed out in y is not in x
        for row, start in enumerate(batch):
            y[row, : max(ends[i + row] - start, 0)] = -100
        yield x, y


def bits_per_byte(loss, data, tokenizer):
    """The loss in a unit that is the same for every vocabulary, to compare models by: not per token
    but per byte of the text behind the tokens, and with logarithms of base 2 (bits)."""
    n_bytes = len(tokenizer.decode(data.tolist()).encode("utf-8"))
    return loss / math.log(2) * len(data) / n_bytes


# ---------------------------------------------------------------------------------------------
# Training

# `torchrun --nproc_per_node=8 bpe_gpt.py` starts the script 8 times over, one process for each GPU.
# Each has the whole model and a share of each batch. PyTorch's DistributedDataParallel takes the
# mean of their gradients, so that all make the same step, and the models stay the same.


def processes():
    """Which of how many processes this is: (0, 1), unless torchrun has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(*numbers, device):
    sums = torch.tensor(numbers, dtype=torch.float32 if device.type == "mps" else torch.float64)
    if dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
    return sums.tolist()


def make_optimizers(model, config):
    """As in char_gpt.py, Muon for the matrices in the blocks and AdamW for the rest; or AdamW for
    all, if Muon has no learning rate, as in fine-tuning: Muon moves all directions of a matrix
    equally far, also those in which published weights are just right.
    Only matrices decay; gains have no reason to be small, and biases are few."""
    muon, decay, others = [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            others.append(p)
        elif ".h." in name and config.muon_learning_rate:
            muon.append(p)
        else:
            decay.append(p)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": others}]
    adamw = torch.optim.AdamW(
        groups, config.learning_rate, betas=(0.9, 0.95), weight_decay=0, fused=True
    )
    if not muon:
        return [adamw]
    return [torch.optim.Muon(muon, config.muon_learning_rate, config.weight_decay), adamw]


def learning_rate_share(step, config):
    """The share of its full learning rate that a step uses. It rises in a line over warmup_iters
    (the first gradients are wild), and falls to 0 in the shape of half a cosine wave."""
    rise = (step + 1) / (config.warmup_iters + 1)
    through = (step - config.warmup_iters) / max(config.max_iters - config.warmup_iters, 1)
    return min(rise, 0.5 + 0.5 * math.cos(math.pi * max(through, 0)))


def train(model, tokenizer, train_data, val_data, config, autocast, checkpoint):
    """Gradient descent, as in char_gpt.py, with steps of any size: the batch of a step goes through
    the model in parts that fit into memory, batch_size sequences each, and gradients add up. Of
    several processes each takes its share of the batch.

    At each evaluation, and after Ctrl-C, saves the checkpoint with what is new in it: the history
    ([step, training loss, validation loss] of each evaluation), the weights that had the best
    validation loss so far ("model"), and all it takes to go on after the last step ("last").
    Returns the number of steps done, which after Ctrl-C is less than max_iters.
    """
    device = model.transformer.wte.weight.device
    optimizers = make_optimizers(model, config)
    first, losses, history = 0, [], checkpoint["history"]
    if checkpoint["last"]:
        first, losses = restore(checkpoint["last"], model, optimizers)
    forward = model
    if config.compile and device.type == "cuda":
        x, y = (part[: config.batch_size] for part in get_batch(train_data, config, first))
        with autocast:
            forward = try_compile(model, x.to(device), y.to(device))
    rank, n_processes = processes()
    if n_processes > 1:
        forward = nn.parallel.DistributedDataParallel(forward)
    interrupts = catch_interrupts()
    done, started = first, time.perf_counter()
    if config.minutes:  # set_steps() needs 11 steps, or a tenth of the time, to settle their number
        config.max_iters = max(config.max_iters, done + 12)
    while done < config.max_iters:
        step = done
        share = learning_rate_share(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * optimizer.defaults["lr"]
        x, y = get_batch(train_data, config, step)
        # What dropout drops depends on (seed, step) alone, too: draw a seed for it from these.
        torch.manual_seed(int(np.random.default_rng((config.seed, step, rank)).integers(2**32)))
        model.train()  # dropout on; evaluate() and generate() turn it off
        parts = zip(*(rows[rank::n_processes].split(config.batch_size) for rows in (x, y)))
        step_loss, left = 0.0, len(x[rank::n_processes])
        n_targets = (y != -100).sum()
        for x_part, y_part in parts:
            left -= len(x_part)
            # Gradients travel between processes once, with the last part.
            quiet = forward.no_sync() if n_processes > 1 and left else contextlib.nullcontext()
            with quiet:
                with autocast:
                    logits, loss = forward(x_part.to(device), y_part.to(device))
                # Its share in the mean over the step.
                loss = loss * ((y_part != -100).sum() / n_targets).item()
                (loss * n_processes).backward()  # adds to the gradients of the parts before
            step_loss += loss.item()
        step_loss, n_interrupts, elapsed = sum_over_processes(
            step_loss, len(interrupts), (time.perf_counter() - started) / n_processes, device=device
        )
        check_finite("loss", step_loss, step, config)
        # The gradient is shortened, so that one odd batch does no harm.
        length = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        check_finite("gradient", length.item(), step, config)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(step_loss)

        done, interrupted = step + 1, n_interrupts > 0  # in any process: all stop together
        if step == first:
            started = time.perf_counter()  # the first step is slow, and does not count
        else:
            print_progress(done, step - first, y.numel(), step_loss, started, config)
        is_tenth = config.minutes and elapsed > 60 * config.minutes / 10  # of the time, in seconds
        if step == first + 10 or is_tenth:
            seconds = elapsed / max(step - first, 1)  # per step
            if config.minutes:
                n_val_tokens = sum(y.numel() for _, y in windows(val_data, config))
                set_steps(config, first, seconds, n_val_tokens, n_tokens=y.numel())
                checkpoint["config"] = asdict(config)
            steps = config.max_iters - first
            print(f"{CLEAR_LINE}at this speed, {steps:,} steps take {duration(steps * seconds)}")
        evaluates = done % config.eval_interval == 0 or done == config.max_iters
        if evaluates:
            with autocast:
                val_loss = evaluate(model, val_data, config)
            check_finite("validation loss", val_loss, step, config)
            if all(val_loss < earlier for _, _, earlier in history):
                checkpoint["model"] = copy.deepcopy(model.state_dict())
            history.append([done, sum(losses) / len(losses), val_loss])
            losses = []
        if rank == 0 and (evaluates or interrupted):
            states = [optimizer.state_dict()["state"] for optimizer in optimizers]
            checkpoint["last"] = dict(step=done, losses=losses, optimizers=states)
            checkpoint["last"]["model"] = model.state_dict()
            save_checkpoint(config.out, checkpoint)
        if rank == 0 and evaluates:
            print_evaluation(history, model, tokenizer, val_data, config)
        if interrupted:
            break
    return done


def set_steps(config, first, seconds, n_val_tokens, n_tokens):
    """Set max_iters so that training, which began after step `first`, lasts config.minutes, now
    that it is known how many seconds a step of n_tokens takes. The number of evaluations stays."""
    n_evals = -(-config.max_iters // config.eval_interval)
    # To evaluate takes a third of the time of training: half of the work is the way back.
    steps = config.minutes * 60 / seconds - n_evals * n_val_tokens / n_tokens / 3
    config.max_iters = first + max(int(steps), 12)  # of which at most 11 are done
    config.eval_interval = -(-config.max_iters // n_evals)
    config.minutes = 0.0  # what is left is an ordinary run, which can be resumed


def restore(last, model, optimizers):
    """Brings model and optimizers to where the run stopped. Returns the number of steps done, and
    the losses since the last evaluation. Raises ValueError for a state that is not theirs."""
    try:
        model.load_state_dict(last["model"])
        for optimizer, state in zip(optimizers, last["optimizers"], strict=True):
            # The running averages as they were; learning rates and the like by today's flags.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            names = {"momentum_buffer"}
            if isinstance(optimizer, torch.optim.AdamW):
                names = {"exp_avg", "exp_avg_sq", "step"}
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                averages = optimizer.state[p]
                shapes = {a.shape for name, a in averages.items() if name != "step"}
                if averages.keys() != names or shapes != {p.shape}:
                    raise ValueError
        return int(last["step"]), [float(loss) for loss in last["losses"]]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise ValueError("the checkpoint to resume is damaged: it does not fit its model") from None


def try_compile(model, x, y):
    """The model, made faster by torch.compile, which merges its many small operations; or the model
    as it is, where that does not work (it takes Triton and a C compiler)."""
    model.train()
    try:
        compiled = torch.compile(model)
        compiled(x, y)[1].backward()  # compiling is put off until the first use
        return compiled
    except Exception:  # of many kinds, none of them a reason not to train
        return model
    finally:
        model.zero_grad()


def catch_interrupts():
    """Returns a list that Ctrl-C (SIGINT) or SIGTERM makes longer, so that the step in hand can be
    finished and saved. A second one ends the program at once."""
    interrupts = []

    def handler(signum, frame):
        interrupts.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)
    return interrupts


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
    print(
        f"{CLEAR_LINE}step {step}/{config.max_iters}: training loss {train_loss:.4f}, "
        f"validation loss {val_loss:.4f} ({other_units(val_loss, val_data, tokenizer)})"
    )
    print_sample(model, tokenizer, val_data, config)


def other_units(loss, data, tokenizer):
    """The loss as a perplexity: among how many tokens, all as likely, one would have to guess to do
    as badly. And in bits per byte."""
    perplexity = f"perplexity {math.exp(min(loss, 700)):.2f}"
    if isinstance(data, list):  # of records, which nobody compares in bytes
        return perplexity
    return f"{perplexity}, {bits_per_byte(loss, data, tokenizer):.3f} bits per byte"


def print_sample(model, tokenizer, val_data, config):
    """What the model writes by now: after the end of a text, which stands at the start of another;
    or in answer to the first records of val_data, the likeliest token each time."""
    prompts, choose, n_tokens = [np.array([tokenizer.eot_token])], draw, 60
    if isinstance(val_data, list):
        prompts = [x[: (y == -100).sum() + 1] for x, y in val_data[:3]]
        choose, n_tokens = lambda logits: logits.argmax(dim=-1, keepdim=True), 40
    torch.manual_seed(config.seed)
    for prompt in prompts:
        idx = torch.tensor(prompt[None], device=model.transformer.wte.weight.device)
        ids = [column.item() for column in generate(model, idx, n_tokens, choose)]
        text = tokenizer.decode(ids)
        if isinstance(val_data, list):
            asked = tokenizer.decode(prompt.tolist()).split("### Instruction:\n")[-1]
            text = asked.replace("\n\n", "\n") + text.split(END_OF_TEXT)[0]
        print(textwrap.indent(text.strip(), "    | ", lambda line: True))
        if isinstance(val_data, list):
            print("    |")


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
# Weights

# GPT-2's weights are published in Hugging Face's layout: a folder with config.json, which has the
# sizes, and model.safetensors (or pytorch_model.bin), which has a tensor for each parameter. The
# names are ours. The shapes are too, but for four matrices in each block: OpenAI's program computed
# x @ weight, and PyTorch's nn.Linear computes x @ weight.T, so that one's matrix is the other's
# transposed. Some files also have the attention mask ("attn.bias"), which is not learned, or a
# second name for the tied table.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}  # of masks


def load_pretrained(name_or_path, **settings):
    """See GPT.from_pretrained; the path may also be that of a checkpoint of this script. Returns
    the model, and its tokenizer (None where the folder has none)."""
    path = find_weights(name_or_path, settings.get("offline", False))
    ours = path.suffix not in (".safetensors", ".bin")
    if ours:
        checkpoint = load_checkpoint(path, "bpe_gpt")
        tokenizer, tensors = unpack_vocab(checkpoint["vocab"]), checkpoint["model"]
        names = (*SIZES["gpt2"], "vocab_size", "block_size", "tied")
        try:
            shape = {name: checkpoint["config"][name] for name in names}
            if not all_tensors(tensors):
                raise TypeError
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged: train the model again") from None
    else:
        tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
        if name_or_path in SIZES:
            shape = dict(SIZES[name_or_path], vocab_size=50257, block_size=1024, tied=True)
        else:
            shape = read_config(path.with_name("config.json"))
        tokenizer = read_vocabulary(path.parent)
    for name, value in shape.items():
        asked = settings.get(name, value)
        if asked != value and (name != "block_size" or asked > value):
            raise ValueError(f"--{name} cannot be {asked}: it is {value} in {path}")
    config = GPTConfig(**{**shape, **settings})
    if config.n_layer > len(tensors):  # before any time is spent on so many
        raise ValueError(f"{path} has no {config.n_layer} layers, but {len(tensors)} tensors")
    try:
        # Shapes, without memory: the tensors will be the weights.
        with torch.device("meta"), NoRandomNumbers():
            model = GPT(replace(config, block_size=shape["block_size"]))
    except RuntimeError:
        raise ValueError(f"{path} is not of the sizes that its configuration has") from None
    take_weights(model, tensors, path, transposed=() if ours else TRANSPOSED)
    model.config, model.block_size = config, config.block_size
    if config.block_size < shape["block_size"]:  # the other positions are not wanted
        wpe = model.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[: config.block_size].detach().clone())
    return model, tokenizer


class NoRandomNumbers(torch.overrides.TorchFunctionMode):
    """Where a model is made for weights that are there already, drawing others is left out. (Even
    where nothing is drawn, it would take PyTorch a second to get ready for it.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not nn.init.normal_:
            return function(*args, **(kwargs or {}))


def take_weights(model, tensors, path, transposed):
    """Makes the tensors the model's parameters, each in its place. Raises ValueError for one that
    is missing, of no use, of another shape, or not finite."""
    expected, found = dict(model.named_parameters()), {}
    for name, tensor in tensors.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if re.fullmatch(r"transformer\.h\.\d+\.attn\.(masked_)?bias", name):
            continue  # the mask
        if name == "lm_head.weight" and model.config.tied:
            continue  # a second name for wte
        if name.endswith(transposed) and tensor.dim() == 2:
            tensor = tensor.t()
        if name in found:
            raise ValueError(f"{path}: {name} is there twice")
        if name not in expected:
            raise ValueError(f"{path}: {name} is not a part of this GPT-2")
        if tensor.shape != expected[name].shape:
            shapes = f"{[*tensor.shape]}, not {[*expected[name].shape]}"
            raise ValueError(f"{path}: {name} has the shape {shapes}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{path}: {name} is of {tensor.dtype}, which weights never are")
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"{path}: {name} has numbers that are infinite, or none at all (NaN)")
        found[name] = tensor.to(torch.float32)
    if missing := expected.keys() - found.keys():
        raise ValueError(f"{path}: {min(missing)} is missing")
    model.load_state_dict(found, strict=False, assign=True)  # not strict: lm_head, where it is tied
    if model.config.tied:
        model.lm_head.weight = model.transformer.wte.weight


def read_config(path):
    """The sizes in a config.json, as fields of GPTConfig. Raises ValueError for another model than
    GPT-2."""
    try:
        config = json.loads(path.read_bytes())
        shape = {name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): it has the sizes") from None
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not a JSON object") from None
    except KeyError as error:
        raise ValueError(f"{path} is no configuration of GPT-2: it has no {error}") from None
    shape["block_size"] = config.get("n_positions", 1024)
    for name, value in shape.items():
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"{path}: {name} is {value!r}; it must be above 0 and below 2**31")
    for name, *allowed in (
        ("model_type", "gpt2"),
        ("activation_function", "gelu_new", "gelu_pytorch_tanh"),  # two names of the same formula
        ("layer_norm_epsilon", 1e-5),
        ("n_inner", None, 4 * shape["n_embd"]),
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("tie_word_embeddings", True, False),
    ):
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name} is {config[name]!r}; in GPT-2 it is {allowed[0]!r}")
    return {**shape, "tied": config.get("tie_word_embeddings", True)}


def read_safetensors(path):
    """The tensors of a file by their names. It has 8 bytes with the length of a header; the header,
    in JSON, with the type and shape of each tensor and where it lies; and then the tensors, nothing
    but their numbers. They are not read here but mapped: the file is used as if it were memory, and
    the system fetches each page when it is first touched. Raises ValueError for a damaged file."""
    tensors, end = {}, 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if not 8 < start <= min(size, 10_000_000):
                raise ValueError("its header is longer than the file, or than any model's")
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
                first, last = entry["data_offsets"]
                if not all(type(n) is int and n > 0 for n in [*shape, last]):
                    raise ValueError(f"{name} has an impossible shape or place")
                # Tensors lie end to end, so that none overlaps another.
                if first != end or last - first != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{name} does not lie where it should")
                tensors[name] = map_tensor(file, start + first, start + last, dtype).view(shape)
                end = last
            if start + end != size:
                raise ValueError("there is something after the last tensor")
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a header that makes no sense ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return tensors


def map_tensor(file, first, last, dtype):
    """The bytes from first to last of a file, as a tensor. Changes to it do not reach the file."""
    page = first - first % mmap.ALLOCATIONGRANULARITY  # a mapping must start at one of these
    mapping = mmap.mmap(file.fileno(), last - page, access=mmap.ACCESS_COPY, offset=page)
    data = torch.frombuffer(mapping, dtype=torch.uint8, offset=first - page)
    if first % dtype.itemsize:  # as in OpenAI's files: numbers that lie askew must be copied
        data = data.clone()
    return data.view(dtype)


def read_bin(path):
    """The tensors of a pytorch_model.bin by their names. Nothing in the file can run as code."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if all_tensors(tensors):
            return tensors
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None
    except Exception:  # a damaged file can trip its reader in any way
        pass
    raise ValueError(f"{path} is not a file of weights, or it is damaged")


def all_tensors(tensors):
    """Whether this is a dict of ordinary tensors by their names."""
    return all(
        type(name) is str
        and isinstance(t, torch.Tensor)
        and t.device.type == "cpu"
        and t.layout == torch.strided
        for name, t in tensors.items()
    )


def export(model, tokenizer, folder):
    """Writes the model as Hugging Face has it: GPT2LMHeadModel.from_pretrained(folder) opens it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header, end, tensors = {"__metadata__": {"format": "pt"}}, 0, []
    for name, p in model.named_parameters():
        tensors.append(p.detach().t() if name.endswith(TRANSPOSED) else p.detach())
        first, end = end, end + 4 * p.numel()
        header[name] = dict(dtype="F32", shape=[*tensors[-1].shape], data_offsets=[first, end])
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # so that no number lies askew
    with open(folder / "model.safetensors.tmp", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            file.write(tensor.contiguous().numpy())
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    c = model.config
    config = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", tie_word_embeddings=c.tied)
    config |= dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd)
    config |= dict(n_layer=c.n_layer, n_head=c.n_head, activation_function="gelu_new")
    config |= dict(embd_pdrop=c.dropout, resid_pdrop=c.dropout, attn_pdrop=0.0)
    config |= dict(layer_norm_epsilon=1e-5, bos_token_id=tokenizer.eot_token)
    config["eos_token_id"] = tokenizer.eot_token
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_vocabulary(tokenizer, folder)


# In vocab.json and merges.txt a token is written with a visible character for each byte: its own,
# or else the next one from number 256 on. So a space becomes "Ġ".
LETTERS = [chr(b) for b in VISIBLE] + [chr(256 + i) for i in range(256 - len(VISIBLE))]
LETTER_OF, BYTE_OF = dict(zip(BYTES, LETTERS)), dict(zip(LETTERS, BYTES))


def spell(token):
    return "".join(LETTER_OF[b] for b in token)


def read_vocabulary(folder):
    """The tokenizer in vocab.json and merges.txt; None where they are not there."""
    paths = folder / "vocab.json", folder / "merges.txt"
    if not all(path.exists() for path in paths):
        return None
    try:
        number = json.loads(paths[0].read_bytes())
        words = sorted(number, key=number.get)
        merges = [line for line in paths[1].read_text("utf-8").split("\n") if line][1:]
        merged = [number[merge.replace(" ", "")] for merge in merges]
        if [number[word] for word in words] != [*range(len(words))] or merged != sorted(merged):
            raise ValueError  # tiktoken merges in the order of the numbers
        tokens = [bytes(BYTE_OF[letter] for letter in word) for word in words]
        return make_tokenizer(tokens)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{paths[0]} and merges.txt are damaged, or not GPT-2's kind") from None


def write_vocabulary(tokenizer, folder):
    """Writes vocab.json and merges.txt, the form in which others read a vocabulary."""
    tokens = token_bytes(tokenizer)
    number = {token: i for i, token in enumerate(tokens)}
    lines = ["#version: 0.2"]
    for token in tokens:
        if token == END_OF_TEXT.encode() or len(token) == 1:
            continue
        parts = [bytes([b]) for b in token]  # merge until two are left, to see which these are
        while len(parts) > 2:
            pairs = [number.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        lines.append(" ".join(map(spell, parts)))
    vocab = json.dumps({spell(token): i for token, i in number.items()}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def token_bytes(tokenizer):
    return [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)]


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
HUB = "https://huggingface.co/openai-community"
PUBLISHED = {  # the version of each model, and the SHA-256 of its weights (if None, the server's)
    "gpt2": (
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": (
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}
TIKTOKEN_FILES = (  # the names that tiktoken gives to its copies of GPT-2's vocabulary
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
)


def find_weights(name_or_path, offline=False):
    """The path of the file that has the weights; those of a published model are downloaded, unless
    they are in data/ or in Hugging Face's cache. Raises OSError where they cannot be had, and
    ValueError for a path that leads nowhere."""
    if name_or_path in PUBLISHED:
        version, sha256 = PUBLISHED[name_or_path]
        cache = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
        cache = cache / f"models--openai-community--{name_or_path}" / "snapshots" / version
        path = DATA / name_or_path / "model.safetensors"
        if (cache / path.name).exists():
            return cache / path.name
        if not path.exists():
            if offline:
                raise OSError(f"{path} is not there, and --offline was given")
            url = f"{HUB}/{name_or_path}/resolve/{version}/{path.name}"
            print(f"fetching {url}", file=sys.stderr)
            download(url, path, sha256 or stated_sha256(url))
        return path
    path = Path(name_or_path)
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).exists():
                return path / name
        raise ValueError(f"{path} has no model.safetensors and no pytorch_model.bin")
    if not path.is_file():
        raise ValueError(f"there is no model {path}: name a file or folder, or {', '.join(SIZES)}")
    return path


def stated_sha256(url):
    """The SHA-256 of a large file, as Hugging Face's server states it in its first answer, which
    sends one on to where the file lies."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args):
            return None

    try:
        request = urllib.request.Request(url, method="HEAD")
        headers = urllib.request.build_opener(Stay).open(request, timeout=10).headers
    except (OSError, http.client.HTTPException) as error:  # to be sent on counts as one, here
        headers = getattr(error, "headers", None) or {}
    if not (stated := headers.get("X-Linked-ETag")):
        raise OSError(f"cannot fetch {url} (no answer that states its SHA-256)")
    return stated.strip('"')


def gpt2_tokenizer(offline=False):
    """GPT-2's own tokenizer, fetched once. Raises OSError where it cannot be had."""
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or DATA / "tiktoken")
    if offline and not all((folder / name).exists() for name in TIKTOKEN_FILES):
        raise OSError(f"GPT-2's vocabulary is not in {folder}, and --offline was given")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # of the network's many kinds, or a file that is not the right one
        raise OSError(f"cannot fetch GPT-2's vocabulary ({type(error).__name__})") from None


def fit_tokenizer(tokenizer, model):
    """The tokenizer that came with a model; if none did, GPT-2's own. Raises ValueError where that
    is not the model's, and OSError where it cannot be had."""
    if tokenizer is None and model.config.vocab_size == 50257:
        tokenizer = gpt2_tokenizer(model.config.offline)
    if tokenizer is None or tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(
            f"the model has {model.config.vocab_size} tokens, and no vocab.json and merges.txt "
            f"with as many lie beside it"
        )
    return tokenizer


def load_data(config, tokenizer):
    """The tokenizer, learned from the text if it is None, and token numbers in two arrays, to train
    on and to validate on; or all in one for --eval_only. Raises ValueError for data of no use."""
    path = Path(config.data) if config.data else find_shakespeare(config)
    if path.is_dir():  # files of 16-bit numbers, which are mapped: they may be larger than memory
        tokenizer = tokenizer or gpt2_tokenizer(config.offline)
        parts = []
        for name in ["val.bin"] if config.eval_only else ["train.bin", "val.bin"]:
            try:
                parts.append(np.memmap(path / name, dtype="<u2", mode="r"))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ValueError(f"cannot read tokens from {path / name} ({reason})") from None
    else:
        text = read_text(path)
        texts = [text] if config.eval_only else split_text(text)
        tokenizer = tokenizer or train_bpe(texts[0], config.learned_vocab_size)
        parts = [encode(tokenizer, text) for text in texts]
    if len(parts[-1]) < 2 or (len(parts) > 1 and len(parts[0]) <= config.block_size):
        counts = " and ".join(f"{len(part):,}" for part in parts)
        raise ValueError(
            f"{path} is too little ({counts} tokens): it takes 2 to guess one, and more than "
            f"--block_size to learn"
        )
    for part in parts:
        if part.max() >= tokenizer.n_vocab:
            raise ValueError(f"{path} has token {part.max()}; the vocabulary ends before that")
    print(
        f"data: {path.name}, {' and '.join(f'{len(part):,}' for part in parts)} tokens, "
        f"of {tokenizer.n_vocab:,} different ones"
    )
    return tokenizer, parts


def load_records(config, tokenizer):
    """The tokenizer, learned from the records to train on if it is None, and the records of the
    file --instructions as encode_record() makes them, in three lists: 80% to train on, 10% to
    validate on and 10% to test on, or all in one for --eval_only."""
    records = read_records(config.instructions)
    if len(records) < 10:
        raise ValueError(f"{config.instructions} has {len(records)} records; it takes 10 at least")
    order = np.random.default_rng(config.seed).permutation(len(records))
    n = len(records) // 10
    places = [order[2 * n :], order[:n], order[n : 2 * n]]
    if tokenizer is None:
        text = "\n".join(lay_out(records[i]) + records[i]["output"] for i in places[0])
        tokenizer = train_bpe(text, config.learned_vocab_size)
    parts, n_cut, n_left_out, T = [], 0, 0, config.block_size
    for part in [order] if config.eval_only else places:
        encoded = [encode_record(tokenizer, records[i]) for i in part]
        n_cut += sum(len(x) > T for x, _ in encoded)
        parts.append([(x[:T], y[:T]) for x, y in encoded if (y[:T] != -100).any()])
        n_left_out += len(encoded) - len(parts[-1])
    if not all(parts):
        raise ValueError(f"--block_size {T} is too short for the records of {config.instructions}")
    print(
        f"data: {Path(config.instructions).name}, {' and '.join(str(len(p)) for p in parts)} "
        f"records, in {tokenizer.n_vocab:,} different tokens"
        + (f"; longer than --block_size, and cut: {n_cut}" if n_cut else "")
        + (f", of which no answer was left in {n_left_out}" if n_left_out else "")
    )
    return tokenizer, parts


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


def load_checkpoint(path, *scripts):
    """The checkpoint at path, written by one of the scripts. Nothing in the file can run as code.
    Raises ValueError where there is none, or not one of theirs."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a damaged file; what follows is clearer
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        parts = {"config", "vocab", "model", "history"}
        if checkpoint["script"] in scripts and parts <= checkpoint.keys():
            return checkpoint
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): train that model first") from None
    except Exception:  # a damaged file can trip its reader in any way
        pass
    raise ValueError(f"{path} is not a checkpoint of {' or '.join(f'{s}.py' for s in scripts)}")


def pack_vocab(tokenizer):
    """The tokens as strings, a character for each byte: what a checkpoint can hold."""
    return [token.decode("latin-1") for token in token_bytes(tokenizer)]


def unpack_vocab(vocab):
    try:
        return make_tokenizer([token.encode("latin-1") for token in vocab])
    except (AttributeError, TypeError, UnicodeEncodeError):
        raise ValueError("the vocabulary in the checkpoint is damaged") from None


def resume_settings(Config, checkpoint, given, fixed):
    """The settings of a run to go on with: as they were, but for those given anew, of which it
    tells. Raises ValueError for one that is fixed, since another run would come of it."""
    try:
        settings = Config(**checkpoint["config"])
    except TypeError:
        raise ValueError("the checkpoint to resume is damaged: its settings are others") from None
    for name, value in given.items():
        old = getattr(settings, name)
        if value != old and name in fixed:
            raise ValueError(f"--{name} cannot change; the run to resume has {old}, not {value}")
        if value != old and name not in ("resume", "out", "data", "offline"):
            print(f"--{name} changes from {old} to {value}")
    return replace(settings, **{"out": Config.out, **given})


def check_resumable(checkpoint, fingerprint, config):
    """Raise ValueError where a run cannot go on: with other data, or with no steps left."""
    last = checkpoint.get("last")
    if checkpoint.get("data") != fingerprint:
        raise ValueError(f"{config.out} learned from other data than this: name its own by --data")
    if not isinstance(last, dict) or type(last.get("step")) is not int:
        raise ValueError(f"{config.out} is damaged: it does not say where the run stopped")
    if last["step"] >= config.max_iters and not config.minutes:
        raise ValueError(f"{config.out} has had its {config.max_iters} steps: raise --max_iters")


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


def pick_device(name):
    """The device called name, or for "auto" the fastest kind that is there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    if name != "auto" and name not in there:
        raise ValueError(f"--device {name} is not there; it can be auto, {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def pick_dtype(name, device):
    """The number format of matrix products. bfloat16 has the range of float32 in half the bits, and
    is twice as fast where the hardware knows it; weights and sums stay in float32 either way."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32 or bfloat16; it is {name}")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        fast = features.get("avx512_bf16") or features.get("amx_bf16")
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def start(given, device):
    """Settings, model and tokenizer, as the given flags ask for. A model from scratch is not made
    yet, nor a tokenizer that is learned: both are None."""
    needs_weights = given.get("eval_only") or given.get("export")
    init = given.get("init") or (given.get("out", GPTConfig.out) if needs_weights else "")
    if needs_weights and init == "scratch":
        raise ValueError("--init scratch has learned nothing to export or evaluate: name a model")
    small = device.type == "cpu" and not given.get("full")
    answers = bool(given.get("instructions"))
    tuning = INSTRUCTION_SETTINGS if answers else FINE_TUNING_SETTINGS
    settings = (CPU_INSTRUCTION_SETTINGS if answers else CPU_SETTINGS) if small else {}
    if init not in ("", "scratch"):
        settings = tuning
    config = GPTConfig(**{**settings, **given})  # flags that make no sense are refused at once
    if init != "scratch":
        try:
            model, tokenizer = load_pretrained(init or "gpt2", **{**tuning, **given})
            return model.config, model, fit_tokenizer(tokenizer, model)
        except OSError as error:
            if init:
                raise
            print(f"no GPT-2 ({error}): training from scratch (or name weights by --init)")
    if small:
        print("on a CPU a small model is trained; --full trains the full one, --init gpt2 GPT-2")
    if config.tokenizer == "gpt2":
        try:
            return config, None, gpt2_tokenizer(config.offline)
        except OSError as error:
            if "tokenizer" in given:
                raise
            print(f"no GPT-2 tokenizer ({error}): learning one from the text")
    return config, None, None


def print_plan(model, dtype, config):
    """What is trained, and how long. Raises ValueError where a process would have nothing to do."""
    n_params = sum(p.numel() for p in model.parameters())
    n_rows = max(config.total_batch_size // config.block_size, 1)
    if n_rows < processes()[1]:
        raise ValueError(f"--total_batch_size has {n_rows} sequences, less than one a process")
    device = model.transformer.wte.weight.device
    print(
        f"model: GPT, {config.n_layer} layers of {config.n_head} heads, {config.n_embd} wide, "
        f"{n_params:,} parameters, on {device} in {str(dtype).removeprefix('torch.')}\n"
        f"plan: {config.max_iters:,} steps of "
        + (f"{n_rows} records" if config.instructions else f"{n_rows * config.block_size:,} tokens")
    )


def join_processes(device):
    """Where torchrun has started this process as one of several, gets them to know each other. The
    first alone prints."""
    if device.type == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node must be {torch.cuda.device_count()}, one a GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A place to meet of its own for each restart: in the old one are the addresses of the dead.
    store, rank, n_processes = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_processes)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")


# What a run keeps from its first step to its last, besides its data.
FIXED = "n_layer", "n_head", "n_embd", "tied", "block_size", "total_batch_size", "stride", "seed"
FIXED += "init", "tokenizer", "learned_vocab_size", "full"


def main():
    given = parse_flags(GPTConfig)
    checkpoint, model = None, None
    out = given.get("out", GPTConfig.out)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by torchrun, after a failure
    if given.get("eval_only") or given.get("export"):
        given["resume"] = False
    if restarts and not given.get("resume") and Path(out).exists():
        # Go on with what this same run has saved, and as it was, whatever --minutes made of it.
        saved_by = load_checkpoint(out, "bpe_gpt").get("run")
        given["resume"] = saved_by == os.environ["TORCHELASTIC_RUN_ID"]
        for name in ("minutes", "max_iters", "eval_interval") if given["resume"] else ():
            given.pop(name, None)
    if given.get("resume"):
        checkpoint = load_checkpoint(out, "bpe_gpt")
        config = resume_settings(GPTConfig, checkpoint, given, FIXED)
        if bool(config.muon_learning_rate) != bool(checkpoint["config"]["muon_learning_rate"]):
            raise ValueError("--muon_learning_rate cannot change from or to 0 in a run to resume")
        tokenizer = unpack_vocab(checkpoint["vocab"])
    device = pick_device(config.device if checkpoint else given.get("device", "auto"))
    fetches = os.environ.get("LOCAL_RANK", "0") == "0"  # of all processes on this machine
    if "TORCHELASTIC_RUN_ID" in os.environ and not given.get("export"):
        join_processes(device)
        if not fetches:
            dist.barrier()  # wait until the files are there
    if checkpoint is None:
        config, model, tokenizer = start(given, device)
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if config.export:
        export(model, tokenizer, config.export)
        print(f"wrote {config.export}, which transformers' GPT2LMHeadModel.from_pretrained opens")
        return
    tokenizer, data = (load_records if config.instructions else load_data)(config, tokenizer)
    if dist.is_initialized() and fetches:
        dist.barrier()
    if config.eval_only:
        with autocast:
            loss = evaluate(model.to(device), data[0], config, config.stride)
        print(f"loss {loss:.4f} ({other_units(loss, data[0], tokenizer)})")
        return
    check_writable(config.out)
    learns_from_scratch = model is None
    if learns_from_scratch:
        config.vocab_size = tokenizer.n_vocab
        torch.manual_seed(config.seed)
        model = GPT(config)
    model.to(device)
    for p in model.parameters():
        # Published matrices lie in memory the other way round, so that sums are rounded in another
        # order. In a resumed run they lie this way: only so can it end with the same bits.
        p.data = p.data.contiguous()
    fingerprint = hashlib.sha256()
    for part in data:
        ids = np.concatenate([x for x, _ in part]) if config.instructions else part[: 1 << 20]
        fingerprint.update(np.int32(ids).tobytes())
    if checkpoint is None:
        checkpoint = dict(script="bpe_gpt", vocab=pack_vocab(tokenizer), history=[], last=None)
        checkpoint["data"] = fingerprint.hexdigest()
        if config.instructions:
            checkpoint["layouts"] = [LAYOUT, LAYOUT_WITH_INPUT]
    else:
        check_resumable(checkpoint, fingerprint.hexdigest(), config)
    checkpoint["config"] = asdict(config)
    checkpoint["run"] = os.environ.get("TORCHELASTIC_RUN_ID")  # torchrun's name for it
    if not checkpoint["history"]:
        checkpoint["model"] = model.state_dict()  # the weights as they are, until there is a best

    print_plan(model, dtype, config)
    if checkpoint["last"]:
        print(f"going on after step {checkpoint['last']['step']:,}")
    else:
        if Path(config.out).exists():
            print(f"note: {config.out} is there already, and will be replaced")
        with autocast:
            val_loss = evaluate(model, data[1], config)
        print(
            f"before training: validation loss {val_loss:.4f} "
            f"({other_units(val_loss, data[1], tokenizer)}); "
            f"an even guess costs ln({config.vocab_size}) = {math.log(config.vocab_size):.4f}"
        )
        if config.instructions or not learns_from_scratch:
            print_sample(model, tokenizer, data[1], config)

    done = train(model, tokenizer, data[0], data[1], config, autocast, checkpoint)
    if done < config.max_iters:
        print(f"{CLEAR_LINE}stopped after step {done:,}, and saved {config.out}")
        print(f"to go on: python bpe_gpt.py --resume --out {config.out}")
        return
    if config.instructions:
        model.load_state_dict(checkpoint["model"])
        with autocast:
            loss = evaluate(model, data[2], config)
        print(
            f"test loss {loss:.4f} ({other_units(loss, data[2], tokenizer)}), of the best weights"
        )
    best_step, _, best = min(checkpoint["history"], key=lambda row: row[2])
    print(
        f"validation loss {checkpoint['history'][-1][2]:.4f} at the end, "
        f"{best:.4f} at best (step {best_step:,}, kept)\n"
        f"saved {config.out}; to sample from it: python sample.py {config.out}"
    )


if __name__ == "__main__":
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # nobody hangs up while another is still talking
            dist.destroy_process_group()
    except KeyboardInterrupt:
        fail("interrupted")
    except (OSError, ValueError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if dist.is_initialized() and re.search("onnection|NCCL|gloo", repr(error)):
            fail("another process has ended; torchrun --max-restarts=3 would start all again")
        if not re.search("out of memory|allocate|MemoryError", repr(error)):
            raise
        fail("out of memory: lower --batch_size, --block_size or the size of the model")
