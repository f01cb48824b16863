"""How fast the scripts are, beside what they are to be compared with, in one run on this machine:

    python tests/bench.py                  # a table, in less than 15 minutes on two CPU cores
    python tests/bench.py --json speed.json
    python tests/bench.py --only decode    # a part: limits, small, full, decode, load or finetune
    python tests/bench.py --long           # trains the full character model too, to its end

Baselines: the plain recipe, which is the same model trained with AdamW in float32 by nanoGPT's
published settings; text without a cache; what the machine itself can do (matrix products, reading
memory); and Hugging Face's GPT-2, where transformers is installed. The 124M model has random
numbers for weights, which are as slow as any. Each time is the median of several, unless it is that
of a whole training run. The clock stands still while a model is evaluated.
"""

import argparse
import contextlib
import io
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bpe_gpt
import char_gpt

DEVICE = char_gpt.pick_device("auto")
FAST = char_gpt.pick_dtype("auto", DEVICE)
ROWS = []


def row(what, value, unit, baseline="", ratio=None):
    """One line of the table: a figure, and how it compares with a baseline."""
    if math.isinf(value):
        value, unit, ratio = None, "never", None
    ROWS.append(dict(what=what, value=value, unit=unit, baseline=baseline, ratio=ratio))
    value = value or 0.0
    digits = 4 if unit == "loss" else 2 if value < 10 else 1 if value < 100 else 0
    compared = "" if ratio is None else f"{ratio:6.2f} x  "
    print(f"{what:58} {value:10,.{digits}f} {unit:10} {compared}{baseline}", flush=True)


def now():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_time(function, repeats=5):
    """The median of the seconds that it takes, after a first time that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = now()
        function()
        times.append(now() - start)
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------
# What the machine can do


def matrix_rate(rows, n_embd, dtype):
    """Operations a second in the largest matrix product of a model's blocks."""
    a = torch.randn(rows, n_embd, device=DEVICE, dtype=dtype)
    b = torch.randn(n_embd, 4 * n_embd, device=DEVICE, dtype=dtype)
    return 2 * rows * n_embd * 4 * n_embd / median_time(lambda: a @ b, repeats=20)


def memory_rate():
    """Bytes a second that are read from memory, when nothing is done but to add them up."""
    x = torch.randn(100_000_000, device=DEVICE)
    return 4 * x.numel() / median_time(x.sum)


def limits():
    for name, rows, n_embd in (("4x128", 2048, 128), ("6x384", 4096, 384), ("124M", 1024, 768)):
        for dtype in {torch.float32, FAST}:
            rate = matrix_rate(rows, n_embd, dtype)
            row(f"matrix products of {name}, {str(dtype)[6:]}", rate / 1e9, "GFLOP/s")
    row("reading memory", memory_rate() / 1e9, "GB/s")


# ---------------------------------------------------------------------------------------------
# Training on characters


def plain_recipe(size):
    """nanoGPT's published settings for Shakespeare's characters, on a CPU or full."""
    small = dict(char_gpt.CPU_SETTINGS, batch_size=12, max_iters=2000, eval_interval=250)
    full = dict(dropout=0.2, batch_size=64, max_iters=5000, eval_interval=250)
    config = char_gpt.GPTConfig(**(small if size == "small" else full))

    def make_optimizers(model, config):
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))]

    def share(step, config):  # cosine from 1e-3 to 1e-4
        through = max(step - 100, 0) / (config.max_iters - 100)
        return min(step / 100, 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * through)))

    return config, make_optimizers, share, torch.float32


def our_recipe(size, **settings):
    """What `python char_gpt.py`, or `--full`, does on this machine."""
    settings = {**(char_gpt.CPU_SETTINGS if size == "small" else {}), **settings}
    config = char_gpt.GPTConfig(**settings)
    return config, char_gpt.make_optimizers, char_gpt.learning_rate_share, FAST


