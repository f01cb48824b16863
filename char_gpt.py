"""Character-level GPT: the transformer of GPT-2, small enough to train on Shakespeare at home.

bigram.py predicts the next character from the last one alone. Here each prediction can draw on up
to 256 characters, and the model learns which of them matter. Only model and training are new.

    python char_gpt.py                # a GPU trains the full model, a CPU a small one in 3 minutes
    python char_gpt.py --full         # the full 6-layer, 384-wide model on a CPU too: 35 minutes
    python char_gpt.py --minutes 10   # as many steps as fit into ten minutes
    python char_gpt.py --resume       # go on with a run that was stopped

On Tiny Shakespeare the validation loss falls from 4.2 to 1.50 (small) or 1.44 (full).
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
import signal
import sys
import time
import urllib.request
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
    n_layer: int = 6  # transformer blocks
    n_head: int = 6  # attention heads in a block; must divide n_embd
    n_embd: int = 384  # width: numbers that represent a token on its way through the blocks
    block_size: int = 256  # context: how many characters the model can see
    dropout: float = 0.1  # fraction of activations zeroed in training, against overfitting
    fused: bool = True  # use PyTorch's kernels for the formulas written out below
    batch_size: int = 16  # sequences in a step
    max_iters: int = 1400  # steps of gradient descent
    minutes: float = 0.0  # if given, train for this long instead (in all, if resumed)
    eval_interval: int = 200  # steps between evaluations
    learning_rate: float = 0.006  # of AdamW, for embeddings, gains and biases
    muon_learning_rate: float = 0.025  # of Muon, for the matrices of the blocks
    warmup_iters: int = 10  # steps over which the learning rates rise from zero
    weight_decay: float = 0.2  # pull of the matrices towards zero, against overfitting
    grad_clip: float = 1.0  # gradient clipping: shorten gradients of a larger norm than this
    seed: int = 1337  # the same seed gives the same run
    full: bool = False  # train the full model on a CPU too
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of matrix products: float32 or bfloat16
    compile: bool = True  # torch.compile, on a CUDA GPU
    resume: bool = False  # go on from the checkpoint, if there is one
    data: str = ""  # text file to learn from; default: Tiny Shakespeare
    out: str = "out/char_gpt.pt"  # checkpoint, for sample.py and --resume

# What a CPU trains unless told otherwise: the same model, smaller. Small models overfit less.
CPU_SETTINGS = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, dropout=0.0, weight_decay=0.1,
                    max_iters=1800, eval_interval=300)

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
# C is n_embd. Each token is a vector of C numbers: x is (B, T, C) all the way through the model.
class LayerNorm(nn.LayerNorm):
    """Normalises each token's vector to mean 0 and variance 1, then applies a learned gain and
    bias, so that every layer gets inputs of one scale. Ba, Kiros & Hinton 2016."""
    def __init__(self, config):
        super().__init__(config.n_embd)  # the gain, weight, starts at 1 and the bias at 0
        self.fused = config.fused

    def forward(self, x):
        if self.fused:
            return super().forward(x)
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)  # (B, T, 1)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class GELU(nn.Module):
    """The activation function: a smooth max(0, x). Without a nonlinearity between them, two linear
    maps would equal a single one. Hendrycks & Gimpel 2016, in their approximation with tanh."""
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(q, k, v):  # all of them, and the result, are (B, n_head, T, head_size)
    """Each token collects information from itself and those before it. It has a query (what it is
    looking for), a key (what it can be found by) and a value (what it passes on). Dot products
    compare its query with their keys; softmax turns these scores into attention weights, which sum
    to 1; the result is the weighted mean of their values. Vaswani et al. 2017, section 3.2.1."""
    T, head_size = q.shape[-2:]
    # The variance of a dot product grows with head_size; dividing by sqrt(head_size) undoes that.
    # Large scores would saturate the softmax, and its gradient would vanish.
    scores = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, T)
    # Causal mask: a token must not see what it has to predict. A score of -inf gives weight 0.
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # column <= row
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v


class CausalSelfAttention(nn.Module):
    """Attention in n_head heads side by side, each with its own queries, keys and values: one can
    look for the speaker's name and another for where the word began."""
    def __init__(self, config):
        super().__init__()
        self.n_head, self.fused = config.n_head, config.fused
        # nn.Linear multiplies by a learned matrix and adds a learned bias.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads found

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_size)
        if self.fused and x.device.type != "cpu":  # on a CPU the formula is faster
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenates the heads
        return self.c_proj(y)


class MLP(nn.Module):
    """Works on each token by itself: what attention collected is processed here."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh") if config.fused else GELU()
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
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.dropout(self.attn(self.ln_1(x)))
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), with its parameter names."""
    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),  # token embeddings
            "wpe": nn.Embedding(config.block_size, config.n_embd),  # position embeddings
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": LayerNorm(config),
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

    def forward(self, idx, targets=None):
        """Tokens idx (B, T) to logits (B, T, vocab_size); with targets (B, T), also the loss."""
        B, T = idx.shape
        if T > self.block_size:
            raise ValueError(f"{T} tokens do not fit into the context of {self.block_size}")
        # Attention is a weighted mean, and a mean is blind to order: wpe says where a token stands.
        positions = self.transformer.wpe(torch.arange(T, device=idx.device))  # (T, C)
        x = self.transformer.drop(self.transformer.wte(idx) + positions)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
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


