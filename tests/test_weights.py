"""bpe_gpt.py: reading and writing weights, and fetching them. What is damaged is never used."""

import hashlib
import http.server
import json
import os
import shutil
import struct
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line_error, run

import bpe_gpt
from bpe_gpt import GPT, GPTConfig, export, find_weights, load_pretrained, read_safetensors

FIXTURES = ROOT / "tests" / "fixtures"
SMALL = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=300, block_size=16)


@pytest.fixture(scope="module")
def tokenizer():
    text = (ROOT / "data" / "the-glass-harbour.txt").read_text(encoding="utf-8")
    return bpe_gpt.train_bpe(text[:20_000], 300)


def logits(model, idx=torch.arange(16)[None]):
    with torch.no_grad():
        return model.eval()(idx)[0]


# ---------------------------------------------------------------------------------------------
# The round trip


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_model_comes_back_the_same(tmp_path, tokenizer, tied):
    model = GPT(GPTConfig(**SMALL, tied=tied))
    export(model, tokenizer, tmp_path)
    again, same_tokenizer = load_pretrained(tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    assert bpe_gpt.token_bytes(same_tokenizer) == bpe_gpt.token_bytes(tokenizer)
    assert again.config.tied == tied
    header = (tmp_path / "model.safetensors").read_bytes()[:8]
    assert struct.unpack("<Q", header)[0] % 8 == 0, "so that numbers lie on multiples of 4"
    names = {"model.safetensors", "config.json", "vocab.json", "merges.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_exported_file_is_what_transformers_writes(tmp_path, tokenizer):
    """The same names, shapes and bytes as in the file from which the model came."""
    original = FIXTURES / "tied" / "model.safetensors"
    export(GPT.from_pretrained(original.parent), tokenizer, tmp_path)
    ours, theirs = read_safetensors(tmp_path / "model.safetensors"), read_safetensors(original)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((original.parent / "config.json").read_text())
    assert all(config[n] == published[n] for n in config.keys() & published.keys() - {
        "embd_pdrop", "resid_pdrop", "attn_pdrop", "bos_token_id", "eos_token_id"})  # fmt: skip


def test_a_mapped_file_is_not_changed_by_training(tmp_path, tokenizer):
    export(GPT(GPTConfig(**SMALL)), tokenizer, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = GPT.from_pretrained(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_numbers_that_lie_askew_are_read_right(tmp_path, tokenizer):
    """OpenAI's own files have a header of odd length, so that no number lies on a multiple of 4."""
    model = GPT(GPTConfig(**SMALL))
    export(model, tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(struct.pack("<Q", n + 3) + data[8 : 8 + n] + b"   " + data[8 + n :])
    again = GPT.from_pretrained(tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    assert all(p.data_ptr() % 4 == 0 for p in again.parameters())


def test_a_shorter_context_keeps_the_first_positions():
    whole = GPT.from_pretrained(FIXTURES / "tied")
    short = GPT.from_pretrained(FIXTURES / "tied", block_size=20)
    idx = torch.arange(20)[None]
    assert torch.equal(logits(whole, idx), logits(short, idx))
    assert short.block_size == short.config.block_size == 20


def test_a_second_name_for_the_tied_table_is_no_second_table(tmp_path):
    shutil.copytree(FIXTURES / "old", tmp_path / "old")
    path = tmp_path / "old" / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, "lm_head.weight": tensors["wte.weight"]}, path)
    model = GPT.from_pretrained(tmp_path / "old")
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("askew", [0, 3])
def test_loading_takes_no_second_copy_of_the_file(tmp_path, askew):
    """A file of 96 MB, in memory once: what is mapped, touched and copied stays below 1.3 times."""
    config = GPTConfig(n_layer=3, n_head=12, n_embd=768, vocab_size=3000, block_size=256)
    tokenizer = bpe_gpt.make_tokenizer([bytes([b]) for b in bpe_gpt.BYTES] + [b"<|endoftext|>"])
    export(GPT(config), tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    if askew:
        data = path.read_bytes()
        n = struct.unpack("<Q", data[:8])[0]
        header = struct.pack("<Q", n + askew) + data[8 : 8 + n] + b" " * askew
        path.write_bytes(header + data[8 + n :])
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import bpe_gpt, re
def peak():
    return int(re.search("VmHWM:\\\\s+(\\\\d+)", open("/proc/self/status").read())[1]) * 1024
bpe_gpt.GPT.from_pretrained({str(FIXTURES / "tied")!r})
before = peak()
model = bpe_gpt.GPT.from_pretrained({str(tmp_path)!r})
print((peak() - before) / {path.stat().st_size})
"""
    assert float(run("-c", code, cwd=tmp_path, fresh=True)[0]) < 1.3


# ---------------------------------------------------------------------------------------------
# Damaged files


def write(folder, header, body=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + body)


def entry(first, last, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


BAD_FILES = {
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "seven bytes": lambda folder: (folder / "model.safetensors").write_bytes(b"\1" * 7),
    "a header longer than the file": lambda folder: write(folder, {}, length=10**6),
    "a header of 2**64 bytes": lambda folder: write(folder, {}, length=2**64 - 1),
    "not JSON": lambda folder: write(folder, b"{wte.weight"),
    "a list": lambda folder: write(folder, [1, 2]),
    "not UTF-8": lambda folder: write(folder, b'{"\xff": 1}'),
    "a header of 11 MB": lambda folder: write(folder, b"{}" + b" " * 11_000_000),
    "nested without end": lambda folder: write(folder, b"[" * 1_000_000),
    "a number without end": lambda folder: write(folder, b'{"a": ' + b"9" * 1_000_000 + b"}"),
    "an entry without offsets": lambda folder: write(folder, {"a": {"dtype": "F32", "shape": []}}),
    "one offset": lambda folder: write(folder, {"a": {**entry(0, 4, [1]), "data_offsets": [0]}}),
    "negative offsets": lambda folder: write(folder, {"a": entry(-4, 0, [1])}, b"1234"),
    "offsets of words": lambda folder: write(folder, {"a": entry("0", "4", [1])}, b"1234"),
    "a negative shape": lambda folder: write(folder, {"a": entry(0, 4, [-1, -1])}, b"1234"),
    "a shape of fractions": lambda folder: write(folder, {"a": entry(0, 4, [1.0])}, b"1234"),
    "a shape that does not fit": lambda folder: write(folder, {"a": entry(0, 4, [2])}, b"1234"),
    "overlapping tensors": lambda folder: write(
        folder, {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"1" * 12
    ),
    "a hole": lambda folder: write(
        folder, {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1" * 12
    ),
    "past the end": lambda folder: write(folder, {"a": entry(0, 8, [2])}, b"1234"),
    "more after the end": lambda folder: write(folder, {"a": entry(0, 4, [1])}, b"12345"),
    "an unknown type": lambda folder: write(folder, {"a": entry(0, 4, [1], "F7")}, b"1234"),
    "a type of lists": lambda folder: write(folder, {"a": entry(0, 4, [1], ["F32"])}, b"1234"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_damaged_safetensors_file_is_refused(tmp_path, fault):
    BAD_FILES[fault](tmp_path)
    with pytest.raises(ValueError, match="model.safetensors"):
        read_safetensors(tmp_path / "model.safetensors")


def change(name, f):
    """The tensors of a good file, with one changed by f (or left out, where f is None)."""

    def apply(folder):
        tensors = torch.load(FIXTURES / "old" / "pytorch_model.bin", weights_only=True)
        tensor = tensors.pop(name, None)
        if f:
            tensors[name] = f(tensor)
        torch.save(tensors, folder / "pytorch_model.bin")

    return apply


def configure(**settings):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))

    return apply


def spoil(tensor):
    tensor[3] = float("nan")
    return tensor


BAD_MODELS = {
    "a missing tensor": (change("h.1.ln_2.bias", None), "transformer.h.1.ln_2.bias is missing"),
    "an extra tensor": (change("h.2.ln_2.bias", lambda t: torch.ones(24)), "h.2.ln_2.bias"),
    "a misshapen tensor": (change("wpe.weight", lambda t: t[1:]), "wpe.weight has the shape"),
    "a matrix not transposed": (
        change("h.0.mlp.c_fc.weight", lambda t: t.t().contiguous()), "h.0.mlp.c_fc.weight has the"
    ),
    "a tensor twice": (change("transformer.ln_f.bias", lambda t: torch.ones(24)), "ln_f.bias is"),
    "NaN": (change("h.0.attn.c_proj.bias", spoil), "h.0.attn.c_proj.bias has numbers"),
    "whole numbers": (change("ln_f.bias", lambda t: t.long()), "ln_f.bias is of torch.int64"),
    "something that is no tensor": (change("ln_f.bias", lambda t: "x"), "not a file of weights"),
    "half a file": (
        lambda f: os.truncate(f / "pytorch_model.bin", 40_000), "pytorch_model.bin"
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "a config of another model": (configure(model_type="bert"), "model_type is 'bert'"),
    "another epsilon": (configure(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
    "another activation": (configure(activation_function="relu"), "activation_function"),
    "no layers": (configure(n_layer=0), "n_layer is 0"),
    "a billion layers": (configure(n_layer=10**9), "n_layer"),
    "more layers than tensors": (configure(n_layer=900), "900 layers"),
    "half a head": (configure(n_head=1.5), "n_head is 1.5"),
    "heads that do not fit": (configure(n_head=7), "n_head"),
    "a width beyond all numbers": (configure(n_embd=10**30), "n_embd"),
    "a width beyond all memory": (configure(n_embd=3 * 2**28, vocab_size=2**30), "sizes"),
    "a width that is a word": (configure(n_embd="wide"), "n_embd is 'wide'"),
    "too few words": (configure(vocab_size=299), "wte.weight has the shape"),
    "neither kind of file": (lambda f: (f / "pytorch_model.bin").unlink(), "has no model.safet"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_MODELS)
def test_a_model_with_a_fault_is_refused_in_one_line(tmp_path, fault):
    apply, clue = BAD_MODELS[fault]
    for path in (FIXTURES / "old").iterdir():
        shutil.copy(path, tmp_path)
    apply(tmp_path)
    assert clue in one_line_error(
        ROOT / "bpe_gpt.py", "--init", str(tmp_path), "--eval_only", cwd=tmp_path
    )


def test_a_vocabulary_whose_numbers_are_not_in_the_order_of_its_merges_is_refused(
    tmp_path, tokenizer
):
    """tiktoken merges in the order of the numbers: it would give other tokens than meant."""
    bpe_gpt.write_vocabulary(tokenizer, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    a, b = [word for word, i in vocab.items() if i in (260, 261)]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match="vocab.json"):
        bpe_gpt.read_vocabulary(tmp_path)


def test_a_pytorch_model_cannot_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"wte.weight": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a file of weights"):
        bpe_gpt.read_bin(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "harm").exists()


# ---------------------------------------------------------------------------------------------
# Published weights, from a server on loopback that answers as Hugging Face's does

WEIGHTS = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Weights "gpt2", which break off at the first try, and "gpt2-large", whose SHA-256 the server
    states; data/ and Hugging Face's cache are empty folders."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            asked.append((self.command, self.path, self.headers["Range"]))
            if "/resolve/" in self.path:  # Hugging Face sends one on to where large files lie
                self.send_response(302)
                self.send_header("Location", "/" + self.path.rsplit("/", 1)[1])
                self.send_header("X-Linked-ETag", f'"{SHA256}"')
                self.send_header("Content-Length", "0")
                return self.end_headers()
            first = int((self.headers["Range"] or "bytes=0-")[6:-1])
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(WEIGHTS) - first))
            self.end_headers()
            if self.command == "GET":
                cut = len(asked) == 2 and "gpt2-large" not in asked[0][1]
                self.wfile.write(WEIGHTS[first : 100_000 if cut else None])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(bpe_gpt, "HUB", f"http://127.0.0.1:{httpd.server_port}")
        monkeypatch.setattr(bpe_gpt, "DATA", tmp_path / "data")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setitem(bpe_gpt.PUBLISHED, "gpt2", ("v1", SHA256))
        yield asked
        httpd.shutdown()


def test_published_weights_are_fetched_once_and_go_on_where_they_broke_off(hub, tmp_path):
    with pytest.raises(OSError, match="broke off at byte 100,000"):
        find_weights("gpt2")
    path = find_weights("gpt2")
    assert path == tmp_path / "data" / "gpt2" / "model.safetensors"
    assert path.read_bytes() == WEIGHTS and len(list(path.parent.iterdir())) == 1
    assert hub[0][1] == "/gpt2/resolve/v1/model.safetensors"
    assert hub[-1] == ("GET", "/model.safetensors", "bytes=100000-")
    n = len(hub)
    assert find_weights("gpt2") == find_weights("gpt2", offline=True) == path and len(hub) == n


def test_a_digest_that_is_not_known_here_is_the_servers(hub):
    assert find_weights("gpt2-large").read_bytes() == WEIGHTS
    assert hub[0][0] == "HEAD" and "32b71b12589c2f8d625668d2335a01cac3249519" in hub[0][1]


def test_a_wrong_digest_is_refused(hub, monkeypatch, tmp_path):
    monkeypatch.setitem(bpe_gpt.PUBLISHED, "gpt2", ("v1", "0" * 64))
    for _ in range(2):  # the first try breaks off
        with pytest.raises(OSError, match="cannot fetch"):
            find_weights("gpt2")
    assert list((tmp_path / "data" / "gpt2").iterdir()) == []


def test_weights_in_hugging_faces_cache_are_used(hub, tmp_path):
    folder = tmp_path / "hf" / "hub" / "models--openai-community--gpt2" / "snapshots" / "v1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    assert find_weights("gpt2") == folder / "model.safetensors" and not hub


def test_offline_nothing_is_asked_for(hub):
    with pytest.raises(OSError, match="--offline"):
        find_weights("gpt2", offline=True)
    assert not hub


def test_an_unknown_name_is_answered_with_the_names_there_are(tmp_path):
    error = one_line_error(ROOT / "bpe_gpt.py", "--init", "gpt3", cwd=tmp_path)
    assert "gpt3" in error and "gpt2-medium" in error
