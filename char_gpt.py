"""A GPT (generative pretrained transformer) on characters, small enough to train at home.

bigram.py predicts the next character from the current one alone. Here each prediction can use up to
256 characters (128 in the small model), and the model learns which of them matter. Data, generation
and evaluation are the same as in bigram.py; the model and its training are new.

    python char_gpt.py                # the full model on a GPU; on a CPU a small one: 3.5 minutes
    python char_gpt.py --full         # the full 6-layer, 384-wide model on a CPU too: 31 minutes
    python char_gpt.py --resume       # continue a run that was stopped

The validation loss on Tiny Shakespeare, 1.1 million characters, falls from 4.2 to 1.48 (small) or
1.42 (full). Next comes bpe_gpt.py: the same model at GPT-2's size, with parts of words as tokens.
"""

import argparse
import hashlib
import inspect
import math
import os
import pickle
import socket
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Configuration ------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    vocab_size: int = 65  # number of distinct characters; taken from the text
    n_layer: int = 6  # transformer blocks, each of attention and an MLP
    n_head: int = 6  # attention heads per block; must divide n_embd
    n_embd: int = 384  # width: how many numbers represent a token inside the model
    block_size: int = 256  # context: how many characters the model can look at
    by_hand: bool = False  # compute layers with the formulas below, not PyTorch's built-ins
    batch_size: int = 16  # sequences per step
    max_iters: int = 1400  # steps of gradient descent
    eval_interval: int = 200  # steps between evaluations
    learning_rate: float = 0.006  # for Adam, which updates embeddings, gains and biases
    muon_learning_rate: float = 0.025  # for Muon, which updates the matrices in the blocks
    warmup_iters: int = 10  # steps over which the learning rates rise from zero
    weight_decay: float = 0.3  # pulls the matrices towards zero, against overfitting
    grad_clip: float = 1.0  # maximum norm of the gradient of all parameters together; 0: no limit
    seed: int = 1337  # for the random numbers: on a CPU, the same seed gives the same run
    full: bool = False  # train the full model, even where a small one is the default
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of the model's matrix products: float32 or bfloat16
    compile: bool = sys.platform == "linux"  # use torch.compile on a CUDA GPU (needs Linux)
    resume: bool = False  # continue from the checkpoint, if there is one
    data: str = ""  # text file to learn from; default: Tiny Shakespeare
    out: str = "out/char_gpt.pt"  # checkpoint, for sample.py and --resume

# For a CPU, 3.5 minutes: a smaller model, which overfits less and so needs less weight decay.
CPU_SETTINGS = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, weight_decay=0.1,
                    max_iters=2100, eval_interval=300)  # reads the training text 4.3 times

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

# In the shapes below, B is the batch size, T the number of tokens in a sequence, and C = n_embd.
# Inside the model every token is a vector of C numbers: x is (B, T, C), from embedding to scores.

class LayerNorm(nn.Module):
    """Shifts and scales the vector of each token to mean 0 and variance 1, however large it was.
    Then each of the C numbers is multiplied by a learned gain (weight) and a learned bias is added.
    This keeps the next layer's input at a steady size, set by the gains. (A mean over all tokens
    would tell a token about later ones: see attention().) Ba, Kiros & Hinton 2016."""
    by_hand = False  # GPT sets it to config.by_hand
    def __init__(self, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x):
        if not self.by_hand:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)
        mean = x.mean(dim=-1, keepdim=True)  # (B, T, 1)
        variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)  # (B, T, 1)
        std = torch.sqrt(variance + 1e-5)  # 1e-5 prevents a division by zero
        return (x - mean) / std * self.weight + self.bias


