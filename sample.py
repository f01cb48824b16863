"""Text from the models that the other scripts train, and from GPT-2; and a look inside them.

    python sample.py                    # the newest checkpoint in out/
    python sample.py out/bigram.pt      # this one
    python sample.py gpt2               # as published; or gpt2-medium, gpt2-large, gpt2-xl
    python sample.py FOLDER             # a GPT-2 in Hugging Face's format
    python sample.py --prompt "ROMEO:" --temperature 0.8 --top_k 20
    python sample.py --interactive      # one prompt after the other; Ctrl-D ends
    python sample.py --instruct "Name the opposite." --input "heavy"

What a model makes of a text:

    python sample.py --probs "To be, or not"      # the probability of each token
    python sample.py --attention "To be, or not" --layer 1 --head 2
    python sample.py --attention "To be, or not" --plot attention.png     # all layers and heads
    python sample.py --shapes "To be, or not"     # what goes into each module, and what comes out
    python sample.py --curve out/bigram.pt out/char_gpt.pt --plot curves.png

--plot needs matplotlib; --instruct, a model trained by bpe_gpt.py --instructions.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "tiktoken", "regex"]
# ///

import argparse
import codecs
import glob
import inspect
import itertools
import math
import operator
import os
import signal
import sys
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

import bpe_gpt
import char_gpt
from bigram import BigramConfig, BigramLanguageModel
from char_gpt import CharTokenizer, attention, load_checkpoint, pick_device, pick_dtype, sample

# ---- Configuration ------------------------------------------------------------------------------

@dataclass
class SampleConfig:
    prompt: str = ""  # text to continue
    instruct: str = ""  # instruction to answer
    input: str = ""  # what the instruction is about
    interactive: bool = False  # ask for prompts, or instructions
    max_new_tokens: int = 500  # length of a text
    num_samples: int = 1  # texts to make, as one batch
    temperature: float = 1.0  # below 1: likely tokens gain; 0: always the likeliest
    top_k: int = 0  # sample from the k likeliest tokens only
    top_p: float = 1.0  # from the likeliest tokens that together have this probability
    min_p: float = 0.0  # from tokens at least this fraction as likely as the likeliest
    beam: int = 0  # instead of sampling, search for the likeliest text, keeping this many
    stop: str = ""  # end a text before this
    ignore_end: bool = False  # go on where the model ends its text
    dtype: str = "auto"  # float32, bfloat16 or float16; auto: fast, if the model is large
    seed: int = 1337  # the same seed gives the same text
    probs: str = ""  # show the probability of every token of this text
    attention: str = ""  # show which of its tokens attend to which
    layer: int = 0  # of --attention
    head: int = 0  # of --attention
    shapes: str = ""  # show what this text is on its way through the model
    curve: bool = False  # show the losses of the checkpoints named, in bits per byte
    plot: str = ""  # draw --attention or --curve in this file, such as x.png

# ---- Sampling -----------------------------------------------------------------------------------

# Taking the likeliest token each time soon runs in circles. Drawing from the distribution is true
# to the model, but it has a long tail of unlikely tokens, and one bad token can derail the text.
# Most settings make this tail thinner, or cut it off.


def choose(logits, config):
    """Draw a token as the settings say: (B, vocab_size) to (B, 1)."""
    if config.temperature < 1e-9:  # the limit: all probability is on the likeliest token
        return logits.argmax(dim=-1, keepdim=True)
    logits, tokens = logits.float().sort(dim=-1, descending=True)  # the likeliest first
    # Softmax ignores what is subtracted from all scores; with the best at 0, none can overflow.
    logits = (logits - logits[:, :1]) / config.temperature
    # Cut by rank (Fan et al. 2018), by probability relative to the likeliest (Nguyen et al. 2024),
    # or by the sum of the likelier ones' probabilities ("nucleus", Holtzman et al. 2020).
    if config.top_k:
        logits[:, config.top_k :] = -math.inf
    probs = F.softmax(logits, dim=-1)
    tail = probs < config.min_p * probs[:, :1]
    if config.top_p < 1:
        likelier = probs.cumsum(dim=-1) - probs  # the probability of all tokens before this one
        tail |= likelier >= config.top_p
    tail[:, 0] = False  # the likeliest stays, whatever the settings
    return tokens.gather(-1, sample(logits.masked_fill(tail, -math.inf)))


@torch.no_grad()
def beam_search(model, idx, max_new_tokens, width, end):
    """Look for the likeliest text that begins with idx (1, T): extend the `width` best texts by any
    token, keep the `width` best of the results, repeat. Returns finished texts, the best first, as
    lists of new tokens. Each token lowers the probability of a text, so that the total would favour
    short ones: finished texts are ranked by the mean log-probability of their tokens."""
    texts, scores, finished, caches = idx, 0, [], []  # scores: total log-probabilities
    if isinstance(model, bpe_gpt.GPT) and idx.shape[1] + max_new_tokens <= model.block_size:
        caches = [bpe_gpt.Cache(model.block_size) for _ in model.transformer.h]
    for n in range(1, max_new_tokens + 1):
        if caches:
            logits, _ = model(texts[:, caches[0].length :], caches=caches)
        else:
            logits, _ = model(texts[:, -model.block_size :])
        totals = scores + F.log_softmax(logits[:, -1].float(), dim=-1)  # (texts, vocab_size)
        best, places = totals.flatten().topk(min(width, totals.numel()))
        parents, tokens = torch.unravel_index(places, totals.shape)
        texts = torch.cat((texts[parents], tokens[:, None]), dim=1)
        done = (tokens == end) | (n == max_new_tokens)
        finished += zip((best[done] / n).tolist(), texts[done, idx.shape[1] :].tolist())
        if done.all() or len(finished) >= width:
            break
        texts, scores, parents = texts[~done], best[~done, None], parents[~done]
        for cache in caches:  # a text takes over the keys and values of the one that it extends
            cache.kv = cache.kv[:, parents]
    return [text for _, text in sorted(finished, reverse=True)]


def continuations(model, idx, end, config):
    """The texts that follow idx (1, T), as iterators over their tokens."""
    if config.beam:
        texts = beam_search(model, idx, config.max_new_tokens, config.beam, end)
        return texts[: config.num_samples]
    generate = bpe_gpt.generate if isinstance(model, bpe_gpt.GPT) else char_gpt.generate
    idx = idx.repeat(config.num_samples, 1)
    columns = generate(model, idx, config.max_new_tokens, lambda logits: choose(logits, config))
    # All texts grow at once, by a column (B, 1) of tokens. Reading one of them further than any so
    # far makes the model go on; tee() keeps what the others have not read yet.
    columns = itertools.tee((column.flatten().tolist() for column in columns), config.num_samples)
    return [map(operator.itemgetter(i), columns[i]) for i in range(config.num_samples)]


def stream(tokens, tokenizer, end, stop):
    """Yields the text of the tokens, as soon as it is certain: a part of a character waits for its
    other bytes, and what may be the beginning of `stop` waits until it cannot be."""
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for token in tokens:
        if token == end:
            break
        text += decoder.decode(tokenizer.decode_single_token_bytes(token))
        if stop and stop in text:
            yield text[: text.index(stop)]
            return
        beginnings = (stop[:n] for n in range(len(stop) - 1, 0, -1))  # the longest first
        waiting = next((part for part in beginnings if text.endswith(part)), "")
        yield text.removesuffix(waiting)
        text = waiting
    yield text + decoder.decode(b"", final=True)


def write(model, tokenizer, idx, shown, config):
    """Print what the model makes of idx (1, T): the first text as it grows, then the others."""
    end = -1 if config.ignore_end else tokenizer.eot_token  # no token is -1
    for i, tokens in enumerate(continuations(model, idx, end, config)):
        print("-" * 40 + "\n" if i else "", shown, sep="", end="", flush=True)
        for piece in stream(tokens, tokenizer, end, config.stop):
            print(piece, end="", flush=True)
        print()

# ---- Looking inside -----------------------------------------------------------------------------

def quote(tokenizer, token):
    """A token on one line, in quotes; \\xf0 is a byte that is not a whole character."""
    text = tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
    return repr(text).replace("\\\\", "\\")


@torch.no_grad()
def next_log_probs(model, idx):
    """For each token of idx (1, T) the log-probabilities of the next one, (T, vocab_size)."""
    size = model.block_size
    logits = [model(idx[:, :size])[0][0]]  # all places in one pass
    for end in range(size + 1, idx.shape[1] + 1):  # beyond block_size one by one, as in generate()
        logits.append(model(idx[:, end - size : end])[0][0, -1:])
    return F.log_softmax(torch.cat(logits), dim=-1)


def show_probs(model, tokenizer, ids):
    """A line for each token but the first: its probability, its rank among all tokens, the other
    likely ones. The redder, the more surprised was the model: two bits for each of five colours."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    log_probs, ids = next_log_probs(model, torch.tensor([ids[:-1]])), ids[1:]
    print("token           probability    rank   likeliest others")
    for token, row in zip(ids, log_probs):
        rank = (row > row[token]).sum() + 1
        others = [other for other in row.argsort(descending=True)[:4].tolist() if other != token]
        others = [f"{quote(tokenizer, other)} {row[other].exp():.1%}" for other in others[:3]]
        name = f"{quote(tokenizer, token):15}"
        if coloured:
            colour = (34, 106, 178, 208, 196)[min(int(-row[token] / math.log(4)), 4)]
            name = f"\033[38;5;{colour}m{name}\033[0m"
        print(f"{name} {row[token].exp():11.2%} {rank:7}   {'  '.join(others)}")
    loss = F.nll_loss(log_probs, torch.tensor(ids))
    print(f"total loss {loss * len(ids):.2f}, mean {loss:.4f}, perplexity {loss.exp():.2f}")


