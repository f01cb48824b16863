"""What the scripts have in common: text, tokens, batches, evaluation, files, flags."""

import ast
import hashlib
import http.server
import io
import math
import pickle
import re
import socket
import struct
import threading
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import PLAY, ROOT, SHAKESPEARE, needs_shakespeare, one_line_error, run

import bigram
import bpe_gpt
import char_gpt

SCRIPTS = ["bigram.py", "char_gpt.py", "bpe_gpt.py", "sample.py"]
TRAINING_SCRIPTS = ["bigram.py", "char_gpt.py", "bpe_gpt.py"]

# Definitions that may differ between scripts although they have the same name, and why.
MAY_DIFFER = {
    "train": "bigram.py takes plain steps; char_gpt.py warms up, clips, saves and resumes",
    "main": "each script builds and describes its own model",
    "fail": "sample.py shows no progress in a live line, which would have to be erased",
    "parse_flags": "sample.py has a positional argument, and no configuration to take flags from",
}
MAY_DIFFER_IN_BPE_GPT = {
    "GPTConfig": "GPT-2's sizes, and settings of its own",
    "get_batch": "tokens lie on disk or in memory, not on the device; --stride",
    "attention": "with a cache, fewer tokens ask than are asked",
    "CausalSelfAttention": "keeps keys and values in the cache; always PyTorch's own where it can",
    "MLP": "PyTorch's own GELU, which char_gpt.py has written out",
    "Block": "hands the cache on; PyTorch's own LayerNorm, which char_gpt.py has written out",
    "GPT": "the cache, published weights, a head that need not be tied",
    "generate": "uses the cache",
    "evaluate": "windows may overlap",
    "make_optimizers": "AdamW alone, for fine-tuning; it decays the embeddings, too",
    "learning_rate_share": "half a cosine wave",
    "print_evaluation": "perplexity; a sample starts with the end of text",
}


def source(script):
    return (ROOT / script).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# The repetition that is the lesson


def definitions(script):
    text = source(script)
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.parse(text).body if isinstance(node, kinds)]
    decorators = {node.name: [ast.unparse(d) for d in node.decorator_list] for node in nodes}
    return {n.name: (decorators[n.name], ast.get_source_segment(text, n)) for n in nodes}


def test_what_two_scripts_share_is_the_same_to_the_letter():
    shared = set()
    for a, b in combinations(SCRIPTS, 2):
        ours, theirs = definitions(a), definitions(b)
        may_differ = MAY_DIFFER | (MAY_DIFFER_IN_BPE_GPT if "bpe_gpt.py" in (a, b) else {})
        for name in ours.keys() & theirs.keys() - may_differ.keys():
            assert ours[name] == theirs[name], f"{name} differs between {a} and {b}"
            shared.add(name)
    assert {"CharTokenizer", "get_batch", "generate", "evaluate", "download"} <= shared


def test_what_may_differ_does_differ():
    """So that the lists above, of which each line costs the reader something, stay short."""
    char, bpe = definitions("char_gpt.py"), definitions("bpe_gpt.py")
    assert all(char[name] != bpe[name] for name in MAY_DIFFER_IN_BPE_GPT)


def test_sections_come_in_the_same_order():
    heading = re.compile(r"^# -{80,}\n# (.+)$", re.MULTILINE)
    bigram, char, bpe = [heading.findall(source(script)) for script in TRAINING_SCRIPTS]
    assert len(bigram) >= 7
    assert bigram == char == [h for h in bpe if h not in ("Instructions", "Weights")]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "--seed=x", "--nonsense"])
def test_help_and_mistakes_need_not_wait_for_pytorch(script, flag, tmp_path):
    code = f"import runpy, sys\nsys.argv = ['x', {flag!r}]\n"
    code += f"try:\n    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
    code += "except SystemExit:\n    assert not {'torch', 'numpy', 'tiktoken'} & set(sys.modules)"
    out, error = run("-c", code, cwd=tmp_path, fresh=True)
    assert ("usage:" in out) == (flag == "--help") and len(error.splitlines()) == (flag != "--help")


def test_training_scripts_import_nothing_from_each_other():
    for script in TRAINING_SCRIPTS:
        imports = re.findall(r"^(?:from|import) (\w+)", source(script), re.MULTILINE)
        assert imports and not set(imports) & {"bigram", "char_gpt", "bpe_gpt", "sample"}


def test_importing_a_script_runs_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "import bigram, char_gpt, bpe_gpt, sample"
    assert run("-c", code, cwd=tmp_path, fresh=True) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_scripts_name_the_packages_that_requirements_txt_names():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for script in SCRIPTS:
        block = re.search(r"^# /// script\n((?:# .*\n)+?)# ///$", source(script), re.MULTILINE)
        for package in re.findall(r'"([a-z][^"]+)"', block[1].split("dependencies")[1]):
            assert package in requirements, f"{script}: {package}"