class GELU(nn.Module):
    """An activation function: without one, two linear layers in a row would be equal to one. GELU
    is ReLU, max(0, x), made smooth so that negative x also get gradients: x * P(Z <= x), where Z is
    a standard normal variable. The tanh formula is nearly the same. Hendrycks & Gimpel 2016."""
    by_hand = False
    def forward(self, x):
        if not self.by_hand:
            return F.gelu(x, approximate="tanh")
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(q, k, v):
    """Lets every token gather information from itself and from the tokens before it.

    Learned matrices turn each token into three vectors of head_size numbers each: a query (what it
    looks for), a key (what it offers) and a value (what it passes on to tokens that attend to it).
    The dot product of a token's query and any token's key, divided by sqrt(head_size), is a score.
    Scores for later tokens are masked out. Softmax turns the others into attention weights, which
    sum to 1, and the result is the weighted mean of the values. For example, with T = 3 tokens (a
    row for each query, a column for each key) and values of one number each, 10, 20 and 30:

          scores              masked              weights           result
         0.6  1.0 -0.3       0.6 -inf -inf      1.00 0.00 0.00       10.0
         1.2  0.2  0.9       1.2  0.2 -inf      0.73 0.27 0.00       12.7
        -0.4  0.8  0.3      -0.4  0.8  0.3      0.16 0.52 0.32       21.6

    q, k, v and the result are (B, n_head, T, head_size): there are n_head such tables for each
    sequence, as CausalSelfAttention explains. Vaswani et al. 2017, section 3.2.1."""
    T, head_size = q.shape[-2:]
    # A sum of n independent terms around 0 grows like sqrt(n); here, n is head_size. Without the
    # division, large scores would push softmax towards 0 and 1, where it is flat (no gradient).
    scores = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, T)
    # The causal mask: no token may see the ones after it, or it would see what it has to predict.
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # column <= row
    scores = scores.masked_fill(~visible, -math.inf)  # exp(-inf) = 0: no weight
    return scores.softmax(dim=-1) @ v


class CausalSelfAttention(nn.Module):
    """Attention in n_head heads at once, each with queries, keys and values of its own, so that one
    can look for the name of the speaker, say, and another for the start of the word."""
    by_hand = False
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise UserError(f"--n_head {config.n_head} does not divide --n_embd {config.n_embd}")
        self.n_head = config.n_head
        # nn.Linear multiplies by a learned matrix and adds a learned bias. (c_ names are OpenAI's.)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads found

    def forward(self, x):
        B, T, C = x.shape
        head_size = C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        # view() cuts each vector of C numbers into one piece per head: (B, T, n_head, head_size).
        # transpose() then swaps T and n_head: matrix products work on the last two dimensions.
        q = q.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_head, head_size).transpose(1, 2)
        v = v.view(B, T, self.n_head, head_size).transpose(1, 2)
        # PyTorch's attention is faster, but not in bfloat16 on a CPU.
        if self.by_hand or (q.dtype == torch.bfloat16 and q.device.type == "cpu"):
            y = attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # with the causal mask
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
    """Attention, then the MLP. Each adds its result to x instead of replacing it. So x is a stream
    that runs through all blocks, the residual stream, from which they read and to which they write.

    This makes deep models trainable (He et al. 2015): the derivative of x + f(x) is 1 + f'(x), and
    through the 1 the gradient reaches every block undiminished. Layer norm is only for what f
    reads: with x = norm(x + f(x)), the gradient would be divided by another std in every block."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). Its parameters are named as in Hugging Face's library."""
    def __init__(self, config):
        super().__init__()
        self.context_size = config.block_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),  # token embeddings
            "wpe": nn.Embedding(config.block_size, config.n_embd),  # position embeddings
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
        for module in self.modules():
            module.by_hand = config.by_hand

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

    def forward(self, idx, targets=None):
        """Tokens idx (B, T) to logits (B, T, vocab_size); with targets (B, T), also the loss."""
        B, T = idx.shape
        if T > self.context_size:
            raise UserError(f"{T} tokens do not fit into a context of {self.context_size}")
        # Except for the mask, attention ignores the order of the vectors. So each vector must say
        # where it stands: it is the sum of an embedding of the token and one of its position.
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        # The loss of bigram.py. PyTorch's function takes (N, vocab_size) and (N,), with N = B * T.
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

# What it costs. A block has about 12 C^2 parameters: 4 C^2 in attention and 8 C^2 in the MLP. Each
# of them takes a multiplication and an addition per token. In all heads together, the dot products
# with T keys take 2 T C operations per token, and the weighted means of T values as many.
# backward() takes twice as many: for y = W x, the gradients of W and of x each cost as much as y.

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

# ---- Optimizers ---------------------------------------------------------------------------------

