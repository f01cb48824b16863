"""Text out of the models that bigram.py and char_gpt.py have trained.

    python sample.py                            # from the newest checkpoint in out/
    python sample.py out/bigram.pt              # from this one
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
# dependencies = ["torch==2.13.0", "numpy"]
# ///

import argparse
import math
import re
import signal
import sys
from pathlib import Path

import torch

from bigram import BigramConfig, BigramLanguageModel, draw
from char_gpt import GPT, CharTokenizer, GPTConfig, fail, generate, load_checkpoint, pick_device

# ---------------------------------------------------------------------------------------------
# Decoding


def make_choice(temperature=1.0, top_k=None, top_p=1.0):
    """Returns the function that turns the scores of the next token (B, vocab_size) into the token
    chosen (B, 1), for use in generate()."""

    def choose(logits):
        if temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
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

MODELS = {"bigram": (BigramConfig, BigramLanguageModel), "char_gpt": (GPTConfig, GPT)}


def newest_checkpoint():
    """The path of the checkpoint in out/ that was written last."""
    paths = sorted(Path("out").glob("*.pt"), key=lambda path: path.stat().st_mtime)
    if not paths:
        fail("no checkpoint in out/: train a model first, with bigram.py or char_gpt.py")
    return paths[-1]


def load_model(path, device):
    """The model of a checkpoint, its tokenizer, and its history (see train()). Raises ValueError
    for a file that is missing, damaged, or not a checkpoint."""
    checkpoint = load_checkpoint(path, *MODELS)
    Config, Model = MODELS[checkpoint["script"]]
    try:
        tokenizer = CharTokenizer(checkpoint["vocab"])
        model = Model(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model.to(device), tokenizer, checkpoint["history"]
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise ValueError(f"{path} is damaged: train the model again") from None


# ---------------------------------------------------------------------------------------------
# Command line


def parse_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    add = parser.add_argument
    add("checkpoint", nargs="?", help="the model to sample from [the newest in out/]")
    add("--prompt", help="the words to go on from [a line break]")
    add("--max_new_tokens", type=int, default=500, help="how many tokens to add [500]")
    add("--num_samples", type=int, default=1, help="how many texts to make, side by side [1]")
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token [1.0]")
    add("--top_k", type=int, help="draw from this many of the likeliest tokens only [all]")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest, up to this sum [1.0]")
    add("--seed", type=int, default=1337, help="the same seed gives the same text [1337]")
    args = parser.parse_args()
    for name, good, rule in (
        ("max_new_tokens", args.max_new_tokens > 0, "above 0"),
        ("num_samples", 0 < args.num_samples <= 1000, "from 1 to 1000"),
        ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
        ("top_k", args.top_k is None or args.top_k > 0, "above 0"),
        ("top_p", 0 < args.top_p <= 1, "above 0, and 1 at most"),
        ("seed", 0 <= args.seed < 2**31, "0 or more, and below 2**31"),
        ("prompt", args.prompt != "", "a character at least"),
    ):
        if not good:
            fail(f"--{name} must be {rule}; it is {getattr(args, name)!r}")
    return args


def main():
    args = parse_flags()
    path = args.checkpoint or newest_checkpoint()
    device = pick_device("auto")
    model, tokenizer, history = load_model(path, device)
    prompt = args.prompt
    if prompt is None:
        prompt = "\n" if "\n" in tokenizer.chars else tokenizer.chars[0]
    try:
        idx = torch.tensor([tokenizer.encode(prompt)] * args.num_samples, device=device)
    except ValueError as error:
        raise ValueError(f"--prompt: {error}") from None
    best = min((f"{val_loss:.4f}" for _, _, val_loss in history), default="not known yet")
    print(f"{path}: best validation loss {best}", file=sys.stderr)

    torch.manual_seed(args.seed)
    choose = make_choice(args.temperature, args.top_k, args.top_p)
    columns = []
    print(prompt, end="", flush=True)
    for column in generate(model, idx, args.max_new_tokens, choose):  # (num_samples, 1)
        columns.append(column)
        print(tokenizer.decode(column[0].tolist()), end="", flush=True)  # the first, as it grows
    print()
    for row in torch.cat(columns, dim=1)[1:].tolist():  # then the others
        print(f"{'-' * 40}\n{prompt}{tokenizer.decode(row)}")


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
