"""Generate text with the models of the other scripts and with GPT-2, and look inside them.

    python sample.py                    # from the newest checkpoint in out/
    python sample.py gpt2               # from GPT-2, or gpt2-medium, gpt2-large, gpt2-xl
    python sample.py --prompt "ROMEO:" --temperature 0.8 --top_k 20
    python sample.py --interactive      # one prompt after another; Ctrl-D ends
    python sample.py --probs "To be, or not"      # the probability of each token
    python sample.py --explore "To be, or not"    # a page for the browser: what the model does
    python sample.py --shapes "To be, or not"     # what goes into each module and what comes out
    python sample.py --curve out/bigram.pt out/char_gpt.pt --plot curves.png
"""

import argparse
import base64
import codecs
import glob
import inspect
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass, fields
from unittest import mock

import torch
import torch.nn.functional as F

import bpe_gpt
import char_gpt
from bigram import BigramConfig, BigramLanguageModel
from char_gpt import CharTokenizer, UserError, load_checkpoint, pick_device, pick_dtype, sample

# ---- Configuration ------------------------------------------------------------------------------

@dataclass
class SampleConfig:
    prompt: str = ""  # text to continue (in bash, $'ROMEO:\n' has a line break)
    instruct: str = ""  # instruction to follow, for a model that data/instruct.py has trained
    input: str = ""  # text that the instruction refers to
    interactive: bool = False  # ask for prompts, or instructions
    max_new_tokens: int = 500  # limit on the length of a text
    num_samples: int = 1  # number of texts
    temperature: float = 1.0  # below 1: likely tokens become likelier; 0: always the likeliest
    top_k: int = 0  # if given, sample from the k likeliest tokens only
    top_p: float = 1.0  # sample from the likeliest tokens that together reach this probability
    min_p: float = 0.0  # sample from tokens with at least this fraction of the top probability
    beam: int = 0  # instead of sampling, search for the likeliest text, keeping this many at a time
    stop: str = ""  # end a text before this string (in bash, $'\n' is a line break)
    ignore_end: bool = False  # continue even after the model's end-of-text token
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 for a large model, if it is fast here
    seed: int = 1337  # for the random numbers: the same seed gives the same text
    probs: str = ""  # show the probability of every token in this text
    explore: str = ""  # make a page for the browser that shows what the model does with this text
    shapes: str = ""  # show the shapes of each module's input and output for this text
    curve: bool = False  # show the losses of the checkpoints that are named, in bits per byte
    plot: str = ""  # file for the picture of --curve, such as x.png, or for the page of --explore

# ---- Sampling -----------------------------------------------------------------------------------

# Always taking the likeliest token (greedy decoding) soon leads to repetition. Drawing from the
# predicted distribution is true to the model, but among 50,257 tokens very many are unlikely.
# Together, they come up often, and a single bad token can spoil the rest of the text. The settings
# below make this tail of the distribution thinner, or cut it off.

def choose(logits, config):
    """Draw a token according to the settings: (B, vocab_size) to (B, 1). No setting cuts off the
    likeliest token, and a top_k larger than the vocabulary cuts off nothing."""
    if config.temperature < 1e-9:  # the limit: all probability is on the likeliest token
        return logits.argmax(dim=-1, keepdim=True)
    logits, tokens = logits.float().sort(dim=-1, descending=True)  # the likeliest first
    # The highest score becomes 0, since a low temperature could make it infinite otherwise. Softmax
    # does not change when the same number is subtracted from all scores.
    logits = (logits - logits[:, :1]) / config.temperature  # 0.5 doubles differences of scores
    if config.top_k:  # a cut by rank (Fan et al. 2018)
        logits[:, config.top_k :] = -math.inf
    probs = logits.softmax(dim=-1)
    # A cut by probability, relative to the likeliest token (Nguyen et al. 2024).
    tail = probs < config.min_p * probs[:, :1]
    # A cut by the sum of the probabilities of all likelier tokens (Holtzman et al. 2020). For
    # example, with the probabilities 0.5, 0.3, 0.15, 0.05 and a top_p of 0.7, these sums are 0,
    # 0.5, 0.8, 0.95: the first two tokens stay. (1e-6 allows for rounding errors in these sums.)
    if config.top_p < 1:
        tail |= probs.cumsum(dim=-1) - probs >= config.top_p - 1e-6
    tail[:, 0] = False  # the likeliest token always stays
    ranks = sample(logits.masked_fill(tail, -math.inf))  # (B, 1): 0 is the likeliest
    return tokens.gather(-1, ranks)  # the tokens that have these ranks


