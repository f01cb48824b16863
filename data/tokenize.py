"""Turns text files of any size into tokens for `python bpe_gpt.py --data FOLDER`.

    python data/tokenize.py my_corpus/*.txt --out data/my_corpus
    python bpe_gpt.py --data data/my_corpus

The folder gets train.bin and val.bin: GPT-2's token numbers, 16 bits each, one after the other, as
nanoGPT has them. Each file is a document, and a token of its own, <|endoftext|>, follows it; where
a file has that word in its text, a document ends there, too. The last tenth of the text (or what
--val_share says) goes to val.bin. Text is read piece by piece, so it may be larger than memory.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy", "tiktoken"]
# ///

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: in it, Python would take this file for its own `tokenize`

import argparse  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import tiktoken  # noqa: E402


def pieces(file, size):
    """The text of a file in pieces of about `size` characters, which give the same tokens one by
    one as all at once: GPT-2 never joins a word to the space after it, so that text can be cut
    before a space that follows a word."""
    rest = ""
    while more := file.read(size):
        rest += more
        cuts = [match.end() for match in re.finditer(r"\S(?=[ \n])", rest[-10_000:])]
        if cuts:
            cut = cuts[-1] + max(len(rest) - 10_000, 0)
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    parser.add_argument("files", nargs="+", type=Path, help="text files, in UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--val_share", type=float, default=0.1, help="share of val.bin [0.1]")
    args = parser.parse_args()
    if not 0 < args.val_share < 1:
        fail(f"--val_share must be between 0 and 1; it is {args.val_share}")
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(__file__).resolve().parent / "tiktoken")
    try:
        tokenizer = tiktoken.get_encoding("gpt2")
    except Exception as error:  # of the network's many kinds
        fail(f"cannot fetch GPT-2's vocabulary ({type(error).__name__}): check the network")

    args.out.mkdir(parents=True, exist_ok=True)
    names = [args.out / "train.bin", args.out / "val.bin"]
    parts = [path.with_name(path.name + ".part") for path in names]
    try:
        write_tokens(tokenizer, args.files, parts, args.val_share)
        for part, name in zip(parts, names):
            os.replace(part, name)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    sizes = " and ".join(f"{name.stat().st_size // 2:,}" for name in names)
    print(f"{CLEAR_LINE}{args.out}: {sizes} tokens in train.bin and val.bin")


def write_tokens(tokenizer, paths, parts, val_share):
    """Writes the first of the text to the first of two parts, and val_share of it to the other."""
    total, done = sum(path.stat().st_size for path in paths), 0  # bytes
    with open(parts[0], "wb") as train, open(parts[1], "wb") as val:
        for path in paths:
            with open(path, encoding="utf-8") as file:
                try:
                    for text in pieces(file, size=min(1 << 20, total // 100 + 1)):
                        out = train if done < (1 - val_share) * total else val
                        write(tokenizer.encode(text, allowed_special="all"), out)
                        done += len(text.encode("utf-8"))
                        if CLEAR_LINE and total:
                            percent = f"{path.name}: {done / total:.0%}"
                            print(CLEAR_LINE + percent, end="", flush=True)
                except UnicodeDecodeError:
                    raise ValueError(f"{path} is not UTF-8 text: convert it") from None
            write([tokenizer.eot_token], out)


CLEAR_LINE = "\r\033[K" if sys.stdout.isatty() else ""  # erases a terminal's current line


def write(tokens, file):
    file.write(np.array(tokens, dtype="<u2").tobytes())


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except (OSError, ValueError) as error:
        fail(error)
