"""Write a model of bpe_gpt.py in Hugging Face's format, for transformers and the tools around it.

    python data/export.py out/bpe_gpt.pt my_gpt2

Then, in Python: transformers.GPT2LMHeadModel.from_pretrained("my_gpt2"). The folder gets the
weights (model.safetensors), their sizes (config.json) and the vocabulary (vocab.json, merges.txt).
What the files look like is explained in bpe_gpt.py, which reads them.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "tiktoken", "regex"]
# ///

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bpe_gpt


def export(model, tokenizer, folder):
    """Write a GPT and its tokenizer to the folder. Raises ValueError if something is in it: other
    files, such as an older vocabulary, might be taken for parts of this model."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder / "model.safetensors")
    write_config(model, tokenizer, folder / "config.json")
    write_tokenizer(tokenizer, folder)


def write_weights(model, path):
    header = {"__metadata__": {"format": "pt"}}
    arrays = []
    end = 0
    for name, p in model.named_parameters():  # each once: lm_head is wte
        array = p.detach().numpy()
        if name.endswith(bpe_gpt.TRANSPOSED):
            array = np.ascontiguousarray(array.T)
        arrays.append(array)
        place = (end, end + array.nbytes)
        header[name] = dict(dtype="F32", shape=array.shape, data_offsets=place)
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    with bpe_gpt.replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.writelines(arrays)


def write_config(model, tokenizer, path):
    config = {name: getattr(model.config, name) for name in bpe_gpt.SIZE_NAMES}
    config |= dict(bpe_gpt.SUPPORTED, model_type="gpt2", n_positions=model.context_size,
                   bos_token_id=tokenizer.eot_token, eos_token_id=tokenizer.eot_token)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def words_of(tokenizer):
    """The tokens as strings of printable characters, in the order of their numbers."""
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)]
    return [token.decode("latin-1").translate(bpe_gpt.LETTERS) for token in tokens]


def write_tokenizer(tokenizer, folder):
    """vocab.json has the number of each token, merges.txt the two parts of each merge. These have
    to be found again: repeat the merges of a token until only the last one is left."""
    words = words_of(tokenizer)
    numbers = {word: i for i, word in enumerate(words)}
    merges = ["#version: 0.2"]
    for word in words:
        if len(word) > 1 and word != bpe_gpt.END_OF_TEXT:
            parts = list(word)
            while len(parts) > 2:
                pairs = [numbers.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
                i = pairs.index(min(pairs))  # the pair that was learned first
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            merges.append(" ".join(parts))
    (folder / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint of bpe_gpt.py")
    parser.add_argument("folder", help="a new folder")
    args = parser.parse_args()
    model, tokenizer = bpe_gpt.load_pretrained(args.model, {}, {})
    export(model, bpe_gpt.find_tokenizer(model, tokenizer), args.folder)
    print(f"saved {args.folder}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
