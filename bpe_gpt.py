"""GPT-2: the model of char_gpt.py at its real size, on word parts instead of characters.

New since char_gpt.py (`diff char_gpt.py bpe_gpt.py` shows it line by line): a vocabulary learned by
byte-pair encoding, a cache that makes generation fast, the weights that OpenAI published, from 124
million to 1.5 billion parameters, and fine-tuning: on any text, or on instructions to be answered.

    python bpe_gpt.py                 # train from scratch: a GPU GPT-2 124M, a CPU a small model
    python bpe_gpt.py --full          # GPT-2 124M on a CPU, too
    python bpe_gpt.py --init gpt2     # fine-tune GPT-2 on Shakespeare; downloads 548 MB once
    python bpe_gpt.py --init gpt2-medium --data my_text.txt
    python bpe_gpt.py --init gpt2 --instructions data/instructions.json
    python bpe_gpt.py --init gpt2 --data my_text.txt --eval_only --stride 512
    python bpe_gpt.py --init out/bpe_gpt.pt --export my_gpt2      # for Hugging Face's transformers
    torchrun --nproc_per_node=8 bpe_gpt.py                        # on 8 GPUs
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "tiktoken", "regex"]
# ///

import argparse
import copy
import hashlib
import http.client
import inspect
import json
import math
import os
import signal
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---- Configuration ------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    vocab_size: int = 50257  # GPT-2's own vocabulary; any other size is learned from the text
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # width: numbers that represent a token on its way through the blocks
    block_size: int = 1024  # context: how many tokens the model can see
    dropout: float = 0.1  # fraction of activations zeroed in training, against overfitting
    init: str = ""  # fine-tune gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder or a checkpoint
    batch_size: int = 16  # sequences that go through the model at once, as memory allows
    total_batch_size: int = 16384  # tokens in a step
    max_iters: int = 400  # steps of gradient descent
    eval_interval: int = 50  # steps between evaluations
    learning_rate: float = 0.001  # of AdamW, for embeddings, gains and biases
    muon_learning_rate: float = 0.02  # of Muon, for the matrices of the blocks; 0: AdamW for all
    warmup_iters: int = 50  # steps over which the learning rates rise from zero
    weight_decay: float = 0.1  # of the matrices
    grad_clip: float = 1.0  # gradient clipping: shorten gradients of a larger norm than this
    seed: int = 1337  # the same seed gives the same run
    full: bool = False  # train the full model on a CPU too
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of matrix products: float32 or bfloat16
    compile: bool = True  # torch.compile, on a CUDA GPU
    resume: bool = False  # go on from the checkpoint, if there is one
    data: str = ""  # text file, or folder of train.bin and val.bin; default: Tiny Shakespeare
    instructions: str = ""  # JSON file of instructions with responses, to learn from instead
    stride: int = 0  # evaluation: tokens from one window to the next; 0: windows end to end
    eval_only: bool = False  # print the loss on all of --data (of a folder, its val.bin), and end
    export: str = ""  # write the model to this folder in Hugging Face's format, and end
    out: str = "out/bpe_gpt.pt"  # checkpoint, for sample.py, --resume, --init; replaces an old one


# The published models; vocab_size and block_size are those above.
SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124,439,808 parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 354,823,168
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774,030,080
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1,557,611,200
}
SIZE_NAMES = "vocab_size", "n_layer", "n_head", "n_embd"

# What a CPU trains from scratch unless told otherwise: the same model, smaller.
CPU_SETTINGS = dict(
    vocab_size=1024, n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.05, batch_size=32,
    total_batch_size=2048, max_iters=2400, eval_interval=400, learning_rate=0.002,
    muon_learning_rate=0.025, weight_decay=0.15)
# Fine-tuning takes few, small steps, so that the model learns the text and forgets little else;
# and not by Muon, which changes all directions of a matrix, also those that are right as they are.
FINE_TUNING_SETTINGS = dict(
    batch_size=1, total_batch_size=2048, max_iters=40, eval_interval=20, learning_rate=5e-5,
    muon_learning_rate=0.0, warmup_iters=5)
# On top of these with --instructions. From scratch, the context must hold a prompt and its
# response; in fine-tuning it is the model's own.
INSTRUCTION_SETTINGS = dict(
    block_size=256, batch_size=8, total_batch_size=8192, max_iters=130, eval_interval=65)

# ---- Tokens -------------------------------------------------------------------------------------

# Characters make long sequences of which each element says little; words are too many to list. A
# token of GPT-2 is in between: a string of bytes that is frequent, from one byte to a long word.

# A text is first split into words: letters (\p{L}), digits (\p{N}) or other marks, each with the
# space before it; endings such as 's; white space. No token crosses from one word into the next.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The first 256 tokens are the single bytes, so that any text can be written. GPT-2 begins with
# those that are printable characters in Latin-1.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]
# Where a vocabulary is written down, each byte has a printable character: its own, or one of those
# from number 256 on. A space is "Ġ".
LETTERS = dict(zip(BYTES, [*PRINTABLE, *range(256, 512)]))
END_OF_TEXT = "<|endoftext|>"  # a token of its own, between one text and the next


def train_bpe(text, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016): begin with single bytes; merge the most frequent
    pair of adjacent tokens into a new token; repeat.

    For example, "low lower lowest" is split into "low", " lower" and " lowest". The pairs l-o and
    o-w occur 3 times each. Of equals, the pair with the lower token numbers goes first: l-o becomes
    the token "lo". The next merges are lo-w (3 times), space-low and " low"-e (twice each). Then no
    pair occurs twice, and learning ends."""
    tokens = [bytes([b]) for b in BYTES]
    frequencies = Counter(regex.findall(WORDS, text))
    words = {word: [BYTES.index(b) for b in word.encode()] for word in frequencies}
    pair_counts, words_with = Counter(), defaultdict(set)  # kept up to date from merge to merge

    def count_pairs(word, sign):
        for pair in zip(words[word], words[word][1:]):
            pair_counts[pair] += sign * frequencies[word]
            words_with[pair].add(word)

    for word in words:
        count_pairs(word, +1)
    while len(tokens) < vocab_size - 1:
        highest = max(pair_counts.values(), default=0)
        if highest < 2:
            break
        pair = min(pair for pair, count in pair_counts.items() if count == highest)
        for word in list(words_with[pair]):
            count_pairs(word, -1)
            words[word] = merge(words[word], pair, len(tokens))
            count_pairs(word, +1)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return make_tokenizer([*tokens, END_OF_TEXT.encode()])


