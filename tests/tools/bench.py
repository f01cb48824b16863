"""How fast the scripts are, beside what they are to be compared with, in one run on this machine:

    python tests/tools/bench.py                  # a table; most parts take minutes
    python tests/tools/bench.py --json speed.json
    python tests/tools/bench.py --only decode    # or limits, small, full, bpe, load, finetune: one part
    python tests/tools/bench.py --only gpu       # what is worth knowing of a GPU, in a few minutes
    python tests/tools/bench.py --long           # trains the full character model too, to its end

Baselines: the plain recipe, which is the same model trained with AdamW in float32 by nanoGPT's
published settings; text without a cache; what the machine itself can do (matrix products, reading
memory); and Hugging Face's GPT-2, where transformers is installed. The 124M model has random
numbers for weights, which are as slow as any. Each time is the median of several, unless it is that
of a whole training run. While a character model is evaluated, the clock stands still.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import bpe_gpt
import char_gpt
import hugging_face

DEVICE = char_gpt.pick_device("auto")
FAST = char_gpt.pick_dtype("auto", DEVICE)
ROWS = []


def row(what, value, unit, baseline="", ratio=None):
    """One line of the table: a figure, and how it compares with a baseline."""
    if math.isinf(value):
        value, unit, ratio = None, "never", None
    ROWS.append(dict(what=what, value=value, unit=unit, baseline=baseline, ratio=ratio))
    figure = compared = ""
    if value is not None:
        digits = {"loss": 4, "bits/byte": 3}.get(unit, 2 if value < 10 else 1 if value < 100 else 0)
        figure = f"{value:,.{digits}f}"
    if ratio is not None:
        compared = f"{ratio:6.2f} x  "
    print(f"{what:58} {figure:>10} {unit:10} {compared}{baseline}", flush=True)


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
# Training on characters. The small model sees 128 characters, in the plain recipe 64.

# A recipe is a configuration, its optimizers, and a precision. The steps are those of char_gpt.py.


class PlainAdamW(torch.optim.AdamW):
    """AdamW with nanoGPT's published settings and schedule: after the warm-up, the rate falls as a
    cosine from 1e-3 to 1e-4. (The multiplier of char_gpt.py's own schedule does not count.)"""
    def __init__(self, model, config):
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [dict(params=decayed, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
        super().__init__(groups, lr=1e-3, betas=(0.9, 0.99))
        self.config = config
        self.n_steps = 0

    def step(self, multiplier):
        warmup, end = self.config.warmup_iters, self.config.max_iters
        through = (self.n_steps - warmup) / (end - warmup)
        cosine = 1e-4 + 9e-4 * (1 + math.cos(math.pi * through)) / 2
        rising = 1e-3 * (self.n_steps + 1) / (warmup + 1)
        for group in self.param_groups:
            group["lr"] = rising if self.n_steps < warmup else cosine
        self.n_steps += 1
        super().step()


def plain_recipe(size):
    """nanoGPT's published settings for Shakespeare's characters, on a CPU or full (but for dropout,
    which takes time and is not in char_gpt.py)."""
    settings = dict(warmup_iters=100, eval_interval=250, compile=False)
    if size == "small":
        settings |= char_gpt.CPU_SETTINGS | dict(block_size=64, batch_size=12, max_iters=2000)
    else:
        settings |= dict(batch_size=64, max_iters=5000)
    optimizers = lambda model, config: [PlainAdamW(model, config)]
    return char_gpt.GPTConfig(**settings), optimizers, torch.float32


def our_recipe(size, **settings):
    """What `python char_gpt.py` does on a CPU, with `--full` if full."""
    smaller = char_gpt.CPU_SETTINGS if size == "small" else {}
    return char_gpt.GPTConfig(**smaller | settings), char_gpt.make_optimizers, FAST


def training(recipe, steps=None, every=None):
    """Trains as the recipe says, but for its first `steps` only, if given. Yields (seconds of this
    step, seconds of all, validation loss or None) after each step; the loss is that of the whole
    split, every so many steps."""
    config, make_optimizers, dtype = recipe
    with contextlib.redirect_stdout(io.StringIO()):
        text = char_gpt.load_text(config.data)
    tokenizer = char_gpt.CharTokenizer(text)
    config.vocab_size = len(tokenizer.chars)
    data = torch.tensor(tokenizer.encode(text), device=DEVICE)
    train_data, val_data = char_gpt.split_data(data, config)
    torch.manual_seed(config.seed)
    model = char_gpt.GPT(config).to(DEVICE)
    forward = torch.compile(model) if config.compile and DEVICE.type == "cuda" else model
    optimizers = make_optimizers(model, config)
    autocast = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)
    seconds = 0.0
    for step in range(steps or config.max_iters):
        start = now()
        x, y = char_gpt.get_batch(train_data, config, step)
        char_gpt.training_step(forward, optimizers, x, y, step, config, autocast)
        took = now() - start
        seconds += took
        val_loss = None
        if every and ((step + 1) % every == 0 or step + 1 == config.max_iters):
            with autocast:
                val_loss = char_gpt.evaluate(model, val_data, config)
        yield took, seconds, val_loss


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


def whole_run(script, *flags):
    """`python script`, from its start to its end: its seconds and its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/{Path(script).stem}.pt"
        command = [sys.executable, script, "--out", out, *flags]
        start = now()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return now() - start, torch.load(out, weights_only=True)


def lowest(checkpoint):
    return min(entry[3] for entry in checkpoint["history"])


def small():
    plain = evaluations(training(plain_recipe("small"), every=100))
    row("plain recipe, 4x128, 2,000 steps", plain[-1][0], "s")
    row("  validation loss at the end", plain[-1][1], "loss")
    best = min(loss for _, loss in plain)  # about that of nanoGPT's README, 1.88
    slow = time_to(best, plain)
    row("  until its best validation loss", slow, "s")
    for name, settings in (("--max_iters 275", dict(max_iters=275)), ("", {})):
        ours = evaluations(training(our_recipe("small", **settings), every=25))
        fast = time_to(best, ours)
        row(f"char_gpt.py {name}, its steps".replace(" ,", ","), ours[-1][0], "s")
        row("  validation loss, best", min(loss for _, loss in ours), "loss")
        row(f"  until validation loss {best:.4f}", fast, "s", "of the plain recipe's", fast / slow)
    seconds, checkpoint = whole_run(char_gpt.__file__, "--device", "cpu")
    row("char_gpt.py, from its start to its end, on the CPU", seconds, "s")
    row("  validation loss, best", lowest(checkpoint), "loss")


GOAL = 1.4697  # the best validation loss in nanoGPT's README, and the plain recipe's
PLAIN_STEPS = 1750  # after which the plain recipe reaches it


def full(long):
    plain = step_time(training(plain_recipe("full"), steps=4))
    row("plain recipe, 6x384, a step of 64x256", plain, "s")
    row(f"  {PLAIN_STEPS} of them", PLAIN_STEPS * plain / 60, "min")
    recipe = our_recipe("full")
    config = recipe[0]
    ours = step_time(training(recipe, steps=9))
    row(f"char_gpt.py --full, a step of {config.batch_size}x{config.block_size}", ours, "s")
    rate = flops(config) / ours
    limit = matrix_rate(config.batch_size * config.block_size, config.n_embd, FAST)
    row("  operations of the model", rate / 1e9, "GFLOP/s", "of matrix products", rate / limit)
    share = config.max_iters * ours / (PLAIN_STEPS * plain)
    row("  all its steps", config.max_iters * ours / 60, "min", "of the plain recipe's", share)
    if long:
        seconds, checkpoint = whole_run(char_gpt.__file__, "--device", "cpu", "--full")
        row("char_gpt.py --full, from its start to its end, on the CPU", seconds / 60, "min")
        row("  validation loss, best", lowest(checkpoint), "loss")
        # Counted in steps: half an hour is long enough for the machine to become slower or faster.
        done = [(step * ours, loss) for step, _, _, loss in checkpoint["history"]]
        fast, slow = time_to(GOAL, done), PLAIN_STEPS * plain
        row(f"  until {GOAL}, by its steps", fast / 60, "min", "of the plain recipe's", fast / slow)


# ---------------------------------------------------------------------------------------------
# Training on learned tokens


def bpe():
    seconds, checkpoint = whole_run(bpe_gpt.__file__, "--device", "cpu")
    row("bpe_gpt.py, from its start to its end, on the CPU", seconds, "s")
    row("  training, evaluation and samples", checkpoint["last"]["seconds"], "s")
    row("  validation loss, best", lowest(checkpoint), "loss")
    bits = lowest(checkpoint) / math.log(2) / checkpoint["bytes_per_token"][1]
    row("  the same", bits, "bits/byte")


# ---------------------------------------------------------------------------------------------
# GPT-2 124M


def likeliest(logits):
    return logits.argmax(dim=-1, keepdim=True)


def generation(model, n_rows, n_tokens, n_prompt=16):
    """The seconds that generate() takes for tokens after a prompt, the prompt included."""
    prompt = torch.arange(n_prompt, device=DEVICE).repeat(n_rows, 1)
    start = now()
    for _ in bpe_gpt.generate(model, prompt, n_tokens, likeliest):
        pass
    return now() - start


def their_generation(model, n_rows, n_tokens, n_prompt=16):
    """The same by Hugging Face's generate()."""
    prompt = torch.arange(n_prompt, device=DEVICE).repeat(n_rows, 1)
    settings = dict(max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)
    start = now()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **settings)
    return now() - start


def turns(runs, dtype, *sizes):
    """The median seconds of each of runs. They take turns, on a machine whose speed changes."""
    seconds = {who: [] for who in runs}
    for _ in range(6):  # the first warms up
        for who, (model, generate) in runs.items():
            seconds[who].append(generate(model.to(dtype), *sizes))
    return {who: statistics.median(times[1:]) for who, times in seconds.items()}


def decode(folder):
    model = hugging_face.load_model(folder).to(DEVICE)
    runs = {"ours": (model, generation)}
    with contextlib.suppress(ImportError):
        from transformers import GPT2LMHeadModel

        theirs = GPT2LMHeadModel.from_pretrained(folder).to(DEVICE).eval()
        runs["theirs"] = theirs, their_generation
    prompt = torch.arange(16, device=DEVICE)[None]
    start, n = now(), 0
    with torch.no_grad():
        while now() - start < 10 and n < 1000:  # on a CPU, to 100 tokens or so
            prompt = torch.cat((prompt, likeliest(model(prompt)[0][:, -1])), dim=1)
            n += 1
    plain = n / (now() - start)
    row(f"124M, {n} tokens without a cache, float32", plain, "tokens/s")
    bandwidth = memory_rate()
    row("reading memory", bandwidth / 1e9, "GB/s")
    best = {name: 0.0 for name in runs}
    for dtype in dict.fromkeys((torch.float32, FAST)):
        seconds = turns(runs, dtype, 1, 1, 1000)
        speed = {who: 1000 / seconds[who] for who in runs}
        row(f"124M, reading a prompt of 1,000, {str(dtype)[6:]}", speed["ours"], "tokens/s")
        if "theirs" in runs:
            ratio = speed["ours"] / speed["theirs"]
            row("  by transformers", speed["theirs"], "tokens/s", "(ours to theirs)", ratio)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype)[6:]
        for n_rows, n_tokens in (1, 60), (8, 30):
            if n_rows > 1 and dtype == torch.float16 and DEVICE.type == "cpu":
                continue  # minutes, at a tenth of the speed of the others
            seconds = turns(runs, dtype, n_rows, n_tokens)
            speed = {who: n_rows * n_tokens / seconds[who] for who in runs}
            if n_rows == 1:
                best = {who: max(best[who], speed[who]) for who in runs}
                n_bytes = sum(p.numel() * p.element_size() for p in runs["ours"][0].parameters())
                what = f"124M, {name}", speed["ours"], "tokens/s", "of reading all weights"
                row(*what, speed["ours"] * n_bytes / bandwidth)
            else:
                row(f"124M, 8 texts together, {name}", speed["ours"], "tokens/s")
            if "theirs" in runs:
                ratio = speed["ours"] / speed["theirs"]
                row("  by transformers", speed["theirs"], "tokens/s", "(ours to theirs)", ratio)
    if "theirs" in runs:
        ratio = best["ours"] / best["theirs"]
        row("124M, in the best type of each", best["ours"], "tokens/s", "(ours to theirs)", ratio)