class Optimizer:
    """What Adam and Muon have in common. Plain gradient descent has one learning rate, but some
    parameters have gradients a thousand times as large as others, and a single batch's are noisy.
    So update() takes running means of the gradients, in which the latest count most, and scales
    them to similar sizes. With weight decay, each step also shrinks the parameters a little, so
    that one becomes large only if the gradients keep pushing it that way. Small tensors of the same
    shape are stacked: on a GPU, many small operations take longer than one large operation."""
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
    """Keeps two running means for each number: m, of its gradient, and v, of the square of its
    gradient. The update is m / sqrt(v). If the gradient is always g, this is g / |g|, which is 1 or
    -1: each step is as large as the learning rate, whatever the size of g. If the gradient keeps
    changing sign, m stays near 0, and the number hardly moves. Kingma & Ba 2015; with the weight
    decay of step() above, it is called AdamW (Loshchilov & Hutter 2019)."""
    n_means = 2
    beta1 = 0.9
    beta2 = 0.999
    eps = 1e-8

    def update(self, grads, means):
        m, v = means  # each (number of tensors, *shape), like grads
        m.lerp_(grads, 1 - self.beta1)  # m += 0.1 * (grads - m)
        v.lerp_(grads**2, 1 - self.beta2)  # v += 0.001 * (grads**2 - v)
        # Both means began at 0. After n steps, the gradients in m have a total weight of only
        # 1 - 0.9**n, which is 0.1, then 0.19, then 0.271. The division makes up for that.
        m_hat = m / (1 - self.beta1**self.n_steps)
        v_hat = v / (1 - self.beta2**self.n_steps)
        return m_hat / (v_hat.sqrt() + self.eps)  # eps prevents a division by zero


def orthogonalize(x, rounds=4):
    """For Muon: makes the strengths (see below) of n matrices x (n, rows, columns) more equal.

    Every matrix X is a product U S V^T, its singular value decomposition: V^T rotates the input, S
    multiplies each direction by a number s, its strength (singular value), and U rotates the
    result. If all s are 1, X is orthogonal. The strengths can be changed without knowing U and V.
    For example, X X^T X = (U S V^T) (V S U^T) (U S V^T) = U S^3 V^T, since a rotation and its
    transpose cancel: each s becomes s^3. In the same way (Newton-Schulz), the strengths of
    a X + b (X X^T) X + c (X X^T)^2 X are a s + b s^3 + c s^5. With the a, b, c below (Jordan et al.
    2024), a small s becomes 3.4 times as large, and one from 0.2 to 1.2 gets to between 0.65 and
    1.21. In four rounds, 0.1 becomes 0.340, 0.992, 0.707, 1.107, and 0.001 becomes 0.140."""
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
    """For matrices (Jordan et al. 2024). In the gradient of a matrix, a few directions (see above)
    are strong, and the others can be hundreds of times weaker. Muon takes the running mean of the
    gradient and makes its directions more equally strong: the model also learns from weak ones."""
    n_means = 1
    momentum = 0.95

    def update(self, grads, means):
        m = means[0]
        m.lerp_(grads, 1 - self.momentum)  # m += 0.05 * (grads - m); m's norm will not matter
        ahead = m.lerp(grads, 1 - self.momentum)  # Nesterov: the newest gradient counts more
        dtype = pick_dtype("auto", grads.device)  # a fast one: few digits are enough here
        rows, columns = grads.shape[-2:]
        # With all s = 1, and 4 times as many outputs (rows) as inputs (columns), the output has the
        # norm of the input, so that each of its numbers is half as large. This factor undoes that.
        return math.sqrt(max(1, rows / columns)) * orthogonalize(ahead.to(dtype))


def make_optimizers(model, config):
    """Muon is for the matrices in the blocks, Adam (without weight decay) for the rest. Gains and
    biases are not matrices, and the rows of an embedding are separate vectors, each for one token:
    Muon would mix their gradients, in X X^T X."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = Muon(matrices, config.muon_learning_rate, config.weight_decay)
    return muon, Adam(others, config.learning_rate)

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


def training_step(model, optimizers, x, y, step, config, autocast):
    """One step of gradient descent; returns the loss."""
    # The learning rates rise while the running means are based on only a few, noisy gradients. Then
    # they fall linearly to zero: large steps to get near a minimum, and small ones to settle there.
    warmup = (step + 1) / (config.warmup_iters + 1)
    multiplier = min(warmup, 1 - step / config.max_iters)
    model.train()  # undoes eval(). This and the seed are for dropout (random zeros), if you add it.
    torch.manual_seed(config.seed * 1_000_003 + step)
    # Mixed precision: matrix products in bfloat16, if that is faster. Unlike float16, it has the
    # range of float32, but few digits: weights stay in float32, or small updates would be lost.
    with autocast:
        _, loss = model(x, y)
    model.zero_grad()
    loss.backward()
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
        x, y = get_batch(train_data, config, step)
        loss = training_step(compiled, optimizers, x, y, step, config, autocast)
        losses.append(loss)
        step += 1
        n_read += y.numel()
        show_progress(step, loss, n_read, step / config.max_iters, started)
        if step % config.eval_interval == 0 or step == config.max_iters:
            with autocast:
                val_loss = evaluate(model, val_data, config)
            checkpoint["history"].append((step, n_read, sum(losses) / len(losses), val_loss))
            losses = []
            save(checkpoint, started, model, optimizers, config.out)
            report(checkpoint, model, tokenizer, config)


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
    was stopped and resumed ends like one that was not (on a CPU, to the last bit)."""
    step, n_read, _, val_loss = checkpoint["history"][-1]
    if not math.isfinite(val_loss):
        raise UserError(f"validation loss {val_loss} after step {step}: try lower learning rates")
    # keep_vars=True gives the parameters themselves. Tied ones, with two names, are copied once.
    copies = {p: p.data.to("cpu", copy=True) for p in model.state_dict(keep_vars=True).values()}
    weights = {name: copies[p] for name, p in model.state_dict(keep_vars=True).items()}
    if val_loss == min(entry[3] for entry in checkpoint["history"]):
        checkpoint["model"] = weights
    checkpoint["last"] = dict(
        step=step, n_read=n_read, seconds=time.perf_counter() - started, model=weights,
        optimizers=[optimizer.means for optimizer in optimizers])
    replace_file(path, lambda file: torch.save(checkpoint, file))