# ---------------------------------------------------------------------------------------------
# Text and tokens


def test_tokenizer_gives_back_the_text_it_was_given():
    tokenizer = char_gpt.CharTokenizer("héllo, wörld\n")
    assert tokenizer.decode(tokenizer.encode("lö,hé\n")) == "lö,hé\n"
    assert tokenizer.vocab_size == len(set("héllo, wörld\n"))


def test_tokens_are_numbered_in_sorted_order():
    assert char_gpt.CharTokenizer("banana").encode("abn") == [0, 1, 2]


def test_a_character_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="'z'"):
        char_gpt.CharTokenizer("abc").encode("abz")


def test_the_shipped_play_has_exactly_the_characters_of_tiny_shakespeare():
    text = PLAY.read_text(encoding="utf-8")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert set(text) == set("\n !$&',-.3:;?" + letters)
    assert len(text) >= 60_000


def test_the_shipped_play_has_the_layout_of_tiny_shakespeare():
    text = PLAY.read_text(encoding="utf-8")
    speeches = text.rstrip("\n").split("\n\n")
    assert all(re.match(r"[A-Z][A-Za-z ]*:\n[^\n]", speech) for speech in speeches)
    lines = [line for line in text.split("\n") if len(line) > 30]
    assert len(set(lines)) == len(lines), "a line stands in the play twice"


@needs_shakespeare
def test_tiny_shakespeare_is_cut_90_to_10_in_order():
    text = SHAKESPEARE.read_text(encoding="utf-8")
    assert len(text) == 1_115_394 and len(set(text)) == 65
    train, val = bigram.split_text(text)
    assert (len(train), len(val)) == (1_003_854, 111_540)
    assert train + val == text


# ---------------------------------------------------------------------------------------------
# Batches


DATA = torch.arange(1000) % 65
CONFIG = bigram.BigramConfig(batch_size=8, block_size=16, seed=5)


def test_targets_are_the_inputs_one_token_later():
    data = torch.arange(1000)
    x, y = bigram.get_batch(data, CONFIG, step=0)
    assert x.shape == y.shape == (8, 16)
    assert torch.equal(y, x + 1)


def test_a_batch_depends_on_seed_and_step_alone():
    x, _ = bigram.get_batch(DATA, CONFIG, step=3)
    torch.manual_seed(99), np.random.seed(99)  # whatever else uses chance
    again, _ = bigram.get_batch(DATA, CONFIG, step=3)
    next_step, _ = bigram.get_batch(DATA, CONFIG, step=4)
    other = bigram.BigramConfig(batch_size=8, block_size=16, seed=6)
    other_seed, _ = bigram.get_batch(DATA, other, step=3)
    assert torch.equal(x, again)
    assert not torch.equal(x, next_step) and not torch.equal(x, other_seed)


def test_batches_reach_every_token_of_the_text():
    data = torch.arange(40)
    seen = set()
    for step in range(100):
        for part in bigram.get_batch(data, CONFIG, step):
            seen |= set(part.flatten().tolist())
    assert seen == set(range(40))


# ---------------------------------------------------------------------------------------------
# Evaluation and generation


@pytest.mark.parametrize("length", [17, 161, 170, 10])
def test_evaluation_asks_for_every_token_once(length):
    """The mean over windows equals the mean over tokens asked one by one, to the ragged end."""
    torch.manual_seed(0)
    config = char_gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=3)
    model = char_gpt.GPT(config)
    data = torch.randint(65, (length,))
    losses = []
    with torch.no_grad():
        model.eval()
        for i in range(1, length):  # what is token i, given the tokens of its window before it?
            start = (i - 1) // 16 * 16
            logits, _ = model(data[None, start:i])
            losses.append(-logits[0, -1].log_softmax(-1)[data[i]].item())
    assert char_gpt.evaluate(model, data, config) == pytest.approx(np.mean(losses), abs=1e-5)


def test_bits_per_byte_compares_vocabularies():
    """Two bytes a character, e nats a token: the loss in bits, halved."""
    text = "éàéà"
    tokenizer = bigram.CharTokenizer(text)
    data = torch.tensor(tokenizer.encode(text))
    assert bigram.bits_per_byte(math.log(2), data, tokenizer) == pytest.approx(0.5)


def test_generation_yields_each_token_as_soon_as_it_is_chosen():
    calls = []

    def model(idx):
        calls.append(idx.shape)
        logits = torch.zeros(*idx.shape, 65)
        logits[:, -1, 7] = 100  # at the last position, sure of token 7
        return logits, None

    model.eval, model.block_size = lambda: None, 4
    tokens = bigram.generate(model, torch.zeros(2, 3, dtype=torch.long), max_new_tokens=5)
    assert next(tokens).tolist() == [[7], [7]] and calls == [(2, 3)]
    assert len(list(tokens)) == 4
    assert calls[-1] == (2, 4), "the model must not be shown more than block_size tokens"


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    torch.manual_seed(0)
    probs = torch.tensor([0.1, 0.2, 0.7])
    drawn = bigram.draw(probs.log().expand(20_000, 3))
    shares = drawn.flatten().bincount(minlength=3) / 20_000
    assert torch.allclose(shares, probs, atol=0.015)