def first_token(folder):
    """The seconds from a command to the first token: starting Python, imports and all."""
    ours = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, bpe_gpt\n"
        "state = bpe_gpt.read_safetensors(sys.argv[2] + '/model.safetensors')\n"
        "config = bpe_gpt.GPTConfig()\n"
        "model = bpe_gpt.build_model(dict(config=vars(config), model=state), config)\n"
        "next(bpe_gpt.generate(model, torch.zeros(1, 5, dtype=torch.long), 1))\n"
    )
    theirs = (
        "import sys, torch\n"
        "from transformers import GPT2LMHeadModel\n"
        "model = GPT2LMHeadModel.from_pretrained(sys.argv[2])\n"
        "model.generate(torch.zeros(1, 5, dtype=torch.long), max_new_tokens=1)\n"
    )
    times = {ours: [], theirs: []}
    for _ in range(4):  # the first warms up
        for code in times:
            start = now()
            command = [sys.executable, "-c", code, str(ROOT), str(folder)]
            done = subprocess.run(command, capture_output=True)
            if done.returncode == 0:
                times[code].append(now() - start)
    seconds = statistics.median(times[ours][1:])
    row("124M, from the command to the first token, float32", seconds, "s")
    if times[theirs]:
        slow = statistics.median(times[theirs][1:])
        row("  by transformers", slow, "s", "(theirs to ours)", slow / seconds)


