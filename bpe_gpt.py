"""GPT-2: the model of char_gpt.py at its real size, on parts of words instead of characters.

New here: byte-pair encoding; a cache that makes generation fast; the weights that OpenAI published,
from 124M to 1.5B parameters; fine-tuning, which trains them further; dropout; several GPUs.

    python bpe_gpt.py                 # train from scratch: GPT-2 124M, or a small model on a CPU
    python bpe_gpt.py --init gpt2     # fine-tune GPT-2 on Shakespeare; downloads 548 MB once
    python data/instruct.py --init gpt2                           # teach it to follow instructions
    torchrun --nproc_per_node=8 bpe_gpt.py                        # on 8 GPUs
"""

import argparse
import hashlib
import heapq
import inspect
import itertools
import json
import math
import os
import pickle
import socket
import sys
import time
import timeit
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache, partial
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
    vocab_size: int = 50257  # GPT-2's vocabulary; any other size, from 257 on, is learned
    n_layer: int = 12  # transformer blocks, each of attention and an MLP
    n_head: int = 12  # attention heads per block; must divide n_embd
    n_embd: int = 768  # width: how many numbers represent a token inside the model
    block_size: int = 1024  # context: how many tokens the model can look at
    dropout: float = 0.1  # fraction of embeddings and of attention's and MLPs' results set to zero
    init: str = ""  # fine-tune gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a checkpoint
    batch_size: int = 16  # sequences that go through the model at once: lower it to save memory
    total_batch_size: int = 16384  # tokens per step, in total_batch_size // block_size rows
    max_iters: int = 400  # steps of gradient descent
    eval_interval: int = 50  # steps between evaluations
    learning_rate: float = 0.001  # for AdamW, which updates embeddings, gains and biases
    muon_learning_rate: float = 0.02  # for Muon: the matrices in the blocks; 0: use AdamW for all
    warmup_iters: int = 50  # steps over which the learning rates rise from zero
    weight_decay: float = 0.1  # pulls matrices and embeddings towards zero, against overfitting
    grad_clip: float = 1.0  # maximum norm of the gradient of all parameters together; 0: no limit
    seed: int = 1337  # for the random numbers: on a CPU, the same seed gives the same run
    full: bool = False  # train the full model, even where a small one is the default
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of the model's matrix products: float32 or bfloat16
    compile: bool = sys.platform == "linux"  # use torch.compile on a CUDA GPU (needs Linux)
    resume: bool = False  # continue from the checkpoint, if there is one
    data: str = ""  # text file, or folder of train.bin and val.bin; default: Tiny Shakespeare
    out: str = "out/bpe_gpt.pt"  # checkpoint, for sample.py, --resume and --init

SIZES = {  # the published models; all of them have the vocab_size and block_size given above
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124,439,808 parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 354,823,168
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774,030,080
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1,557,611,200
}
SIZE_NAMES = ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")
CPU_SETTINGS = dict(  # on anything but a CUDA GPU: a smaller model, 5.5 minutes on a CPU
    vocab_size=2048, n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.05, batch_size=32,
    total_batch_size=2048, max_iters=2100, eval_interval=300, learning_rate=0.002,
    muon_learning_rate=0.025, warmup_iters=10, weight_decay=0.15)
# For a folder of tokens (see data/prepare.py): half a million per step, like the small GPT-3 (Brown
# et al. 2020); Muon's rate and decay as in modded-nanogpt; no dropout, as the data is read once.
FOLDER_SETTINGS = dict(
    vocab_size=50257, dropout=0.0, batch_size=32, total_batch_size=2**19, eval_interval=250,
    learning_rate=0.003, muon_learning_rate=0.02, weight_decay=0.01)
# A few small steps, so that GPT-2 keeps its English. (Muon's steps are large in all directions.)
FINE_TUNING_SETTINGS = dict(
    batch_size=1, total_batch_size=2048, max_iters=40, eval_interval=20, learning_rate=5e-5,
    muon_learning_rate=0.0, warmup_iters=5)

# ---- Tokens -------------------------------------------------------------------------------------

# Sequences of characters are long, and each character says little; words are too many to list. So
# GPT-2's tokens lie in between: frequent strings of bytes, from a single byte to a long word. First
# the text is split into "words", so that no token joins a word and a comma. A "word" is an ending
# such as 's; a run of letters (\p{L}), digits (\p{N}) or other signs, along with a space before it;
# or white space, split before its last character: "a  b\n\nc" is "a", " ", " b", "\n", "\n", "c".
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"  # a token that stands between texts