def merge(ids, pair, new):
    """The same tokens with every occurrence of the pair replaced by the new one."""
    merged = []
    for token in ids:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def make_tokenizer(tokens):
    """tiktoken repeats the merges in the order in which they were learned: each word starts as
    single bytes, and of all pairs that make a token, the one with the lowest number is merged."""
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {END_OF_TEXT: ranks.pop(END_OF_TEXT.encode())}
    return tiktoken.Encoding("bpe", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


def gpt2_tokenizer():
    """GPT-2's own vocabulary, which OpenAI learned from 40 GB of web pages; downloaded once."""
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # the network fails in many ways
        raise OSError(
            f"cannot fetch GPT-2's vocabulary ({type(error).__name__}): try --vocab_size 1024"
        ) from None


def pack_vocab(tokenizer):
    """The tokens as printable strings: what a checkpoint and Hugging Face's files hold."""
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)]
    return [token.decode("latin-1").translate(LETTERS) for token in tokens]


def unpack_vocab(words):
    byte = {letter: b for b, letter in LETTERS.items()}
    return make_tokenizer([word.translate(byte).encode("latin-1") for word in words])

# ---- Data ---------------------------------------------------------------------------------------

# Both kinds of data offer the same: batch(step) gives the inputs x and targets y of a training
# step, which depend on (seed, step) alone; windows() gives all of the data, for evaluation,
# batch_size rows at a time. x and y are (B, T). Targets of -100 do not count in the loss.

class TextData:
    """A text as an array of tokens, of which the model sees windows of block_size."""
    prompts = ["\n"]  # what report() lets the model continue

    def __init__(self, tokens, config):
        if len(tokens) < 2:
            raise ValueError("the text is too short: a part of it has fewer than two tokens")
        self.config, self.T = config, min(config.block_size, len(tokens) - 1)
        # All stretches of T + 1 tokens, not copied.
        self.stretches = np.lib.stride_tricks.sliding_window_view(tokens, self.T + 1)
        self.stride = min(config.stride, self.T)

    def cut(self, starts):
        tokens = torch.from_numpy(self.stretches[starts].astype(np.int64))  # (B, T + 1)
        return tokens[:, :-1], tokens[:, 1:]

    def batch(self, step):
        """Steps of the golden ratio, as in char_gpt.py: all parts come equally often."""
        B = sequences_per_step(self.config)
        numbers = step * B + np.arange(B)
        rounds = np.random.default_rng(self.config.seed).random() + numbers * 0.6180339887498949
        return self.cut((rounds % 1 * len(self.stretches)).astype(int))

    def windows(self):
        """End to end; with a stride, overlapping. Each token counts once, in the first window that
        has it: a shorter stride gives it more context, and takes longer."""
        last = len(self.stretches) - 1
        starts = np.append(np.arange(0, last, self.stride or self.T), last)
        n_new = np.diff(starts, prepend=-self.T)  # tokens in no earlier window (at first: all)
        for i in range(0, len(starts), self.config.batch_size):
            batch = slice(i, i + self.config.batch_size)
            x, y = self.cut(starts[batch])
            is_new = torch.from_numpy(np.arange(self.T) >= self.T - n_new[batch, None])  # (B, T)
            yield x, y.where(is_new, -100)


