"""From a checkpoint of bpe_gpt.py to Hugging Face's format, and back:

    python data/hugging_face.py out/bpe_gpt.pt my_gpt2     # a checkpoint becomes a new folder
    python data/hugging_face.py my_gpt2 out/my_gpt2.pt     # a folder becomes a checkpoint

The transformers library loads such a folder with GPT2LMHeadModel.from_pretrained("my_gpt2"). It has
the weights (model.safetensors), the sizes (config.json) and the vocabulary (vocab.json and
merges.txt, or tokenizer.json). Others' folders may ask for something that bpe_gpt.py does not do.
Those are refused, since their results would be wrong here.
"""

import argparse
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bpe_gpt
from bpe_gpt import UserError

# Settings in config.json that change what a GPT-2 computes. Only these values are supported. (The
# last four are other names of sizes.) Of the rest, only the sizes matter here; dropout does not.
SUPPORTED = dict(
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    is_causal=True, tie_word_embeddings=True, quantization_config=None, hidden_size=None,
    num_hidden_layers=None, num_attention_heads=None, max_position_embeddings=None)

# In vocab.json, a byte is its own character or, if that cannot be printed, one from number 256 on.
# A space is "Ġ".
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
LETTER = dict(zip(PRINTABLE + OTHERS, PRINTABLE + list(range(256, 512))))
BYTE = {letter: byte for byte, letter in LETTER.items()}

# The files of a tokenizer that are read here. Others with such names may be a vocabulary, too.
TOKENIZER_FILES = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                   "added_tokens.json", "special_tokens_map.json"}
GPT2_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHANGE_TOKENS = ("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens")
OTHER_FILES = r"vocab|merges|token|encoder|spiece|sentencepiece|^(bpe|dict)\.|\.(model|spm)$"

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
        config = read_json(Path(folder) / "config.json")
        sizes = read_sizes(config)
        tokens = read_vocabulary(Path(folder))
        text_before = config.get("text_before", bpe_gpt.END_OF_TEXT)  # written by export()
        check_text_before(text_before, tokens or [b"\n", bpe_gpt.END_OF_TEXT.encode()])
        templates = [str(text) for text in config.get("templates", [])]  # written there, too
        state = read_weights(Path(folder) / "model.safetensors", sizes, tokens)
    except (OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())  # on one line
        raise UserError(f"cannot load {folder}: {kind}{reason:.300}") from None
    sizes["vocab_size"] = len(state["transformer.wte.weight"])
    return dict(written_by="bpe_gpt", config=sizes, vocab=tokens, text_before=text_before,
                templates=templates, history=[], model=state)


def read_json(path):
    try:
        return dict(json.loads(path.read_bytes()))
    except (TypeError, ValueError):
        raise UserError(f"{path.name} is not a JSON object") from None


def check_text_before(text, tokens):
    if not isinstance(text, str) or text.encode() not in tokens:
        raise UserError(f"text_before is {text!r}, which is not a token of the vocabulary")


def read_weights(path, sizes, tokens):
    """The parameters, by our names and in our shapes."""
    if not path.exists():
        raise UserError("there is no model.safetensors. Several files, or another format, become "
                        "this one by model.save_pretrained(folder, max_shard_size='100GB')")
    header, body = read_header(path)
    check_tensors(header, body)
    if sizes["n_layer"] > len(header):  # to build so many blocks could take forever
        raise UserError(f"n_layer is {sizes['n_layer']}, but there are only {len(header)} tensors")
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
    n_tokens = len(wte) if tokens is None else len(tokens)
    if tokens is None and len(wte) in range(50257, 50257 + 128):
        n_tokens = 50257  # GPT-2's vocabulary, whose matrix nanoGPT makes 50,304 rows long
    if n_tokens > len(wte):
        raise UserError(f"there are {len(wte)} embeddings for {n_tokens} tokens")
    # Some models have rows without a token, to make the matrix a rounder size: they are left out.
    state["transformer.wte.weight"] = wte[:n_tokens].clone()
    return state