def load(folder):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import torch, bpe_gpt\n"
        "start = time.perf_counter()\n"
        "state = bpe_gpt.read_safetensors(sys.argv[2] + '/model.safetensors')\n"
        "config = bpe_gpt.GPTConfig()\n"
        "model = bpe_gpt.build_model(dict(config=vars(config), model=state), config)\n"
        "next(bpe_gpt.generate(model, torch.zeros(1, 5, dtype=torch.long), 1))\n"
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code, str(Path(bpe_gpt.__file__).parent), str(folder)]
    runs = [subprocess.run(command, stdout=subprocess.PIPE, check=True) for _ in range(3)]
    times = [float(done.stdout) for done in runs]
    row("124M, from its file to the first token, float32", statistics.median(times), "s")
    first_token(folder)


def finetune_here(folder, name, dtype):
    """Prints the seconds of a training step of 4x256 tokens, and the peak of memory in bytes."""
    dtype = getattr(torch, dtype)
    autocast = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)
    tokens = torch.randint(50257, (4, 257), device=DEVICE)
    x, y = tokens[:, :-1], tokens[:, 1:]
    if name == "ours":
        settings = bpe_gpt.FINE_TUNING_SETTINGS | dict(batch_size=len(x))
        model = hugging_face.load_model(folder, **settings).to(DEVICE)
        optimizers = bpe_gpt.make_optimizers(model, model.config)

        def step():
            bpe_gpt.training_step(model, optimizers, x, y, 0, model.config, autocast)

    else:
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(folder).to(DEVICE).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

        def step():
            optimizer.zero_grad()
            with autocast:
                loss = model(x, labels=x).loss  # they shift the labels themselves
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    seconds = median_time(step)
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # Linux only; getrusage() would count this process's parent, too
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    print(json.dumps([seconds, peak]))