class InstructionData:
    """Instructions with responses, each a row. The model is to learn to respond, not to ask: only
    the response counts, and the end of text after it."""
    def __init__(self, records, tokenizer, config):
        self.prompts, self.config = [make_prompt(record) for record in records[:3]], config
        rows = [encode_record(record, tokenizer) for record in records]
        self.rows = [row for row in rows if len(row) <= config.block_size]
        if len(self.rows) < len(rows):
            print(f"{len(rows) - len(self.rows)} records do not fit into block_size: left out")

    def pad(self, rows):
        """Makes rows as long as the longest: adds at their end, where no token sees it."""
        rows = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)  # (B, T, 2)
        return rows[..., 0].clamp(min=0), rows[..., 1]

    def batch(self, step):
        return self.pad(shuffled(self.rows, step, self.config))

    def windows(self):
        for i in range(0, len(self.rows), self.config.batch_size):
            yield self.pad(self.rows[i : i + self.config.batch_size])


def sequences_per_step(config):
    return max(config.total_batch_size // config.block_size, N_PROCESSES)


def shuffled(sequences, step, config):
    """The sequences of a step. Each comes once in an epoch, in another order in each epoch."""
    B, n, chosen, epoch = sequences_per_step(config), len(sequences), [], -1
    for i in range(step * B, step * B + B):
        if i // n != epoch:
            epoch = i // n
            order = np.random.default_rng((config.seed, epoch)).permutation(n)
        chosen.append(sequences[order[i % n]])
    return chosen


# The prompt template of Stanford Alpaca (Taori et al. 2023): GPT-2 continues texts, and a text that
# looks like this is to be continued by a response.
TEMPLATE = """Below is an instruction that describes a task{context}. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}{input}

### Response:
"""


def make_prompt(record):
    context = input = ""
    if record["input"].strip():
        context = ", paired with an input that provides further context"
        input = f"\n\n### Input:\n{record['input']}"
    return TEMPLATE.format(context=context, instruction=record["instruction"], input=input)


def encode_record(record, tokenizer):
    """Inputs and targets, (T, 2)."""
    prompt = tokenizer.encode_ordinary(make_prompt(record))
    response = tokenizer.encode_ordinary(record["output"]) + [tokenizer.eot_token]
    tokens = torch.tensor(prompt + response)
    row = torch.stack((tokens[:-1], tokens[1:]), dim=1)
    row[: len(prompt) - 1, 1] = -100
    return row


FIELDS = "instruction", "input", "output"


def read_records(path):
    """A JSON list of {"instruction": ..., "input": ..., "output": ...}; there may be no input."""
    records = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        records = [{f: str(record.get(f) or "") for f in FIELDS} for record in records]
    except AttributeError:
        raise ValueError(f"{path} must hold records with the fields {', '.join(FIELDS)}") from None
    complete = [r for r in records if r["instruction"].strip() and r["output"].strip()]
    print(f"{len(records) - len(complete)} records have no instruction or no output: skipped")
    if len(complete) < 10:
        raise ValueError(f"{path} has {len(complete)} usable records; at least 10 are needed")
    return complete


def load_instructions(config, tokenizer):
    """90% to train on, 10% to validate on; with --eval_only, validate on all. Returns these and the
    tokenizer, which is learned from the first part if it is None."""
    records = read_records(config.instructions)
    np.random.default_rng(config.seed).shuffle(records)
    n = len(records) // (1 if config.eval_only else 10)
    train, val = records[n:], records[:n]
    text = "\n".join(make_prompt(record) + record["output"] for record in train)
    tokenizer = tokenizer or train_bpe(text, config.vocab_size)
    print(f"{len(train)} records to train on, {len(val)} to validate on")
    return *(InstructionData(part, tokenizer, config) for part in (train, val)), tokenizer


def load_tokens(config, tokenizer):
    """The first 90% of a text to train on, the rest to validate on; with --eval_only, validate on
    all. A folder has GPT-2's tokens as 16-bit integers, in files that may be larger than memory.
    Returns these and the tokenizer, which is learned from the first part if it is None."""
    if os.path.isdir(config.data):
        tokenizer = tokenizer or gpt2_tokenizer()
        parts = [np.memmap(f"{config.data}/{name}.bin", dtype="<u2", mode="r")
                 for name in ("train", "val")]
    else:
        text = load_text(config.data)
        n = int(0.9 * len(text))
        texts = [text] * 2 if config.eval_only else [text[:n], text[n:]]
        tokenizer = tokenizer or train_bpe(texts[0], config.vocab_size)
        parts = [np.array(tokenizer.encode(text, allowed_special="all")) for text in texts]
    print(f"{len(parts[0]):,} tokens to train on, {len(parts[1]):,} to validate on")
    return *(TextData(part, config) for part in parts), tokenizer

# ---- Model --------------------------------------------------------------------------------------

# C is n_embd. Each token is a vector of C numbers: x is (B, T, C) all the way through the model.
# LayerNorm and GELU, which char_gpt.py writes out, are PyTorch's from here on.
def attention(q, k, v):
    """As in char_gpt.py, but the queries may be those of the last T of S tokens alone: q and the
    result are (B, n_head, T, head_size), k and v (B, n_head, S, head_size)."""
    T, S, head_size = q.shape[-2], *k.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, S)
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v


