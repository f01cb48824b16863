"""bpe_gpt.py: published weights; data/hugging_face.py: folders in Hugging Face's format. What is
damaged, or not a GPT-2 like ours, is never used."""

import hashlib
import http.server
import json
import os
import random
import re
import shutil
import struct
import tempfile
import threading
from pathlib import Path

import pytest
import tiktoken.load
import torch
from conftest import PLAY, ROOT, hugging_face, needs_gpt2_tokenizer, one_line_error, run

import bpe_gpt
from bpe_gpt import GPT, GPTConfig, UserError, find_weights

SCRIPT = ROOT / "data" / "hugging_face.py"

FIXTURES = ROOT / "tests" / "fixtures"
TIED = FIXTURES / "tied"
SMALL = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=300, block_size=16)


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_gpt.train_bpe(PLAY.read_text(encoding="utf-8")[:20_000], 300)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TIED, tmp_path / "model")


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """The path of a checkpoint as bpe_gpt.py saves it, and the model in it."""
    model = GPT(GPTConfig(**SMALL))
    torch.save(dict(written_by="bpe_gpt", config=SMALL, model=model.state_dict(), text_before="\n",
                    vocab=vocabulary(tokenizer)), tmp_path / "x.pt")
    return tmp_path / "x.pt", model


def logits(model, idx=torch.arange(16)[None]):
    with torch.no_grad():
        return model.eval()(idx)[0]


def vocabulary(tokenizer):
    """All tokens, as bytes, in the order of their numbers."""
    return tokenizer.tokens


def parse(path):
    """A safetensors file, read here in another way: {name: (type, shape, bytes)}, and where the
    numbers begin."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    tensors = {}
    for name in header.keys() - {"__metadata__"}:
        first, last = header[name]["data_offsets"]
        tensors[name] = header[name]["dtype"], header[name]["shape"], data[start:][first:last]
    return tensors, start


def write(path, header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)

# ---- The round trip -----------------------------------------------------------------------------

def test_an_exported_model_comes_back_the_same_with_its_tokenizer(tmp_path, tokenizer):
    model = GPT(GPTConfig(**SMALL))
    hugging_face.export(model, tokenizer, tmp_path)
    assert torch.equal(logits(hugging_face.load_model(tmp_path)), logits(model))
    same = bpe_gpt.BPETokenizer(hugging_face.read_folder(tmp_path)["vocab"])
    assert vocabulary(same) == vocabulary(tokenizer)
    text = "What news, my lord? None, none at all; the harbour's glass — 12 times!\n\n  "
    assert same.encode(text) == tokenizer.encode(text)
    names = {"model.safetensors", "config.json", "vocab.json", "merges.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_exported_file_is_what_transformers_writes(tmp_path, tokenizer):
    hugging_face.export(hugging_face.load_model(TIED), tokenizer, tmp_path)
    ours, start = parse(tmp_path / "model.safetensors")
    theirs, _ = parse(TIED / "model.safetensors")
    assert ours == theirs and start % 8 == 0
    config, published = (json.loads((f / "config.json").read_text()) for f in (tmp_path, TIED))
    ids = {"bos_token_id", "eos_token_id"}  # those of the tokenizer
    same = config.keys() & published.keys() - ids
    assert len(same) >= 9 and all(config[name] == published[name] for name in same)
    assert all(config[name] == 299 for name in ids)


def test_a_checkpoint_is_exported_by_the_command_line(checkpoint, tokenizer):
    path, model = checkpoint
    output, error = run(SCRIPT, "x.pt", "a/folder", cwd=path.parent)
    assert output == "saved a/folder\n" and error == ""
    output, error = run(SCRIPT, "a/folder", "again.pt", cwd=path.parent)
    assert output == "saved again.pt\n" and error == ""
    for name in ("x.pt", "again.pt"):
        assert torch.equal(logits(GPT.from_pretrained(path.parent / name)), logits(model))
        assert bpe_gpt.load_pretrained(path.parent / name)["vocab"] == vocabulary(tokenizer)
        assert bpe_gpt.load_pretrained(path.parent / name)["text_before"] == "\n"


def test_a_model_that_is_not_built_like_gpt2_is_not_exported(tmp_path, tokenizer):
    """An output layer of its own, or a second MLP: other programs would compute something else."""
    untied, longer = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**SMALL))
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    longer.transformer.h[0].second = bpe_gpt.MLP(longer.config)
    for model in (untied, longer):
        with pytest.raises(bpe_gpt.UserError, match="not built like GPT-2"):
            hugging_face.export(model, tokenizer, tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_a_folder_that_is_not_empty_is_left_as_it_is(folder, tokenizer, checkpoint):
    """An older vocabulary in it might be taken for the exported model's."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="model is not empty: name a new folder"):
        hugging_face.export(GPT(GPTConfig(**SMALL)), tokenizer, folder)
    assert "not empty" in one_line_error(SCRIPT, checkpoint[0], folder, cwd=folder.parent)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("names, clue", [
    ("nothing.pt new", "nothing.pt is missing, damaged"),
    ("half.pt new", "half.pt is missing, damaged"),
    ("x.pt half.pt", "half.pt"),  # a file, not a folder
    (f"{TIED} new", "must end in .pt"),
    (f"{TIED} new.pt", "vocab"),  # the folder has none; GPT-2's cannot be had, or does not fit
])
def test_what_cannot_be_exported_gets_one_line(checkpoint, names, clue):
    path, _ = checkpoint
    data = path.read_bytes()
    (path.parent / "half.pt").write_bytes(data[: len(data) // 2])
    assert clue in one_line_error(SCRIPT, *names.split(), cwd=path.parent)
    assert not list(path.parent.glob("new*"))


@pytest.mark.parametrize("name", ["a folder", "a checkpoint"])
def test_a_trained_model_is_ready_to_be_used_without_dropout(name, checkpoint):
    if name == "a folder":
        model = hugging_face.load_model(TIED, dropout=0.5)
    else:
        model = GPT.from_pretrained(checkpoint[0], dropout=0.5)
    assert not any(module.training for module in model.modules())
    idx = torch.arange(16)[None]
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("name", ["tied", "half", "bfloat16", "published"])
def test_every_kind_of_file_is_loaded_as_float32(name):
    model = hugging_face.load_model(FIXTURES / name)
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert hugging_face.read_folder(FIXTURES / name)["vocab"] is None
    kinds = dict(tied={"F32"}, half={"F16"}, bfloat16={"BF16"}, published={"F32", "U8"})
    assert {kind for kind, _, _ in parse(FIXTURES / name / "model.safetensors")[0].values()} == kinds[name]


def test_numbers_that_lie_askew_are_read_right(folder):
    """OpenAI's own files have a header of odd length, so that no number lies on a multiple of 4."""
    assert parse(FIXTURES / "published" / "model.safetensors")[1] % 2 == 1
    path, model = folder / "model.safetensors", hugging_face.load_model(folder)
    data, start = path.read_bytes(), parse(path)[1]
    for spaces in (b" ", b"  ", b"   "):
        write(path, data[8:start] + spaces, data[start:])
        again = hugging_face.load_model(folder)
        assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters()))
        assert all(p.data_ptr() % 4 == 0 for p in again.parameters())