def fused_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def training(recipe, steps=None, every=None):
    """Trains as the recipe says, but for its first `steps` only, if given. Yields (seconds of this
    step, seconds of all, validation loss or None) after each step; the loss is that of the whole
    split, every so many steps."""
    config, make_optimizers, share, dtype = recipe
    with contextlib.redirect_stdout(io.StringIO()):
        text = char_gpt.load_text(config)
    tokenizer = char_gpt.CharTokenizer(text)
    train_data, val_data = [
        torch.tensor(tokenizer.encode(part), device=DEVICE) for part in char_gpt.split_text(text)
    ]
    torch.manual_seed(config.seed)
    model = forward = char_gpt.GPT(config).to(DEVICE)
    optimizers = make_optimizers(model, config)
    autocast = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)
    if DEVICE.type == "cuda" and dtype != torch.float32:
        with autocast:
            forward = char_gpt.try_compile(model, *char_gpt.get_batch(train_data, config, 0))
    seconds = 0.0
    for step in range(steps or config.max_iters):
        start = now()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share(step, config) * optimizer.defaults["lr"]
        x, y = char_gpt.get_batch(train_data, config, step)
        model.train()
        with autocast:
            _, loss = forward(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        took = now() - start
        seconds += took
        val_loss = None
        if every and ((step + 1) % every == 0 or step + 1 == config.max_iters):
            with autocast:
                val_loss = char_gpt.evaluate(model, val_data, config)
        yield took, seconds, val_loss


def plain_training(size, **options):
    """The plain recipe, with the attention that is the faster one in float32."""
    ours = char_gpt.attention
    char_gpt.attention = fused_attention
    yield from training(plain_recipe(size), **options)
    char_gpt.attention = ours


def time_to(goal, evaluations):
    """The seconds until the loss has come down to the goal, in a line between two evaluations."""
    before = None
    for seconds, loss in evaluations:
        if loss <= goal:
            if before is None:
                return seconds
            share = (before[1] - goal) / (before[1] - loss)
            return before[0] + share * (seconds - before[0])
        before = seconds, loss
    return math.inf


def evaluations(run):
    return [(seconds, loss) for _, seconds, loss in run if loss is not None]


def step_time(run):
    times = [took for took, _, _ in run]
    return statistics.median(times[1:])


def flops(config):
    """Floating-point operations of a training step of the model (Kaplan et al. 2020, appendix B): 6
    for each weight of a matrix and token; and attention's own, of which the mask leaves half."""
    C, T = config.n_embd, config.block_size
    weights = 12 * config.n_layer * C * C + config.vocab_size * C
    return config.batch_size * T * (6 * weights + 6 * config.n_layer * T * C)


def small():
    plain = evaluations(plain_training("small", every=100))
    row("plain recipe, 4x128, 2,000 steps", plain[-1][0], "s")
    row("  validation loss at the end", plain[-1][1], "loss")
    best = min(loss for _, loss in plain)  # about that of nanoGPT's README, 1.88
    slow = time_to(best, plain)
    row("  until its best validation loss", slow, "s")
    for name, settings in (("--max_iters 275", dict(max_iters=275)), ("", {})):
        ours = evaluations(training(our_recipe("small", **settings), every=25))
        fast = time_to(best, ours)
        row(f"char_gpt.py {name}".rstrip(), ours[-1][0], "s")
        row("  validation loss, best", min(loss for _, loss in ours), "loss")
        row(f"  until validation loss {best:.4f}", fast, "s", "of the plain recipe's", fast / slow)


def full(long):
    plain = step_time(plain_training("full", steps=4))
    row("plain recipe, 6x384, a step of 64x256", plain, "s")
    recipe = our_recipe("full")
    config = recipe[0]
    ours = step_time(training(recipe, steps=9))
    row(f"char_gpt.py --full, a step of {config.batch_size}x{config.block_size}", ours, "s")
    rate = flops(config) / ours
    limit = matrix_rate(config.batch_size * config.block_size, config.n_embd, FAST)
    row("  operations of the model", rate / 1e9, "GFLOP/s", "of matrix products", rate / limit)
    goal = 1.4697  # the best validation loss in nanoGPT's README
    if not long:
        share = config.max_iters * ours / (2000 * plain)
        row("  all its steps", config.max_iters * ours / 60, "min", "of 2,000 plain steps", share)
        return
    done = evaluations(training(recipe, every=100))
    row("  all its steps", done[-1][0] / 60, "min")
    row("  validation loss, best", min(loss for _, loss in done), "loss")
    fast = time_to(goal, done)
    row(
        f"  until validation loss {goal}",
        fast / 60,
        "min",
        "of 2,000 plain steps",
        fast / 2000 / plain,
    )


# ---------------------------------------------------------------------------------------------
# GPT-2 124M


def likeliest(logits):
    return logits.argmax(dim=-1, keepdim=True)


def tokens_per_second(model, n_rows, n_tokens):
    """The speed of generate(), from the second token on; median of three."""
    prompt = torch.arange(16, device=DEVICE).repeat(n_rows, 1)
    speeds = []
    for _ in range(3):
        tokens = bpe_gpt.generate(model, prompt, n_tokens + 1, likeliest)
        next(tokens)
        start = now()
        speeds.append(n_rows * sum(1 for _ in tokens) / (now() - start))
    return statistics.median(speeds)


def lay_out(model):
    """As sample.py does after a change of precision: each matrix in the order of its rows."""
    for p in model.parameters():
        p.data = p.data.contiguous()
    return model


def decode(folder):
    model = bpe_gpt.load_pretrained(folder)[0].to(DEVICE)
    theirs = in_transformers(folder, "decode")
    prompt = torch.arange(16, device=DEVICE)[None]
    start, n = now(), 0
    with torch.no_grad():
        while now() - start < 10:  # to 100 tokens or so
            prompt = torch.cat((prompt, likeliest(model(prompt)[0][:, -1])), dim=1)
            n += 1
    plain = n / (now() - start)
    row(f"124M, {n} tokens without a cache, float32", plain, "tokens/s")
    bandwidth = memory_rate()
    row("reading memory", bandwidth / 1e9, "GB/s")
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (DEVICE.type == "cpu")
    for dtype in dtypes:
        model = lay_out(model.to(dtype))
        name = str(dtype)[6:]
        one = tokens_per_second(model, 1, 60)
        n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        row(
            f"124M, with the cache, {name}",
            one,
            "tokens/s",
            "of reading all weights",
            one * n_bytes / bandwidth,
        )
        for key, value in theirs.items():
            if key == f"{name} 1":
                row("  by transformers", value, "tokens/s", "(ours to theirs)", one / value)
        if dtype == torch.bfloat16:
            eight = tokens_per_second(model, 8, 30)
            row(f"124M, 8 texts together, {name}", eight, "tokens/s", "of one", eight / one)
            if theirs:
                value = theirs[f"{name} 8"]
                row("  by transformers", value, "tokens/s", "(ours to theirs)", eight / value)


def load(folder):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import torch, bpe_gpt\n"
        "start = time.perf_counter(); model, _ = bpe_gpt.load_pretrained(sys.argv[2])\n"
        "next(bpe_gpt.generate(model, torch.zeros(1, 5, dtype=torch.long), 1))\n"
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code, str(Path(bpe_gpt.__file__).parent), str(folder)]
    times = [
        float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(3)
    ]
    row("124M, from its file to the first token, float32", statistics.median(times), "s")