@torch.no_grad()
def beam_search(model, idx, max_new_tokens, width, end):
    """Search for the likeliest text that begins with idx (1, T): extend each of the `width` best
    texts by every token, keep the `width` best of the results, and repeat. A text is finished by
    the token `end`, or after max_new_tokens; the search ends when `width` or more are finished.
    Returns their new tokens, best text first. (The likeliest text is often dull and repetitive.)

    The score of a text is its log-probability, the sum of those of its tokens. Every token lowers
    it, and short texts would win. So finished texts are ranked by the mean over their tokens."""
    texts = idx
    scores = torch.zeros(1, 1, device=idx.device)  # of the texts, (number of texts, 1)
    finished = []
    caches = []  # as in bpe_gpt.generate(), if the whole text fits into the context
    if isinstance(model, bpe_gpt.GPT) and idx.shape[1] + max_new_tokens <= model.context_size:
        caches = [bpe_gpt.Cache(model.context_size) for _ in model.transformer.h]
    for n in range(1, max_new_tokens + 1):
        if caches:
            logits, _ = model(texts[:, caches[0].length :], caches=caches)  # reads what is new
        else:
            logits, _ = model(texts[:, -model.context_size :])
        totals = scores + logits[:, -1].float().log_softmax(dim=-1)  # (texts, vocab_size)
        best, positions = totals.flatten().topk(min(width, totals.numel()))
        parents, tokens = torch.unravel_index(positions, totals.shape)  # which text, which token
        texts = torch.cat((texts[parents], tokens.unsqueeze(1)), dim=1)
        done = (tokens == end) | (n == max_new_tokens)
        finished += zip((best[done] / n).tolist(), texts[done, idx.shape[1] :].tolist())
        if done.all() or len(finished) >= width:
            break
        texts = texts[~done]
        scores = best[~done].unsqueeze(1)
        for cache in caches:  # a text takes over the keys and values of the one that it extends
            cache.k = cache.k[parents[~done]]
            cache.v = cache.v[parents[~done]]
    return [text for _, text in sorted(finished, reverse=True)]


def continuations(model, idx, end, config):
    """The texts that continue idx (1, T), each as an iterable of tokens."""
    if config.beam:
        return beam_search(model, idx, config.max_new_tokens, config.beam, end)[:config.num_samples]
    generate = bpe_gpt.generate if isinstance(model, bpe_gpt.GPT) else char_gpt.generate
    idx = idx.repeat(config.num_samples, 1)
    columns = generate(model, idx, config.max_new_tokens, lambda logits: choose(logits, config))
    # A column (B, 1) has a token of each text. tee() keeps it until all texts have been read.
    copies = itertools.tee(columns, config.num_samples)
    return [read_row(i, copy) for i, copy in enumerate(copies)]


def read_row(i, columns):
    for column in columns:
        yield column[i].item()