def train_bpe(text, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016) learns a vocabulary. The first 256 tokens are the
    single bytes, so that any text can be written. Then, again and again, the most frequent pair of
    adjacent tokens is merged into a new token. GPT-2's vocabulary comes from 50,000 merges: with
    the end-of-text token, it has 256 + 50,000 + 1 = 50,257 tokens.

    For example, "low lower lowest" is split into "low", " lower" and " lowest". The pairs l-o and
    o-w occur three times each. In a tie, the smaller pair of numbers comes first, so l-o
    becomes the token "lo". The next merges are lo-w (three times), space-low and " low"-e (twice
    each). Then no pair occurs twice, and learning ends. Counting all pairs again after each merge
    would be slow, so only the counts of the merged pairs and their neighbours are updated."""
    words = Counter(regex.findall(WORDS, text))
    # The tokens of all distinct words, -1 after each word; for each position, the word's count.
    ids = np.array([token for word in words for token in [*word.encode(), -1]], np.int32)
    times = np.array([n for word, n in words.items() for _ in [*word.encode(), -1]], np.int32)
    pair_counts = Counter()
    heap = []  # of (-count, pair); when a count has changed, the old entry is still there

    def count_pairs(starts, sign):  # adds (+1) or subtracts (-1) the pairs that begin there
        changes = Counter()
        for a, b, n in zip(ids[starts].tolist(), ids[starts + 1].tolist(), times[starts].tolist()):
            if -1 not in (a, b):  # no pair reaches into another word
                changes[a, b] += sign * n
        pair_counts.update(changes)  # adds the numbers
        for pair in changes:
            if pair_counts[pair] > 1:
                heapq.heappush(heap, (-pair_counts[pair], pair))

    count_pairs(np.arange(len(ids) - 1), +1)
    tokens = [bytes([b]) for b in range(256)]
    while heap and len(tokens) < vocab_size - 1:  # the last one is the end-of-text token
        count, pair = heapq.heappop(heap)  # the smallest: the pair with the largest count
        if pair_counts[pair] != -count:  # an old entry
            continue
        starts = find_pair(ids, pair)
        # x a b y becomes x ab y: x-a, a-b, b-y go, and x-ab, ab-y come. In l-o-l-o, unique() takes
        # o-l only once. (If starts - 1 is -1, that is the last place, a separator.)
        count_pairs(np.unique([starts - 1, starts, starts + 1]), -1)
        ids[starts] = len(tokens)
        ids = np.delete(ids, starts + 1)
        times = np.delete(times, starts + 1)
        starts = np.flatnonzero(ids == len(tokens))
        count_pairs(np.unique([starts - 1, starts]), +1)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return BPETokenizer([*tokens, END_OF_TEXT.encode()])


def find_pair(ids, pair):
    """The positions in ids where the pair is to be merged: in a a a, only the first a-a can be."""
    starts = []
    for i in np.flatnonzero((ids[:-1] == pair[0]) & (ids[1:] == pair[1])).tolist():
        if not starts or i > starts[-1] + 1:
            starts.append(i)
    return np.array(starts)


def encode_word(word, ranks):
    """The tokens of a word (bytes), to show what tiktoken does; ranks has the number of each token.
    Again and again, the two neighbours whose token was learned first (lowest number) are merged, as
    in learning. If "lo", "ow" and "er" were learned in this order, "lower" becomes lo w er."""
    parts = [bytes([b]) for b in word]
    while len(parts) > 1:
        merged = [a + b for a, b in zip(parts, parts[1:])]
        best = min(merged, key=lambda token: ranks.get(token, math.inf))
        if best not in ranks:
            break
        i = merged.index(best)
        parts[i : i + 2] = [best]
    return [ranks[part] for part in parts]


class BPETokenizer:
    """Like CharTokenizer, for a list of tokens as bytes. tiktoken encodes as encode_word() does."""
    def __init__(self, tokens):
        self.tokens = tokens
        ranks = {token: i for i, token in enumerate(tokens)}
        self.end_of_text = ranks.pop(END_OF_TEXT.encode())
        self.tiktoken = tiktoken.Encoding("bpe", pat_str=WORDS, mergeable_ranks=ranks,
                                          special_tokens={END_OF_TEXT: self.end_of_text})

    def encode(self, text, special=(END_OF_TEXT,)):  # with (), "<|endoftext|>" is only text
        return self.tiktoken.encode(text, allowed_special=set(special), disallowed_special=())

    def decode(self, ids):
        return self.tiktoken.decode(ids)


def gpt2_tokenizer():
    """GPT-2's own vocabulary, which OpenAI learned from 40 GB of web pages; downloaded once."""
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # there are many ways in which a download can fail
        raise OSError(f"cannot download GPT-2's vocabulary: {type(error).__name__}") from None
    return BPETokenizer([gpt2.decode_single_token_bytes(i) for i in range(gpt2.n_vocab)])

# ---- Data ---------------------------------------------------------------------------------------