class Cache:
    """The keys and values that a block has computed so far. No token sees those after it, so they
    stay valid when the text grows, and only the new token has to pass through the model."""
    def __init__(self, room):
        self.room, self.length = room, 0  # in tokens

    def append(self, k, v):
        """Adds those of new tokens (B, n_head, T, head_size); returns those of all S tokens."""
        if self.length == 0:
            self.kv = k.new_empty(2, *k.shape[:2], self.room, k.shape[3])
        start, self.length = self.length, self.length + k.shape[2]
        self.kv[:, :, :, start : self.length] = torch.stack((k, v))
        return self.kv[:, :, :, : self.length]  # keys and values


class CausalSelfAttention(nn.Module):
    """Attention in n_head heads side by side, each with its own queries, keys and values: one can
    look for the speaker's name and another for where the word began."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # nn.Linear multiplies by a learned matrix and adds a learned bias.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads found

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_size)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_head, S, head_size)
        # PyTorch's kernel is faster on a GPU; on a CPU only for long texts, and for one new token.
        if T == 1 or (T == k.shape[2] and (T > 512 or x.device.type != "cpu")):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        else:
            y = attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenates the heads
        return self.c_proj(y)


class MLP(nn.Module):
    """Works on each token by itself: what attention collected is processed here."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))  # (B, T, C), in between (B, T, 4 * C)


class Block(nn.Module):
    """Attention, then MLP. Each adds its result to x, the residual stream that runs through all
    blocks. A sum passes gradients back unchanged, however many blocks there are (He et al. 2015).
    Layer norm stands before each part, and not, as in the first transformers, after the sum, where
    it would rescale the stream itself and every gradient on its way back."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        x = x + self.dropout(self.attn(self.ln_1(x), cache))
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), with its parameter names."""
    def __init__(self, config):
        super().__init__()
        self.config, self.block_size = config, config.block_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),  # token embeddings
            "wpe": nn.Embedding(config.block_size, config.n_embd),  # position embeddings
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Weight tying (Press & Wolf 2017): one table serves at both ends. At the input a row says
        # what its token is like; at the output its dot product with x says how well it fits.
        self.lm_head.weight = self.transformer.wte.weight
        # Small weights give small scores: the first loss, as in bigram.py, is near ln(vocab_size).
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            if name.endswith("c_proj.weight"):  # 2 * n_layer of these add to the residual stream
                p.data /= math.sqrt(2 * config.n_layer)  # so that the sum has the variance of one

    @classmethod
    def from_pretrained(cls, name_or_path, **settings):
        """A trained model: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", a folder in Hugging
        Face's format, or a checkpoint. Settings are fields of GPTConfig. Raises ValueError for what
        is damaged or not a GPT-2, OSError for what cannot be downloaded."""
        return load_pretrained(name_or_path, {}, settings)[0]

    def forward(self, idx, targets=None, caches=None):
        """Tokens idx (B, T) to logits (B, T, vocab_size); with targets (B, T), also the loss, in
        which targets of -100 do not count. With caches, one for each block, idx are the tokens
        after those that are in them."""
        B, T = idx.shape
        start = caches[0].length if caches else 0
        if start + T > self.block_size:
            raise ValueError(f"{start + T} tokens do not fit into the context of {self.block_size}")
        # Attention is a weighted mean, and a mean is blind to order: wpe says where a token stands.
        positions = self.transformer.wpe(torch.arange(start, start + T, device=idx.device))
        x = self.transformer.drop(self.transformer.wte(idx) + positions)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # as in bigram.py