def test_training_a_loaded_model_does_not_change_its_file(folder):
    before, model = (folder / "model.safetensors").read_bytes(), hugging_face.load_model(folder)
    model(torch.arange(16)[None], torch.arange(1, 17)[None])[1].backward()
    for optimizer in bpe_gpt.make_optimizers(model, GPTConfig(muon_learning_rate=0)):
        optimizer.step()
    assert not torch.equal(logits(model), logits(hugging_face.load_model(folder)))
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_shorter_context_keeps_the_first_positions():
    whole, short = hugging_face.load_model(TIED), hugging_face.load_model(TIED, block_size=20)
    idx = torch.arange(20)[None]
    assert torch.equal(logits(whole, idx), logits(short, idx))
    assert short.context_size == short.config.block_size == len(short.transformer.wpe.weight) == 20


def test_a_size_that_the_model_does_not_have_is_refused():
    """The weights do not even show n_head."""
    sizes = dict(n_head=2, n_layer=3, n_embd=48, block_size=65, vocab_size=299)
    for name, size in sizes.items():
        with pytest.raises(bpe_gpt.UserError, match=rf"--{name} is \d+ in this model"):
            hugging_face.load_model(TIED, **{name: size})


def test_transformers_opens_an_exported_folder_and_says_the_same(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    model = hugging_face.load_model(FIXTURES / "published")
    hugging_face.export(model, tokenizer, tmp_path)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.allclose(theirs(torch.arange(16)[None]).logits, logits(model), atol=1e-5)
    text = PLAY.read_text(encoding="utf-8")[20_000:30_000] + " 'Tis 1999 — naïve,\t\n\n  x  "
    for Tokenizer in (transformers.AutoTokenizer, transformers.GPT2Tokenizer):
        their_tokenizer = Tokenizer.from_pretrained(tmp_path)
        assert their_tokenizer.encode(text) == tokenizer.encode(text)
        assert their_tokenizer.eos_token_id == tokenizer.end_of_text
    their_tokenizer.save_pretrained(tmp_path / "theirs")
    assert hugging_face.read_vocabulary(tmp_path / "theirs") == vocabulary(tokenizer)

# ---- Tokenizers ---------------------------------------------------------------------------------

def tokenizer_json(tokenizer):
    """What transformers 5 writes."""
    words = hugging_face.words_of(tokenizer.tokens)
    vocab = {word: i for i, word in enumerate(words)}
    end = {"id": vocab.pop("<|endoftext|>"), "content": "<|endoftext|>", "special": True}
    model = {"type": "BPE", "dropout": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "byte_fallback": False, "vocab": vocab,
             "merges": [line.split() for line in merges_of(tokenizer)]}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    return {"version": "1.0", "added_tokens": [end], "normalizer": None, "pre_tokenizer": split,
            "model": model}


def merges_of(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        hugging_face.write_vocabulary(tokenizer, Path(folder))
        return (Path(folder) / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]


def test_a_vocabulary_is_read_from_tokenizer_json_alone(tmp_path, tokenizer):
    content = tokenizer_json(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert hugging_face.read_vocabulary(tmp_path) == vocabulary(tokenizer)


def change(*path, to):
    def apply(content):
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = to
    return apply


def swap_merges(content):
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BEGIN = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}


def template(*parts):
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": {}}


FOREIGN = {
    "an added token": (lambda c: c["added_tokens"].append({"id": 300, "content": "<|user|>"}),
                       "added token '<|user|>'"),
    "a normalizer": (change("normalizer", to={"type": "NFC"}), "normalizer"),
    "a prefix space": (change("pre_tokenizer", "add_prefix_space", to=True), "add_prefix_space"),
    "other words": (change("pre_tokenizer", "use_regex", to=False), "use_regex"),
    "another splitter": (change("pre_tokenizer", to={"type": "Whitespace"}), "pre_tokenizer.type"),
    "no splitter": (change("pre_tokenizer", to=None), "pre_tokenizer"),
    "another kind of model": (change("model", "type", to="Unigram"), "model.type"),
    "dropped merges": (change("model", "dropout", to=0.1), "model.dropout"),
    "endings of words": (change("model", "end_of_word_suffix", to="</w>"), "end_of_word_suffix"),
    "merges in another order": (swap_merges, "where the tokens imply"),
    "a merge too few": (lambda c: c["model"]["merges"].pop(), "'nothing' stands where"),
    "a byte that is no token": (lambda c: c["model"]["vocab"].pop("\u0120"), "gaps"),
    "two tokens with a number": (change("model", "vocab", "a", to=5), "used twice"),
    "no end of text": (change("added_tokens", to=[]), "no token <|endoftext|>"),
    "a token at the beginning": (change("post_processor", to=template(BEGIN, TEXT)), "adds tokens"),
    "a token at the end": (
        change("post_processor", to={"type": "RobertaProcessing", "sep": ["<|endoftext|>", 299]}),
        "adds tokens"),
    "a token among several rules": (
        change("post_processor", to={"type": "Sequence", "processors": [template(TEXT, BEGIN)]}),
        "adds tokens"),
    "a token that takes the space before it": (
        change("added_tokens", 0, "lstrip", to=True), "changes the text around it"),
    "numbers that are words": (change("model", "vocab", "a", to="5"), "gaps"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_vocabulary_that_would_give_other_tokens_is_refused(tmp_path, tokenizer, what):
    apply, clue = FOREIGN[what]
    content = tokenizer_json(tokenizer)
    apply(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(clue)):
        hugging_face.read_vocabulary(tmp_path)


@pytest.mark.parametrize("name, value", [
    ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}),
    ("post_processor", template(TEXT)),
    ("truncation", {"max_length": 4}),
    ("padding", {"pad_token": "<|endoftext|>"}),
])
def test_what_leaves_the_tokens_of_a_text_as_they_are_is_accepted(tmp_path, tokenizer, name, value):
    content = tokenizer_json(tokenizer) | {name: value}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert hugging_face.read_vocabulary(tmp_path) == vocabulary(tokenizer)


SETTINGS = {
    "a token at the beginning": ("tokenizer_config.json", {"add_bos_token": True}, "add_bos_token"),
    "a token at the end": ("tokenizer_config.json", {"add_eos_token": True}, "add_eos_token"),
    "another way to split": (
        "tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens"),
    "a prefix space": ("tokenizer_config.json", {"add_prefix_space": True}, "add_prefix_space"),
    "another kind": ("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}, "Qwen2"),
    "another kind for the model": ("config.json", {"tokenizer_class": "BertTokenizer"}, "Bert"),
    "a token for padding": ("tokenizer_config.json", {"pad_token": "[PAD]"}, "token '[PAD]'"),
    "a word as a special token": ("special_tokens_map.json", {"pad_token": "the"}, "token 'the'"),
    "a special token as an object": (
        "special_tokens_map.json", {"pad_token": {"content": "!"}}, "token '!'"),
    "more special tokens": (
        "special_tokens_map.json", {"additional_special_tokens": ["<x>"]}, "token '<x>'"),
    "a numbered token": (
        "tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": "<x>"}}}, "'<x>'"),
    "an added token": ("added_tokens.json", {"<x>": 300}, "token '<x>'"),
    "a token that texts are cut at": ("added_tokens.json", {"a": 97}, "token 'a'"),
    "another number": ("added_tokens.json", {"<|endoftext|>": 300}, "gaps"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_change_the_tokens_of_a_text_are_refused(checkpoint, tokenizer, what):
    path, model = checkpoint
    name, settings, clue = SETTINGS[what]
    file = path.parent / "model" / name
    hugging_face.export(model, tokenizer, file.parent)
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | settings))
    with pytest.raises(ValueError, match=f"^cannot load .*model: .*{re.escape(clue)}"):
        hugging_face.read_folder(file.parent)


