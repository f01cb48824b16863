"""Text out of the models that the other scripts have trained, and out of GPT-2; and a look inside.

    python sample.py                            # from the newest checkpoint in out/
    python sample.py out/bigram.pt              # from this one
    python sample.py gpt2                       # as published; or gpt2-medium, -large, -xl
    python sample.py FOLDER                     # from a GPT-2 in Hugging Face's layout
    python sample.py --prompt "ROMEO:"          # go on from these words
    python sample.py --temperature 0.8 --top_k 20
    python sample.py --interactive              # one prompt after the other; Ctrl-D leaves
    python sample.py --instruct "Name the opposite." --input "heavy"    # if it learned to answer

A model gives each token a probability; these are the ways to pick one. Always the likeliest
(--temperature 0) soon runs in circles. Drawing by the probabilities is true to the model, and now
and then takes something silly from the long tail of unlikely tokens. In between, --temperature
below 1 makes likely tokens likelier still, --top_k keeps only the k likeliest tokens, --top_p as
many of them as it takes to reach a probability of p (nucleus sampling, Holtzman et al. 2020), and
--min_p those at least p times as likely as the likeliest (Nguyen et al. 2024). --beam draws
nothing: it looks for the text whose tokens are, taken together, the likeliest.

To see what the model does with a text:

    python sample.py --probs "To be, or not"    # how probable each token was, and what else was
    python sample.py --attention "To be, or not" --layer 2 --head 0     # who looks at whom
    python sample.py --attention "To be, or not" --plot attention.png   # in all layers and heads
    python sample.py --shapes "To be, or not"   # the walk through the model, step by step
    python sample.py --curve out/bigram.pt out/char_gpt.pt --plot curve.png

Pictures in files take matplotlib (pip install matplotlib); without --plot they are drawn here.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "tiktoken"]
# ///

import argparse
import codecs
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# Flags


def fail(message):
    """A mistake that the user can mend ends in one line on standard error, and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


DTYPES = "auto", "float32", "bfloat16", "float16"


def parse_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    add = parser.add_argument
    add("model", nargs="?", help="checkpoint, folder, or name [the newest checkpoint in out/]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--prompt", help="the words to go on from [the start of a text]")
    mode.add_argument("--instruct", help="what a model taught by --instructions is to do")
    mode.add_argument("--interactive", action="store_true", help="ask for prompts, or instructions")
    mode.add_argument("--probs", metavar="TEXT", help="show how probable each token is")
    mode.add_argument("--attention", metavar="TEXT", help="show which tokens look at which")
    mode.add_argument("--shapes", metavar="TEXT", help="show the modules that the text passes")
    mode.add_argument("--curve", nargs="+", metavar="CHECKPOINT", help="show losses in training")
    add("--input", default="", help="what the instruction is about")
    add("--max_new_tokens", type=int, default=500, help="how many tokens to add [500]")
    add("--num_samples", type=int, default=1, help="how many texts to make at once [1]")
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token [1.0]")
    add("--top_k", type=int, help="draw from this many of the likeliest tokens only [all]")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest, up to this sum [1.0]")
    add(
        "--min_p",
        type=float,
        default=0.0,
        help="draw from those this share as likely as the likeliest [0]",
    )
    add("--beam", type=int, help="look for the likeliest text, with so many at a time [draw one]")
    add("--stop", help="end the text where this occurs in it")
    add("--ignore_end", action="store_true", help="go on where the model ends its text")
    add("--layer", type=int, default=0, help="of --attention; the first is [0]")
    add("--head", type=int, default=0, help="of --attention; the first is [0]")
    add("--plot", metavar="FILE", help="draw --attention or --curve into this file, say x.png")
    add("--dtype", default="auto", help="float32, bfloat16, float16 [auto: fast, if large]")
    add("--seed", type=int, default=1337, help="the same seed gives the same text [1337]")
    args = parser.parse_args()
    good_beam = args.beam is None or (0 < args.beam <= 1000 and args.num_samples == 1)
    for name, good, rule in (
        ("max_new_tokens", 0 < args.max_new_tokens < 2**31, "above 0, and below 2**31"),
        ("num_samples", 0 < args.num_samples <= 1000, "from 1 to 1000"),
        ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
        ("top_k", args.top_k is None or args.top_k > 0, "above 0"),
        ("top_p", 0 < args.top_p <= 1, "above 0, and 1 at most"),
        ("min_p", 0 <= args.min_p <= 1, "from 0 to 1"),
        ("beam", good_beam, "from 1 to 1000, with one sample"),
        ("dtype", args.dtype in DTYPES, ", ".join(DTYPES)),
        ("seed", 0 <= args.seed < 2**31, "0 or more, and below 2**31"),
        ("input", not args.input or args.instruct is not None, "with --instruct"),
        ("plot", not args.plot or args.attention or args.curve, "with --attention or --curve"),
        *(
            (name, getattr(args, name) != "", "a character at least")
            for name in ("prompt", "instruct", "probs", "attention", "shapes", "stop")
        ),
    ):
        if not good:
            fail(f"--{name} must be {rule}; it is {getattr(args, name)!r}")
    return args