class TextData:
    """Tokens, in batches of windows of block_size tokens, which depend only on seed and step."""
    prompts = ["\n"]  # what report() lets the model continue
    max_evaluated = 1_000_000  # about the most tokens that an evaluation reads
    def __init__(self, tokens, config):
        if len(tokens) < 2:
            raise UserError("the text is too short: a part of it has fewer than two tokens")
        # A hash by which to recognize the text when a run is resumed; these parts are enough.
        parts = [tokens[: 2**19], tokens[-(2**19) :], [len(tokens)]]
        self.hash = hashlib.sha256(np.concatenate(parts).tobytes()).hexdigest()
        self.tokens = tokens
        self.config = config
        self.T = min(config.block_size, len(tokens) - 1)  # inputs per row
        self.n_rows = max(1, (len(tokens) - 1) // self.T - 1)  # per epoch

    def row(self, start):
        """T inputs from start on, or what is left, and the targets, which come one token later."""
        window = torch.from_numpy(self.tokens[start : start + self.T + 1].astype(np.int64))
        return window[:-1], window[1:]

    def training_batch(self, step):
        """Every epoch cuts the text into new windows, from a new offset."""
        epoch, chosen = pick_rows(self.n_rows, step, self.config)
        rng = np.random.default_rng((self.config.seed, epoch))
        offset = rng.integers(len(self.tokens) - self.n_rows * self.T)
        return make_batch([self.row(offset + self.T * n) for n in chosen])

    def evaluation_batches(self):
        """Windows, end to end; of a long text, only some of them. The last one may be shorter."""
        starts = range(0, len(self.tokens) - 1, self.T)
        starts = starts[:: 1 + len(self.tokens) // self.max_evaluated]
        for i in range(0, len(starts), self.config.batch_size):
            yield make_batch([self.row(start) for start in starts[i : i + self.config.batch_size]])


def pick_rows(n_rows, step, config):
    """The epoch of a step, and the numbers of its rows. An epoch takes the n_rows rows in random
    order. A step takes n of them, or all if there are fewer. What is left at the end is dropped."""
    n = max(N_PROCESSES, config.total_batch_size // config.block_size)  # at least 1 per GPU
    steps_per_epoch = max(1, n_rows // n)
    epoch, i = divmod(step, steps_per_epoch)
    return epoch, shuffled(n_rows, config.seed, epoch)[i * n : (i + 1) * n]


@lru_cache(maxsize=2)  # shuffling millions of rows takes a second: once per epoch is enough
def shuffled(n_rows, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n_rows)


def make_batch(rows):
    """Rows (x, y) as one batch. Shorter ones are padded at the end: the causal mask hides the
    padding from all tokens before it, and PyTorch's cross_entropy() leaves out targets of -100."""
    xs, ys = zip(*rows)
    pad = nn.utils.rnn.pad_sequence
    return pad(xs, batch_first=True), pad(ys, batch_first=True, padding_value=-100)

# ---- Model --------------------------------------------------------------------------------------

# In the shapes below, B is the batch size, T the number of tokens in a sequence, and C = n_embd.
# Inside the model every token is a vector of C numbers: x is (B, T, C), from embedding to scores.

# Layer norm, GELU and attention are PyTorch's here; char_gpt.py writes them out.
LayerNorm = nn.LayerNorm
GELU = partial(nn.GELU, approximate="tanh")  # GELU() calls nn.GELU with this argument

class Cache:
    """The keys and values that a block has computed so far. No token sees the ones after it, so
    keys and values remain valid when the text grows: only new tokens pass through the model."""
    def __init__(self, context_size):
        self.context_size = context_size
        self.length = 0  # tokens so far

    def append(self, k, v):
        """Adds keys and values of T tokens, (B, n_head, T, head_size); returns those of all S."""
        if self.length == 0:  # room for a whole context: growing would copy everything
            B, n_head, _, head_size = k.shape
            self.k = k.new_empty(B, n_head, self.context_size, head_size)
            self.v = torch.empty_like(self.k)
        S = self.length + k.shape[2]
        self.k[:, :, self.length : S] = k
        self.v[:, :, self.length : S] = v
        self.length = S
        return self.k[:, :, :S], self.v[:, :, :S]


class CausalSelfAttention(nn.Module):
    """Attention in n_head heads at once, each with queries, keys and values of its own, so that one
    can look for the name of the speaker, say, and another for the start of the word."""
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise UserError(f"--n_head {config.n_head} does not divide --n_embd {config.n_embd}")
        self.n_head = config.n_head
        # nn.Linear multiplies by a learned matrix and adds a learned bias. (c_ names are OpenAI's.)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads found

    def forward(self, x, cache=None):
        B, T, C = x.shape
        head_size = C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        # view() cuts each vector of C numbers into one piece per head: (B, T, n_head, head_size).
        # transpose() then swaps T and n_head: matrix products work on the last two dimensions.
        q = q.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_head, head_size).transpose(1, 2)
        v = v.view(B, T, self.n_head, head_size).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_head, S, head_size): those of earlier tokens, too
        if T == 1:  # a single token, the last one of S, sees all of them: there is nothing to mask
            y = F.scaled_dot_product_attention(q, k, v)  # (B, n_head, T, head_size)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # causal mask; S = T here
        y = y.transpose(1, 2).reshape(B, T, C)  # puts the heads' results side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """Multi-layer perceptron. It works on each token by itself: what attention has gathered is
    processed here. The vector between its two matrices is wider, usually by a factor of 4."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)  # fc for fully connected
        self.gelu = GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))  # (B, T, C), in between (B, T, 4 * C)