def test_settings_as_transformers_4_wrote_them_are_accepted(tmp_path, tokenizer):
    hugging_face.write_vocabulary(tokenizer, tmp_path)
    end = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "rstrip": False}
    settings = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": {"299": end},
        "bos_token": end, "eos_token": "<|endoftext|>", "pad_token": None, "errors": "replace",
        "model_max_length": 1024, "split_special_tokens": False, "tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": end}))
    assert hugging_face.read_vocabulary(tmp_path) == vocabulary(tokenizer)


@pytest.mark.parametrize("name", [
    "encoder.model", "spiece.model", "vocab.txt", "tokenizer.model", "vocab.bpe", "encoder.json",
    "gpt2-vocab.json", "sentencepiece.bpe", "Tokenizer", "source.spm", "bpe.codes", "dict.txt",
    "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"])
def test_a_vocabulary_that_is_not_understood_is_not_taken_for_none(folder, name):
    """Nor is a part of one."""
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=f"^cannot load .*model: {re.escape(name)}"):
        hugging_face.read_folder(folder)


def test_a_vocabulary_in_another_format_is_refused_beside_one_that_is_read(tmp_path, tokenizer):
    """Which of them is the model's?"""
    hugging_face.write_vocabulary(tokenizer, tmp_path)
    (tmp_path / "vocab.txt").write_text("the")
    with pytest.raises(ValueError, match="vocab.txt may be a vocabulary in another format"):
        hugging_face.read_vocabulary(tmp_path)