def apart(name, *words):
    """What bench.py prints for a part of it that runs in a process of its own; None if it fails,
    as it does without transformers. Ours must not."""
    ours = name == "ours"
    command = [sys.executable, __file__, "--apart", name, *map(str, words)]
    errors = None if ours else subprocess.DEVNULL
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=ours)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def finetune(folder):
    for dtype in dict.fromkeys(["float32", str(FAST)[6:]]):
        seconds, peak = apart("ours", dtype, folder)
        row(f"124M, a training step of 4x256, {dtype}", 1024 / seconds, "tokens/s")
        row("  peak of memory", peak / 1e9, "GB")
        if theirs := apart("transformers", dtype, folder):
            speed, ratio = 1024 / theirs[0], theirs[0] / seconds
            row("  by transformers", speed, "tokens/s", "(ours to theirs)", ratio)
            row("  peak of memory", theirs[1] / 1e9, "GB", "(ours to theirs)", peak / theirs[1])


# ---------------------------------------------------------------------------------------------
# A GPU


def gpu(folder):
    """The character model to its end, GPT-2 124M in training and in generation, and what the
    compiler makes of instructions. On a CPU it is a trial of all this with tiny sizes."""
    on_gpu = DEVICE.type == "cuda"
    tiny = ["--full", "--max_iters", "4", "--n_layer", "1"]
    seconds, checkpoint = whole_run(char_gpt.__file__, *([] if on_gpu else tiny))
    row("char_gpt.py, from its start to its end", seconds, "s")
    row("  validation loss, best", lowest(checkpoint), "loss")
    recipe = our_recipe("full", **{} if on_gpu else dict(n_layer=1))
    config = recipe[0]
    speed = config.batch_size * config.block_size
    speed /= step_time(training(recipe, steps=200 if on_gpu else 3))
    row("  one of its steps", speed, "tokens/s")
    config, *others = plain_recipe("full")
    config.batch_size = 64 if on_gpu else 1
    plain = config.batch_size * config.block_size
    plain /= step_time(training((config, *others), steps=500 if on_gpu else 3))
    row("  a step of the plain recipe, 64x256", plain, "tokens/s", "(ours to its)", speed / plain)
    ways_to_compile(on_gpu)
    train_124m(on_gpu)
    if on_gpu:
        decode(folder)
    compile_instructions(steps=100 if on_gpu else 12)