class Block(nn.Module):
    """Attention, then the MLP; each adds its result to the residual stream x (see char_gpt.py)."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)  # explained in training_step()

    def forward(self, x, cache=None):
        x = x + self.dropout(self.attn(self.ln_1(x), cache))
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). Its parameters are named as in Hugging Face's library."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.context_size = config.block_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),  # token embeddings
            "wpe": nn.Embedding(config.block_size, config.n_embd),  # position embeddings
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": LayerNorm(config.n_embd),  # f for final: rescales x, a sum of many results
        })
        # The output layer, from vectors to scores. (lm: language model; not an attention head.)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # as in GPT-2
        # Weight tying (Press & Wolf 2017): one matrix serves at both ends. At the input, row i is
        # the vector of token i. At the output, the score of token i is the dot product of row i and
        # x, which is large if x points the same way. What is learned at one end helps at the other.
        self.lm_head.weight = self.transformer.wte.weight
        self.initialize(config)  # sets all matrices and biases, also those of your own modules

    def initialize(self, config):
        """Random weights (parameters): with equal ones, a layer would always compute equal numbers.
        Small ones make the first guess nearly uniform. (GPT-2 uses 0.02 too, but 0.01 for wpe.)"""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            # 2 * n_layer results are added to the residual stream, and the variance of a sum grows
            # with the number of its terms. This division makes it start out the same at any depth.
            if name.endswith("c_proj.weight"):
                p.data /= math.sqrt(2 * config.n_layer)

    @classmethod
    def from_pretrained(cls, name_or_path, **settings):
        """For use from Python: a trained model, one of SIZES or a checkpoint."""
        checkpoint = load_pretrained(name_or_path)
        return build_model(checkpoint, GPTConfig(**checkpoint["config"] | settings)).eval()

    def forward(self, idx, targets=None, caches=None):
        """Tokens idx (B, T) to logits (B, T, vocab_size); with targets (B, T), also the loss. With
        caches, one per block, idx continues what they hold, and only its last token gets logits."""
        B, T = idx.shape
        start = caches[0].length if caches else 0
        if start + T > self.context_size:
            raise UserError(f"{start + T} tokens do not fit into a context of {self.context_size}")
        assert start == 0 or T == 1, "filled caches take one token at a time: the mask is for T = S"
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        x = x[:, -1:] if caches else x  # generation needs no more than the last token's scores
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T or 1, vocab_size)
        if targets is None:
            return logits, None
        # The loss of bigram.py. PyTorch's function takes (N, vocab_size) and (N,), with N = B * T.
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

# ---- Generation ---------------------------------------------------------------------------------

def sample(logits):
    """Draw a token from the predicted distribution: (B, vocab_size) to (B, 1)."""
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


@torch.no_grad()  # gradients are needed for training only
def generate(model, idx, max_new_tokens, choose=sample):
    """Continue idx (B, T) token by token. Yields each new column (B, 1) as soon as it is chosen.

    The model reads idx once, then only new tokens. When the context is full, it moves on by a token
    each time: every token in it gets another position, so all are read again, into new caches."""
    caches = []
    model.eval()  # evaluation mode: turns off what only training uses
    for _ in range(max_new_tokens):
        if not caches or idx.shape[1] > model.context_size:
            caches = [Cache(model.context_size) for _ in model.transformer.h]
            unread = idx[:, -model.context_size :]
        logits, _ = model(unread, caches=caches)
        new = choose(logits[:, -1])  # the last position's scores are for the token to come
        idx = torch.cat((idx, new), dim=1)
        unread = new
        yield new

# ---- Optimizers ---------------------------------------------------------------------------------

class Optimizer:
    """What Adam and Muon have in common: parameters in stacks of equal shape, running means of the
    gradients, and weight decay. (char_gpt.py explains all this, and both optimizers.)"""
    def __init__(self, params, learning_rate, weight_decay=0.0):
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.n_steps = 0
        by_shape = defaultdict(list)
        for p in params:
            by_shape[p.shape if p.numel() < 2**20 else p].append(p)  # a large p is its own key
        self.stacks = list(by_shape.values())  # each has n_means running means (see Adam, Muon)
        self.means = [ps[0].new_zeros(self.n_means, len(ps), *ps[0].shape) for ps in self.stacks]

    @torch.no_grad()
    def step(self, multiplier=1.0):
        """Make one step, with the learning rate times multiplier."""
        learning_rate = multiplier * self.learning_rate
        self.n_steps += 1
        for params, means in zip(self.stacks, self.means):
            # A parameter that is frozen, or not used, has no gradient (None), and stays as it is.
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            updates = self.update(torch.stack(grads), means)  # as Adam or Muon defines it
            for p, update in zip(params, learning_rate * updates):
                if p.grad is not None:
                    p *= 1 - learning_rate * self.weight_decay
                    p -= update


class Adam(Optimizer):
    """The update of each number is m / sqrt(v), with m and v the running means of its gradient and
    the gradient's square (Kingma & Ba 2015). With this kind of weight decay, it is called AdamW."""
    n_means = 2
    beta1 = 0.9
    beta2 = 0.999
    eps = 1e-8

    def update(self, grads, means):
        m, v = means  # each (number of tensors, *shape), like grads
        m.lerp_(grads, 1 - self.beta1)  # m += 0.1 * (grads - m)
        v.lerp_(grads**2, 1 - self.beta2)  # v += 0.001 * (grads**2 - v)
        m_hat = m / (1 - self.beta1**self.n_steps)
        v_hat = v / (1 - self.beta2**self.n_steps)
        return m_hat / (v_hat.sqrt() + self.eps)  # eps prevents a division by zero


def orthogonalize(x, rounds=4):
    """Makes the directions of a matrix more equally strong; x (n, rows, columns) has n matrices.
    A round turns each singular value s of X into 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT  # transposed (U and V change places): X X^T is smaller then
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no s exceeds the norm: now s <= 1
    for _ in range(rounds):
        # bmm() multiplies n pairs of matrices; baddbmm(x, y, z) is beta * x + alpha * y @ z.
        square = torch.bmm(x, x.mT)  # X X^T, (n, rows, rows)
        factor = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)  # b, c
        x = torch.baddbmm(x, factor, x, beta=3.4445)  # a
    return x.mT if is_tall else x


class Muon(Optimizer):
    """For matrices (Jordan et al. 2024): keeps a running mean of the gradient, and makes its
    directions more equally strong, so that the model also learns from the weak ones."""
    n_means = 1
    momentum = 0.95

    def update(self, grads, means):
        m = means[0]
        m.lerp_(grads, 1 - self.momentum)  # m += 0.05 * (grads - m); m's norm will not matter
        ahead = m.lerp(grads, 1 - self.momentum)  # Nesterov: the newest gradient counts more
        dtype = pick_dtype("auto", grads.device)  # a fast one: few digits are enough here
        rows, columns = grads.shape[-2:]
        return math.sqrt(max(1, rows / columns)) * orthogonalize(ahead.to(dtype))


def make_optimizers(model, config):
    """Muon is for the matrices in the blocks, and Adam for the rest, or for all if
    muon_learning_rate is 0. Gains and biases do not decay; embeddings do, unlike in char_gpt.py."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    embeddings = [p for p in others if p.dim() == 2]
    without_decay = [p for p in others if p.dim() != 2]
    if config.muon_learning_rate > 0:
        for_matrices = Muon(matrices, config.muon_learning_rate, config.weight_decay)
    else:
        for_matrices = Adam(matrices, config.learning_rate, config.weight_decay)
    for_embeddings = Adam(embeddings, config.learning_rate, config.weight_decay)
    return for_matrices, for_embeddings, Adam(without_decay, config.learning_rate)

# ---- Training -----------------------------------------------------------------------------------

# torchrun starts several processes, one per GPU, with the same model. Each computes the gradient
# for its share of a step's rows; then they all use the sum of these gradients, and stay equal.
RANK = int(os.environ.get("RANK") or 0)  # the number of this process; number 0 prints and saves
N_PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)


