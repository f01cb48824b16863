"""From a checkpoint of bpe_gpt.py to Hugging Face's format, and back:

    python data/hugging_face.py out/bpe_gpt.pt my_gpt2     # a checkpoint becomes a new folder
    python data/hugging_face.py my_gpt2 out/my_gpt2.pt     # a folder becomes a checkpoint

The transformers library loads such a folder with GPT2LMHeadModel.from_pretrained("my_gpt2"). It has
the weights (model.safetensors), the sizes (config.json) and the vocabulary (vocab.json and
merges.txt, or tokenizer.json). Others' folders may ask for something that bpe_gpt.py does not do.
Those are refused: to compute something else without a word would be worse.
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
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bpe_gpt
from bpe_gpt import UserError

# Settings in config.json that change what a GPT-2 computes. Only these values are supported. Of the
# other settings, the sizes are read, and the rest changes nothing here (dropout, for example).
SUPPORTED = dict(
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    tie_word_embeddings=True, quantization_config=None)

# In vocab.json, a byte is its own character or, if that cannot be printed, one from number 256 on.
# A space is "Ġ".
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
LETTER = dict(zip(PRINTABLE + OTHERS, PRINTABLE + list(range(256, 512))))
BYTE = {letter: byte for byte, letter in LETTER.items()}

# ---- Reading ------------------------------------------------------------------------------------

def load_model(folder, **settings):
    """For use from Python: the model in a folder. Raises UserError, with the reason, if it is
    damaged or not a GPT-2 like ours."""
    checkpoint = read_folder(folder)
    config = bpe_gpt.GPTConfig(**checkpoint["config"] | settings)
    return bpe_gpt.build_model(checkpoint, config).eval()


def read_folder(folder):
    """The model in a folder, as a checkpoint of bpe_gpt.py. vocab is a list of tokens, as bytes, or
    None if the folder has no vocabulary. Raises UserError, as above."""
    try:
        sizes = read_config(Path(folder) / "config.json")
        tokens = read_vocabulary(Path(folder))
        state = read_weights(Path(folder) / "model.safetensors", sizes, tokens)
    except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # on one line
        raise UserError(f"cannot load {folder}: {type(error).__name__}: {reason:.300}") from None
    sizes["vocab_size"] = len(state["transformer.wte.weight"])
    return dict(written_by="bpe_gpt", config=sizes, vocab=tokens, text_before=bpe_gpt.END_OF_TEXT,
                history=[], model=state)


def read_weights(path, sizes, tokens):
    """The parameters, by our names and in our shapes."""
    if not path.exists():
        raise UserError("there is no model.safetensors. Several files, or another format, become "
                        "this one by model.save_pretrained(folder, max_shard_size='100GB')")
    header, body = read_header(path)
    check_tensors(header, body)
    state = bpe_gpt.read_safetensors(path)
    with torch.device("meta"):
        model = bpe_gpt.GPT(bpe_gpt.GPTConfig(**sizes))
    shapes = {name: p.shape for name, p in model.named_parameters()}  # once each: lm_head is wte
    for name in sorted(shapes.keys() | state.keys()):
        if name not in state or name not in shapes:
            raise UserError(f"{name} is {'missing' if name in shapes else 'not known'}")
        if state[name].shape != shapes[name]:
            raise UserError(f"{name} is {list(state[name].shape)}, not {list(shapes[name])}")
        if not state[name].isfinite().all():
            raise UserError(f"{name} has numbers that are infinite or NaN")
    wte = state["transformer.wte.weight"]
    n_tokens = min(len(wte), 50257) if tokens is None else len(tokens)
    if n_tokens > len(wte):
        raise UserError(f"there are {len(wte)} embeddings for {n_tokens} tokens")
    # Some models have rows without a token, to make the matrix a rounder size: they are left out.
    state["transformer.wte.weight"] = wte[:n_tokens].clone()
    return state


def read_config(path):
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} is {config[name]}; only {value} is supported")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"n_inner is {config['n_inner']}; only 4 * n_embd is supported")
    names = dict.fromkeys(bpe_gpt.SIZE_NAMES) | {"block_size": "n_positions"}
    return {name: config[theirs or name] for name, theirs in names.items()}


def read_header(path):
    """The entries of a safetensors file by name, and its numbers as bytes."""
    def no_name_twice(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise UserError("a tensor is in the file twice")
        return dict(pairs)

    data = np.memmap(path, np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes(), object_pairs_hook=no_name_twice)
    header.pop("__metadata__", None)
    return header, data[start:]


def check_tensors(header, body):
    """The tensors must follow each other without gap or overlap, from the first byte to the last,
    and have the sizes that their shapes say. Those that bpe_gpt.py does not read must say nothing
    that it does not know."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end or last < first:
            raise UserError(f"{name} does not begin where the tensor before it ends")
        end = last
        if entry["dtype"] in bpe_gpt.DTYPES:
            size = bpe_gpt.DTYPES[entry["dtype"]].itemsize
            if last - first != size * math.prod(entry["shape"]):
                raise UserError(f"{name} has another size than its shape says")
        elif not name.endswith((".attn.bias", ".attn.masked_bias")):
            raise UserError(f"{name} has the type {entry['dtype']}, which is not supported")
    if end != len(body):
        raise UserError(f"the file has {len(body)} bytes of numbers, its tensors {end}")

    def numbers(name):
        first, last = header[name]["data_offsets"]
        return bytes(body[first:last])

    for name, entry in header.items():
        if name.endswith(".attn.bias") and entry["dtype"] in ("U8", "BOOL", "F32"):
            kind = {"U8": np.uint8, "BOOL": np.bool_, "F32": np.float32}[entry["dtype"]]
            mask = np.frombuffer(numbers(name), kind).reshape(entry["shape"])
            if not np.array_equal(mask, np.tril(np.ones(entry["shape"], kind))):
                raise UserError(f"{name} is not the causal mask")
    if "lm_head.weight" in header:
        wte = "transformer.wte.weight" if "transformer.wte.weight" in header else "wte.weight"
        if numbers("lm_head.weight") != numbers(wte):
            raise UserError("lm_head.weight is not equal to wte.weight; they must be tied")


