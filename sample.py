"""Text out of the models that the other scripts have trained, and out of GPT-2.

    python sample.py                            # from the newest checkpoint in out/
    python sample.py out/bigram.pt              # from this one
    python sample.py gpt2                       # from GPT-2 as published; so too gpt2-medium, -xl
    python sample.py FOLDER                     # from a GPT-2 in Hugging Face's layout
    python sample.py --prompt "ROMEO:"          # go on from these words
    python sample.py --temperature 0.8 --top_k 20

A model gives each token a probability; these are the ways to pick one. Always the likeliest
(--temperature 0) soon runs in circles. Drawing by the probabilities is true to the model, and now
and then takes something silly from the long tail of unlikely tokens. In between, --temperature
below 1 makes likely tokens likelier still, --top_k keeps only the k likeliest tokens, and --top_p
as many of them as it takes to reach a probability of p (nucleus sampling, Holtzman et al. 2020).
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "tiktoken"]
# ///

import argparse
import codecs
import math
import re
import signal
import sys
from pathlib import Path

import torch

import bigram
import bpe_gpt
import char_gpt
from char_gpt import CharTokenizer, draw, fail, load_checkpoint, pick_device, pick_dtype

# ---------------------------------------------------------------------------------------------
# Decoding


def make_choice(temperature=1.0, top_k=None, top_p=1.0):
    """Returns the function that turns the scores of the next token (B, vocab_size) into the token
    chosen (B, 1), for use in generate()."""

    def choose(logits):
        if temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits.float()  # a model in bfloat16 gives scores in bfloat16
        # Softmax is blind to what is subtracted from all scores; with the best at 0, a temperature
        # however small cannot make them overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            logits[:, top_k:] = -math.inf
        if top_p < 1:
            probs = logits.softmax(dim=-1)
            likelier = probs.cumsum(dim=-1) - probs  # the probability of all tokens before it
            logits[likelier >= top_p] = -math.inf
        return tokens.gather(-1, draw(logits))

    return choose


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
    """The model of a checkpoint, its tokenizer, and its history (see train()); or a published model
    and its tokenizer, with an empty history. Raises ValueError for a file that is missing, damaged,
    or of no such kind, and OSError where a published model cannot be had."""
    path = Path(name_or_path)
    is_published = name_or_path in bpe_gpt.SIZES or path.is_dir()
    if is_published or path.suffix in (".safetensors", ".bin"):
        model, tokenizer = bpe_gpt.load_pretrained(name_or_path)
        return model, bpe_gpt.fit_tokenizer(tokenizer, model), []
    checkpoint = load_checkpoint(path, *MODELS)
    Config, Model, make_tokenizer = MODELS[checkpoint["script"]]
    try:
        tokenizer = make_tokenizer(checkpoint["vocab"])
        model = Model(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        if not all(p.sum().isfinite() for p in model.parameters()):
            raise TypeError
        return model, tokenizer, checkpoint["history"]
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise ValueError(f"{path} is damaged: train the model again") from None


def best_loss(history):
    """The least validation loss of a history. Raises ValueError for what is none."""
    try:
        return min(float(val_loss) for _, _, val_loss in history)
    except TypeError:
        raise ValueError(
            "the history in the checkpoint is damaged: train the model again"
        ) from None


# ---------------------------------------------------------------------------------------------
# Command line


def parse_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    add = parser.add_argument
    add("model", nargs="?", help="checkpoint, folder, or name [the newest checkpoint in out/]")
    add("--prompt", help="the words to go on from [a line break, or the start of a text]")
    add("--max_new_tokens", type=int, default=500, help="how many tokens to add [500]")
    add("--num_samples", type=int, default=1, help="how many texts to make, side by side [1]")
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token [1.0]")
    add("--top_k", type=int, help="draw from this many of the likeliest tokens only [all]")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest, up to this sum [1.0]")
    add("--ignore_end", action="store_true", help="go on where the model ends its text")
    add("--dtype", default="auto", help="float32 or bfloat16 [the faster one, for a large model]")
    add("--seed", type=int, default=1337, help="the same seed gives the same text [1337]")
    args = parser.parse_args()
    for name, good, rule in (
        ("max_new_tokens", args.max_new_tokens > 0, "above 0"),
        ("num_samples", 0 < args.num_samples <= 1000, "from 1 to 1000"),
        ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
        ("top_k", args.top_k is None or args.top_k > 0, "above 0"),
        ("top_p", 0 < args.top_p <= 1, "above 0, and 1 at most"),
        ("dtype", args.dtype in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
        ("seed", 0 <= args.seed < 2**31, "0 or more, and below 2**31"),
        ("prompt", args.prompt != "", "a character at least"),
    ):
        if not good:
            fail(f"--{name} must be {rule}; it is {getattr(args, name)!r}")
    return args


def main():
    args = parse_flags()
    name = str(args.model or newest_checkpoint())
    device = pick_device("auto")
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, history = load_model(name)
    n_params = sum(p.numel() for p in model.parameters())
    if args.dtype == "auto" and n_params < 50_000_000:
        dtype = torch.float32  # a small model gains no speed from less precision
    model.to(device, dtype)

    prompt = args.prompt
    if isinstance(model, bpe_gpt.GPT):
        generate, to_bytes = bpe_gpt.generate, tokenizer.decode_single_token_bytes
        end = None if args.ignore_end else tokenizer.eot_token
        # What stands at the start of a text is the end of the text before it.
        ids = bpe_gpt.encode(tokenizer, prompt or bpe_gpt.END_OF_TEXT).tolist()
        prompt = prompt or ""
    else:
        generate, end = char_gpt.generate, None
        to_bytes = lambda token: tokenizer.decode([token]).encode("utf-8")
        if prompt is None:
            prompt = "\n" if "\n" in tokenizer.chars else tokenizer.chars[0]
        try:
            ids = tokenizer.encode(prompt)
        except ValueError as error:
            raise ValueError(f"--prompt: {error}") from None
    best = f"best validation loss {best_loss(history):.4f}, " if history else ""
    kind = f"{n_params:,} parameters in {str(dtype).removeprefix('torch.')} on {device}"
    print(f"{name}: {best}{kind}", file=sys.stderr)

    torch.manual_seed(args.seed)
    choose = make_choice(args.temperature, args.top_k, args.top_p)
    idx = torch.tensor([ids] * args.num_samples, device=device)
    texts = [[] for _ in range(args.num_samples)]  # the new tokens of each sample
    going_on = set(range(args.num_samples))  # the samples that have not come to their end
    # Bytes to text. What is only a part of a character is held back until the rest is there.
    text = codecs.getincrementaldecoder("utf-8")("replace")
    print(prompt, end="", flush=True)
    for column in generate(model, idx, args.max_new_tokens, choose):  # (num_samples, 1)
        for i, token in enumerate(column.flatten().tolist()):
            if token == end:
                going_on.discard(i)
            elif i in going_on:
                texts[i].append(token)
                if i == 0:  # the first is shown as it grows
                    print(text.decode(to_bytes(token)), end="", flush=True)
        if not going_on:
            break
    print(text.decode(b"", final=True))
    for tokens in texts[1:]:  # then the others
        print(f"{'-' * 40}\n{prompt}{tokenizer.decode(tokens)}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python sample.py | head` ends in silence
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except (OSError, ValueError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|allocate|MemoryError", repr(error)):
            raise
        fail("out of memory: lower --num_samples")