def make_optimizers(model, config):
    """Muon (Jordan et al. 2024) for the blocks' matrices: it replaces the mean gradient by the
    nearest orthogonal matrix, so that weak directions move as far as the few dominant ones. AdamW
    (Adam with weight decay, here 0) for gains, biases, and embeddings, whose rows are tokens."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if ".h." in name and p.dim() == 2 else others).append(p)
    muon = torch.optim.Muon(matrices, config.muon_learning_rate, config.weight_decay)
    adamw = torch.optim.AdamW(others, config.learning_rate, weight_decay=0)
    return muon, adamw


def training_step(model, optimizers, x, y, step, fraction, config, autocast):
    """One step of gradient descent; returns the loss. fraction says how much of the run is over."""
    # Learning-rate schedule: warm up, while gradients are large and the optimizers' averages new;
    # then fall to zero as half a cosine: long steps get near a minimum, short ones settle in it.
    multiplier = min((step + 1) / (config.warmup_iters + 1), math.cos(math.pi / 2 * fraction) ** 2)
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = multiplier * optimizer.defaults["lr"]
    # Dropout zeroes random activations, so that the model cannot rely on any single one: train()
    # turns it on, eval() off. What it drops depends, like the batch, on (seed, step) alone.
    torch.manual_seed(config.seed * 1_000_003 + step)
    model.train()
    with autocast:
        _, loss = model(x, y)
    loss.backward()
    if not nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).isfinite():
        raise ValueError(f"infinite or NaN gradient in step {step + 1}: try lower learning rates")
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def train(model, train_data, val_data, tokenizer, config, checkpoint, autocast):
    """Train from where the checkpoint stands; save it at every evaluation and at Ctrl-C. It holds
    the weights with the lowest validation loss ("model"; later ones may overfit) and the state of
    the run ("last"), all that the next step depends on: a resumed run is the same, bit for bit."""
    optimizers = make_optimizers(model, config)
    history, last = checkpoint["history"], checkpoint["last"]
    step, losses, started = last["step"], last["losses"], time.perf_counter() - last["seconds"]
    earlier = step == 0 and Path(config.out).exists()  # an older run: kept until an evaluation
    if step > 0:
        model.load_state_dict(last["model"])
        for optimizer, state in zip(optimizers, last["optimizers"]):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    forward = torch.compile(model) if config.compile and train_data.is_cuda else model
    caught, stop = catch_signals(), False
    def progress():  # the fraction of the run that is over
        seconds = time.perf_counter() - started
        return seconds / 60 / config.minutes if config.minutes else step / config.max_iters
    fraction = progress()
    while fraction < 1 and not stop:
        x, y = get_batch(train_data, config, step)
        losses.append(training_step(forward, optimizers, x, y, step, fraction, config, autocast))
        step += 1
        fraction, stop = progress(), len(caught) > 0
        show_progress(step, losses[-1], y.numel(), fraction, started)
        if step % config.eval_interval == 0 or fraction >= 1:
            with autocast:
                val_loss = evaluate(model, val_data, config)
            if all(val_loss < best for _, _, best in history):
                checkpoint["model"] = copy.deepcopy(model.state_dict())
            history.append((step, sum(losses) / len(losses), val_loss))
            losses, earlier = [], False
        if not losses or stop and not earlier:
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


def main():
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # any character, line by line
    given = parse_flags(GPTConfig)
    config = GPTConfig(**given)
    check_out(config.out)
    checkpoint = settings = {}
    if config.resume and Path(config.out).exists():
        checkpoint = load_checkpoint(config.out, "char_gpt")
        settings = checkpoint["config"]
    elif pick_device(config.device).type == "cpu" and not config.full:
        settings = CPU_SETTINGS
        print("a CPU trains a small model; --full trains the full one")
    config = GPTConfig(**settings | given | {"out": config.out})
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    text = load_text(config.data)
    fixed = (f"n_layer {config.n_layer}, n_head {config.n_head}, n_embd {config.n_embd}, block_size"
             f" {config.block_size}, text {hashlib.sha256(text.encode()).hexdigest():.12}")
    if checkpoint.get("fixed", fixed) != fixed:
        raise ValueError(f"--resume: the run has {checkpoint['fixed']}; this is {fixed}")
    tokenizer = CharTokenizer(text)
    config.vocab_size = V = len(tokenizer.chars)
    train_data, val_data = split_data(torch.tensor(tokenizer.encode(text), device=device), config)
    torch.manual_seed(config.seed)
    model = GPT(config).to(device)
    print(f"{len(text):,} characters, {V} distinct; on {device} in {dtype}: "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{config.batch_size * config.block_size:,} characters in a step")
    if not checkpoint:
        checkpoint = dict(script="char_gpt", vocab=tokenizer.chars, history=[], fixed=fixed,
                          bytes_per_token=len(text[len(train_data) :].encode()) / len(val_data),
                          model=model.state_dict(), last=dict(step=0, losses=[], seconds=0))
        with autocast:
            val_loss = evaluate(model, val_data, config)
        print(f"before training: val loss {val_loss:.4f}; uniform: ln({V}) = {math.log(V):.4f}")
    checkpoint["config"] = vars(config)
    train(model, train_data, val_data, tokenizer, config, checkpoint, autocast)
    step, _, best = min(checkpoint["history"], key=lambda entry: entry[2])
    print(f"best val loss {best:.4f} at step {step}; next: python sample.py {config.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