@torch.no_grad()
def evaluate(model, data):
    """Mean loss over all targets but -100; each process takes a share of the evaluation batches."""
    model.eval()
    device = model.lm_head.weight.device
    sums = torch.zeros(2, dtype=torch.float64)  # the sum of the losses; the number of targets
    for x, y in itertools.islice(data.evaluation_batches(), RANK, None, N_PROCESSES):
        _, loss = model(x.to(device), y.to(device))
        n = (y != -100).sum().item()
        sums += torch.tensor([n * loss.item(), n], dtype=torch.float64)
    if N_PROCESSES > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)  # adds up those of all processes, in place
    return (sums[0] / sums[1]).item()


def training_step(model, optimizers, x, y, step, config, autocast):
    """One step of gradient descent; returns the loss."""
    # The learning rates rise while the running means are based on only a few, noisy gradients. Then
    # they fall linearly to zero: large steps to get near a minimum, and small ones to settle there.
    warmup = (step + 1) / (config.warmup_iters + 1)
    multiplier = min(warmup, 1 - step / config.max_iters)
    # Dropout sets some numbers that enter the residual stream to zero, so that the model cannot
    # rely on any one, and overfits less. The others are divided by 1 - dropout, to keep the mean.
    torch.manual_seed((config.seed * 1_000_003 + step) * N_PROCESSES + RANK)
    model.train()  # turns dropout on; model.eval() turns it off
    for p in model.parameters():  # clears the gradients; all processes must have one, if only 0
        p.grad = torch.zeros_like(p) if N_PROCESSES > 1 and p.requires_grad else None
    loss = torch.zeros((), device=x.device)
    n_targets = (y != -100).sum()  # in the whole step
    xs = x[RANK::N_PROCESSES].split(config.batch_size)  # this process's share, in batches
    ys = y[RANK::N_PROCESSES].split(config.batch_size)
    # Gradient accumulation: the gradients of the batches add up; memory has to hold only one batch.
    for batch_x, batch_y in zip(xs, ys):
        with autocast:  # mixed precision: see char_gpt.py
            _, mean = model(batch_x, batch_y)
        batch_loss = mean * (batch_y != -100).sum() / n_targets  # its part of the step's mean
        batch_loss.backward()
        loss += batch_loss.detach() if len(batch_x) > 0 else 0  # no rows: nan, but gradients of 0
    if N_PROCESSES > 1:
        tensors = [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
        vector = nn.utils.parameters_to_vector(tensors)  # end to end, to be sent at once
        dist.all_reduce(vector)
        nn.utils.vector_to_parameters(vector, tensors)  # back into the loss and the gradients
    # Clipping shortens a gradient that is too long: an unusual batch must not distort the means.
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    if not norm.isfinite():
        raise UserError(f"infinite gradient, or nan, in step {step + 1}: try lower learning rates")
    for optimizer in optimizers:
        optimizer.step(multiplier)
    return loss.item()


def train(model, train_data, val_data, tokenizer, config, checkpoint, autocast):
    """Train from the checkpoint to the end of the run, and save a new one at every evaluation."""
    device = model.lm_head.weight.device
    optimizers = make_optimizers(model, config)
    step, n_read, started = restore(checkpoint["last"], model, optimizers)
    # Compiled, the same model is faster, but a new shape of x, as in evaluate(), takes a minute.
    compiled = torch.compile(model) if config.compile and device.type == "cuda" else model
    losses = []  # since the last evaluation: their mean is the training loss
    while step < config.max_iters:
        x, y = [part.to(device) for part in train_data.training_batch(step)]
        loss = training_step(compiled, optimizers, x, y, step, config, autocast)
        losses.append(loss)
        step += 1
        n_read += y.numel()
        if RANK == 0:
            show_progress(step, loss, n_read, step / config.max_iters, started)
        if step % 100 == 0:
            checkpoint["log"].append(dict(step=step, tokens=n_read, loss=loss))
        if step % config.eval_interval == 0 or step == config.max_iters:
            with autocast:
                val_loss = evaluate(model, val_data)
            checkpoint["history"].append((step, n_read, sum(losses) / len(losses), val_loss))
            losses = []
            checkpoint["log"].append(dict(step=step, tokens=n_read, val_loss=val_loss))
            if RANK == 0:
                config.out = save(checkpoint, started, model, optimizers, config.out)
                write_log(checkpoint["log"], config.out)
                report(checkpoint, model, tokenizer, val_data, config)


def show_progress(step, loss, n_tokens, progress, started):
    """A line on the terminal that is overwritten at each step."""
    if sys.stderr.isatty():
        seconds = time.perf_counter() - started
        left = (seconds / progress - seconds) / 60
        text = f"loss {loss:.3f}, {n_tokens / seconds:,.0f} tokens/s, {left:.1f} minutes left"
        print(f"step {step}: {text}", end=" \r", file=sys.stderr, flush=True)


def save(checkpoint, started, model, optimizers, path):
    """Write the checkpoint to path. "model" has the weights with the lowest validation loss so far,
    since later ones may overfit. "last" has all that the next step depends on, so that a run that
    was stopped and resumed ends like one that was not (on a CPU, to the last bit). Returns path."""
    step, n_read, _, val_loss = checkpoint["history"][-1]
    if not math.isfinite(val_loss):
        raise UserError(f"validation loss {val_loss} after step {step}: try lower learning rates")
    earlier = checkpoint["history"][:-1]  # the file has this, unless another run replaced it
    if earlier and os.path.exists(path):
        if load_checkpoint(path, "bigram", "char_gpt", "bpe_gpt", mmap=True)["history"] != earlier:
            path = f"{path.removesuffix('.pt')}-{os.getpid()}.pt"
            print(f"another run has replaced the checkpoint: from now on, this one saves to {path}")
    # keep_vars=True gives the parameters themselves. Tied ones, with two names, are copied once.
    copies = {p: p.data.to("cpu", copy=True) for p in model.state_dict(keep_vars=True).values()}
    weights = {name: copies[p] for name, p in model.state_dict(keep_vars=True).items()}
    if val_loss == min(entry[3] for entry in checkpoint["history"]):
        checkpoint["model"] = weights
    checkpoint["last"] = dict(
        step=step, n_read=n_read, seconds=time.perf_counter() - started, model=weights,
        optimizers=[optimizer.means for optimizer in optimizers])
    replace_file(path, lambda file: torch.save(checkpoint, file))
    return path


def restore(last, model, optimizers):
    """Go back to "last". Returns step, tokens read, and the start time, adjusted for the break."""
    if last["step"] > 0:
        model.load_state_dict(last["model"])
        for optimizer, means in zip(optimizers, last["optimizers"], strict=True):
            optimizer.n_steps = last["step"]
            for mean, saved in zip(optimizer.means, means, strict=True):
                mean.view_as(saved).copy_(saved)  # view_as: an error if the sizes differ
    return last["step"], last["n_read"], time.perf_counter() - last["seconds"]


def write_log(log, path):
    """Lines of JSON, one per evaluation and per hundred steps, in a file beside the checkpoint."""
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    replace_file(f"{path}.jsonl", lambda file: file.write(lines.encode()))


def show_cost(config, model, train_data, last):
    """Print how many tokens the run will read, and how much it will save, before it begins."""
    x, _ = train_data.training_batch(0)
    n_tokens = last["n_read"] + x.numel() * max(0, config.max_iters - last["step"])
    passes = n_tokens / x.shape[1] / train_data.n_rows  # rows read, divided by rows in the data
    gigabytes = 4 * 4 * sum(p.numel() for p in model.parameters()) / 1e9  # last, best, 2 means
    print(f"steps {last['step']:,} to {config.max_iters:,} of about {x.numel():,} tokens: "
          f"{n_tokens:,} in all, {passes:.2g} passes through the data; "
          f"a checkpoint of at most {gigabytes:.2g} GB every {config.eval_interval} steps")


def bytes_per_token(data, tokenizer):
    lengths = torch.tensor([len(token) for token in tokenizer.tokens])
    lengths[tokenizer.end_of_text] = 0  # it is a token, but stands for no bytes
    sums = torch.zeros(2, dtype=torch.float64)  # of the bytes; of the tokens
    for _, y in data.evaluation_batches():
        targets = y[y != -100]
        sums += torch.tensor([lengths[targets].sum(), len(targets)])
    return (sums[0] / sums[1]).item()


def describe(loss, bytes_per_token):
    """Loss; perplexity, exp(loss): as unsure as a uniform guess among so many; bits per byte."""
    bits = loss / math.log(2) / bytes_per_token
    return f"{loss:.4f} (perplexity {math.exp(min(loss, 700)):.2f}, {bits:.3f} bits/byte)"


def report(checkpoint, model, tokenizer, val_data, config):
    """Print the latest losses, and a sample of what the model writes so far."""
    step, n_read, train_loss, val_loss = checkpoint["history"][-1]
    val_loss = describe(val_loss, checkpoint["bytes_per_token"][1])
    print(f"step {step}: loss {train_loss:.4f} train, {val_loss} val")
    seconds = checkpoint["last"]["seconds"]
    speed = n_read / seconds
    print(f"after {seconds / 60:.1f} of {seconds / 60 * config.max_iters / step:,.1f} minutes: "
          f"{speed:,.0f} tokens/s, MFU {utilization(model, config, speed):.0%}")
    torch.manual_seed(config.seed)  # the same random numbers each time, to compare the samples
    for prompt in val_data.prompts:
        ids = tokenizer.encode(prompt, special=())
        idx = torch.tensor([ids], device=model.lm_head.weight.device)
        new_ids = (new.item() for new in generate(model, idx, 60))
        ids += itertools.takewhile(lambda token: token != tokenizer.end_of_text, new_ids)
        print("    | " + tokenizer.decode(ids).strip().replace("\n", "\n    | "))


def utilization(model, config, tokens_per_second):
    """MFU, model flops utilization (Chowdhery et al. 2022): the operations that the model needs per
    second (see "What it costs" in char_gpt.py), as a fraction of those that are possible here."""
    device = model.lm_head.weight.device
    n_params = sum(p.numel() for p in model.parameters())
    per_token = 3 * (2 * n_params + 4 * config.n_layer * config.n_embd * config.block_size)
    possible = N_PROCESSES * matrix_rate(device, pick_dtype(config.dtype, device))
    return per_token * tokens_per_second / possible


@lru_cache  # measured only once
def matrix_rate(device, dtype):
    """Operations per second in a matrix product, best of 20. (item() waits for a GPU's result.)"""
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device, dtype=dtype)
    seconds = timeit.repeat(lambda: (x @ x)[0, 0].item(), repeat=20, number=1)
    return 2 * n**3 / min(seconds)