# ---- Generation ---------------------------------------------------------------------------------

def sample(logits):
    """Draw a token from the distribution: (B, vocab_size) to (B, 1)."""
    return torch.multinomial(logits.softmax(-1), num_samples=1)


@torch.no_grad()  # gradients are for training only
def generate(model, idx, max_new_tokens, choose=sample):
    """Continue idx (B, T): predict, choose a token, append it, repeat. Yields each new (B, 1).

    The model reads idx once, then only what is new. When the context is full, it becomes a window
    that moves on. Every token then gets another position, so that nothing in the caches is right
    any more: from there on, the whole window is read again for each new token."""
    model.eval()
    caches = []
    for _ in range(max_new_tokens):
        if not caches or idx.shape[1] > model.block_size:
            new = idx[:, -model.block_size :]
            caches = [Cache(model.block_size) for _ in model.transformer.h]
        logits, _ = model(new, caches=caches)
        new = choose(logits[:, -1])  # the scores at the last place are for the token to come
        idx = torch.cat((idx, new), dim=1)
        yield new

# ---- Training -----------------------------------------------------------------------------------

# `torchrun --nproc_per_node=8 bpe_gpt.py` starts this script 8 times, one process for each GPU. All
# have the same model. Each computes the gradient for its share of a step's sequences; the sum over
# all processes is the gradient of the whole step, and every process makes the same step with it.
# This is all there is to data parallelism. The first process alone prints and saves.
RANK, N_PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sum_over_processes(tensor):
    if N_PROCESSES > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def evaluate(model, data):
    """Mean loss over all targets in data that count."""
    model.eval()
    device = model.lm_head.weight.device
    total = count = 0
    for x, y in data.windows():
        n = (y >= 0).sum().item()
        total += n * model(x.to(device), y.to(device))[1].item()
        count += n
    return total / count