@torch.no_grad()
def forward_with_hooks(model, ids, modules, hook):
    """Run the model on ids, and hook(module, inputs, output) after each of the modules."""
    handles = [module.register_forward_hook(hook) for module in modules]
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()


def attention_weights(model, ids):
    """(n_layer, n_head, T, T): in each head, row t says how much token t attends to each token."""
    blocks, found = model.transformer.h, []

    def hook(c_attn, inputs, output):  # (1, T, 3 * C): queries, keys and values of all heads
        heads = output.unflatten(-1, (3, blocks[0].attn.n_head, -1))
        q, k, _ = heads.permute(2, 0, 3, 1, 4)  # each (1, n_head, T, head_size)
        # The weighted mean of the rows of the identity matrix: the weights themselves.
        found.append(attention(q, k, torch.eye(len(ids))))

    forward_with_hooks(model, ids, [block.attn.c_attn for block in blocks], hook)
    return torch.cat(found)


def show_attention(model, tokenizer, ids, config):
    if not hasattr(model, "transformer"):
        raise ValueError("a bigram model has no attention: name another checkpoint")
    weights, names = attention_weights(model, ids), [quote(tokenizer, token) for token in ids]
    if config.plot:
        return plot_attention(weights, names, config.plot)
    n_layer, n_head, _, _ = weights.shape
    if not (0 <= config.layer < n_layer and 0 <= config.head < n_head):
        raise ValueError(f"--layer is from 0 to {n_layer - 1}, --head from 0 to {n_head - 1}")
    weights, width = weights[config.layer, config.head], max(map(len, names))
    print(f"layer {config.layer}, head {config.head}: each row attends to the columns")
    for letters in itertools.zip_longest(*names, fillvalue=" "):  # the names, from top to bottom
        print(" " * width, " ".join(letters))
    for name, row in zip(names, weights.tolist()):
        shades = (" ░▒▓█"[min(int(5 * math.sqrt(weight)), 4)] for weight in row)
        print(name.rjust(width), "".join(2 * shade for shade in shades))
    print("weights: ░ from 4%, ▒ from 16%, ▓ from 36%, █ from 64%")