def stream(tokens, tokenizer, end, stop):
    """Yields the text of the tokens, each piece as soon as it is certain. A character can be spread
    over several tokens: the first of its bytes wait for the others. What may be the beginning of
    `stop`, which is not to be shown, waits for what follows."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # it keeps bytes that have to wait
    text = ""
    for token in tokens:
        if token == end:
            break
        text += decoder.decode(tokenizer.tokens[token])
        if stop and stop in text:
            yield text[: text.index(stop)]
            return
        waiting = ""
        for n in range(1, len(stop)):
            if text.endswith(stop[:n]):
                waiting = stop[:n]  # in the end, the longest of these
        yield text.removesuffix(waiting)
        text = waiting
    yield text + decoder.decode(b"", final=True)


def print_texts(model, tokenizer, idx, prompt, config):
    """Print the prompt and the continuations of idx (1, T), the first one as it grows."""
    end = -1 if config.ignore_end else tokenizer.end_of_text  # no token has the number -1
    for i, tokens in enumerate(continuations(model, idx, end, config)):
        if i > 0:
            print("-" * 40)
        print(prompt, end="", flush=True)
        for piece in stream(tokens, tokenizer, end, config.stop):
            print(piece, end="", flush=True)
        print()

# ---- Looking inside -----------------------------------------------------------------------------

def quote(tokenizer, token):
    """A token in quotes, on one line. A byte that is only part of a character looks like \\xf0."""
    text = tokenizer.tokens[token].decode("utf-8", "backslashreplace")
    return repr(text).replace("\\\\", "\\")


@torch.no_grad()
def next_log_probs(model, idx):
    """The log-probabilities of what follows each token of idx (1, T): (T, vocab_size). A long text
    is read in windows that overlap: with T = 8 and a context of 4, they begin at 0, 2 and 4. After
    the first, only their last 2 rows are used: these tokens see at least half a context."""
    size = model.context_size
    step = max(1, size // 2)
    rows = [model(idx[:, :size])[0][0]]
    for start in range(step, idx.shape[1] - size + step, step):  # until a window reaches the end
        logits, _ = model(idx[:, start : start + size])
        rows.append(logits[0, size - step :])
    return torch.cat(rows).log_softmax(dim=-1)


def show_probs(model, tokenizer, ids):
    """For each token but the first: its probability, its rank, and the likeliest other tokens."""
    log_probs = next_log_probs(model, torch.tensor([ids[:-1]]))
    targets = ids[1:]
    print("token           probability    rank   likeliest others")
    for token, row in zip(targets, log_probs):
        rank = (row > row[token]).sum() + 1
        others = [other for other in row.argsort(descending=True)[:4].tolist() if other != token]
        others = [f"{quote(tokenizer, other)} {row[other].exp():.1%}" for other in others[:3]]
        print(f"{quote(tokenizer, token):15} {row[token].exp():11.2%} {rank:7} ", *others, sep="  ")
    loss = F.nll_loss(log_probs, torch.tensor(targets))  # cross-entropy, from log-probabilities
    print(f"total loss {loss * len(targets):.2f}, mean {loss:.4f}, perplexity {loss.exp():.2f}")


@torch.no_grad()
def record(model, ids, modules):
    """Run the model on ids. Returns (module, input, output) for each call of one of modules."""
    calls = []
    def hook(module, inputs, output):  # PyTorch calls it when the module has run
        calls.append((module, inputs[0], output))
    handles = [module.register_forward_hook(hook) for module in set(modules)]  # each once
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def attention_weights(model, ids):
    """(n_layer, n_head, T, T): in each head, row t says how much token t attends to each token.
    Weights must sum to 1: a head that finds nothing often attends to the first token."""
    weights = []
    usual = F.scaled_dot_product_attention
    def recording(q, k, v, **settings):  # temporarily replaces this function
        # With the identity matrix as values, weights @ values are the weights themselves.
        identity = torch.eye(len(ids)).expand(*v.shape[:2], -1, -1)
        weights.append(usual(q, k, identity, **settings))
        return usual(q, k, v, **settings)
    with mock.patch.object(F, "scaled_dot_product_attention", recording):
        model(torch.tensor([ids]))
    if len(weights) != len(model.transformer.h):
        raise UserError("attention is seen only where a block calls scaled_dot_product_attention")
    return torch.cat(weights)


@torch.no_grad()
def explore(model, tokenizer, ids, name, history, config):
    """Make a page for the browser out of data/explore.html: what the model does with ids."""
    has_attention = hasattr(model, "transformer")  # or it is a bigram table
    limit = min(81, model.context_size) if has_attention else 81  # so that the page opens fast
    if len(ids) > limit:
        raise UserError(f"--explore takes at most {limit - 1} tokens; the text has {len(ids) - 1}")
    n_params = sum(p.numel() for p in model.parameters())
    about = f"{n_params:,} parameters"
    if history:  # bigram.py saves the last table, the others their best weights
        saved = min(history, key=lambda row: row[3]) if has_attention else history[-1]
        about += f", validation loss {saved[3]:.4f} nats after {saved[0]:,} steps"
    log_probs = next_log_probs(model, torch.tensor([ids]))  # (T, vocab_size)
    followed = log_probs[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1))  # (T - 1, 1)
    scores, order = log_probs.sort(dim=-1, descending=True)
    # Of 50,257 scores, the page gets those of the ranks up to 100, and then of each 1% further on.
    ranks = torch.logspace(0, math.log10(scores.shape[1]), 1200).round().long().unique()
    page = {
        "model": name, "about": about, "text": tokenizer.decode(ids[1:]), "ids": ids,
        "best": order[:, :100].tolist(), "score_ranks": ranks.tolist(),
        "names": [quote(tokenizer, i)[1:-1].replace(" ", "\u2423") for i in range(scores.shape[1])],
        "scores": scores[:, ranks - 1].double().round(decimals=4).tolist(),
        "log_probs": followed.flatten().tolist(),
        "ranks": ((log_probs[:-1] > followed).sum(dim=-1) + 1).tolist(),
        "context_size": model.context_size if has_attention else 10**6}  # a bigram table: any text
    for setting in ("temperature", "top_k", "top_p", "min_p"):
        page[setting] = min(getattr(config, setting), 1e6)  # JSON has no infinity
    if has_attention:
        page["attention"] = (attention_weights(model, ids) * 1000).round().int().tolist()
        # The "logit lens" (nostalgebraist 2020): what would a model that ends at a block predict?
        # All blocks add to the same x, so that the output layer can read it at any point.
        calls = record(model, ids, model.transformer.h)
        x = torch.cat([calls[0][1], *(output for _, _, output in calls)])  # input; all outputs
        probs, tokens = model.lm_head(model.transformer.ln_f(x)).softmax(dim=-1).max(dim=-1)
        page["lens"] = {"tokens": tokens.tolist(), "probs": probs.tolist()}  # (n_layer + 1, T)
    if n_params <= 16e6:  # for a larger model, the file would be too large
        page |= page_model(model, tokenizer, rounded=n_params > 2e6)
    data = json.dumps(page, separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c")  # so that no </script> in the data ends the script
    html = (bpe_gpt.DATA / "explore.html").read_text(encoding="utf-8")
    script = (bpe_gpt.DATA / "gpt2.js").read_text(encoding="utf-8")
    html = html.replace("/* data/gpt2.js comes here */", script)
    html = html.replace('id="data">', f'id="data">{data}')
    path = config.plot or "explore.html"
    bpe_gpt.replace_file(path, lambda file: file.write(html.encode()))
    print(f"saved {path}: open it in a browser")


def page_model(model, tokenizer, rounded):
    """For gpt2.js, which runs small models in the page: the tokens, and the weights in base64."""
    weights = []
    for name, p in model.named_parameters():
        scale = p.abs().max().item() / 32767 if rounded else 0  # for 16-bit integers
        numbers = (p / scale).round().short() if scale else p
        weights.append((name, base64.b64encode(numbers.detach().numpy().tobytes()).decode(), scale))
    # First, gpt2.js compares its own results with PyTorch's, for the text and for these tokens.
    check = torch.arange(min(130, model.context_size)).unsqueeze(0) % len(tokenizer.tokens)
    return {
        "check": check[0].tolist(), "check_scores": next_log_probs(model, check)[:, 0].tolist(),
        "weights": weights, "rounded": rounded, "end_of_text": tokenizer.end_of_text,
        "tokens": [token.decode("latin-1") for token in tokenizer.tokens],  # a letter for each byte
        "words": bpe_gpt.WORDS if isinstance(model, bpe_gpt.GPT) else None}


def show_shapes(model, ids):
    """A line for each module that contains no other module, in the order they run, except dropout.
    Attention has no line, because it is a function: it comes between c_attn and c_proj."""
    names = {module: name for name, module in model.named_modules()}
    leaves = [m for m in names if not list(m.children()) and not isinstance(m, torch.nn.Dropout)]
    counted = set()  # the parameters so far, since lm_head has the same as wte
    print(f"{'module':28} {'kind':10} {'in':>16} {'out':>16} {'parameters':>12}")
    for module, x, y in record(model, ids, leaves):
        n_params = sum(p.numel() for p in module.parameters() if p not in counted)
        counted.update(module.parameters())
        shapes = f"{list(x.shape)!s:>16} {list(y.shape)!s:>16}"
        print(f"{names[module]:28} {type(module).__name__:10} {shapes} {n_params:12,}")
    print(f"{'total':73} {sum(p.numel() for p in model.parameters()):12,}")


def read_curve(path):
    """The history of a run, [(megabytes of text read, training loss, validation loss)]. The losses
    are in bits per byte of text, which can be compared between models with different tokens."""
    checkpoint = load_checkpoint(path, *CHARACTER_MODELS, "bpe_gpt")
    if checkpoint.get("templates") or not checkpoint["history"]:
        raise UserError(f"{path} has no losses on a text: trained on instructions, or elsewhere")
    train_bytes, val_bytes = checkpoint["bytes_per_token"]  # per token, in the two parts
    return [(n_read * train_bytes / 1e6,
             train_loss / math.log(2) / train_bytes, val_loss / math.log(2) / val_bytes)
            for _, n_read, train_loss, val_loss in checkpoint["history"]]


def show_curves(paths, plot):
    curves = {path: read_curve(path) for path in paths}
    print("text read (MB)    train (bits/byte)    val (bits/byte)")
    for path, curve in curves.items():
        print(path)
        for megabytes, train, val in curve:
            print(f"{megabytes:14.2f} {train:20.3f} {val:18.3f}")
    if plot:
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from None
        figure, axis = plt.subplots()
        for path, curve in curves.items():
            megabytes, train, val = zip(*curve)
            axis.plot(megabytes, val, ".-", label=path)
            axis.plot(megabytes, train, ":", color=axis.lines[-1].get_color(), label="(training)")
        axis.set(xlabel="text read (megabytes)", ylabel="bits per byte", xscale="log")
        axis.legend()
        figure.savefig(plot, dpi=150, bbox_inches="tight")
        print(f"saved {plot}")

# ---- Models and flags ---------------------------------------------------------------------------

CHARACTER_MODELS = {"bigram": (BigramConfig, BigramLanguageModel),
                    "char_gpt": (char_gpt.GPTConfig, char_gpt.GPT)}


def load_model(name):
    """Model, tokenizer, and the checkpoint that they come from."""
    if name in bpe_gpt.SIZES or os.path.isdir(name):
        checkpoint = bpe_gpt.load_pretrained(name)
    else:
        mmap = os.name == "posix"  # Windows would not let a run replace the file meanwhile
        checkpoint = load_checkpoint(name, *CHARACTER_MODELS, "bpe_gpt", mmap=mmap)
    written_by = checkpoint.get("written_by", "bpe_gpt")
    Config, Model = CHARACTER_MODELS.get(written_by, (bpe_gpt.GPTConfig, bpe_gpt.GPT))
    settings = checkpoint["config"] | {"by_hand": False}  # see attention_weights()
    config = Config(**{n: x for n, x in settings.items() if hasattr(Config, n)})
    if written_by == "bpe_gpt":
        model = bpe_gpt.build_model(checkpoint, config)
        return model.eval(), bpe_gpt.BPETokenizer(checkpoint["vocab"]), checkpoint
    model = Model(config)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), CharTokenizer(checkpoint["vocab"]), checkpoint


def parse_flags(Config):
    """Makes every field of Config a flag. Returns those given, and the "models", as a dict."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [model ...] [--setting value ...]", argument_default=argparse.SUPPRESS,
        allow_abbrev=False, description=f"{__doc__}\n{inspect.getsource(Config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=argparse.SUPPRESS, default=[])
    looks = parser.add_mutually_exclusive_group()  # one of these at a time
    for field in fields(Config):
        switch = {"action": argparse.BooleanOptionalAction}  # such as --curve and --no-curve
        kind = switch if field.type is bool else {"type": field.type}
        group = looks if field.name in ("probs", "explore", "shapes", "curve") else parser
        group.add_argument(f"--{field.name}", help=argparse.SUPPRESS, **kind)
    flags = vars(parser.parse_intermixed_args())  # models may come before and after flags
    if len(flags["models"]) > 1 and not flags.get("curve"):
        raise UserError("only --curve takes several models")
    if "explore" in flags and not flags.get("plot", ".html").endswith(".html"):
        raise UserError(f"--plot {flags['plot']}: the name of a page must end in .html")
    at_least = dict(temperature=0, top_k=0, top_p=0, min_p=0, max_new_tokens=0, num_samples=1)
    for name, least in at_least.items():
        if not flags.get(name, least) >= least:  # (`<` would let nan pass)
            raise UserError(f"--{name} must be at least {least}")
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if name in flags and flags.get("beam"):
            raise UserError(f"--beam searches for the likeliest text: --{name} has no effect")
    if flags.get("beam") and flags.get("num_samples", 1) > flags["beam"]:
        raise UserError(f"--beam {flags['beam']} finds {flags['beam']} texts: give a larger one")
    return flags