def make_optimizers(model, config):
    """As in char_gpt.py, Muon for the matrices of the blocks and AdamW for the rest; or AdamW for
    all, where muon_learning_rate is 0."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if ".h." in name and p.dim() == 2 else others).append(p)
    adamw = torch.optim.AdamW(others, config.learning_rate, weight_decay=0)
    if config.muon_learning_rate == 0:
        adamw.add_param_group(dict(params=matrices, weight_decay=config.weight_decay))
        return (adamw,)
    muon = torch.optim.Muon(matrices, config.muon_learning_rate, config.weight_decay)
    return muon, adamw


def training_step(model, optimizers, x, y, step, fraction, config, autocast):
    """One step of gradient descent; returns the loss. fraction says how much of the run is over.
    Where memory is too small for all sequences at once, they go through the model batch by batch,
    and their gradients add up: gradient accumulation."""
    # The learning rates warm up, as in char_gpt.py, and then fall to zero as half a cosine wave.
    multiplier = min((step + 1) / (config.warmup_iters + 1), math.cos(math.pi / 2 * fraction) ** 2)
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = multiplier * optimizer.defaults["lr"]
    torch.manual_seed((config.seed * 1_000_003 + step) * N_PROCESSES + RANK)  # of dropout
    model.train()
    total, n_targets = 0, (y >= 0).sum()
    xs, ys = (rows[RANK::N_PROCESSES].split(config.batch_size) for rows in (x, y))
    for x, y in zip(xs, ys):
        with autocast:
            _, loss = model(x, y)
        loss = loss * (y >= 0).sum() / n_targets  # its part of the mean over all of the step
        loss.backward()
        total += loss.detach()
    for p in model.parameters():
        sum_over_processes(p.grad)
    if not nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).isfinite():
        raise ValueError(f"infinite or NaN gradient in step {step + 1}: try lower learning rates")
    for optimizer in optimizers:
        optimizer.step()
    return sum_over_processes(total).item()


def train(model, train_data, val_data, tokenizer, config, checkpoint, autocast):
    """Train from where the checkpoint stands; save it at every evaluation and at Ctrl-C, as in
    char_gpt.py. With several processes, the first saves, and all stop when one is stopped."""
    device = model.lm_head.weight.device
    optimizers = make_optimizers(model, config)
    history, last = checkpoint["history"], checkpoint["last"]
    step, losses, started = last["step"], last["losses"], time.perf_counter() - last["seconds"]
    earlier = step == 0 and Path(config.out).exists()  # an older run: kept until an evaluation
    if step > 0:
        model.load_state_dict(last["model"])
        for optimizer, state in zip(optimizers, last["optimizers"]):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    forward = torch.compile(model) if config.compile and device.type == "cuda" else model
    caught, stop = catch_signals(), False
    while step < config.max_iters and not stop:
        x, y = (rows.to(device) for rows in train_data.batch(step))
        fraction = step / config.max_iters
        losses.append(training_step(forward, optimizers, x, y, step, fraction, config, autocast))
        step += 1
        stop = sum_over_processes(torch.tensor(len(caught), device=device)).item() > 0
        show_progress(step, losses[-1], y.numel(), step / config.max_iters, started)
        if step % config.eval_interval == 0 or step == config.max_iters:
            with autocast:
                val_loss = evaluate(model, val_data)
            if all(val_loss < best for _, _, best in history):
                checkpoint["model"] = copy.deepcopy(model.state_dict())
            history.append((step, sum(losses) / len(losses), val_loss))
            losses, earlier = [], False
        if RANK == 0 and (not losses or stop and not earlier):
            checkpoint["last"] = dict(step=step, losses=losses, model=model.state_dict(),
                                      optimizers=[o.state_dict()["state"] for o in optimizers],
                                      seconds=time.perf_counter() - started)
            write_whole(config.out, lambda file: torch.save(checkpoint, file))
        if not losses:
            report(checkpoint, model, tokenizer, val_data, config)
    if stop:
        sys.exit(f"stopped after step {step}; {'old file kept' if earlier else '--resume goes on'}")


def show_progress(step, loss, n_tokens, fraction, started):
    """One line on the terminal, written over and over."""
    if sys.stderr.isatty():
        seconds = time.perf_counter() - started
        speed, left = step * n_tokens / seconds, seconds / fraction - seconds
        print(f"step {step}: loss {loss:.3f}, {speed:,.0f} tokens/s, {left / 60:.1f} minutes left",
              end=" \r", file=sys.stderr, flush=True)


def catch_signals():
    """Returns a list that Ctrl-C or SIGTERM adds to, so that the current step can be finished."""
    caught = []
    def handler(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)
    return caught


def bytes_per_token(data, tokenizer):
    targets = torch.cat([y[y >= 0] for _, y in data.windows()])
    text = targets[targets != tokenizer.eot_token].tolist()  # its end has no bytes
    return len(tokenizer.decode_bytes(text)) / len(targets)


def describe(loss, bytes_per_token):
    """The loss; perplexity: a uniform guess among that many tokens has the same loss; and bits per
    byte of the text, which compare models with different vocabularies."""
    bits = loss / math.log(2) / bytes_per_token
    return f"{loss:.4f} (perplexity {math.exp(min(loss, 700)):.2f}, {bits:.3f} bits/byte)"


def report(checkpoint, model, tokenizer, val_data, config):
    """Print the latest losses, and what the model writes by now."""
    step, train_loss, val_loss = checkpoint["history"][-1]
    val_loss = describe(val_loss, checkpoint["bytes_per_token"])
    print(f"step {step}: loss {train_loss:.4f} train, {val_loss} val")
    torch.manual_seed(config.seed)
    for prompt in val_data.prompts:
        ids = tokenizer.encode_ordinary(prompt)
        idx = torch.tensor([ids], device=model.lm_head.weight.device)
        ids += [new.item() for new in generate(model, idx, 60)]
        print("    | " + tokenizer.decode(ids).strip().replace("\n", "\n    | "))

# ---- Weights in Hugging Face's format -----------------------------------------------------------

# A folder has the sizes in config.json, and the parameters by their names in model.safetensors. The
# names are ours. The matrices of the blocks are transposed: OpenAI's "Conv1D" computes x @ weight,
# nn.Linear computes x @ weight.T.
CONV1D = "c_attn.weight", "c_proj.weight", "c_fc.weight"
DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
# Settings in config.json that change the result, but no tensor. Only these values are supported.
VARIANTS = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5,
                scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)

HUB = "https://huggingface.co/openai-community"
PUBLISHED = {  # revision, and SHA-256 of model.safetensors where it is known
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}


def find_weights(name_or_path):
    """The file that has the weights. A published model's is downloaded if it is missing."""
    path = Path(name_or_path)
    if name_or_path in SIZES:
        path = DATA / name_or_path / "model.safetensors"
        if not path.exists():
            download(name_or_path, path)
    return path / "model.safetensors" if path.is_dir() else path


def download(name, path):
    revision, sha256 = PUBLISHED[name]
    url, digest = f"{HUB}/{name}/resolve/{revision}/model.safetensors", hashlib.sha256()
    def write(file):
        with urllib.request.urlopen(url, timeout=30) as response:
            while chunk := response.read(1 << 24):
                file.write(chunk)
                digest.update(chunk)
                print(f"{url}: {file.tell() / 1e6:,.0f} MB", end=" \r", file=sys.stderr)
        if response.length or sha256 and digest.hexdigest() != sha256:
            raise OSError("the download broke off, or is damaged")
    try:
        write_whole(path, write)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"cannot fetch {name} from {HUB}: {error}") from None