def read_vocabulary(folder):
    """The tokens as bytes, by their numbers. bpe_gpt.py splits a text into words by GPT-2's rule,
    and takes the order of merges from the numbers of tokens: both must be so here, too."""
    vocab = folder / "vocab.json"
    tokenizer = folder / "tokenizer.json"
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        if json.loads(settings.read_text(encoding="utf-8")).get("add_prefix_space"):
            raise UserError("add_prefix_space in tokenizer_config.json is not supported")
    added = {}
    if tokenizer.exists():
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        check_tokenizer(content)
        numbers = content["model"]["vocab"]
        merges = content["model"]["merges"]
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
    elif vocab.exists():
        numbers = json.loads(vocab.read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        return None
    if (folder / "added_tokens.json").exists():
        added |= json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    for token in added:
        if token != bpe_gpt.END_OF_TEXT:
            raise UserError(f"the added token {token!r} is not supported")
    numbers = numbers | added
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise UserError("the numbers of the tokens have gaps, or are used twice")
    words = sorted(numbers, key=numbers.get)
    if bpe_gpt.END_OF_TEXT not in numbers:
        raise UserError(f"there is no token {bpe_gpt.END_OF_TEXT}")
    check_merges(merges, numbers)
    return [word.translate(BYTE).encode("latin-1") for word in words]


def check_tokenizer(content):
    """Compares a tokenizer.json with what GPT-2's says. (Older files leave some of this out.)"""
    if content.get("normalizer") is not None:
        raise UserError("tokenizer.json has a normalizer, which is not supported")
    expected = {
        "pre_tokenizer": dict(type="ByteLevel", add_prefix_space=False, use_regex=True),
        "model": dict(type="BPE", dropout=None, continuing_subword_prefix="",
                      end_of_word_suffix="", byte_fallback=False),
    }
    for part, settings in expected.items():
        found = content[part]
        if found is None:
            raise UserError(f"tokenizer.json has no {part}")
        for name, value in settings.items():
            if (found.get(name, value) or None) != (value or None):  # "" and null are the same
                raise UserError(f"{part}.{name} in tokenizer.json is {found[name]!r}; only "
                                 f"{value!r} is supported")


def check_merges(merges, numbers):
    """Each token but the single bytes must come from a merge, in the order of the numbers."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    made = ["".join(pair) for pair in pairs]
    bytes_ = {chr(letter) for letter in LETTER.values()}
    if missing := bytes_ - numbers.keys():
        raise UserError(f"{len(missing)} of the 256 single bytes are no tokens")
    if set(made) != numbers.keys() - bytes_ - {bpe_gpt.END_OF_TEXT}:
        raise UserError("the merges do not make the tokens of the vocabulary")
    order = [numbers[word] for word in made]
    if order != sorted(order):
        raise UserError("the numbers of the tokens are not in the order of the merges")

# ---- Writing ------------------------------------------------------------------------------------

def export(model, tokenizer, folder):
    """Write a GPT and its tokenizer to the folder. Raises UserError if something is in it: other
    files, such as an older vocabulary, might be taken for parts of this model."""
    folder = Path(folder)
    C, T = model.config.n_embd, model.config.block_size
    n_params = model.config.n_layer * (12 * C**2 + 13 * C) + (model.config.vocab_size + T + 2) * C
    if sum(p.numel() for p in model.parameters()) != n_params:
        raise UserError("this model is not built like GPT-2, and cannot be written as one")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder / "model.safetensors")
    write_config(model, tokenizer, folder / "config.json")
    write_vocabulary(tokenizer, folder)


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
    config["n_positions"] = config.pop("block_size")
    config |= {name: value for name, value in SUPPORTED.items() if value is not None}
    config |= dict(n_inner=None, bos_token_id=tokenizer.end_of_text,
                   eos_token_id=tokenizer.end_of_text)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def words_of(tokenizer):
    """The tokens as strings of printable characters, in the order of their numbers."""
    return [token.decode("latin-1").translate(LETTER) for token in tokenizer.tokens]


def write_vocabulary(tokenizer, folder):
    """vocab.json has the number of each token, merges.txt the two parts of each merge. These have
    to be found again: with the tokens before it alone, a token is encoded as its two parts."""
    words = words_of(tokenizer)
    numbers = {word: i for i, word in enumerate(words)}
    merges = ["#version: 0.2"]
    ranks = {}
    for i, token in enumerate(tokenizer.tokens):
        if len(token) > 1 and i != tokenizer.end_of_text:
            a, b = bpe_gpt.encode_word(token, ranks)
            merges.append(f"{words[a]} {words[b]}")
        ranks[token] = i
    (folder / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a checkpoint of bpe_gpt.py, or a folder")
    parser.add_argument("target", help="a new folder, or a checkpoint, which ends in .pt")
    args = parser.parse_args()
    if Path(args.source).is_dir():
        if not args.target.endswith(".pt"):
            raise UserError(f"{args.target}: the name of a checkpoint must end in .pt")
        checkpoint = read_folder(args.source)
        checkpoint["vocab"] = checkpoint["vocab"] or bpe_gpt.gpt2_tokenizer().tokens
        if len(checkpoint["vocab"]) != checkpoint["config"]["vocab_size"]:
            raise UserError(f"{args.source} has no vocab.json, and is not for GPT-2's vocabulary")
        Path(args.target).parent.mkdir(parents=True, exist_ok=True)
        with bpe_gpt.replacing(args.target) as file:
            torch.save(checkpoint, file)
    else:
        checkpoint = bpe_gpt.load_pretrained(args.source)
        tokenizer = bpe_gpt.BPETokenizer(checkpoint["vocab"])
        export(bpe_gpt.GPT.from_pretrained(args.source), tokenizer, args.target)
    print(f"saved {args.target}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, UserError) as error:
        sys.exit(f"error: {error}")