def read_sizes(config):
    """The sizes in config.json, by our names, once it is clear that it means a GPT-2 like ours."""
    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} is {config[name]}; only {value} is supported")
    check_settings(config, "config.json")  # an old one may say something about the tokenizer
    names = dict(zip(bpe_gpt.SIZE_NAMES, bpe_gpt.SIZE_NAMES)) | {"block_size": "n_positions"}
    sizes = {ours: config.get(name) for ours, name in names.items()}
    for ours, size in sizes.items():
        if type(size) is not int or size < 1:  # not isinstance(), for which True is an int
            raise UserError(f"{names[ours]} is {json.dumps(size)}, not a whole number above zero")
    if sizes["n_embd"] % sizes["n_head"] != 0:
        raise UserError(f"n_head {sizes['n_head']} does not divide n_embd {sizes['n_embd']}")
    if config.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise UserError(f"n_inner is {config['n_inner']}; only 4 * n_embd is supported")
    return sizes


def read_header(path):
    """The entries of a safetensors file by name, and its numbers as bytes."""
    try:
        data = np.memmap(path, np.uint8, mode="r")  # an error if the file is empty
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        text = data[8 : min(start, 10**8)].tobytes()
        pairs = json.loads(text, object_pairs_hook=list)  # in a dict, each name would be there once
        header = {name: dict(entry) for name, entry in pairs if name != "__metadata__"}
    except (TypeError, ValueError):
        reason = "no safetensors file, or its beginning is damaged"
        if path.stat().st_size < 1000 and b"git-lfs" in path.read_bytes():
            reason = "a pointer of git LFS, not the weights: run git lfs pull"
        raise UserError(f"{path.name} is {reason}") from None
    names = [name.removeprefix("transformer.") for name, _ in pairs]
    if len(set(names)) < len(names):
        raise UserError("a tensor is in the file twice")
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
        return bytearray(body[first:last])

    wte = "transformer.wte.weight" if "transformer.wte.weight" in header else "wte.weight"
    kinds = bpe_gpt.DTYPES | {"U8": torch.uint8, "BOOL": torch.bool}
    for name, entry in header.items():
        if name.endswith(".attn.bias") and entry["dtype"] in kinds:
            mask = torch.frombuffer(numbers(name), dtype=kinds[entry["dtype"]]).view(entry["shape"])
            if not torch.equal(mask, torch.ones_like(mask).tril()):
                raise UserError(f"{name} is not the causal mask")
        if name.endswith("lm_head.weight") and numbers(name) != numbers(wte):
            raise UserError("lm_head.weight is not equal to wte.weight; they must be tied")


def read_vocabulary(folder):
    """The tokens as bytes, by their numbers, or None if there is no file of a tokenizer. Texts must
    be split into words as in bpe_gpt.py, and the tokens must imply the merges: see merges_of()."""
    names = {path.name for path in folder.iterdir()}
    for name in sorted(names - TOKENIZER_FILES):
        if re.search(OTHER_FILES, name, re.IGNORECASE):
            raise UserError(f"{name} may be a vocabulary in another format, which is not "
                            "supported. If the model does not need it, move it out of the folder")
    names &= TOKENIZER_FILES
    if not names:
        return None
    files = {name: read_json(folder / name) for name in names - {"merges.txt"}}
    added = files.get("added_tokens.json", {})
    if "tokenizer.json" in names:
        content = files["tokenizer.json"]
        check_tokenizer(content)
        numbers = content["model"]["vocab"]
        merges = content["model"]["merges"]
        check_special_tokens(content["added_tokens"])
        added |= {token["content"]: token["id"] for token in content["added_tokens"]}
    elif {"vocab.json", "merges.txt"} <= names:
        numbers = files["vocab.json"]
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        raise UserError(f"{min(names)}, but neither tokenizer.json nor vocab.json with merges.txt")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        check_settings(files.get(name, {}), name)
    check_special_tokens(list(added))
    numbers = numbers | added
    if set(numbers.values()) != set(range(len(numbers))):
        raise UserError("the numbers of the tokens have gaps, or are used twice")
    if bpe_gpt.END_OF_TEXT not in numbers:
        raise UserError(f"there is no token {bpe_gpt.END_OF_TEXT}")
    return check_merges(merges, sorted(numbers, key=numbers.get))