def plot_attention(weights, names, path):
    """One picture of all heads (side by side) of all layers (one above the other)."""
    import matplotlib.pyplot as plt

    n_layer, n_head, T, _ = weights.shape
    size = T + 1  # of a tile: T x T weights and a gap
    tiles = F.pad(weights, (0, 1, 0, 1), value=math.nan)  # (n_layer, n_head, size, size)
    picture = tiles.transpose(1, 2).reshape(n_layer * size, n_head * size)
    inch = min(0.13, 30 / max(picture.shape))  # of a token
    figure, axis = plt.subplots(figsize=(inch * n_head * size + 2, inch * n_layer * size + 1))
    image = axis.imshow(picture.numpy(), vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    axis.set_xticks(range(n_head * size), (names + [""]) * n_head, rotation=90)
    axis.set_yticks(range(n_layer * size), (names + [""]) * n_layer)
    axis.tick_params(labelsize=50 * inch)
    axis.set_title(f"{n_layer} layers from top to bottom, {n_head} heads from left to right")
    figure.colorbar(image, label="attention weight", shrink=0.5, pad=0.1)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"saved {path}")


def show_shapes(model, ids):
    """A line for each module without parts, in the order in which they work. Attention itself is a
    function, without a line: it stands between c_attn and c_proj."""
    names = {module: name for name, module in model.named_modules()}
    counted = set()  # the parameters so far: lm_head shares those of wte

    def hook(module, inputs, output):
        n_params = sum(p.numel() for p in module.parameters() if p not in counted)
        counted.update(module.parameters())
        kind, before, after = type(module).__name__, [*inputs[0].shape], [*output.shape]
        print(f"{names[module]:28} {kind:10} {before!s:>16} {after!s:>16} {n_params:12,}")

    print(f"{'module':28} {'kind':10} {'in':>16} {'out':>16} {'parameters':>12}")
    leaves = [m for m in names if not list(m.children()) and not isinstance(m, torch.nn.Dropout)]
    forward_with_hooks(model, ids, leaves, hook)
    print(f"{'total':73} {sum(p.numel() for p in model.parameters()):12,}")