def test_the_other_files_of_published_models_are_no_vocabulary(tmp_path, tokenizer):
    hugging_face.write_vocabulary(tokenizer, tmp_path)
    (tmp_path / "onnx").mkdir()
    for name in (
            "README.md", ".gitattributes", "64-8bits.tflite", "coreml_model.mlmodel", "bpe_gpt.pt",
            "flax_model.msgpack", "generation_config.json", "pytorch_model.bin", "rust_model.ot",
            "tf_model.h5"):
        (tmp_path / name).touch()
    assert hugging_face.read_vocabulary(tmp_path) == vocabulary(tokenizer)


@needs_gpt2_tokenizer
@pytest.mark.parametrize(
    "n_rows, fits", [(50257, True), (50304, True), (50256, False), (60000, False)])
def test_gpt2s_vocabulary_takes_the_place_of_none_if_the_size_is_right(tmp_path, n_rows, fits):
    sizes = dict(n_layer=1, n_head=1, n_embd=4, vocab_size=n_rows, block_size=4)
    hugging_face.export(GPT(GPTConfig(**sizes)), bpe_gpt.train_bpe("", 257), tmp_path / "model")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "model" / name).unlink()
    if fits:
        output, _ = run(SCRIPT, "model", "x.pt", cwd=tmp_path)
        assert output == "model has no vocabulary: GPT-2's is used\nsaved x.pt\n"
        checkpoint = bpe_gpt.load_pretrained(tmp_path / "x.pt")
        assert checkpoint["vocab"] == bpe_gpt.gpt2_tokenizer().tokens
        assert checkpoint["config"]["vocab_size"] == 50257
    else:
        error = one_line_error(SCRIPT, "model", "x.pt", cwd=tmp_path)
        assert "model has no vocabulary, and its size is not GPT-2's" in error
        assert not (tmp_path / "x.pt").exists()



class PostNorm(bpe_gpt.Block):
    def forward(self, x, cache=None):
        x = self.ln_1(x + self.attn(x, cache))
        return self.ln_2(x + self.mlp(x))


class SlidingWindow(bpe_gpt.CausalSelfAttention):
    """Token 150 and those after it do not see the first ones."""
    def forward(self, x, cache=None):
        y = super().forward(x)
        late = [super(SlidingWindow, self).forward(x[:, t - 149 : t + 1])[:, -1:]
                for t in range(150, x.shape[1])]
        return torch.cat([y[:, :150], *late], dim=1)


@pytest.mark.parametrize("name, change", [
    ("GELU", torch.nn.ReLU), ("Block", PostNorm), ("WORDS", r"[^\n]+|\n+"),
    ("CausalSelfAttention", SlidingWindow)])
def test_a_model_that_is_not_gpt2_any_more_is_not_exported_as_one(
    name, change, tmp_path, tokenizer, monkeypatch
):
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=len(tokenizer.tokens), block_size=200)
    monkeypatch.setattr(bpe_gpt, name, change)
    with pytest.raises(UserError, match="not built like GPT-2|is not GPT-2's"):
        hugging_face.export(GPT(GPTConfig(**sizes)), tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_prompts_of_a_model_for_instructions_survive_the_way_there_and_back(tmp_path, tokenizer):
    sizes = dict(n_layer=1, n_head=1, n_embd=8, vocab_size=len(tokenizer.tokens), block_size=8)
    config = GPTConfig(**sizes)
    checkpoint = dict(
        written_by="bpe_gpt", config=vars(config), vocab=tokenizer.tokens, text_before="\n",
        templates=["Do {instruction}:", "Do {instruction} with {input}:"],
        model=GPT(config).state_dict())
    torch.save(checkpoint, tmp_path / "x.pt")
    run(SCRIPT, "x.pt", "folder", cwd=tmp_path)
    run(SCRIPT, "folder", "back.pt", cwd=tmp_path)
    back = bpe_gpt.load_pretrained(tmp_path / "back.pt")
    assert back["templates"] == checkpoint["templates"] and back["text_before"] == "\n"


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path, tokenizer):
    """It could not write every text."""
    words = hugging_face.words_of(tokenizer.tokens)
    words.remove("\u0120")  # the space
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("\n".join(merges_of(tokenizer)), encoding="utf-8")
    with pytest.raises(ValueError, match="1 of the 256 single bytes are no tokens"):
        hugging_face.read_vocabulary(tmp_path)


def test_embeddings_without_a_token_are_left_out(tmp_path, tokenizer):
    """Models are often padded to a rounder number of rows: these can never be chosen."""
    padded = GPT(GPTConfig(**SMALL | {"vocab_size": 320}))
    hugging_face.export(padded, tokenizer, tmp_path / "model")
    model = hugging_face.load_model(tmp_path / "model")
    assert model.config.vocab_size == 300
    assert torch.equal(logits(model), logits(padded)[..., :300])