def typed_lines():
    """What the user types, line by line, until Ctrl-D."""
    while sys.stdin:  # it is None if there is no standard input
        try:
            yield input("> ")
        except EOFError:
            return print()


def main():
    if hasattr(sys.stdout, "reconfigure"):  # unprintable characters become ?; lines appear at once
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    flags = parse_flags(SampleConfig)
    names = flags.pop("models") or sorted(glob.glob("out/*.pt"), key=os.path.getmtime)[-1:]
    if not names:
        raise UserError("no checkpoint in out/: train a model first, or name one, such as gpt2")
    config = SampleConfig(**flags)
    if config.curve:
        return show_curves(names, config.plot)
    model, tokenizer, checkpoint = load_model(names[0])
    # A token to stand before a text, so that the first token of the text is predicted, too.
    text_before = checkpoint.get("text_before", checkpoint["vocab"][0])
    before = [tokenizer.tokens.index(text_before.encode())]
    if config.probs:
        return show_probs(model, tokenizer, before + tokenizer.encode(config.probs))
    if config.explore:
        ids = before + tokenizer.encode(config.explore.replace("\r\n", "\n").replace("\r", "\n"))
        return explore(model, tokenizer, ids, names[0], checkpoint.get("history"), config)
    if config.shapes:
        return show_shapes(model, tokenizer.encode(config.shapes))
    templates = checkpoint.get("templates")  # without and with input, if trained on instructions
    if (config.instruct or config.input) and not templates:
        raise UserError(f"{names[0]} was not trained on instructions: see data/instruct.py")
    device = pick_device(config.device)
    is_large = sum(p.numel() for p in model.parameters()) > 50e6
    if config.dtype == "auto" and not is_large:  # bfloat16 saves time in large models only
        config.dtype = "float32"
    dtype = pick_dtype(config.dtype, device)
    model.to(device, dtype)
    print(f"{names[0]} on {device}, {dtype}", file=sys.stderr)
    torch.manual_seed(config.seed)
    for text in typed_lines() if config.interactive else [config.instruct or config.prompt]:
        try:
            if config.instruct or config.input or (config.interactive and templates):
                prompt = templates[config.input != ""].format(instruction=text, input=config.input)
                ids = tokenizer.encode(prompt, special=())
                text = ""  # only the response is shown
            else:
                ids = tokenizer.encode(text) or before
            print_texts(model, tokenizer, torch.tensor([ids], device=device), text, config)
        except UserError as error:  # a character that the model never saw
            if not config.interactive:
                raise
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()
    except BrokenPipeError:  # `python sample.py | head` ends quietly
        os._exit(0)
    except (OSError, UserError, bpe_gpt.UserError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        sys.exit("error: out of memory; use a smaller model, or --dtype bfloat16")