if __name__ == "__main__":
    parse_flags()  # a mistake is told at once: the imports below take seconds

import numpy as np
import torch

import bigram
import bpe_gpt
import char_gpt
from char_gpt import CharTokenizer, draw, load_checkpoint, pick_device, pick_dtype

# ---------------------------------------------------------------------------------------------
# Decoding


def make_choice(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Returns the function that turns the scores of the next token (B, vocab_size) into the token
    chosen (B, 1), for use in generate()."""

    def choose(logits):
        if temperature < 1e-9:  # 0, or too small to divide by
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits.float()  # a model in bfloat16 gives scores in bfloat16
        # Softmax is blind to what is subtracted from all scores; with the best at 0, a small
        # temperature cannot make them overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            logits[:, top_k:] = -math.inf
        if top_p < 1:
            probs = logits.softmax(dim=-1)
            likelier = probs.cumsum(dim=-1) - probs  # the probability of all tokens before it
            logits[likelier >= top_p] = -math.inf
        if min_p > 0:
            logits[logits < math.log(min_p)] = -math.inf  # the likeliest has 0, the log of 1
        return tokens.gather(-1, draw(logits))

    return choose


@torch.no_grad()
def beam_search(model, idx, max_new_tokens, width, end=None):
    """The likeliest text that begins with idx (1, T), as far as a search of this width finds it:
    after each token it keeps the `width` likeliest texts so far, and goes on with each of them. A
    width of 1 is the same as always taking the likeliest token. Texts that come to their `end` wait
    for the others. As a text only becomes less likely as it grows, it is the mean log-probability
    of the tokens that decides in the end. Returns the new tokens (a list), with the end, if any."""
    model.eval()
    cache = None
    if isinstance(model, bpe_gpt.GPT) and idx.shape[1] + max_new_tokens <= model.block_size:
        cache = bpe_gpt.Cache(model, 1, room=idx.shape[1] + max_new_tokens)
    n_prompt, texts, scores = idx.shape[1], idx, torch.zeros(1, device=idx.device)
    ended = []  # (mean log-probability, tokens)
    for n in range(1, max_new_tokens + 1):
        if cache:
            logits, _ = model(texts[:, cache.length :], cache=cache)
        else:
            logits, _ = model(texts[:, -model.block_size :])
        log_probs = logits[:, -1].float().log_softmax(dim=-1)  # (texts, vocab_size)
        totals = (scores[:, None] + log_probs).flatten()
        scores, best = totals.topk(min(width, len(totals)))
        parents, tokens = best // log_probs.shape[1], best % log_probs.shape[1]
        texts = torch.cat((texts[parents], tokens[:, None]), dim=1)
        going_on = tokens != (-1 if end is None else end)  # no token is -1
        if n == max_new_tokens:
            going_on[:] = False
        for score, text in zip(scores[~going_on].tolist(), texts[~going_on].tolist()):
            ended.append((score / n, text[n_prompt:]))
        scores, texts = scores[going_on], texts[going_on]
        if len(texts) == 0:
            break
        if cache:  # each text takes over the keys and values of the one that it goes on from
            cache.kv = cache.kv[:, :, parents[going_on]]
    return max(ended, key=lambda pair: pair[0])[1]


class Stream:
    """Tokens in, text out, as soon as it is sure. Bytes that are only a part of a character wait
    for the rest, and what may be the beginning of the text to stop at waits until it is not."""

    def __init__(self, to_bytes, end=None, stop=None):
        self.to_bytes, self.end, self.stop = to_bytes, end, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.ended = "", False

    def push(self, token):
        """The text that is sure after this token; none after the end."""
        if self.ended:
            return ""
        if token == self.end:
            return self.close()
        self.held += self.decoder.decode(self.to_bytes(token))
        n_held = 0
        if self.stop:
            before, stop, _ = self.held.partition(self.stop)
            if stop:
                self.ended = True
                return before
            lengths = range(len(self.stop) - 1, 0, -1)  # of beginnings of stop, the longest first
            n_held = next((n for n in lengths if self.held.endswith(self.stop[:n])), 0)
        sure = self.held[: len(self.held) - n_held]
        self.held = self.held[len(sure) :]
        return sure

    def close(self):
        """What was held back, as no more tokens come."""
        if self.ended:
            return ""
        self.ended = True
        return self.held + self.decoder.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------
# Looking inside


def quote(to_bytes, token):
    """A token as one can print it in a line, in quotes."""
    text = to_bytes(token).decode("utf-8", "backslashreplace")
    return f"'{text}'".replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


@torch.no_grad()
def next_log_probs(model, ids):
    """The log-probabilities (T - 1, vocab_size) of what comes after each of the T ids but the last.
    A text longer than block_size is read in windows that overlap by half. With a block_size of 8:
    tokens 0 to 7, then 4 to 11, of which only the last four count, then 8 to 15, and so on."""
    model.eval()
    size, step = model.block_size, max(model.block_size // 2, 1)
    idx = torch.tensor([ids[:-1]], device=next(model.parameters()).device)
    parts, done = [], 0  # `done` tokens have been followed up
    while done < idx.shape[1]:
        start = max(done - (size - step), 0)
        logits, _ = model(idx[:, start : start + size])
        parts.append(logits[0, done - start :].float().log_softmax(dim=-1))
        done = start + logits.shape[1]
    return torch.cat(parts)


def print_probs(model, ids, to_bytes):
    """One line for each of the ids but the first: its probability given those before it, its rank
    among all tokens, and the likeliest others. The redder, the more surprised is the model."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    log_probs = next_log_probs(model, ids)
    total = 0.0
    print("token           probability    rank   the likeliest others")
    for token, row in zip(ids[1:], log_probs):
        total -= row[token].item()
        rank = (row > row[token]).sum().item() + 1
        likeliest = row.topk(min(4, len(row))).indices.tolist()
        others = [other for other in likeliest if other != token][:3]
        others = "  ".join(f"{quote(to_bytes, o)} {row[o].exp().item():.1%}" for o in others)
        bits = -row[token].item() / math.log(2)
        colour = (34, 106, 178, 208, 196)[min(int(bits / 2), 4)]  # from green to red
        before, after = (f"\033[38;5;{colour}m", "\033[0m") if coloured else ("", "")
        name = f"{quote(to_bytes, token):15}"
        print(f"{before}{name}{after} {row[token].exp().item():11.2%} {rank:7}   {others}")
    n = len(log_probs)
    print(f"{n} tokens: loss {total:.2f} in all, {total / n:.4f} a token", end="")
    print(f", perplexity {math.exp(min(total / n, 700)):.2f}")


@torch.no_grad()
def attention_shares(model, ids):
    """How much each token takes from each: shares (n_layer, n_head, T, T), whose rows sum to 1. The
    model is not changed: what c_attn makes for q and k is caught as it passes by."""
    caught = []
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda module, args, out: caught.append(out))
        for block in model.transformer.h
    ]
    model.eval()
    model(torch.tensor([ids], device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    n_head, T = model.transformer.h[0].attn.n_head, len(ids)
    qkv = torch.cat(caught).float().cpu()  # (n_layer, T, 3 * C)
    qkv = qkv.view(len(caught), T, 3, n_head, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # each (n_layer, n_head, T, head_size)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    return scores.masked_fill(~visible, -math.inf).softmax(dim=-1)


LEVELS = 0.05, 0.2, 0.4, 0.7  # the least share for each shade


def print_attention(shares, names):
    """One head's shares (T, T): each row shows what its token takes from those before it, and from
    itself. Raises ValueError for more tokens than fit beside each other."""
    wide = max(len(name) for name in names) + 1
    columns = shutil.get_terminal_size((100, 24)).columns
    cell = 2 if wide + 2 * len(names) <= columns else 1
    if wide + cell * len(names) > columns:
        raise ValueError(f"{len(names)} tokens do not fit side by side here: give a shorter TEXT")
    inner = [name[1:-1] for name in names]
    for i in range(min(max(map(len, inner)), 8)):  # the tokens on top, from top to bottom
        print(" " * wide + "".join(name[i : i + 1].ljust(cell) for name in inner))
    for name, row in zip(names, shares.tolist()):
        levels = [sum(share >= least for least in LEVELS) for share in row]  # from 0 to 4
        shades = [" ░▒▓█"[level] * cell for level in levels]
        print(name.rjust(wide - 1) + " " + "".join(shades).rstrip())
    print("share of attention: " + ", ".join(f"{s} from {n:.0%}" for s, n in zip("░▒▓█", LEVELS)))


def load_pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")  # into files; needs no screen
        import matplotlib.pyplot

        return matplotlib.pyplot
    except ImportError:
        raise ValueError(
            "--plot takes matplotlib (pip install matplotlib); without --plot it is drawn here"
        ) from None


def plot_attention(shares, names, path):
    """All heads (columns) of all layers (rows) as one picture."""
    plt = load_pyplot()
    n_layer, n_head, T, _ = shares.shape
    labels = [name[1:-1].replace("$", r"\$") for name in names]  # "$" begins a formula
    size = max(1.1, 0.14 * T) if T <= 24 else 1.4  # inches
    size = (size * n_head + 1.6, size * n_layer + 1.2)
    figure, axes = plt.subplots(n_layer, n_head, figsize=size, squeeze=False, layout="constrained")
    for layer in range(n_layer):
        for head in range(n_head):
            axis = axes[layer][head]
            image = axis.imshow(shares[layer, head], vmin=0, vmax=1, cmap="magma_r")
            axis.set_xticks([]), axis.set_yticks([])
            if layer == 0:
                axis.set_title(f"head {head}", fontsize=9)
            if head == 0:
                axis.set_ylabel(f"layer {layer}", fontsize=9)
            if T <= 24 and head == 0:
                axis.set_yticks(range(T), labels, fontsize=6)
            if T <= 24 and layer == n_layer - 1:
                axis.set_xticks(range(T), labels, fontsize=6, rotation=90)
    figure.suptitle("attention: each row's token looks at the columns' tokens", fontsize=10)
    bar = figure.colorbar(image, ax=axes, shrink=0.5)
    bar.set_label("share of the row's attention")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


@torch.no_grad()
def print_shapes(model, ids):
    """The modules in the order in which the text leaves them, as hooks see it: what goes in, what
    comes out, how many numbers the module has learned, and its operations (an addition and a
    multiplication for each weight and token). Attention, which is more than its parts, has a line
    of its own after them, for the products of queries, keys and values."""
    lines, names = [], {module: name for name, module in model.named_modules()}
    seen = set()  # parameters counted: the head shares its table with the embedding

    def hook(module, args, out):
        if isinstance(module, torch.nn.Dropout):
            return  # it does nothing except in training
        x, out = args[0], out[0] if isinstance(out, tuple) else out
        has_parts, n_params = any(True for _ in module.children()), 0
        if not has_parts:
            n_params = sum(p.numel() for p in module.parameters() if p not in seen)
            seen.update(module.parameters())
        operations = 0
        if isinstance(module, torch.nn.Linear):
            operations = 2 * module.weight.numel() * x.shape[:-1].numel()
        elif hasattr(module, "c_attn"):  # q @ k and shares @ v, each T * T * C, without the mask
            operations = 4 * x.shape[1] * x.shape[:-1].numel() * x.shape[-1]
            names[module] += " (q, k, v)"
        elif has_parts:
            return
        shapes = f"{[*x.shape]!s:>16} {[*out.shape]!s:>16}"
        lines.append((names[module], f"{type(module).__name__:20}", shapes, n_params, operations))

    hooks = [module.register_forward_hook(hook) for module in model.modules()]
    model.eval()
    model(torch.tensor([ids], device=next(model.parameters()).device))
    for handle in hooks:
        handle.remove()
    print(f"{'module':32} {'kind':20} {'in':>16} {'out':>16} {'parameters':>13} {'operations':>16}")
    for name, kind, shapes, n_params, operations in lines:
        print(f"{name:32} {kind} {shapes} {n_params:13,} {operations:16,}")
    n_params, operations = (sum(line[i] for line in lines) for i in (3, 4))
    print(f"{'in all':32} {'':20} {'':16} {'':16} {n_params:13,} {operations:16,}")


def read_curve(path):
    """The losses in a checkpoint: [tokens seen, training loss, validation loss] (n, 3)."""
    checkpoint = load_checkpoint(path, *MODELS)
    try:
        config = checkpoint["config"]
        per_step = config.get("total_batch_size") or config["batch_size"] * config["block_size"]
        curve = np.array([[s * per_step, t, v] for s, t, v in checkpoint["history"]], dtype=float)
        if not np.isfinite(curve).all():
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"the history in {path} is damaged: train the model again") from None
    if len(curve) == 0:
        raise ValueError(f"{path} has no losses yet: it was stopped before its first evaluation")
    return curve


def print_curves(curves):
    """Losses against tokens seen, drawn with letters: a, b... training, A, B... validation."""
    width, height = 64, 18
    every = np.concatenate(list(curves.values()))
    right, low, high = every[:, 0].max(), every[:, 1:].min(), every[:, 1:].max()
    high = max(high, low + 1e-3)
    canvas = [[" "] * width for _ in range(height)]
    for letter, curve in zip("abcdefghijklmnopqrstuvwxyz", curves.values()):
        for column in range(width):
            tokens = (column + 0.5) / width * right
            if curve[0, 0] - right / width <= tokens <= curve[-1, 0] + right / width:
                for i, mark in ((1, letter), (2, letter.upper())):
                    loss = np.interp(tokens, curve[:, 0], curve[:, i])
                    canvas[round((high - loss) / (high - low) * (height - 1))][column] = mark
    print("   loss  perplexity")
    for i, line in enumerate(canvas):
        loss = high - (high - low) * i / (height - 1)
        print(f"{loss:7.3f} {math.exp(min(loss, 50)):10.2f} |{''.join(line).rstrip()}")
    print(" " * 19 + "+" + "-" * width)
    print(f"{'0':>20}{f'{right:,.0f} tokens seen':>{width}}")
    for letter, (name, curve) in zip("abcdefghijklmnopqrstuvwxyz", curves.items()):
        best = curve[:, 2].min()
        print(f"{letter} training, {letter.upper()} validation: {name} (at best {best:.4f})")


def plot_curves(curves, path):
    """The same as a picture, with the perplexity on the right."""
    plt = load_pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for i, (name, curve) in enumerate(curves.items()):
        label = f"{name}, validation (best {curve[:, 2].min():.3f})"
        axis.plot(curve[:, 0] / 1e6, curve[:, 2], "-o", color=f"C{i}", markersize=3, label=label)
        axis.plot(curve[:, 0] / 1e6, curve[:, 1], ":", color=f"C{i}", label=f"{name}, training")
    axis.set_xlabel("tokens seen (millions)")
    axis.set_ylabel("loss (nats per token)")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    # Above the picture, where it hides nothing.
    axis.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    right = axis.twinx()
    right.set_yticks(axis.get_yticks(), [f"{math.exp(min(y, 50)):.3g}" for y in axis.get_yticks()])
    right.set_ylim(axis.get_ylim())
    right.set_ylabel("perplexity")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------
# Checkpoints

# For each script that trains: its settings, its model, and its tokenizer from a stored vocabulary.
MODELS = {
    "bigram": (bigram.BigramConfig, bigram.BigramLanguageModel, CharTokenizer),
    "char_gpt": (char_gpt.GPTConfig, char_gpt.GPT, CharTokenizer),
    "bpe_gpt": (bpe_gpt.GPTConfig, bpe_gpt.GPT, bpe_gpt.unpack_vocab),
}


def newest_checkpoint():
    """The path of the checkpoint in out/ that was written last."""
    paths = sorted(Path("out").glob("*.pt"), key=lambda path: path.stat().st_mtime)
    if not paths:
        fail(
            "no checkpoint in out/: train a model first, with bigram.py, or name one, such as gpt2"
        )
    return paths[-1]


def load_model(name_or_path):
    """The model of a checkpoint, its tokenizer, and the checkpoint (see train()); or a published
    model and its tokenizer, and an empty dict. Raises ValueError for a file that is missing,
    damaged, or of no such kind, and OSError where a published model cannot be had."""
    path = Path(name_or_path)
    is_published = name_or_path in bpe_gpt.SIZES or path.is_dir()
    if is_published or path.suffix in (".safetensors", ".bin"):
        model, tokenizer = bpe_gpt.load_pretrained(name_or_path)
        return model, bpe_gpt.fit_tokenizer(tokenizer, model), {}
    checkpoint = load_checkpoint(path, *MODELS)
    Config, Model, make_tokenizer = MODELS[checkpoint["script"]]
    try:
        tokenizer = make_tokenizer(checkpoint["vocab"])
        model = Model(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        if not all(p.sum().isfinite() for p in model.parameters()):
            raise TypeError
        return model, tokenizer, checkpoint
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise ValueError(f"{path} is damaged: train the model again") from None


def best_loss(history):
    """The least validation loss of a history. Raises ValueError for a damaged history."""
    try:
        return min(float(val_loss) for _, _, val_loss in history)
    except (TypeError, ValueError):
        raise ValueError(
            "the history in the checkpoint is damaged: train the model again"
        ) from None


def read_layouts(checkpoint):
    """The two layouts of instructions, without and with input, that the model has learned; None if
    it has learned none. Raises ValueError where they are damaged."""
    layouts = checkpoint.get("layouts")
    is_pair = isinstance(layouts, list) and [type(part) for part in layouts] == [str, str]
    if layouts is not None and not is_pair:
        raise ValueError("the layouts in the checkpoint are damaged: train the model again")
    return layouts


# ---------------------------------------------------------------------------------------------
# Command line


def encode_prompt(tokenizer, text):
    """The tokens of a text (None: of the start of one). Raises ValueError for a character that the
    vocabulary does not have."""
    if not isinstance(tokenizer, CharTokenizer):
        # What stands at the start of a text is the end of the text before it.
        return bpe_gpt.encode(tokenizer, text or bpe_gpt.END_OF_TEXT).tolist()
    if text is None:
        return tokenizer.encode("\n" if "\n" in tokenizer.chars else tokenizer.chars[0])
    return tokenizer.encode(text)


def ask(layouts):
    """Prompts that the user types in, one after the other, until Ctrl-D."""
    try:
        import readline  # noqa: F401  (arrow keys, where there is such a thing)
    except ImportError:
        pass
    while True:
        try:
            line = input("instruction> " if layouts else "> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def speak(model, tokenizer, ids, shown, args, to_bytes):
    """Prints what is shown of the prompt and the text that follows its ids: the first sample as it
    grows, then the others."""
    idx = torch.tensor([ids] * args.num_samples, device=next(model.parameters()).device)
    end = None
    if not isinstance(tokenizer, CharTokenizer) and not args.ignore_end:
        end = tokenizer.eot_token
    if args.beam:
        columns = torch.tensor(beam_search(model, idx, args.max_new_tokens, args.beam, end))
        columns = columns.view(-1, 1, 1)
    else:
        choose = make_choice(args.temperature, args.top_k, args.top_p, args.min_p)
        generate = bpe_gpt.generate if isinstance(model, bpe_gpt.GPT) else char_gpt.generate
        columns = generate(model, idx, args.max_new_tokens, choose)  # each (num_samples, 1)
    streams = [Stream(to_bytes, end, args.stop) for _ in range(args.num_samples)]
    texts = [shown] * args.num_samples
    print(shown, end="", flush=True)
    for column in columns:
        new = [stream.push(token) for stream, token in zip(streams, column.flatten().tolist())]
        print(new[0], end="", flush=True)
        texts = [text + more for text, more in zip(texts, new)]
        if all(stream.ended for stream in streams):
            break
    print(streams[0].close())
    for text, stream in zip(texts[1:], streams[1:]):
        print(f"{'-' * 40}\n{text}{stream.close()}")


def look_inside(model, ids, tokenizer, to_bytes, args):
    """--probs, --attention, --shapes. Raises ValueError where the model cannot show it."""
    if args.probs:
        return print_probs(model, encode_prompt(tokenizer, None) + ids, to_bytes)
    is_table = isinstance(model, bigram.BigramLanguageModel)
    if is_table and args.attention:
        raise ValueError("a bigram table has no attention: name another model")
    if len(ids) > model.block_size and not is_table:
        raise ValueError(f"TEXT has {len(ids)} tokens; the model reads {model.block_size} at most")
    if args.shapes:
        return print_shapes(model, ids)
    shares = attention_shares(model, ids)
    names = [quote(to_bytes, token) for token in ids]
    if args.plot:
        return plot_attention(shares, names, args.plot)
    for flag, n in zip(("layer", "head"), shares.shape):
        if not 0 <= getattr(args, flag) < n:
            raise ValueError(f"--{flag} must be from 0 to {n - 1} in this model")
    print(f"layer {args.layer}, head {args.head}")
    print_attention(shares[args.layer, args.head], names)


def main():
    args = parse_flags()
    if args.curve:
        if len(args.curve) > 26:
            raise ValueError("--curve shows 26 runs at most: there are no more letters")
        curves = {path: read_curve(path) for path in args.curve}
        plot_curves(curves, args.plot) if args.plot else print_curves(curves)
        return
    name = str(args.model or newest_checkpoint())
    device = pick_device("auto")
    model, tokenizer, checkpoint = load_model(name)
    layouts = read_layouts(checkpoint)
    if args.instruct and not layouts:
        raise ValueError(f"{name} follows no instructions: teach it, by bpe_gpt.py --instructions")
    if isinstance(tokenizer, CharTokenizer):
        to_bytes = lambda token: tokenizer.decode([token]).encode("utf-8")
    else:
        to_bytes = tokenizer.decode_single_token_bytes

    def read(prompt):
        """The ids of a prompt, and what is shown of it: of an instruction, the answer alone."""
        if layouts and (args.instruct or args.interactive):
            record = {"instruction": prompt, "input": args.input}
            return encode_prompt(tokenizer, bpe_gpt.lay_out(record, layouts)), ""
        ids = encode_prompt(tokenizer, prompt)
        if prompt is None:
            prompt = tokenizer.decode(ids) if isinstance(tokenizer, CharTokenizer) else ""
        return ids, prompt

    inside = args.probs or args.attention or args.shapes
    ids = shown = None
    if not inside and not args.interactive:
        try:
            ids, shown = read(args.instruct or args.prompt)
        except ValueError as error:
            raise ValueError(f"--prompt: {error}") from None
    n_params = sum(p.numel() for p in model.parameters())
    dtype = torch.float32  # a small model gains no speed from less precision
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)
    elif n_params > 50_000_000 and not inside:
        dtype = pick_dtype("auto", device)
        # In float16 a CPU is twice as fast at reading one token, and far slower at reading more:
        # several texts, or a text longer than the context, which is read anew for each token.
        is_long = len(ids or []) + args.max_new_tokens > model.block_size
        if device.type == "cpu" and args.num_samples == 1 and not args.beam and not is_long:
            dtype = torch.float16
    model.to(device, dtype)
    for p in model.parameters():
        p.data = p.data.contiguous()  # published matrices lie the other way round: slow in float16
    if inside:
        return look_inside(model, encode_prompt(tokenizer, inside), tokenizer, to_bytes, args)

    history = checkpoint.get("history")
    best = f"best validation loss {best_loss(history):.4f}, " if history else ""
    kind = f"{n_params:,} parameters in {str(dtype).removeprefix('torch.')} on {device}"
    print(f"{name}: {best}{kind}", file=sys.stderr)
    torch.manual_seed(args.seed)
    if not args.interactive:
        return speak(model, tokenizer, ids, shown, args, to_bytes)
    for prompt in ask(layouts):
        try:
            speak(model, tokenizer, *read(prompt), args, to_bytes)
        except ValueError as error:  # a character that is not in the vocabulary
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python sample.py | head` ends in silence
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a "?"
    try:
        main()
    except KeyboardInterrupt:
        print(flush=True)  # the line of the text that was not finished
        fail("interrupted")
    except (OSError, ValueError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|allocate|MemoryError", repr(error)):
            raise
        fail("out of memory: lower --num_samples or --beam, or take a smaller model")