def test_the_merges_that_are_written_make_every_token_in_the_order_of_learning(tmp_path, tokenizer):
    assert hugging_face.read_vocabulary(tmp_path) is None
    hugging_face.write_vocabulary(tokenizer, tmp_path)
    assert hugging_face.read_vocabulary(tmp_path) == vocabulary(tokenizer)
    words = hugging_face.words_of(tokenizer.tokens)
    first, *lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert first == "#version: 0.2" and [x.replace(" ", "") for x in lines] == words[256:-1]
    for i, line in enumerate(lines, start=256):
        assert all(words.index(part) < i for part in line.split())


@needs_gpt2_tokenizer
def test_gpt2s_own_vocabulary_is_written_as_openai_published_it(tmp_path):
    gpt2 = bpe_gpt.gpt2_tokenizer()
    hugging_face.write_vocabulary(gpt2, tmp_path)
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken has it now
    merges, vocab = (tiktoken.load.read_file_cached(url + name)
                     for name in ("vocab.bpe", "encoder.json"))
    assert (tmp_path / "merges.txt").read_bytes() == merges
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads(vocab)
    assert hugging_face.read_vocabulary(tmp_path) == vocabulary(gpt2)

# ---- Merges -------------------------------------------------------------------------------------

def read_merges(merges, folder):
    """The tokenizer of a vocabulary: single bytes, a token for each merge, and the end of text."""
    tokens = [merge.replace(" ", "") for merge in merges]
    letters = [chr(letter) for letter in hugging_face.LETTER.values()]
    words = [*letters, *dict.fromkeys(tokens), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return bpe_gpt.BPETokenizer(hugging_face.read_vocabulary(folder))


def split_by_merges(word, merges):
    """What the tokenizers library does: it merges the pair that comes first in the list."""
    parts = list(word)
    while True:
        pairs = [f"{a} {b}" for a, b in zip(parts, parts[1:])]
        listed = [pair for pair in merges if pair in pairs]
        if not listed:
            return parts
        best = listed[0]
        i = pairs.index(best)
        parts[i : i + 2] = [best.replace(" ", "")]


@pytest.mark.parametrize("merges", [
    ["a b", "b c", "a bc"],  # "abc" is ab c
    ["a b", "b c", "ab c", "a bc"],
    ["a a", "aa a", "aaa aaa"],  # "aaaaaa" is aa aa aa
    ["ab c", "a b"],
])
def test_merges_that_the_tokens_do_not_imply_are_refused(tmp_path, merges):
    """bpe_gpt.py has no list of merges: it would merge other pairs."""
    with pytest.raises(ValueError, match="among the merges|is not made of two tokens"):
        read_merges(merges, tmp_path)


def test_a_vocabulary_is_accepted_if_its_tokens_imply_its_merges_and_only_then(tmp_path):
    rng = random.Random(1)
    n_accepted = 0
    for _ in range(100):
        parts = ["a", "b", "c"]
        merges = []
        for _ in range(rng.randint(2, 10)):
            a, b = rng.choice(parts), rng.choice(parts)
            if a + b not in parts and len(a + b) < 8:
                parts.append(a + b)
                merges.append(f"{a} {b}")
        implied = all(split_by_merges(word, merges) == [word] for word in parts)
        try:
            tokenizer = read_merges(merges, tmp_path)
        except bpe_gpt.UserError:
            assert not implied, merges
            continue
        assert implied, merges
        n_accepted += 1
        for _ in range(50):
            word = "".join(rng.choices("abc", k=rng.randint(2, 20)))
            tokens = [tokenizer.decode([token]) for token in tokenizer.encode(word)]
            assert tokens == split_by_merges(word, merges)
    assert 20 < n_accepted < 80


@pytest.mark.parametrize("first", [True, False])
def test_a_vocabulary_that_the_tokenizers_library_learned_is_accepted(tmp_path, first):
    tokenizers = pytest.importorskip("tokenizers")
    text = PLAY.read_text(encoding="utf-8")[:50_000]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>"] if first else []
    theirs.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    theirs.add_special_tokens(["<|endoftext|>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = bpe_gpt.BPETokenizer(hugging_face.read_vocabulary(tmp_path))
    assert ours.end_of_text == (0 if first else 600)
    assert ours.encode(text) == theirs.encode(text).ids
    (tmp_path / "ours").mkdir()
    hugging_face.write_vocabulary(ours, tmp_path / "ours")
    assert hugging_face.read_vocabulary(tmp_path / "ours") == ours.tokens


def test_the_single_bytes_may_have_any_numbers(tmp_path, tokenizer):
    tokens = tokenizer.tokens[256:] + tokenizer.tokens[:256][::-1]
    ours = bpe_gpt.BPETokenizer(tokens)
    hugging_face.write_vocabulary(ours, tmp_path)
    assert hugging_face.read_vocabulary(tmp_path) == tokens


@pytest.mark.parametrize("word, clue", [
    (" ", "letters that do not stand for bytes"),  # the letter of a space is \u0120
    ("\u4e2d", "letters that do not stand for bytes"),
    ("", "the token '' is not made of two tokens"),
])
def test_tokens_that_stand_for_no_bytes_are_refused(tmp_path, tokenizer, word, clue):
    content = tokenizer_json(tokenizer)
    content["added_tokens"][0]["id"] = 300
    content["model"]["vocab"][word] = 299
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=clue):
        hugging_face.read_vocabulary(tmp_path)


def test_a_vocabulary_whose_tokens_do_not_come_from_each_other_is_not_exported(tmp_path, tokenizer):
    odd = bpe_gpt.BPETokenizer([*tokenizer.tokens[:-1], b"zzzz", tokenizer.tokens[-1]])
    model = GPT(GPTConfig(**SMALL | {"vocab_size": 301}))
    with pytest.raises(ValueError, match="the token 'zzzz' is not made of two tokens before it"):
        hugging_face.export(model, odd, tmp_path / "model")

# ---- What came before a text --------------------------------------------------------------------

def test_what_came_before_each_text_in_training_is_kept(tmp_path, tokenizer):
    model = GPT(GPTConfig(**SMALL))
    hugging_face.export(model, tokenizer, tmp_path / "default")
    hugging_face.export(model, tokenizer, tmp_path / "line", text_before="\n")
    assert hugging_face.read_folder(tmp_path / "default")["text_before"] == "<|endoftext|>"
    assert hugging_face.read_folder(tmp_path / "line")["text_before"] == "\n"
    assert hugging_face.read_folder(TIED)["text_before"] == "<|endoftext|>"  # others do not say it


def test_transformers_keeps_what_came_before_each_text(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    hugging_face.export(GPT(GPTConfig(**SMALL)), tokenizer, tmp_path / "ours", "\n")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert hugging_face.read_folder(tmp_path / "theirs")["text_before"] == "\n"


@pytest.mark.parametrize("text", ["", "\n\n \n", None, 5, ["\n"], "\ud800"])
def test_a_text_before_that_is_not_one_token_is_refused(folder, tokenizer, text):
    configure(text_before=text)(folder)
    with pytest.raises(ValueError, match="^cannot load .*model: "):
        hugging_face.read_folder(folder)
    with pytest.raises(ValueError):
        hugging_face.export(GPT(GPTConfig(**SMALL)), tokenizer, folder / "new", text)
    assert not (folder / "new").exists()

# ---- Damaged files ------------------------------------------------------------------------------

def safetensors(header, body=b""):
    return lambda folder: write(folder / "model.safetensors", header, body)


def tensor(name, change):
    """Damage one tensor of a good file: change(type, shape, bytes), or None to leave it out."""
    def apply(folder):
        tensors, header, body = parse(folder / "model.safetensors")[0], {}, b""
        tensor = tensors.pop(name, ("F32", [24], bytes(96)))
        if change:
            tensors[name] = change(*tensor)
        for key, (dtype, shape, data) in tensors.items():
            place = len(body), len(body) + len(data)
            header[key] = dict(dtype=dtype, shape=shape, data_offsets=place)
            body += data
        write(folder / "model.safetensors", header, body)
    return apply


def configure(**settings):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
    return apply


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def shift(n):
    """Move the second half of the tensors by n bytes."""
    def apply(folder):
        tensors, header, body = parse(folder / "model.safetensors")[0], {}, b""
        for i, (key, (dtype, shape, data)) in enumerate(tensors.items()):
            if i == len(tensors) // 2:
                body = body + bytes(n) if n > 0 else body[:n]
            place = len(body), len(body) + len(data)
            header[key] = dict(dtype=dtype, shape=shape, data_offsets=place)
            body += data
        write(folder / "model.safetensors", header, body)
    return apply


def append(path, data):
    path.write_bytes(path.read_bytes() + data)


def twice(folder):
    """The same name again in the header: JSON takes the last one."""
    path = folder / "model.safetensors"
    data, start = path.read_bytes(), parse(path)[1]
    entry = json.dumps({BIAS: json.loads(data[8:start])[BIAS]}).encode()
    write(path, data[8:start].rstrip()[:-1] + b", " + entry[1:], data[start:])


NAN = struct.pack("<f", float("nan"))
INFINITY = struct.pack("<f", float("inf"))
OTHER_HEAD = ("F32", [300, 24], bytes(4 * 300 * 24))
FULL_MASK = ("U8", [1, 1, 64, 64], b"\1" * 64 * 64)
BIAS = "transformer.h.1.ln_2.bias"
MATRIX = "transformer.h.0.mlp.c_fc.weight"
END = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FAULTS = {
    "an empty file": content("model.safetensors", b""),
    "half a file": lambda folder: os.truncate(folder / "model.safetensors", 48_000),
    "a header longer than the file": content("model.safetensors", b"\1" * 9),
    "a header that is not JSON": safetensors(b"{wte.weight"),
    "a tensor past the end": safetensors({"a": END}, b"1234"),
    "a shape that does not fit": safetensors({"a": {**END, "shape": [3]}}, b"12345678"),
    "a missing tensor": tensor(BIAS, None),
    "an extra tensor": tensor(BIAS.replace("1", "2"), lambda *tensor: tensor),
    "a tensor of one number less": tensor(BIAS, lambda d, s, b: (d, [23], b[4:])),
    "a tensor of whole numbers": tensor(BIAS, lambda d, s, b: ("I32", s, b)),
    "a matrix the other way": tensor(MATRIX, lambda d, s, b: (d, s[::-1], b)),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "another activation": configure(activation_function="relu"),
    "another epsilon": configure(layer_norm_epsilon=1e-6),
    "an output of its own": configure(tie_word_embeddings=False),
    "a layer more": configure(n_layer=3),
    "a width that is a word": configure(n_embd="wide"),
    "attention without the scale": configure(scale_attn_weights=False),
    "attention scaled by layers": configure(scale_attn_by_inverse_layer_idx=True),
    "attention to another text": configure(add_cross_attention=True),
    "another kind of model": configure(model_type="gptj"),
    "an MLP of another width": configure(n_inner=100),
    "numbers in four bits": configure(quantization_config={"bits": 4}),
    "a gap between tensors": shift(4),
    "tensors that overlap": shift(-4),
    "a negative place": safetensors({"a": {**END, "data_offsets": [-8, 0]}}, b"12345678"),
    "bytes after the last tensor": lambda folder: append(folder / "model.safetensors", b"1234"),
    "a tensor given twice": twice,
    "a number that is none": tensor(BIAS, lambda d, s, b: (d, s, b[4:] + NAN)),
    "a number that is infinite": tensor(BIAS, lambda d, s, b: (d, s, b[4:] + INFINITY)),
    "an output that is not the input": tensor("lm_head.weight", lambda d, s, b: OTHER_HEAD),
    "a mask that is not causal": tensor("transformer.h.0.attn.bias", lambda d, s, b: FULL_MASK),
    "several files": lambda folder: (folder / "model.safetensors").rename(folder / "1.safetensors"),
    "a tokenizer that is not JSON": content("vocab.json", b"{"),
    "a tokenizer without an end of text": content("vocab.json", b'{"a": 0}'),
    "a tokenizer that adds a space": content("tokenizer_config.json", b'{"add_prefix_space": true}'),
    "a tokenizer.json without a model": content("tokenizer.json", b'{"added_tokens": []}'),
    "a tokenizer.json that is a list": content("tokenizer.json", b'[["a", 1]]'),
    "a tokenizer.json with a list in it": content(
        "tokenizer.json", b'{"added_tokens": [], "pre_tokenizer": [1], "model": [2]}'),
    "attention to later tokens": configure(is_causal=False),
    "a config that is a list": content("config.json", b"[1, 2]"),
    "a mask in half precision": tensor(
        "transformer.h.0.attn.bias", lambda d, s, b: ("F16", [1, 1, 2, 2], b"\0<" * 4)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_model_is_refused_in_one_readable_line(folder, fault):
    FAULTS[fault](folder)
    with pytest.raises(ValueError, match="^cannot load .*model: ") as refused:
        hugging_face.load_model(folder)
    assert len(str(refused.value).splitlines()) == 1


def not_safetensors(data, clue="model.safetensors is no safetensors file"):
    return content("model.safetensors", data), clue


def again(new, old):
    """Write the tensor once more, by another name that means the same."""
    def apply(folder):
        path = folder / "model.safetensors"
        dtype, shape, data = parse(path)[0][old]
        tensor(new, lambda *tensor: (dtype, shape, data))(folder)
    return apply


NO_SIZE = "not a whole number above zero"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
SAID = {
    "a size below zero": (configure(n_head=-4), f"n_head is -4, {NO_SIZE}"),
    "a size of zero": (configure(n_positions=0), f"n_positions is 0, {NO_SIZE}"),
    "a size with a point": (configure(n_embd=24.0), f"n_embd is 24.0, {NO_SIZE}"),
    "a size that is true": (configure(n_layer=True), f"n_layer is true, {NO_SIZE}"),
    "a size that is a word": (configure(n_layer="2"), f'n_layer is "2", {NO_SIZE}'),
    "a size that is null": (configure(vocab_size=None), f"vocab_size is null, {NO_SIZE}"),
    "a billion layers": (configure(n_layer=10**9), "n_layer is 1000000000, but there are only"),
    "heads that do not divide": (configure(n_head=5), "n_head 5 does not divide n_embd 24"),
    "a size by another name": (configure(num_attention_heads=2), "num_attention_heads is 2; only"),
    "a name with and without a prefix": (
        again("wte.weight", "transformer.wte.weight"), "a tensor is in the file twice"),
    "an output with a prefix": (
        tensor("transformer.lm_head.weight", lambda d, s, b: OTHER_HEAD), "must be tied"),
    "a pointer of git LFS": not_safetensors(
        POINTER, "a pointer of git LFS, not the weights: run git lfs pull"),
    "a web page": not_safetensors(b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n" * 9),
    "a zip file": not_safetensors(b"PK\3\4\0\0\10\10" + bytes(900)),
    "no bytes": not_safetensors(b""),
    "three bytes": not_safetensors(b"abc"),
    "a list": not_safetensors(struct.pack("<Q", 9) + b'["a", 10]'),
    "a number": not_safetensors(struct.pack("<Q", 1) + b"5"),
    "an entry that is a number": not_safetensors(struct.pack("<Q", 8) + b'{"a": 1}'),
    "a config that is a web page": (content("config.json", b"<html>"), "config.json is not a JSON"),
}


@pytest.mark.parametrize("fault", SAID)
def test_the_reason_is_said_in_plain_words(folder, fault):
    apply, clue = SAID[fault]
    apply(folder)
    with pytest.raises(ValueError, match=re.escape(clue)) as refused:
        hugging_face.read_folder(folder)
    assert "Error" not in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_the_command_line_says_what_is_not_supported(folder):
    FAULTS["another epsilon"](folder)
    error = one_line_error(SCRIPT, folder, "x.pt", cwd=folder)
    assert "layer_norm_epsilon is 1e-06; only 1e-05 is supported" in error


@pytest.mark.parametrize("script", ["bpe_gpt.py --init", "sample.py"])
def test_a_folder_gets_the_command_that_makes_a_checkpoint_of_it(folder, script):
    name, *flags = script.split()
    error = one_line_error(ROOT / name, *flags, folder, cwd=folder)
    assert f"python data/hugging_face.py {folder} out/x.pt" in error


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_nothing_that_is_loaded_runs_as_code(folder, name):
    class Harmful:
        def __reduce__(self):
            return open, (str(folder / "harm"), "w")

    torch.save({"written_by": "bpe_gpt", "config": SMALL, "model": Harmful()}, folder / name)
    with pytest.raises(ValueError, match="cannot load|is missing, damaged"):
        if name == "model.pt":
            GPT.from_pretrained(folder / name)
        else:
            hugging_face.load_model(folder)
    assert not (folder / "harm").exists()

# ---- Published weights --------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on loopback in place of Hugging Face's, with a tiny model as gpt2 and gpt2-large,
    and an empty data folder. .answer is what it does wrong, .asked are the paths of the requests so
    far. As for the real models, the SHA-256 of gpt2 is known, that of gpt2-large is not."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if server.answer == "reset":
                return self.connection.close()
            self.send_response(404 if server.answer == "not found" else 200)
            self.send_header("Content-Length", str(len(server.weights)))
            self.end_headers()
            self.wfile.write(server.weights[: 100_000 if server.answer == "truncated" else None])

        def log_message(self, *args):
            pass

    sizes = dict(n_layer=1, n_head=2, n_embd=2)  # besides, GPT-2's vocabulary, but 8 positions
    model = GPT(GPTConfig(**sizes, block_size=8))
    hugging_face.export(model, bpe_gpt.train_bpe("", 257), tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.answer, server.model = [], "right", model
        server.weights = (tmp_path / "server" / "model.safetensors").read_bytes()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        download = torch.hub.download_url_to_file

        def download_here(url, *args):
            path = url.removeprefix("https://huggingface.co/openai-community")
            download(f"http://127.0.0.1:{server.server_port}{path}", *args)

        monkeypatch.setattr(torch.hub, "download_url_to_file", download_here)
        monkeypatch.setattr(bpe_gpt, "DATA", tmp_path / "data")
        sha256 = hashlib.sha256(server.weights).hexdigest()
        for name, known in ("gpt2", sha256), ("gpt2-large", None):
            monkeypatch.setitem(bpe_gpt.SIZES, name, sizes)
            monkeypatch.setitem(bpe_gpt.PUBLISHED, name, ("v1", known))
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", ["gpt2", "gpt2-large"])
def test_published_weights_are_downloaded_once_and_whole(hub, tmp_path, name):
    path = find_weights(name)
    assert path == tmp_path / "data" / name / "model.safetensors"
    assert path.read_bytes() == hub.weights and len(list(path.parent.iterdir())) == 1
    assert find_weights(name) == path and hub.asked == [f"/{name}/resolve/v1/model.safetensors"]
    config = GPTConfig(**bpe_gpt.SIZES[name], block_size=8)
    state = bpe_gpt.read_safetensors(path)
    model = bpe_gpt.build_model(dict(config=vars(config), model=state), config)
    idx = torch.tensor([[0, 1, 50256]])
    assert torch.equal(logits(model, idx), logits(hub.model, idx))


@pytest.mark.parametrize("name, answer", [
    ("gpt2", "wrong digest"), ("gpt2", "truncated"), ("gpt2", "not found"), ("gpt2", "reset"),
    ("gpt2-large", "not found"), ("gpt2-large", "reset"),
])
def test_a_failed_download_leaves_one_line_and_no_file(hub, tmp_path, monkeypatch, name, answer):
    hub.answer = answer
    if answer == "wrong digest":
        monkeypatch.setitem(bpe_gpt.PUBLISHED, name, ("v1", "0" * 64))
    with pytest.raises(OSError, match=f"^cannot download http.*/{name}/resolve/v1/") as failed:
        find_weights(name)
    assert len(str(failed.value).splitlines()) == 1 and len(hub.asked) == 1
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"\0" * 8])
def test_what_is_no_safetensors_file_is_called_damaged(hub, tmp_path, content):
    """A pointer of Git LFS, for example, if somebody has put that into the data folder."""
    (tmp_path / "data" / "gpt2").mkdir(parents=True)
    (tmp_path / "data" / "gpt2" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is damaged: delete it"):
        bpe_gpt.load_pretrained("gpt2")


def test_a_part_of_a_file_whose_digest_is_not_known_is_refused_when_it_is_loaded(hub):
    hub.answer = "truncated"
    for _ in range(2):
        with pytest.raises(ValueError, match="gpt2-large.* is damaged: delete it") as refused:
            GPT.from_pretrained("gpt2-large")
        assert len(str(refused.value).splitlines()) == 1
