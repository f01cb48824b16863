"""A GPT on characters: the transformer of GPT-2, small enough to train on Shakespeare at home.

bigram.py guesses the next character from the last one alone. Here a model looks back at up to 256
characters and learns by itself which of them matter. Text, batches, sampling and evaluation are
word for word those of bigram.py; the model is new, and so is the care taken in training it.

    python char_gpt.py                 # a GPU: the full model. A CPU: a small one, in 3 minutes
    python char_gpt.py --full          # the full model on a CPU too, in 40 minutes
    python char_gpt.py --minutes 10    # as many steps as fit into ten minutes
    python char_gpt.py --resume        # go on with a run that was stopped
    python char_gpt.py --help          # every setting

On Tiny Shakespeare the loss falls from 4.2 to 1.51 (the small model) or 1.50 (the full one), where
the bigram table ends at 2.49, and names, lines and most words come out right.
Read next: bpe_gpt.py; `diff char_gpt.py bpe_gpt.py` shows what makes this GPT-2.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy"]
# ///

import argparse
import copy
import hashlib
import http.client
import inspect
import math
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
import urllib.request
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass
class GPTConfig:
    """Every setting. Each is also a flag, as in `--max_iters 100`; only vocab_size comes from the
    text itself. The values are those of the full model; CPU_SETTINGS has the small one's."""

    vocab_size: int = 65  # how many different characters there are
    n_layer: int = 6  # blocks, one after the other, through which each token passes
    n_head: int = 6  # attention heads in each block
    n_embd: int = 384  # numbers that stand for a character on its way through the blocks
    dropout: float = 0.2  # share of results zeroed at random in training, so that none is vital
    fused: bool = True  # PyTorch's own code for what is written out below, where that is faster
    data: str = ""  # text file to learn from (UTF-8); if none is given, Tiny Shakespeare
    offline: bool = False  # never fetch Tiny Shakespeare from the network
    out: str = "out/char_gpt.pt"  # where to save the trained model, for sample.py to use
    resume: bool = False  # go on with the run saved there, with its settings
    full: bool = False  # train the model of these settings on a CPU too, not the small one
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is there
    dtype: str = "auto"  # of matrix products: float32 or bfloat16; auto: whichever is fast here
    compile: bool = True  # on a CUDA GPU, use torch.compile where it works
    seed: int = 1337  # the same seed gives the same run
    batch_size: int = 16  # sequences in a batch
    block_size: int = 256  # characters in a sequence: how far back the model can look
    max_iters: int = 1500  # training steps, one batch each
    minutes: float = 0.0  # train for about so long, in as many steps as fit in; 0: by max_iters
    eval_interval: int = 200  # training steps between evaluations
    learning_rate: float = 0.006  # of AdamW, which trains embeddings, gains and biases
    muon_learning_rate: float = 0.025  # of Muon, which trains the matrices of the blocks
    warmup_iters: int = 10  # steps in which the learning rates rise from zero
    weight_decay: float = 0.1  # pull of the matrices towards zero, per unit of learning rate
    grad_clip: float = 1.0  # a gradient (of all weights together) longer than this is shortened

    # Of the numbers. (Without a type, this is not a setting itself.)
    may_be_zero = {"dropout", "minutes", "seed", "warmup_iters", "weight_decay"}

    def __post_init__(self):
        check_numbers(type(self), vars(self))
        if self.dropout >= 1:
            raise ValueError(f"--dropout must be below 1; it is {self.dropout}")
        if self.n_embd % self.n_head:
            raise ValueError(f"--n_head must divide --n_embd, {self.n_embd}; it is {self.n_head}")


# What a CPU trains unless told otherwise: the same model, smaller, done in minutes.
CPU_SETTINGS = dict(
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.0,
    batch_size=32,
    block_size=64,
    max_iters=1800,
    eval_interval=300,
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

# C stands for n_embd: every token is a row of C numbers, so that x is (B, T, C) on its whole way.


class LayerNorm(nn.Module):
    """Brings each token's C numbers to mean 0 and variance 1, so that no layer meets inputs that
    are huge or tiny; then scales and shifts them by amounts that are learned, the gain (weight) and
    the bias. Ba, Kiros & Hinton 2016."""

    def __init__(self, config):
        super().__init__()
        self.fused = config.fused
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x):
        if self.fused:  # PyTorch's own code for the formula below
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)
        mean = x.mean(dim=-1, keepdim=True)  # (B, T, 1)
        variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)  # (B, T, 1)
        x = (x - mean) / torch.sqrt(variance + 1e-5)  # 1e-5: never divide by zero
        return x * self.weight + self.bias


