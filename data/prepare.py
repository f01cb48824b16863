"""Text files of any size as tokens for bpe_gpt.py, which then need not fit into memory.

    python data/prepare.py corpus/*.txt --out data/corpus --val_share 0.001
    python bpe_gpt.py --full --data data/corpus

Each file is a document, and the token <|endoftext|> follows it; where that word stands in a text,
a document ends there too. The folder gets GPT-2's tokens as 16-bit integers, one after the other:
the last of them (a tenth, or what --val_share says) in val.bin, all others in train.bin.
"""

import argparse
import glob
import itertools
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import tiktoken


def load_tokenizer():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(__file__).resolve().parent / "tiktoken"))
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # by the network, in many ways
        raise OSError(f"cannot fetch GPT-2's vocabulary ({type(error).__name__})") from None


def pieces(file, size=1 << 20):
    """The text of a file in pieces, which one by one give the same tokens as all at once: GPT-2
    joins a space to the word after it, never to the one before, so a piece may end at a word."""
    rest = ""
    while more := file.read(size + len(rest)):  # doubled while no place is found, so as to be quick
        rest += more
        if piece := re.match(r".*\S(?=[ \n])", rest, re.DOTALL):  # up to the last such place
            yield piece[0]
            rest = rest[piece.end() :]
    yield rest


def write_tokens(paths, tokenizer, out):
    """Write the tokens of all files to the file out; return how many they are."""
    for path in paths:
        # Windows' line ends, \r\n, are read as \n, and its byte order mark is dropped.
        with open(path, encoding="utf-8-sig") as file:
            try:
                texts = pieces(file)
                while batch := list(itertools.islice(texts, 16)):  # to use several cores
                    for tokens in tokenizer.encode_batch(batch, allowed_special="all"):
                        out.write(np.array(tokens, dtype="<u2").tobytes())
                    if sys.stderr.isatty():
                        print(f"{path}: {out.tell() // 2:,} tokens", end=" \r", file=sys.stderr)
            except UnicodeDecodeError:
                raise ValueError(f"{path} is not text in UTF-8") from None
            except ValueError as error:  # tiktoken refuses a million spaces in a row, for example
                raise ValueError(f"{path}: {error}") from None
        out.write(np.array([tokenizer.eot_token], dtype="<u2").tobytes())
    return out.tell() // 2


def main():
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="texts in UTF-8")
    parser.add_argument("--out", required=True, type=Path, help="folder for the tokens")
    parser.add_argument("--val_share", default=0.1, type=float, help="default: 0.1")
    args = parser.parse_args()
    if not 0 < args.val_share < 1:
        raise ValueError(f"--val_share is {args.val_share}, but must be between 0 and 1")
    files = []
    for name in args.files:
        # On Windows, *.txt arrives as it was typed.
        found = sorted(glob.glob(name)) if "*" in name else [name]
        if not found:
            raise ValueError(f"no file matches {name}")
        files += found
    for path in files:
        open(path).close()  # a file that is missing is missed now, not after hours of work
    tokenizer = load_tokenizer()
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [args.out / "train.bin", args.out / "val.bin"]
    temporary = [Path(f"{path}.{os.getpid()}.tmp") for path in paths]  # names of this run's own
    try:
        with open(temporary[0], "w+b") as train, open(temporary[1], "wb") as val:
            n = write_tokens(files, tokenizer, train)
            if n < 20:
                raise ValueError(f"{n} tokens are too few: train.bin and val.bin need 10 each")
            # Only now it is known how many tokens a share of them is.
            n_val = min(max(round(args.val_share * n), 10), n - 10)
            train.seek(2 * (n - n_val))
            shutil.copyfileobj(train, val)
            train.truncate(2 * (n - n_val))
        for path, new in zip(paths, temporary):  # files of an earlier run stay whole until here
            new.replace(path)
    finally:
        for new in temporary:
            new.unlink(missing_ok=True)
    print(f"{n - n_val:,} tokens to train on, {n_val:,} to validate on: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