def load_pretrained(name_or_path, settings, given):
    """A trained model, and its tokenizer (None if there is none beside the weights). Settings are
    fields of GPTConfig; those given must agree with the model, but block_size may be smaller."""
    path = find_weights(name_or_path)
    try:
        if path.suffix == ".safetensors":
            sizes = SIZES.get(name_or_path) or read_config(path.parent / "config.json")
            state, tokenizer = read_weights(path), read_tokenizer(path.parent)
        else:
            checkpoint = load_checkpoint(path, "bpe_gpt")
            sizes = {name: checkpoint["config"][name] for name in SIZE_NAMES}
            state, tokenizer = checkpoint["model"], unpack_vocab(checkpoint["vocab"])
        wpe = "transformer.wpe.weight"
        config = GPTConfig(**settings | {"block_size": len(state[wpe])} | sizes | given)
        if config.n_head != sizes["n_head"]:  # in any other size the weights would not fit
            raise ValueError(f"--n_head is {sizes['n_head']} in this model")
        state[wpe] = state[wpe][: config.block_size]  # a shorter context needs fewer positions
        state["lm_head.weight"] = state["transformer.wte.weight"]
        with torch.device("meta"):  # takes no memory; the tensors become the parameters
            model = GPT(config)
        model.load_state_dict(state, assign=True)  # strict: nothing missing, nothing left over
        model.lm_head.weight = model.transformer.wte.weight
        return model, tokenizer
    except Exception as error:  # a damaged file can trip its reader in any way
        raise ValueError(
            f"cannot load {path}: {type(error).__name__}: {' '.join(str(error).split()):.300}"
        ) from None


def find_tokenizer(model, tokenizer):
    """The tokenizer that came with the model, or else GPT-2's. Raises ValueError if it is not the
    model's."""
    tokenizer = tokenizer or gpt2_tokenizer()
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(
            f"the model has {model.config.vocab_size} tokens, its tokenizer {tokenizer.n_vocab}")
    return tokenizer


def read_weights(path):
    """The parameters by our names, in our shapes, in float32."""
    state = {}
    for name, tensor in read_safetensors(path):
        name = "transformer." + name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias", ".lm_head.weight")):
            continue  # the causal mask, which is not learned; another name of wte
        if name.endswith(CONV1D):
            tensor = tensor.t()
        state[name] = tensor.clone(memory_format=torch.contiguous_format).float()
    return state


def read_safetensors(path):
    """8 bytes with the length of the header; the header, in JSON, with the place of each tensor;
    the numbers. The file is mapped into memory, not read: there is no second copy of it."""
    data = np.memmap(path, np.uint8, mode="c")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if entry.get("dtype") in DTYPES:  # no masks (of other types), no metadata (of none)
            first, last = entry["data_offsets"]
            numbers = torch.from_numpy(data[start + first : start + last])
            yield name, numbers.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def read_config(path):
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, value in VARIANTS.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]}; in GPT-2 it is {value}")
    return {name: config[name] for name in SIZE_NAMES}


def export(model, tokenizer, folder):
    """Write the model so that transformers' GPT2LMHeadModel.from_pretrained(folder) opens it."""
    print(f"writing {folder}, in Hugging Face's format")
    folder = Path(folder)
    header, arrays, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, p in model.named_parameters():  # each once: lm_head is wte
        array = p.detach().numpy()
        arrays.append(np.ascontiguousarray(array.T if name.endswith(CONV1D) else array))
        place = end, end + array.nbytes
        header[name] = dict(dtype="F32", shape=arrays[-1].shape, data_offsets=place)
        end += array.nbytes
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers begin at a multiple of 8
    arrays = len(header).to_bytes(8, "little"), header, *arrays
    write_whole(folder / "model.safetensors", lambda file: file.writelines(arrays))
    config = {name: getattr(model.config, name) for name in SIZE_NAMES}
    config |= dict(VARIANTS, model_type="gpt2", n_positions=model.block_size,
                   bos_token_id=tokenizer.eot_token, eos_token_id=tokenizer.eot_token)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_tokenizer(tokenizer, folder)