def check_settings(settings, name):
    """Settings of transformers that change the tokens of a text are not supported."""
    kind = settings.get("tokenizer_class") or "GPT2Tokenizer"
    if not re.match("GPT2Tokenizer|PreTrainedTokenizerFast|TokenizersBackend", kind):
        raise UserError(f"tokenizer_class {kind} in {name} is not supported")
    for setting, value in settings.items():
        if setting in CHANGE_TOKENS and value:
            raise UserError(f"{setting} in {name} is not supported")
        if setting.endswith(("_token", "_tokens", "_tokens_decoder")):
            check_special_tokens(value)


def check_special_tokens(value):
    """value: a token, as a string or as an object with settings, or several of these."""
    if isinstance(value, str) and value != bpe_gpt.END_OF_TEXT:
        raise UserError(f"the added token {value!r} is not supported")
    if isinstance(value, dict):
        if value.get("lstrip") or value.get("rstrip") or value.get("single_word"):
            raise UserError("a token that changes the text around it is not supported")
        value = [value["content"]] if "content" in value else list(value.values())
    if isinstance(value, list):
        for part in value:
            check_special_tokens(part)


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
        found = content[part] or {"type": None}
        for name, value in settings.items():
            if (found.get(name, value) or None) != (value or None):  # "" and null are the same
                raise UserError(f"{part}.{name} in tokenizer.json is {found[name]!r}; only "
                                f"{value!r} is supported")
    if re.search("SpecialToken|Bert|Roberta", json.dumps(content.get("post_processor"))):
        raise UserError("post_processor in tokenizer.json adds tokens, which is not supported")


def check_merges(merges, words):
    """Returns the tokens as bytes. The merges must be those that bpe_gpt.py makes."""
    tokens = [word.translate(BYTE).encode("latin-1", "replace") for word in words]
    if words_of(tokens) != words:
        raise UserError("some of the tokens have letters that do not stand for bytes")
    if n_missing := 256 - sum(len(token) == 1 for token in tokens):
        raise UserError(f"{n_missing} of the 256 single bytes are no tokens")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    for theirs, ours in itertools.zip_longest(merges, merges_of(tokens), fillvalue="nothing"):
        if theirs != ours:
            raise UserError(f"among the merges, {theirs!r} stands where the tokens imply {ours!r}")
    return tokens


def words_of(tokens):
    """The tokens as strings of printable characters."""
    return [token.decode("latin-1").translate(LETTER) for token in tokens]


def merges_of(tokens):
    """The two parts of each token that is not a single byte, as a line of merges.txt. They have to
    be found again: with the tokens before it alone, the token is encoded as its two parts. Then it
    never comes from another pair, not even in a longer word: as long as no merge crosses the ends
    of a stretch of bytes, the stretch is merged as if it stood alone."""
    merges = []
    words = words_of(tokens)
    ranks = {token: i for i, token in enumerate(tokens) if len(token) == 1}
    for i, token in enumerate(tokens):
        if len(token) != 1 and token != bpe_gpt.END_OF_TEXT.encode():
            parts = bpe_gpt.encode_word(token, ranks)
            if len(parts) != 2:
                raise UserError(f"the token {words[i]!r} is not made of two tokens before it")
            merges.append(f"{words[parts[0]]} {words[parts[1]]}")
            ranks[token] = i
    return merges

# ---- Writing ------------------------------------------------------------------------------------

def export(model, tokenizer, folder, text_before=bpe_gpt.END_OF_TEXT, templates=()):
    """Write a GPT, its tokenizer and what came before each text in training to the folder. Raises
    UserError if something is in it: other files, such as an older vocabulary, might be taken for
    parts of this model."""
    folder = Path(folder)
    check_is_gpt2(model)
    check_text_before(text_before, tokenizer.tokens)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(tokenizer, folder)
    write_weights(model, folder / "model.safetensors")
    more = dict(text_before=text_before, templates=templates)  # transformers ignores these
    write_config(model, tokenizer, more, folder / "config.json")