def ways_to_compile(on_gpu):
    """What compiling costs at the start, and what it gains in each step, of the full character model:
    the whole model, or one block that all blocks share, with or without CUDA graphs, and with the
    rounds of Muon compiled, too."""
    backend = dict(backend="inductor" if on_gpu else "eager")
    graphs = dict(mode="reduce-overhead") if on_gpu else backend
    plain = char_gpt.orthogonalize
    config = char_gpt.GPTConfig(**{} if on_gpu else dict(n_layer=2, n_embd=96, block_size=32))
    autocast = torch.autocast(DEVICE.type, FAST, enabled=FAST != torch.float32)
    for name, settings, by_block, muon_too in (
        ("nothing", None, False, False),
        ("the whole model", backend, False, False),
        ("the whole model, with CUDA graphs", graphs, False, False),
        ("one block", backend, True, False),
        ("one block, and Muon", backend, True, True),
        ("the whole model with CUDA graphs, and Muon", graphs, False, True),
    ):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = forward = char_gpt.GPT(config).to(DEVICE)
        optimizers = char_gpt.make_optimizers(model, config)
        char_gpt.orthogonalize = torch.compile(plain, **backend) if muon_too else plain
        if by_block:
            for block in model.transformer.h:
                block.compile(**settings)
        elif settings:
            forward = torch.compile(model, **settings)
        times = []
        for step in range(60 if on_gpu else 3):
            rows = torch.randint(65, (config.batch_size, config.block_size + 1), device=DEVICE)
            start = now()
            char_gpt.training_step(
                forward, optimizers, rows[:, :-1], rows[:, 1:], step, config, autocast)
            times.append(now() - start)
        row(f"compiled: {name}; the first three steps", sum(times[:3]), "s")
        row("  a later step", 1000 * statistics.median(times[len(times) // 2 :]), "ms")
    char_gpt.orthogonalize = plain
    torch._dynamo.reset()


def train_124m(on_gpu):
    tiny = dict(n_layer=1, block_size=64, batch_size=2, total_batch_size=128, vocab_size=300)
    config = bpe_gpt.GPTConfig(**{} if on_gpu else tiny)
    model = bpe_gpt.GPT(config).to(DEVICE)
    forward = torch.compile(model) if on_gpu else model
    optimizers = bpe_gpt.make_optimizers(model, config)
    autocast = torch.autocast(DEVICE.type, FAST, enabled=FAST != torch.float32)
    shape = config.total_batch_size // config.block_size, config.block_size + 1
    times = []
    for step in range(30 if on_gpu else 4):
        rows = torch.randint(config.vocab_size, shape, device=DEVICE)
        start = now()
        bpe_gpt.training_step(
            forward, optimizers, rows[:, :-1], rows[:, 1:], step, config, autocast)
        times.append(now() - start)
    seconds = statistics.median(times[len(times) // 2 :])
    row("bpe_gpt.py --full, a step", config.total_batch_size / seconds, "tokens/s")
    config.batch_size = shape[0]
    rate = flops(config) / seconds
    limit = matrix_rate(config.total_batch_size, config.n_embd, FAST)
    row("  operations of the model", rate / 1e12, "TFLOP/s", "of matrix products", rate / limit)
    if on_gpu:
        row("  peak of memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def compile_instructions(steps):
    """Rows of all lengths must neither break the compiled graph nor be compiled again and again."""
    from torch._dynamo.utils import counters

    sys.path.insert(0, str(ROOT / "data"))
    import instruct

    records = instruct.read_records(ROOT / "data" / "instructions.json")
    tokenizer = bpe_gpt.train_bpe("\n".join(record["output"] for record in records), 400)
    config = bpe_gpt.GPTConfig(
        vocab_size=len(tokenizer.tokens), n_layer=2, n_head=2, n_embd=64, block_size=512,
        total_batch_size=4096, batch_size=8)
    data = instruct.InstructionData(records, tokenizer, config)
    model = bpe_gpt.GPT(config).to(DEVICE)
    optimizers = bpe_gpt.make_optimizers(model, config)
    autocast = torch.autocast(DEVICE.type, FAST, enabled=FAST != torch.float32)
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    graphs = []
    for step in range(steps):
        x, y = [part.to(DEVICE) for part in data.training_batch(step)]
        bpe_gpt.training_step(forward, optimizers, x, y, step, config, autocast)
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())
    row(f"data/instruct.py, {steps} steps, breaks of the graph", breaks, "")
    row("  graphs compiled", graphs[-1], "")
    row("  of these in the second half of the steps", graphs[-1] - graphs[steps // 2], "")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = ("limits", "small", "full", "bpe", "decode", "load", "finetune", "gpu")
    parser.add_argument("--only", choices=parts, help="this part only")
    parser.add_argument("--long", action="store_true", help="train the full model to its end")
    parser.add_argument("--json", help="file for the same figures as data")
    parser.add_argument("--apart", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.apart:
        name, dtype, folder = args.apart
        finetune_here(folder, name, dtype)
        return
    wanted = [args.only] if args.only else parts[:-1]
    print(f"{DEVICE}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    if "limits" in wanted:
        limits()
    if "small" in wanted:
        small()
    if "full" in wanted:
        full(args.long)
    if "bpe" in wanted:
        bpe()
    if {"decode", "load", "finetune", "gpu"} & set(wanted):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            tokens = [*(bytes([b]) for b in range(256)), bpe_gpt.END_OF_TEXT.encode()]
            model = bpe_gpt.GPT(bpe_gpt.GPTConfig())
            hugging_face.export(model, bpe_gpt.BPETokenizer(tokens), folder)
            for name in ("vocab.json", "merges.txt"):  # or only the rows of 257 tokens are loaded
                (Path(folder) / name).unlink()
            if "decode" in wanted:
                decode(folder)
            if "load" in wanted:
                load(folder)
            if "finetune" in wanted:
                finetune(folder)
            if "gpu" in wanted:
                gpu(folder)
    if args.json:
        Path(args.json).write_text(json.dumps(ROWS, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