def write_tokenizer(tokenizer, folder):
    words = pack_vocab(tokenizer)
    ranks = {word: i for i, word in enumerate(words)}
    merges = ["#version: 0.2"]
    for word in words:
        if len(word) > 1 and word != END_OF_TEXT:
            parts = list(word)
            while len(parts) > 2:  # the pair that was merged last is the one that made the token
                pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
                i = pairs.index(min(pairs))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            merges.append(" ".join(parts))
    (folder / "vocab.json").write_text(json.dumps(ranks), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")


def read_tokenizer(folder):
    """From vocab.json, or else tokenizer.json; None where there is neither. The rest is taken to be
    as in GPT-2: words are split by its rule, and merges come in the order of the tokens."""
    files = [*folder.glob("vocab.json"), *folder.glob("tokenizer.json")]
    if not files:
        return None
    ranks = json.loads(files[0].read_text(encoding="utf-8"))
    if "added_tokens" in ranks:
        added = {token["content"]: token["id"] for token in ranks["added_tokens"]}
        ranks = ranks["model"]["vocab"] | added
    return unpack_vocab(sorted(ranks, key=ranks.get))

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


def load_checkpoint(path, *scripts):
    """The checkpoint at path, saved by one of scripts. weights_only: nothing in it runs as code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] in scripts:
            return checkpoint
    except Exception:  # a damaged file can trip its reader in any way
        pass
    raise ValueError(f"{path} is missing, damaged or not a checkpoint of {' or '.join(scripts)}")


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


def pick_device(name):
    best = torch.accelerator.current_accelerator(check_available=True)  # cuda or mps, or None
    return torch.device(name if name != "auto" else best or "cpu")


def pick_dtype(name, device):
    """Mixed precision: matrix products in bfloat16, which has the range of float32 with fewer
    digits, where that is faster; weights in float32, or small updates would be rounded away."""
    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        fast = torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def start(given, device):
    """Checkpoint, settings, model and tokenizer to start from. The last two are None if they are
    still to be learned."""
    small = device.type == "cpu" and not given.get("full")
    settings = FINE_TUNING_SETTINGS if given.get("init") else CPU_SETTINGS if small else {}
    settings = settings | (INSTRUCTION_SETTINGS if given.get("instructions") else {})
    checkpoint = dict(script="bpe_gpt", history=[], last=dict(step=0, losses=[], seconds=0))
    out = given.get("out", GPTConfig.out)
    init = given.get("init", out if given.get("eval_only") or given.get("export") else "")
    if given.get("resume") and Path(out).exists():
        init, checkpoint = out, load_checkpoint(out, "bpe_gpt")
        settings = checkpoint["config"] | {"out": out}
    if init:
        model, tokenizer = load_pretrained(init, settings, given)
        return checkpoint, model.config, model, find_tokenizer(model, tokenizer)
    if small:
        print("a CPU trains a small model; --full trains GPT-2 124M, --init gpt2 goes on from it")
    config = GPTConfig(**settings | given)
    tokenizer = gpt2_tokenizer() if config.vocab_size == GPTConfig.vocab_size else None
    return checkpoint, config, None, tokenizer


def main():
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # any character, line by line
    given = parse_flags(GPTConfig)
    device = pick_device(given.get("device", "auto"))
    if N_PROCESSES > 1:  # they meet in a store, which after a restart has addresses of the dead
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store = next(dist.rendezvous("env://"))[0]
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(store=store, rank=RANK, world_size=N_PROCESSES)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    checkpoint, config, model, tokenizer = start(given, device)
    if config.export:
        return export(model, tokenizer, config.export)
    load_data = load_instructions if config.instructions else load_tokens
    train_data, val_data, tokenizer = load_data(config, tokenizer)
    if model is None:
        config.vocab_size = tokenizer.n_vocab
        torch.manual_seed(config.seed)
        model = GPT(config)
    model.to(device)
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    n_bytes = bytes_per_token(val_data, tokenizer)
    with autocast:
        loss = describe(evaluate(model, val_data), n_bytes)
    if config.eval_only:
        return print(f"loss {loss}")
    check_out(config.out)
    print(f"on {device} in {dtype}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{sequences_per_step(config)} sequences of {config.block_size} tokens in a step")
    print(f"val loss {loss}; uniform: ln({config.vocab_size}) = {math.log(config.vocab_size):.4f}")
    first = train_data.batch(0)[0].tolist()
    if checkpoint.setdefault("first_batch", first) != first:
        raise ValueError(
            f"--resume: {config.out} began with another text, batch size, context or seed")
    checkpoint |= dict(config=vars(config), vocab=pack_vocab(tokenizer), bytes_per_token=n_bytes)
    checkpoint.setdefault("model", model.state_dict())  # until there is a best
    train(model, train_data, val_data, tokenizer, config, checkpoint, autocast)
    step, _, best = min(checkpoint["history"], key=lambda entry: entry[2])
    print(f"best val loss {best:.4f} at step {step}; next: python sample.py {config.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