@torch.no_grad()
def check_is_gpt2(model):
    """Raises UserError if a model, which somebody may have changed, has other parameters than
    GPT-2, or computes something else from them; or if texts are cut into other words."""
    if bpe_gpt.WORDS != GPT2_WORDS:
        raise UserError("WORDS in bpe_gpt.py is not GPT-2's: others would make other tokens")
    C, T = model.config.n_embd, model.config.block_size
    n_params = model.config.n_layer * (12 * C**2 + 13 * C) + (model.config.vocab_size + T + 2) * C
    is_gpt2 = sum(p.numel() for p in model.parameters()) == n_params
    if is_gpt2:
        device = model.lm_head.weight.device
        ids = torch.randint(model.config.vocab_size, (T,), device=device)
        ours, _ = model.eval()(ids.unsqueeze(0))
        theirs = gpt2_logits(model, ids)
        is_gpt2 = (ours[0] - theirs).abs().max() < 1e-3 * theirs.std()
    if not is_gpt2:
        raise UserError("this model is not built like GPT-2, and cannot be written as one")


def gpt2_logits(model, ids):
    """What GPT-2 computes from tokens ids (T,) with the parameters of model: (T, vocab_size)."""
    p = {name: parameter.float() for name, parameter in model.named_parameters()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    x = p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][: len(ids)]  # (T, C)
    future = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).triu(1)
    for i in range(model.config.n_layer):
        block = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = qkv.unflatten(1, (3, model.config.n_head, -1)).permute(1, 2, 0, 3)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)  # (T, C)
        x = x + linear(y, f"{block}.attn.c_proj")
        y = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(F.gelu(y, approximate="tanh"), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ p["transformer.wte.weight"].T


def write_weights(model, path):
    header = {"__metadata__": {"format": "pt"}}
    arrays = []
    end = 0
    for name, p in model.named_parameters():  # each once: lm_head is wte
        array = p.detach().float().cpu().numpy()
        if name.endswith(bpe_gpt.TRANSPOSED):
            array = np.ascontiguousarray(array.T)
        arrays.append(array)
        place = (end, end + array.nbytes)
        header[name] = dict(dtype="F32", shape=array.shape, data_offsets=place)
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    parts = [len(text).to_bytes(8, "little"), text, *arrays]
    bpe_gpt.replace_file(path, lambda file: file.writelines(parts))


def write_config(model, tokenizer, more, path):
    config = {name: getattr(model.config, name) for name in bpe_gpt.SIZE_NAMES}
    config["n_positions"] = config.pop("block_size")
    config |= {name: value for name, value in SUPPORTED.items() if value is not None}
    config |= dict(n_inner=None, bos_token_id=tokenizer.end_of_text,
                   eos_token_id=tokenizer.end_of_text, **more)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_vocabulary(tokenizer, folder):
    """vocab.json has the number of each token, merges.txt the two parts of each merge."""
    numbers = {word: i for i, word in enumerate(words_of(tokenizer.tokens))}
    merges = ["#version: 0.2", *merges_of(tokenizer.tokens)]
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
        if checkpoint["vocab"] is None:
            if checkpoint["config"]["vocab_size"] != 50257:
                raise UserError(f"{args.source} has no vocabulary, and its size is not GPT-2's")
            checkpoint["vocab"] = bpe_gpt.gpt2_tokenizer().tokens
            print(f"{args.source} has no vocabulary: GPT-2's is used")
        Path(args.target).parent.mkdir(parents=True, exist_ok=True)
        bpe_gpt.replace_file(args.target, lambda file: torch.save(checkpoint, file))
    else:
        checkpoint = bpe_gpt.load_pretrained(args.source)
        tokenizer = bpe_gpt.BPETokenizer(checkpoint["vocab"])
        model = bpe_gpt.GPT.from_pretrained(args.source)
        templates = checkpoint.get("templates", [])
        export(model, tokenizer, args.target, checkpoint["text_before"], templates)
    print(f"saved {args.target}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, UserError) as error:
        sys.exit(f"error: {error}")