class GELU(nn.Module):
    """The bend between two linear maps, without which they would be no better than one. It lets
    positive numbers pass and holds negative ones back, like max(0, x), but smoothly: x times the
    chance that a standard normal variable is below x. Hendrycks & Gimpel 2016; GPT-2 takes their
    approximation with tanh."""

    def __init__(self, config):
        super().__init__()
        self.fused = config.fused

    def forward(self, x):
        if self.fused:
            return F.gelu(x, approximate="tanh")
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(q, k, v):
    """Lets each token gather what it needs from itself and the tokens before it.

    Each token has a question (its query, in q), a label that says what it can be asked for (its
    key, in k), and an answer (its value, in v): head_size numbers each, made from its C numbers by
    learned matrices. Where a query and a key match, their dot product is large. Softmax turns the
    matches of one query with all keys into shares that sum to 1, and the token receives the values
    mixed in these shares. q, k, v and the result are (B, n_head, T, head_size).
    Vaswani et al. 2017, section 3.2.1.
    """
    T, head_size = q.shape[-2:]
    # A dot product is a sum of head_size terms, and tends to grow with the root of their number.
    # Undo that: if scores are large, softmax gives all to one, and hardly learns any more.
    scores = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, T): row asks column
    # The mask. In training the model guesses at all T places at once, and at each place the right
    # answer is the next token: it must not be seen. Minus infinity becomes a share of zero.
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # True if column <= row
    scores = scores.masked_fill(~visible, -math.inf)
    return F.softmax(scores, dim=-1) @ v


class CausalSelfAttention(nn.Module):
    """Tokens talk to each other. Attention runs n_head times side by side, and each of these heads
    has queries, keys and values of its own, so that one can look for the speaker's name and another
    for where the word began."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.fused = config.n_head, config.fused
        # nn.Linear multiplies by a learned matrix and adds a learned bias. The names of all parts
        # that learn are those of GPT-2's published weights.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # makes q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads have gathered
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        # Heads go before tokens, so that each head's matrix product is done by itself.
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_size)
        if self.fused and x.device.type != "cpu":  # a CPU in bfloat16 is faster without
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)  # the results of the heads, end to end
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token thinks by itself about what it has gathered: widen, bend, narrow."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = GELU(config)
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
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The transformer of GPT-2 (Radford et al. 2019). Two tables, the embeddings, hold a row of C
    numbers for each token and one for each position. The sum of both rows enters the blocks; the
    dot products of what comes out with the rows of all tokens are the scores for the next one."""

    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),  # of tokens
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # of positions
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one table for input and output
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # Two in each block add to x: made smaller, so that all of them together add
                # about as much as one would. (Variances add up; hence the root of their number.)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None):
        """Token numbers idx (B, T) to logits (B, T, vocab_size), and the loss if targets (B, T) are
        given (else None). Raises ValueError for T above block_size."""
        B, T = idx.shape
        if T > self.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size, {self.block_size}")
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
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