def finetune_here(folder, name, dtype):
    """Prints the seconds of a training step of 4x256 tokens, and the peak of memory in bytes."""
    dtype = getattr(torch, dtype)
    x = torch.randint(50257, (4, 257), device=DEVICE)
    if name == "ours":
        config = dict(dropout=0.1, muon_learning_rate=0)
        model = lay_out(bpe_gpt.load_pretrained(folder, **config)[0]).to(DEVICE).train()
        optimizer = bpe_gpt.make_optimizers(model, model.config)[0]
        loss_of = lambda: model(x[:, :-1], x[:, 1:])[1]
    else:
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(folder).to(DEVICE).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
        loss_of = lambda: model(x[:, :-1], labels=x[:, :-1]).loss

    def step():
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = median_time(step)
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # Linux only; getrusage() would count this process's parent, too
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    print(json.dumps([seconds, peak]))


def apart(*command):
    """What bench.py prints for a part of it that runs in a process of its own; None if it fails."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, command)], capture_output=True, encoding="utf-8"
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def finetune(folder):
    for dtype in dict.fromkeys(["float32", str(FAST)[6:]]):
        seconds, peak = apart("--apart", "ours", dtype, folder)
        row(f"124M, a training step of 4x256, {dtype}", 1024 / seconds, "tokens/s")
        row("  peak of memory", peak / 1e9, "GB")
        theirs = apart("--apart", "transformers", dtype, folder)
        if theirs:
            row(
                "  by transformers",
                1024 / theirs[0],
                "tokens/s",
                "(ours to theirs)",
                theirs[0] / seconds,
            )
            row("  peak of memory", theirs[1] / 1e9, "GB", "(ours to theirs)", peak / theirs[1])


def in_transformers(folder, what):
    return apart("--apart", what, "all", folder) or {}


def decode_in_transformers(folder):
    """Prints the tokens/s of Hugging Face's generate(), by precision and number of texts."""
    from transformers import GPT2LMHeadModel

    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
        for n_rows in (1, 8):
            prompt = torch.arange(16, device=DEVICE).repeat(n_rows, 1)
            n = 60 if n_rows == 1 else 30
            seconds = median_time(
                lambda: model.generate(
                    prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
                ),
                repeats=3,
            )
            speeds[f"{str(dtype)[6:]} {n_rows}"] = n_rows * n / seconds
    print(json.dumps(speeds))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = ("limits", "small", "full", "decode", "load", "finetune")
    parser.add_argument("--only", choices=parts, help="this part only")
    parser.add_argument("--long", action="store_true", help="train the full model to its end")
    parser.add_argument("--json", help="file for the same figures as data")
    parser.add_argument("--apart", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.apart:
        name, dtype, folder = args.apart
        if name == "decode":
            decode_in_transformers(folder)
        else:
            finetune_here(folder, name, dtype)
        return
    wanted = [args.only] if args.only else parts
    print(f"{DEVICE}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    if "limits" in wanted:
        limits()
    if "small" in wanted:
        small()
    if "full" in wanted:
        full(args.long)
    if {"decode", "load", "finetune"} & set(wanted):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            tokenizer = bpe_gpt.make_tokenizer(
                [*(bytes([b]) for b in bpe_gpt.BYTES), b"<|endoftext|>"]
            )
            bpe_gpt.export(bpe_gpt.GPT(bpe_gpt.GPTConfig()), tokenizer, folder)
            if "decode" in wanted:
                decode(folder)
            if "load" in wanted:
                load(folder)
            if "finetune" in wanted:
                finetune(folder)
    if args.json:
        Path(args.json).write_text(json.dumps(ROWS, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