def restore(last, model, optimizers):
    """Go back to "last". Returns step, tokens read, and the start time, adjusted for the break."""
    if last["step"] > 0:
        model.load_state_dict(last["model"])
        for optimizer, means in zip(optimizers, last["optimizers"], strict=True):
            optimizer.n_steps = last["step"]
            for mean, saved in zip(optimizer.means, means, strict=True):
                mean.view_as(saved).copy_(saved)  # view_as: an error if the sizes differ
    return last["step"], last["n_read"], time.perf_counter() - last["seconds"]


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


def main():
    if hasattr(sys.stdout, "reconfigure"):  # unprintable characters become ?; lines appear at once
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    flags = parse_flags(GPTConfig)
    config = GPTConfig(**flags)  # for now: a CPU and a checkpoint have other defaults, see below
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)  # fail now, not after training
    device = pick_device(config.device)
    checkpoint = None
    settings = CPU_SETTINGS if device.type == "cpu" and not config.full else {}
    if config.resume and Path(config.out).exists():
        checkpoint = load_checkpoint(config.out, "char_gpt")
        settings = checkpoint["config"] | {"device": config.device, "out": config.out}
    config = GPTConfig(**settings | flags)  # where both have a setting, the flag wins
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    text = load_text(config.data)
    tokenizer = CharTokenizer(text)
    config.vocab_size = V = len(tokenizer.chars)
    train_data, val_data = split_data(torch.tensor(tokenizer.encode(text), device=device), config)
    torch.manual_seed(config.seed)  # for the initial weights
    model = GPT(config).to(device)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    print(f"{len(text):,} characters, {V} of them distinct; {size}, on {device} in {dtype}")
    changed = [f"{n} {x}" for n, x in vars(config).items() if x != getattr(GPTConfig, n)]
    print(f"settings that differ from the full model's (--full): {', '.join(changed)}")
    text_hash = hashlib.sha256(text.encode()).hexdigest()
    must_match = [text_hash, config.n_layer, config.n_head, config.n_embd, config.block_size]
    if checkpoint is None:
        parts = [text[: len(train_data)], text[len(train_data) :]]  # training, validation
        checkpoint = dict(
            written_by="char_gpt", config={}, vocab=tokenizer.chars, must_match=must_match,
            bytes_per_token=[len(part.encode()) / len(part) for part in parts],
            history=[],  # of each evaluation: step, tokens read, training and validation loss
            model={},  # the weights with the lowest validation loss so far
            last=dict(step=0, n_read=0, seconds=0))  # what the next step depends on: see save()
        with autocast:
            loss = evaluate(model, val_data, config)
        print(f"before training: val loss {loss:.4f}; a uniform guess: ln({V}) = {math.log(V):.4f}")
    elif checkpoint["must_match"] != must_match:
        raise UserError(f"--resume: {config.out} was started with a different text or size")
    checkpoint["config"] = vars(config)
    print("from step", checkpoint["last"]["step"], "with", config.batch_size, "sequences per step")
    train(model, train_data, val_data, tokenizer, config, checkpoint, autocast)
    step, _, _, best = min(checkpoint["history"], key=lambda entry: entry[3])
    print(f"best val loss {best:.4f} at step {step}; next: python sample.py {config.out}")


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