def make_optimizers(model, config):
    """Two optimizers, each for what it is good at.

    AdamW (Loshchilov & Hutter 2019), the Adam of bigram.py with its own form of weight decay,
    treats every number by itself. For a matrix that is a waste: gradients mostly pull its inputs
    and outputs along the same few directions, and the others hardly learn. Muon (Jordan et al.
    2024) keeps a running sum of a matrix's gradients, and steps by the orthogonal matrix nearest to
    it (a few matrix products get there), which moves all directions equally far. It trains the
    matrices in the blocks; embeddings, where a row belongs to one token, gains and biases keep
    AdamW.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        if ".h." in name and p.dim() == 2:
            matrices.append(p)
        else:
            others.append(p)
    muon = torch.optim.Muon(matrices, config.muon_learning_rate, config.weight_decay, momentum=0.9)
    adamw = torch.optim.AdamW(
        others, config.learning_rate, betas=(0.9, 0.95), weight_decay=0, fused=True
    )
    return [muon, adamw]


def learning_rate_share(step, config):
    """The share of its full learning rate that a step uses. It rises in a line over warmup_iters
    (the first gradients are wild), and falls in a line to 0 over the whole run: first far, to get
    near, then less and less, to settle."""
    rise = (step + 1) / (config.warmup_iters + 1)
    fall = 1 - step / config.max_iters
    return min(rise, fall)


def train(model, tokenizer, train_data, val_data, config, autocast, checkpoint):
    """Gradient descent, as in bigram.py, with better steps.

    At each evaluation, and after Ctrl-C, saves the checkpoint with what is new in it: the history
    ([step, training loss, validation loss] of each evaluation), the weights that had the best
    validation loss so far ("model"), and all it takes to go on after the last step ("last").
    Returns the number of steps done, which after Ctrl-C is less than max_iters.
    """
    optimizers = make_optimizers(model, config)
    first, losses, history = 0, [], checkpoint["history"]
    if checkpoint["last"]:
        first, losses = restore(checkpoint["last"], model, optimizers)
    forward = model
    if config.compile and train_data.is_cuda:
        with autocast:
            forward = try_compile(model, *get_batch(train_data, config, first))
    interrupts = catch_interrupts()
    done = first
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
        torch.manual_seed(int(np.random.default_rng((config.seed, step)).integers(2**32)))
        model.train()  # dropout on; evaluate() and generate() turn it off
        with autocast:
            logits, loss = forward(x, y)
        check_finite("loss", loss.item(), step, config)
        loss.backward()
        # The gradient is shortened, so that one odd batch does no harm.
        length = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        check_finite("gradient", length.item(), step, config)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

        done, interrupted = step + 1, bool(interrupts)
        if step == first:
            started = time.perf_counter()  # the first step is slow, and does not count
        else:
            print_progress(done, step - first, y.numel(), loss.item(), started, config)
        elapsed = time.perf_counter() - started
        is_tenth = config.minutes and elapsed > 60 * config.minutes / 10  # of the time, in seconds
        if step == first + 10 or is_tenth:
            seconds = elapsed / max(step - first, 1)  # per step
            if config.minutes:
                set_steps(config, first, seconds, n_val_tokens=len(val_data), n_tokens=y.numel())
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
        if evaluates or interrupted:
            states = [optimizer.state_dict()["state"] for optimizer in optimizers]
            checkpoint["last"] = dict(step=done, losses=losses, optimizers=states)
            checkpoint["last"]["model"] = model.state_dict()
            save_checkpoint(config.out, checkpoint)
        if evaluates:
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


# What a run keeps from its first step to its last, besides its text.
FIXED = "n_layer", "n_head", "n_embd", "block_size", "batch_size", "seed", "full"


def main():
    given = parse_flags(GPTConfig)
    checkpoint, small = None, False
    if given.get("resume"):
        checkpoint = load_checkpoint(given.get("out", GPTConfig.out), "char_gpt")
        config = resume_settings(GPTConfig, checkpoint, given, FIXED)
        device = pick_device(config.device)
    else:
        device = pick_device(given.get("device", "auto"))
        small = device.type == "cpu" and not given.get("full")
        config = GPTConfig(**{**(CPU_SETTINGS if small else {}), **given})
    dtype = pick_dtype(config.dtype, device)
    check_writable(config.out)

    text = load_text(config)
    fingerprint = hashlib.sha256(text.encode("utf-8")).hexdigest()
    tokenizer = CharTokenizer(text)
    config.vocab_size = tokenizer.vocab_size
    train_data, val_data = [
        torch.tensor(tokenizer.encode(part), device=device) for part in split_text(text)
    ]
    torch.manual_seed(config.seed)
    model = GPT(config).to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if checkpoint is None:
        checkpoint = dict(script="char_gpt", vocab="".join(tokenizer.chars), history=[], last=None)
        checkpoint["data"] = fingerprint
    else:
        check_resumable(checkpoint, fingerprint, config)
    checkpoint["config"] = asdict(config)
    if not checkpoint["history"]:
        checkpoint["model"] = model.state_dict()  # the weights as they are, until there is a best

    n_params = sum(p.numel() for p in model.parameters())
    n_tokens = config.batch_size * config.block_size
    print(
        f"model: GPT, {config.n_layer} layers of {config.n_head} heads, {config.n_embd} wide, "
        f"{n_params:,} parameters, on {device} in {str(dtype).removeprefix('torch.')}\n"
        f"plan: {config.max_iters:,} steps of {n_tokens:,} tokens"
        + (" (the small model, for a CPU; --full trains the large one)" if small else "")
    )
    if checkpoint["last"]:
        print(f"going on after step {checkpoint['last']['step']:,}")
    else:
        if Path(config.out).exists():
            print(f"note: {config.out} is there already, and will be replaced")
        with autocast:
            val_loss = evaluate(model, val_data, config)
        print(
            f"before training: validation loss {val_loss:.4f}; "
            f"an even guess costs ln({tokenizer.vocab_size}) = {math.log(tokenizer.vocab_size):.4f}"
        )

    done = train(model, tokenizer, train_data, val_data, config, autocast, checkpoint)
    if done < config.max_iters:
        print(f"{CLEAR_LINE}stopped after step {done:,}, and saved {config.out}")
        print(f"to go on: python char_gpt.py --resume --out {config.out}")
        return
    best_step, _, best = min(checkpoint["history"], key=lambda row: row[2])
    print(
        f"validation loss {checkpoint['history'][-1][2]:.4f} at the end, "
        f"{best:.4f} at best (step {best_step:,}, kept)\n"
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