# ---- Published weights --------------------------------------------------------------------------

# This part reads files, and can be skipped. Names in them may lack our prefix "transformer.". The
# matrices below are transposed: OpenAI's layers compute x @ weight, nn.Linear x @ weight.T.
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
PUBLISHED = {  # revision; where it is known, the first half of model.safetensors's SHA-256
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e", "248dfc3911869ec493c76e65bf2fcf7f"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2", "0f8b28eb05a8075f48b61b6f35332978"),
}


def find_weights(name):
    path = DATA / name / "model.safetensors"
    if not path.exists():
        revision, sha256 = PUBLISHED[name]
        url = f"https://huggingface.co/openai-community/{name}/resolve/{revision}/model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # seconds to wait for an answer
        try:
            torch.hub.download_url_to_file(url, str(path), sha256)  # checks sha256, if it is known
        except Exception as error:  # there are many ways in which a download can fail
            raise OSError(f"cannot download {url}: {error}") from None
    return path


def load_pretrained(name):
    """The checkpoint of a trained model. (A published one has no history and cannot be resumed.)"""
    if name in SIZES:
        return dict(config=vars(GPTConfig(**SIZES[name])), text_before=END_OF_TEXT,
                    model=read_safetensors(find_weights(name)), vocab=gpt2_tokenizer().tokens)
    if os.path.isdir(name):
        raise UserError(f"convert this folder: python data/hugging_face.py {name} out/x.pt")
    return load_checkpoint(name, "bpe_gpt")