def read_curve(path):
    """A run's history: [(megabytes of text read, training loss, validation loss)]. The losses are
    in bits per byte of text, which, unlike those per token, compare between vocabularies."""
    checkpoint = load_checkpoint(path, *CHARACTER_MODELS, "bpe_gpt")
    config, n_bytes = checkpoint["config"], checkpoint["bytes_per_token"]
    if config.get("instructions"):
        raise ValueError(f"{path} learned from instructions, not from a text")
    if not checkpoint["history"]:
        raise ValueError(f"{path} has no losses yet: its run was stopped before it was evaluated")
    n_tokens = config.get("total_batch_size") or config["batch_size"] * config["block_size"]
    bits = 1 / math.log(2) / n_bytes  # per byte, at a loss of 1 per token
    megabytes = n_tokens * n_bytes / 1e6  # per step
    return [(step * megabytes, a * bits, b * bits) for step, a, b in checkpoint["history"]]


def show_curves(paths, plot):
    curves = {path: read_curve(path) for path in paths}
    print("text read (MB)    train (bits/byte)    val (bits/byte)")
    for path, curve in curves.items():
        print(path)
        for megabytes, train, val in curve:
            print(f"{megabytes:14.2f} {train:20.3f} {val:18.3f}")
    if plot:
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots()
        for path, curve in curves.items():
            megabytes, train, val = zip(*curve)
            axis.plot(megabytes, val, ".-", label=path)
            axis.plot(megabytes, train, ":", color=axis.lines[-1].get_color())
        axis.set(xlabel="text read (megabytes)", ylabel="bits per byte", xscale="log")
        axis.set_title("loss on validation data (solid) and training data (dotted)")
        axis.legend()
        figure.savefig(plot, dpi=150, bbox_inches="tight")
        print(f"saved {plot}")

# ---- Models and flags ---------------------------------------------------------------------------

CHARACTER_MODELS = {"bigram": (BigramConfig, BigramLanguageModel)}
CHARACTER_MODELS |= {"char_gpt": (char_gpt.GPTConfig, char_gpt.GPT)}


class Characters(CharTokenizer):
    """CharTokenizer with the methods of tiktoken that this script uses."""
    eot_token = -1  # no token: these models never end a text
    encode_ordinary = CharTokenizer.encode

    def decode_single_token_bytes(self, token):
        return self.chars[token].encode()


def load_model(name):
    """Model, tokenizer and checkpoint, which is empty for a published model or a folder."""
    published = name in bpe_gpt.SIZES or os.path.isdir(name) or name.endswith(".safetensors")
    checkpoint = {} if published else load_checkpoint(name, *CHARACTER_MODELS, "bpe_gpt")
    if published or checkpoint["script"] == "bpe_gpt":
        model, tokenizer = bpe_gpt.load_pretrained(name, {}, {})
        return model.eval(), bpe_gpt.find_tokenizer(model, tokenizer), checkpoint
    Config, Model = CHARACTER_MODELS[checkpoint["script"]]
    model = Model(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), Characters(checkpoint["vocab"]), checkpoint