# ---------------------------------------------------------------------------------------------
# Fetching


BODY = b"To be checked, or not to be used at all. " * 5000


@pytest.fixture
def server():
    """A server on loopback that answers in all the ways in which a download can go wrong."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind, wanted = self.path.strip("/"), self.headers["Range"]
            asked.append(wanted)
            if kind in ("missing", "busy"):
                return self.send_error({"missing": 404, "busy": 503}[kind])
            body = {"wrong": BODY[::-1], "long": BODY * 3, "short": BODY[:-1]}.get(kind, BODY)
            if wanted and kind != "stubborn":
                first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
                if first >= len(body):
                    return self.send_error(416)
                self.send_response(206)
                body = body[first:]
            else:
                self.send_response(200)
            if kind != "long":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body[: len(body) // 2] if kind in ("cut", "reset") else body)
                if kind == "reset":  # close at once, with no word of goodbye
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()
            except OSError:
                pass  # the client has seen enough

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args):
            pass

    with Server(("127.0.0.1", 0), Handler) as httpd:
        httpd.asked = asked
        threading.Thread(target=partial(httpd.serve_forever, 0.01), daemon=True).start()
        yield httpd
        httpd.shutdown()


def url(server, kind):
    return f"http://127.0.0.1:{server.server_port}/{kind}"


def fetch(server, kind, path):
    bigram.download(url(server, kind), path, hashlib.sha256(BODY).hexdigest())


def test_a_download_arrives_whole(server, tmp_path):
    fetch(server, "good", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["wrong", "short", "long", "missing", "busy"])
def test_a_bad_download_is_never_used(server, tmp_path, kind):
    with pytest.raises(OSError, match=f"cannot fetch http.*/{kind}"):
        fetch(server, kind, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_download_goes_on_where_it_broke_off(server, tmp_path, kind):
    with pytest.raises(OSError, match="cannot fetch"):
        fetch(server, kind, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    half = (tmp_path / "file.part").read_bytes()
    assert 0 < len(half) <= len(BODY) // 2 and BODY.startswith(half)
    with pytest.raises(OSError):
        fetch(server, "busy", tmp_path / "file")  # what is there already is not lost
    fetch(server, "good", tmp_path / "file")
    assert server.asked[-1] == f"bytes={len(half)}-"
    assert (tmp_path / "file").read_bytes() == BODY and len(list(tmp_path.iterdir())) == 1


def test_a_server_that_sends_all_again_does_no_harm(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    fetch(server, "stubborn", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize("part", [BODY, BODY * 2, b"x" * 1000])
def test_a_part_of_something_else_is_thrown_away(server, tmp_path, part):
    (tmp_path / "file.part").write_bytes(part)
    with pytest.raises(OSError):
        fetch(server, "good", tmp_path / "file")
    fetch(server, "good", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize("kind", ["wrong", "cut", "missing"])
def test_without_tiny_shakespeare_the_shipped_play_is_used_and_said_so(
    server, tmp_path, monkeypatch, capsys, kind
):
    monkeypatch.setattr(bigram, "SHAKESPEARE", tmp_path / "tinyshakespeare.txt")
    monkeypatch.setattr(bigram, "SHAKESPEARE_URL", url(server, kind))
    text = bigram.load_text(bigram.BigramConfig())
    assert text == PLAY.read_text(encoding="utf-8")
    assert capsys.readouterr().out.count("no Tiny Shakespeare") == 1


def test_a_damaged_tiny_shakespeare_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bigram, "SHAKESPEARE", tmp_path / "tinyshakespeare.txt")
    bigram.SHAKESPEARE.write_text("First Citizen:\nBefore we pro")
    with pytest.raises(ValueError, match="damaged"):
        bigram.load_text(bigram.BigramConfig())


# ---------------------------------------------------------------------------------------------
# Checkpoints


def test_a_failed_save_leaves_the_old_checkpoint_whole(tmp_path):
    path = tmp_path / "model.pt"
    char_gpt.save_checkpoint(path, {"script": "char_gpt", "weights": torch.ones(3)})
    old = path.read_bytes()
    with pytest.raises(Exception):
        char_gpt.save_checkpoint(path, {"weights": torch.ones(10**5), "bad": lambda: None})
    assert path.read_bytes() == old


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    for name, write in (("torch.pt", torch.save), ("pickle.pt", lambda o, f: pickle.dump(o, f, 2))):
        file = io.BytesIO()
        write({"script": "char_gpt", "model": Harmful()}, file)
        (tmp_path / name).write_bytes(file.getvalue())
        with pytest.raises(ValueError, match="not a checkpoint"):
            char_gpt.load_checkpoint(tmp_path / name, "char_gpt")
    assert not (tmp_path / "harm").exists()


# ---------------------------------------------------------------------------------------------
# Command lines


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_every_setting_is_a_flag_with_its_meaning(script):
    output, _ = run(ROOT / script, "--help", cwd=ROOT)
    module = {"bigram.py": bigram, "char_gpt.py": char_gpt, "bpe_gpt.py": bpe_gpt}[script]
    Config = module.BigramConfig if module is bigram else module.GPTConfig
    for name in set(vars(Config())) - {"vocab_size"}:
        assert re.search(rf"--{name}\b.*\n?.*\w \[.*\]", output), name


BAD_COMMANDS = {
    "an unknown flag": ("bigram.py --no_such_flag 3", "no_such_flag"),
    "a word for a number": ("bigram.py --max_iters many", "max_iters"),
    "a setting of zero": ("bigram.py --batch_size 0", "batch_size"),
    "not a number": ("char_gpt.py --learning_rate nan", "learning_rate"),
    "all dropped": ("char_gpt.py --dropout 1", "dropout"),
    "heads that do not fit": ("char_gpt.py --n_embd 100 --n_head 3", "n_head"),
    "no such device": ("char_gpt.py --device abacus", "abacus"),
    "no such number format": ("char_gpt.py --dtype int3", "int3"),
    "no such text": ("bigram.py --data nowhere.txt", "nowhere.txt"),
    "a folder for a text": ("char_gpt.py --data .", "cannot read"),
    "an empty text": ("bigram.py --data empty.txt", "empty.txt"),
    "a text shorter than a sequence": ("bigram.py --data short.txt", "block_size"),
    "a text of one character": ("bigram.py --data same.txt", "distinct"),
    "a text that is not UTF-8": ("bigram.py --data latin1.txt", "UTF-8"),
    "a folder for a checkpoint": ("bigram.py --data text.txt --out .", "directory"),
    "a place that cannot be": ("bigram.py --data text.txt --out text.txt/x/y.pt", "--out"),
    "a learning rate far too high": (
        "char_gpt.py --data text.txt --n_layer 1 --max_iters 50 --warmup_iters 0 --out x.pt "
        "--learning_rate 1e9 --muon_learning_rate 1e9",
        "--learning_rate",
    ),
    "nothing to resume": ("char_gpt.py --resume --out nothing.pt", "nothing.pt"),
    "no such tokenizer": ("bpe_gpt.py --tokenizer words", "tokenizer"),
    "a vocabulary of less than bytes": ("bpe_gpt.py --learned_vocab_size 256", "above 256"),
    "a stride that skips tokens": ("bpe_gpt.py --stride 65 --block_size 64", "--stride"),
    "a text shorter than a sequence of tokens": ("bpe_gpt.py --data short.txt", "too little"),
    "an empty text for tokens": ("bpe_gpt.py --data empty.txt", "too little"),
    "a folder without tokens": ("bpe_gpt.py --data .", "train.bin"),
    "half a token": ("bpe_gpt.py --data half", "val.bin"),
    "tokens outside the vocabulary": ("bpe_gpt.py --data far", "token 60000"),
    "nothing that could be exported": ("bpe_gpt.py --init scratch --export x", "--init"),
    "nothing to export": ("bpe_gpt.py --export x", "out/bpe_gpt.pt"),
    "nothing to go on with": ("bpe_gpt.py --resume --out nothing.pt", "nothing.pt"),
}


@pytest.mark.parametrize("mistake", BAD_COMMANDS)
def test_a_mistake_gets_one_line_that_names_it(mistake, tmp_path):
    for name, content in (
        ("empty.txt", b""),
        ("short.txt", b"short\n"),
        ("same.txt", b"a" * 1000),
        ("latin1.txt", "caf\xe9 ".encode("latin-1") * 1000),
        ("text.txt", b"some text\n" * 1000),
    ):
        (tmp_path / name).write_bytes(content)
    for name in ("half", "far"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.bin").write_bytes(bytes(1000))
        (tmp_path / name / "val.bin").write_bytes(bytes(1001))
    (tmp_path / "far" / "val.bin").write_bytes(np.full(100, 60000, dtype="<u2").tobytes())
    command, clue = BAD_COMMANDS[mistake]
    script, *flags = command.split()
    if script == "bpe_gpt.py":
        flags += ["--offline"] + ["--init", "scratch"] * ("--export" not in command)
    assert clue in one_line_error(ROOT / script, *flags, cwd=tmp_path)