def build_model(checkpoint, config):
    """The model in a checkpoint. A smaller block_size takes the first positions only."""
    for name in SIZE_NAMES:
        size = checkpoint["config"][name]
        if getattr(config, name) != size and (name != "block_size" or config.block_size > size):
            raise UserError(f"--{name} is {size} in this model")
    state = dict(checkpoint["model"])
    # Some files have only wte. lm_head gets a copy, which is used if your model does not tie them.
    state["lm_head.weight"] = state.get("lm_head.weight", state["transformer.wte.weight"]).clone()
    if "transformer.wpe.weight" in state:
        state["transformer.wpe.weight"] = state["transformer.wpe.weight"][: config.block_size]
    with torch.device("meta"):  # without memory: the tensors of state replace all parameters
        model = GPT(config)
    loaded = {}  # if tied, lm_head.weight is the same p as wte.weight, and gets its tensor
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = loaded.setdefault(p, nn.Parameter(state[name]))
    model.load_state_dict(state, assign=True)
    return model


def read_safetensors(path):
    """The parameters with our names and shapes, in float32. The file has 8 bytes with the length of
    the header; then the header, in JSON, which says where each tensor lies; then the numbers."""
    data = np.memmap(path, np.uint8, mode="c")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes()) if start < len(data) else {}
    header.pop("__metadata__", None)  # a comment
    if len(data) - start != max([entry["data_offsets"][1] for entry in header.values()] or [-1]):
        raise UserError(f"{path} is damaged: delete it, to download it again")
    state = {}
    for name, entry in header.items():
        name = "transformer." + name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            continue  # causal masks, which are not learned; another name of wte
        begin, end = entry["data_offsets"]
        tensor = torch.from_numpy(data[start + begin : start + end])
        tensor = tensor.view(DTYPES[entry["dtype"]]).view(entry["shape"])
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        state[name] = tensor.clone(memory_format=torch.contiguous_format).float()
    return state

# ---- Files and flags ----------------------------------------------------------------------------

# The rest is not about language models. On a first reading, skip to load_tokens() and main().

DATA = Path(__file__).resolve().parent / "data"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class UserError(ValueError):
    """A mistake by the user, shown as one line. Errors in the code still show a full traceback."""


def replace_file(path, write):
    """Write a file with write(file). It replaces the one at path only when it is complete: whatever
    happens, path is either the old file or the complete new one."""
    path = os.path.realpath(path)  # if path is a link to a file, this is the file
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # a name that no other process uses
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # waits until it is on the disk, in case the power fails next
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and error.__context__:
            raise error.__context__  # torch.save() hides the cause (full disk, Ctrl-C) behind it
        raise
    for _ in range(100):  # on Windows, a file that another program has open cannot be replaced
        with suppress(PermissionError):
            return temporary.replace(path)
        time.sleep(0.1)
    raise UserError(f"cannot replace {path}: open in another program? The new file is {temporary}")


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


def load_checkpoint(path, *scripts, mmap=False):  # mmap: reads tensors when they are used
    """The checkpoint at path, saved by one of these scripts. (weights_only: no code in it runs.)"""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is missing, damaged or not a checkpoint: {error!s:.60}") from None
    if checkpoint.get("written_by") not in scripts:
        raise UserError(f"{path} was not written by this version of {' or '.join(scripts)}")
    return checkpoint


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


def pick_device(name):
    best = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, or None
    if name != "auto" and name.split(":")[0] not in ("cpu", best and best.type):
        raise UserError(f"--device {name}: PyTorch has no such device here")
    return torch.device(name if name != "auto" else best or "cpu")