def fast_dtype(model, device, config):
    """For each new token all weights are read from memory, which in a large model takes most of the
    time: half the bits, half the time. A CPU without instructions for bfloat16 is still fast with
    one text, but not with several."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if sum(p.numel() for p in model.parameters()) < 50e6:
        return torch.float32
    single = device.type == "cpu" and config.num_samples == 1 and not config.beam
    return torch.bfloat16 if single else pick_dtype("auto", device)


class FastLinear(torch.nn.Linear):
    """torch.nn.Linear on a CPU, up to twice as fast for a single token (PyTorch 2.13)."""
    def forward(self, x):  # (B, T, in_features)
        single = x.numel() == self.in_features
        torch.backends.mkldnn.enabled = not single  # oneDNN is slow with a single one
        if not single or x.dtype != torch.float32:
            return super().forward(x)
        # In float32 PyTorch leaves a product of a matrix and a vector to one core. A batch of such
        # products, each with a part of the matrix, is shared by all cores.
        n = max(n for n in range(1, 65) if self.out_features % n == 0)
        parts = self.weight.unflatten(0, (n, -1))  # (n, out_features / n, in_features)
        y = torch.bmm(parts, x.mT.expand(n, -1, -1)).view(1, 1, -1)  # x.mT is (1, in_features, 1)
        return y if self.bias is None else y + self.bias


def speed_up(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = FastLinear  # the same weights, another forward()


def parse_flags(Config):
    """Every field of Config as a flag, and the models' names. Returns those given, as a dict."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [model ...] [--setting value ...]", argument_default=argparse.SUPPRESS,
        description=f"{__doc__}\n{inspect.getsource(Config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", help=argparse.SUPPRESS, default=[])
    for field in fields(Config):
        switch = {"action": argparse.BooleanOptionalAction}  # --curve, --no-curve
        how = switch if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{field.name}", help=argparse.SUPPRESS, **how)
    return vars(parser.parse_args())


def typed_lines():
    """What the user types, line by line, until Ctrl-D."""
    while sys.stdin:  # None if it is closed
        try:
            yield input("> ")
        except EOFError:
            return print()


def main():
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # any character, line by line
    given = parse_flags(SampleConfig)
    models = given.pop("models") or sorted(glob.glob("out/*.pt"), key=os.path.getmtime)[-1:]
    if not models:
        raise ValueError("no checkpoint in out/: train a model first, or name one, such as gpt2")
    config = SampleConfig(**given)
    if config.curve:
        return show_curves(models, config.plot)
    model, tokenizer, checkpoint = load_model(models[0])
    encode = tokenizer.encode_ordinary
    # Before a text stands the end of another one; with characters a line break, the first of them.
    start = [max(tokenizer.eot_token, 0)]
    if config.probs:
        return show_probs(model, tokenizer, start + encode(config.probs))
    ids = encode(config.attention or config.shapes)
    if config.attention:
        return show_attention(model, tokenizer, ids, config)
    if config.shapes:
        return show_shapes(model, ids)

    device = pick_device("auto")
    dtype = fast_dtype(model, device, config)
    model.to(device, dtype)
    if device.type == "cpu":
        speed_up(model)
    print(f"{models[0]} on {device}, {dtype}", file=sys.stderr)
    torch.manual_seed(config.seed)
    instructed = config.instruct or config.interactive and checkpoint.get("config", {}).get(
        "instructions")
    for text in typed_lines() if config.interactive else [config.instruct or config.prompt]:
        prompt = shown = text
        if instructed:
            prompt, shown = bpe_gpt.make_prompt({"instruction": text, "input": config.input}), ""
        try:
            idx = torch.tensor([encode(prompt) or start], device=device)
            write(model, tokenizer, idx, shown, config)
        except ValueError as error:  # a character that the model never saw
            if not config.interactive:
                raise
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python sample.py | head` ends quietly
    try:
        main()
    except KeyboardInterrupt:
        print()
    except (OSError, ValueError, ImportError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