def pick_dtype(name, device):
    """The type of matrix products: bfloat16 where the hardware makes that faster than float32."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {name}: it must be float32, bfloat16 or auto")
    if name == "auto" and device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and fast) else torch.float32


def join_processes(device):
    if N_PROCESSES > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", RANK)))
        # Processes meet through entries in torchrun's store; a prefix hides those before a restart.
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=RANK, world_size=N_PROCESSES)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def from_first_process(function, *args):
    """The result of function(*args) in the first process, which alone loads or downloads it."""
    results = [function(*args) if RANK == 0 else None]
    if N_PROCESSES > 1:
        dist.broadcast_object_list(results)
    return results[0]


def load_tokens(config, tokenizer):
    """Training data (90% of a text), validation data (10%) and the tokenizer."""
    if from_first_process(os.path.isdir, config.data):
        parts = read_folder(config.data, tokenizer)
    else:
        text = from_first_process(load_text, config.data)
        n = int(0.9 * len(text))
        tokenizer = tokenizer or from_first_process(train_bpe, text[:n], config.vocab_size)
        parts = [np.array(tokenizer.encode(part)) for part in (text[:n], text[n:])]
    train_data, val_data = [TextData(tokens, config) for tokens in parts]
    print(f"{len(parts[0]):,} tokens to train on, {len(parts[1]):,} to validate on")
    return train_data, val_data, tokenizer


def choose_settings(flags, device, resumed, trained, more_settings={}):
    """The settings of a run. Where several sources give the same setting, the last one counts."""
    given = GPTConfig(**flags)
    if os.path.realpath(given.init) == os.path.realpath(given.out) and not resumed:
        raise UserError("--init and --out are the same file: give another --out")
    settings = {}
    small = device.type != "cuda" and not (given.full or given.init or resumed)
    if small:
        settings |= CPU_SETTINGS
        print("training a small model, as on anything but a CUDA GPU; --full trains GPT-2 124M")
    if os.path.isdir(given.data) and not given.init:
        settings |= FOLDER_SETTINGS
        if small:
            settings["total_batch_size"] = 2**14
        n_tokens = os.path.getsize(f"{given.data}/train.bin") // 2  # of two bytes each
        per_step = (settings | flags)["total_batch_size"]
        settings["max_iters"] = max(1, n_tokens // per_step)  # so that all of it is read once
        settings["warmup_iters"] = min(100, settings["max_iters"] // 10)
    if given.init:
        settings |= FINE_TUNING_SETTINGS
    settings |= more_settings
    if given.init and not resumed:
        settings |= {name: trained["config"][name] for name in SIZE_NAMES}
    if resumed:
        settings |= trained["config"] | {"device": given.device, "out": given.out}
    settings |= flags
    changed = [f"{n} {x}" for n, x in settings.items() if x != getattr(GPTConfig, n)]
    print(f"settings that are not the defaults: {', '.join(changed)}")
    return GPTConfig(**settings)


def read_folder(path, tokenizer):
    """The tokens in train.bin and val.bin. They stay on the disk until they are used."""
    if tokenizer is None or tokenizer.tokens != gpt2_tokenizer().tokens:
        raise UserError(f"{path} has GPT-2's tokens, not those of another vocabulary")
    parts = [np.memmap(f"{path}/{name}.bin", "<u2", "r") for name in ("train", "val")]
    # Other programs write 32-bit tokens (every second number is 0), a header, or other tokens.
    foreign = os.path.exists(f"{path}/meta.pkl")  # nanoGPT's, of characters
    for tokens in parts:
        foreign |= tokens[:1024].max() >= GPTConfig.vocab_size or not tokens[1:1024:2].any()
    if foreign:
        raise UserError(f"{path} was not written by data/prepare.py")
    return parts


def must_match(config, train_data, val_data):
    """What has to be the same in all processes, and when a run is resumed."""
    size = [config.n_layer, config.n_head, config.n_embd, config.block_size]
    optimizer = "Muon" if config.muon_learning_rate > 0 else "Adam"
    texts = [train_data.hash, val_data.hash]
    return dict(text=texts, size=size, optimizer=optimizer, init=config.init)


def new_checkpoint(config, tokenizer, train_data, val_data, trained):
    before = END_OF_TEXT if os.path.isdir(config.data) else "\n"  # the token before a text
    return dict(
        written_by="bpe_gpt", config=vars(config), vocab=tokenizer.tokens,
        text_before=trained["text_before"] if trained else before,  # see sample.py
        bytes_per_token=[bytes_per_token(data, tokenizer) for data in (train_data, val_data)],
        templates=getattr(train_data, "templates", []),  # of prompts: see data/instruct.py
        must_match=must_match(config, train_data, val_data),
        history=[],  # of each evaluation: step, tokens read, training and validation loss
        log=[],  # of each evaluation and each hundredth step: what write_log() writes
        model={},  # the weights with the lowest validation loss so far
        last=dict(step=0, n_read=0, seconds=0))  # what the next step depends on: see save()


def main(load_data=load_tokens, more_settings={}):  # data/instruct.py passes others
    if hasattr(sys.stdout, "reconfigure"):  # unprintable characters become ?; lines appear at once
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    flags = parse_flags(GPTConfig)
    config = GPTConfig(**flags)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)  # fail now, not after training
    Path(f"{config.out}.tmp").touch()  # fail now if this file cannot be written
    Path(f"{config.out}.tmp").unlink(missing_ok=True)
    device = pick_device(config.device)
    join_processes(device)
    resumed = from_first_process(lambda: config.resume and Path(config.out).exists())
    start = config.out if resumed else config.init
    trained = from_first_process(load_pretrained, start) if start else None  # to start from
    config = from_first_process(choose_settings, flags, device, resumed, trained, more_settings)
    tokenizer = None  # to be learned from the data
    if trained:
        tokenizer = BPETokenizer(trained["vocab"])
    elif config.vocab_size == GPTConfig.vocab_size:
        tokenizer = from_first_process(gpt2_tokenizer)
    train_data, val_data, tokenizer = load_data(config, tokenizer)
    if not config.init:
        config.vocab_size = len(tokenizer.tokens)  # fewer than asked for, if the text is short
    torch.manual_seed(config.seed)  # for the initial weights; train() restores a resumed run's
    model = (GPT(config) if resumed or not trained else build_model(trained, config)).to(device)
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, on {device} in {dtype}")
    parts = [config, tokenizer, train_data, val_data, trained]
    checkpoint = trained if resumed else from_first_process(new_checkpoint, *parts)
    checkpoint["config"] = vars(config)
    for name, value in must_match(config, train_data, val_data).items():
        if value != checkpoint.get("must_match", {}).get(name):
            other = f"--resume: {config.out}" if resumed else "the first process"
            raise UserError(f"{other} was started with a different {name}")
    if not resumed:
        V = config.vocab_size
        with autocast:
            loss = describe(evaluate(model, val_data), checkpoint["bytes_per_token"][1])
        print(f"val loss {loss}; a uniform guess: ln({V}) = {math.log(V):.4f}")
    show_cost(config, model, train_data, checkpoint["last"])
    train(model, train_data, val_data, tokenizer, config, checkpoint, autocast)
    step, _, _, best = min(checkpoint["history"], key=lambda entry: entry[3])
    print(f"best val loss {best:.4f} at step {step}; next: python sample.py {config.out}")
    if N_PROCESSES > 1:
        dist.destroy_process_group()  # without this, a process may abort as it ends


if __name__ == "__main__":
    try:
        main()
    except (OSError, UserError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        sys.exit("error: out of memory; lower --batch_size, then --block_size")
    except KeyboardInterrupt:
        sys.exit("stopped; if this run has saved a checkpoint, --resume continues from it")
