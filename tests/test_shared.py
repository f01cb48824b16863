"""What the scripts have in common: their text, their size, tokens, batches, files, flags."""

import ast
import hashlib
import http.server
import io
import pickle
import re
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLAY, ROOT, SHAKESPEARE, needs_shakespeare, one_line_error, run

import bigram
import bpe_gpt
import char_gpt

SCRIPTS = ["bigram.py", "char_gpt.py", "bpe_gpt.py", "sample.py"]
TRAINING_SCRIPTS = ["bigram.py", "char_gpt.py", "bpe_gpt.py"]

def source(script):
    return (ROOT / script).read_text(encoding="utf-8")


def test_training_scripts_import_nothing_from_each_other():
    for script in TRAINING_SCRIPTS:
        imports = re.findall(r"^(?:from|import) (\w+)", source(script), re.MULTILINE)
        assert imports and not set(imports) & {"bigram", "char_gpt", "bpe_gpt", "sample"}


def test_importing_a_script_runs_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
    code += "import bigram, char_gpt, bpe_gpt, sample"
    assert run("-c", code, cwd=tmp_path, fresh=True) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_requirements_txt_names_exactly_the_packages_that_the_scripts_import():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    named = set(re.findall(r"^[a-z]+", requirements, re.MULTILINE)) - {"pytest"}
    own = {"bigram", "char_gpt", "bpe_gpt", "sample", "matplotlib"}  # the last one if it is there
    imported = set()
    for path in [*(ROOT / script for script in SCRIPTS), *sorted((ROOT / "data").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported - own - set(sys.stdlib_module_names) == named


# Text and tokens


def test_a_tokenizer_gives_back_the_text_it_was_given():
    tokenizer = char_gpt.CharTokenizer("h\u00e9llo, w\u00f6rld\n")
    assert tokenizer.decode(tokenizer.encode("l\u00f6,h\u00e9\n")) == "l\u00f6,h\u00e9\n"


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
    data = torch.arange(len(text))
    train, val = bigram.split_data(data, bigram.BigramConfig())
    assert (len(train), len(val)) == (1_003_854, 111_540)
    assert torch.equal(torch.cat((train, val)), data)


@pytest.mark.parametrize("script", [bigram, char_gpt], ids=lambda script: script.__name__)
def test_the_shortest_text_that_is_taken_can_be_trained_on_and_evaluated(script):
    """Each part needs a window, and the token after it. One character less is refused."""
    Config = bigram.BigramConfig if script is bigram else char_gpt.GPTConfig
    config = Config(block_size=10, batch_size=4, vocab_size=5)
    data = torch.arange(110) % 5
    train_data, val_data = script.split_data(data, config)
    assert (len(train_data), len(val_data)) == (99, 11)
    x, y = script.get_batch(train_data, config, 0)
    assert x.shape == y.shape == (4, 10)
    model = bigram.BigramLanguageModel(bigram.BigramConfig(5))
    assert script.evaluate(model, val_data, config) == pytest.approx(np.log(5), abs=1e-5)
    with pytest.raises(ValueError, match="^100 characters are too few for --block_size 10$"):
        script.split_data(data[:100], config)


# Evaluation and generation


@pytest.mark.parametrize("length", [18, 161, 170, 49])
def test_evaluation_is_the_mean_over_all_whole_windows(length):
    """The mean over batches of windows equals the mean over tokens asked one by one. Only the
    rest at the end, which is too short for a window, does not count."""
    torch.manual_seed(0)
    config = char_gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=3)
    model = char_gpt.GPT(config)
    data = torch.randint(65, (length,))
    losses = []
    with torch.no_grad():
        model.eval()
        for i in range(1, (length - 1) // 16 * 16 + 1):  # what is token i, given those before it?
            start = (i - 1) // 16 * 16
            logits, _ = model(data[None, start:i])
            losses.append(-logits[0, -1].log_softmax(-1)[data[i]].item())
    assert char_gpt.evaluate(model, data, config) == pytest.approx(np.mean(losses), abs=1e-5)


def test_generation_yields_each_token_as_soon_as_it_is_chosen():
    calls = []

    def model(idx):
        calls.append(idx.shape)
        logits = torch.zeros(*idx.shape, 65)
        logits[:, -1, 7] = 100  # at the last position, sure of token 7
        return logits, None

    model.eval = lambda: None
    model.context_size = 4
    tokens = bigram.generate(model, torch.zeros(2, 3, dtype=torch.long), max_new_tokens=5)
    assert next(tokens).tolist() == [[7], [7]] and calls == [(2, 3)]
    assert len(list(tokens)) == 4
    assert calls[-1] == (2, 4), "the model must not be shown more than context_size tokens"


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    torch.manual_seed(0)
    probs = torch.tensor([0.1, 0.2, 0.7])
    drawn = bigram.sample(probs.log().expand(20_000, 3))
    frequencies = drawn.flatten().bincount(minlength=3) / 20_000
    assert torch.allclose(frequencies, probs, atol=0.015)


# Files


BODY = b"To be checked, or not to be used at all. " * 5000


@pytest.fixture
def server():
    """A server on loopback, whose answers are not Tiny Shakespeare: whole, cut off, or none."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/missing":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[: len(BODY) // 2] if self.path == "/cut" else BODY)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=partial(httpd.serve_forever, 0.01), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_download_is_checked_and_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(bigram, "DATA", tmp_path / "data")
    monkeypatch.setattr(bigram, "URL", f"{server}/whole")
    monkeypatch.setattr(bigram, "SHA256", hashlib.sha256(BODY).hexdigest())
    assert bigram.load_text("") == BODY.decode()
    monkeypatch.setattr(bigram, "URL", f"{server}/missing")
    assert bigram.load_text("") == BODY.decode(), "it is fetched once"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["tinyshakespeare.txt"]


@pytest.mark.parametrize("answer", ["wrong", "cut", "missing"])
def test_without_tiny_shakespeare_the_shipped_play_is_used_and_said_so(
    server, tmp_path, monkeypatch, capsys, answer
):
    (tmp_path / "the-glass-harbour.txt").write_bytes(PLAY.read_bytes())
    monkeypatch.setattr(bigram, "DATA", tmp_path)
    monkeypatch.setattr(bigram, "URL", f"{server}/{answer}")
    assert bigram.load_text("") == PLAY.read_text(encoding="utf-8")
    assert capsys.readouterr().out.count("cannot download Tiny Shakespeare") == 1
    assert len(list(tmp_path.iterdir())) == 1, "nothing half fetched is left"


def test_a_failed_save_leaves_the_old_checkpoint_whole(tmp_path):
    def write_half(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt

    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        char_gpt.replace_file(path, write_half)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_two_runs_that_save_to_one_name_do_not_mix(tmp_path, monkeypatch):
    def write(file):
        file.write(b"one")
        monkeypatch.setattr("os.getpid", lambda: 12345)  # meanwhile, in another process:
        char_gpt.replace_file(path, lambda file: file.write(b"another"))
        assert path.read_bytes() == b"another"
        file.write(b" run")

    path = tmp_path / "model.pt"
    char_gpt.replace_file(path, write)
    assert path.read_bytes() == b"one run" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("seconds_open", [3, 1000])
def test_a_file_that_is_open_elsewhere_on_windows_is_replaced_later_or_left_beside(
        tmp_path, monkeypatch, seconds_open):
    """Windows does not replace a file that another program, a virus scanner for example, has open."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    clock = [0]
    replace = Path.replace

    def windows_replace(self, target):
        if clock[0] < seconds_open:
            raise PermissionError(13, "Access is denied")
        return replace(self, target)

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(Path, "replace", windows_replace)
    monkeypatch.setattr("time.sleep", sleep)
    if seconds_open == 3:
        char_gpt.replace_file(path, lambda file: file.write(b"new"))
        assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
    else:
        with pytest.raises(char_gpt.UserError, match="open in another program") as error:
            char_gpt.replace_file(path, lambda file: file.write(b"new"))
        (new,) = set(tmp_path.iterdir()) - {path}
        assert path.read_bytes() == b"old" and new.read_bytes() == b"new" and str(new) in str(error)
        assert 5 < clock[0] < 60, "it is tried for some seconds"


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    for name, write in (("torch.pt", torch.save), ("pickle.pt", lambda o, f: pickle.dump(o, f, 2))):
        file = io.BytesIO()
        write({"written_by": "char_gpt", "model": Harmful()}, file)
        (tmp_path / name).write_bytes(file.getvalue())
        with pytest.raises(ValueError, match="is missing, damaged"):
            char_gpt.load_checkpoint(tmp_path / name, "char_gpt")
    assert not (tmp_path / "harm").exists()


# Command lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring_and_every_setting(script):
    output, _ = run(ROOT / script, "--help", cwd=ROOT)
    text = source(script)
    assert ast.get_docstring(ast.parse(text)).splitlines()[0] in output
    settings = re.findall(r"^    (\w+): \w+ = .*", text.split("class ")[1], re.MULTILINE)
    assert len(settings) >= 8 and all(f"    {name}: " in output for name in settings)


def test_output_reaches_a_file_in_any_encoding(clone):
    flags = ("--data", "star.txt", "--max_iters", "2", "--out", "star.pt")
    (clone / "star.txt").write_text("\u2605 is a star. " * 400, encoding="utf-8")
    out, error = run(
        "bigram.py", *flags, cwd=clone, fresh=True, env={"PYTHONIOENCODING": "ascii"})
    assert "step 2" in out and error == ""


MISTAKES = {
    "no such text": ("bigram.py --data nowhere.txt", "nowhere.txt"),
    "a text shorter than a sequence": ("bigram.py --data short.txt", "--block_size"),
    "a text too short for a GPT": ("char_gpt.py --data short.txt", "--block_size"),
    "a text too short for tokens": ("bpe_gpt.py --data tiny.txt", "too short"),
    "a text that is not UTF-8": ("bigram.py --data latin1.txt", "latin1.txt is not in UTF-8"),
    "a folder to save in": ("bigram.py --data text.txt --out newdir/", "must end in .pt"),
    "a device to save in": ("char_gpt.py --data text.txt --out /dev/null", "must end in .pt"),
    "a name of a model to save in": ("bpe_gpt.py --data text.txt --out gpt2", "must end in .pt"),
    "a place that cannot be": ("bigram.py --data text.txt --out text.txt/x/y.pt", "text.txt"),
    "a checkpoint that is none": ("char_gpt.py --data text.txt --resume --out bad.pt", "bad.pt"),
    "a model that is none": ("bpe_gpt.py --init gpt7", "gpt7"),
    "heads that do not fit": ("char_gpt.py --data text.txt --n_head 3", "does not divide --n_embd"),
    "heads of tokens": (
        "bpe_gpt.py --data text.txt --vocab_size 260 --n_head 3", "does not divide --n_embd"),
    "a type's short name": ("char_gpt.py --data text.txt --dtype bf16", "float32, bfloat16 or auto"),
    "a type that is not used": ("bpe_gpt.py --data text.txt --vocab_size 260 --dtype float64",
                                "float32, bfloat16 or auto"),
    "nothing to evaluate": ("data/evaluate.py x.pt text.txt", "x.pt is missing"),
    "a folder without tokens": ("bpe_gpt.py --init x.pt --data .", "x.pt"),
    "a GPU that is not there": ("char_gpt.py --device cuda", "no such device"),
    "a device that is none": ("bpe_gpt.py --device gpu --data text.txt", "no such device"),
    "a place to save that cannot be": (
        "bpe_gpt.py --init gpt2 --out text.txt/x/y.pt", "text.txt"),  # before any download
    "a learning rate far too high": (
        "char_gpt.py --data text.txt --n_layer 1 --max_iters 50 --warmup_iters 0 --out x.pt "
        "--learning_rate 1e20 --muon_learning_rate 1e20", "learning rates"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_that_names_it(mistake, tmp_path):
    for name, content in (
        ("tiny.txt", b"x"),
        ("short.txt", b"short\n"),
        ("latin1.txt", "caf\xe9 ".encode("latin-1") * 1000),
        ("text.txt", b"some text\n" * 1000),
        ("bad.pt", b"not a checkpoint"),
    ):
        (tmp_path / name).write_bytes(content)
    command, clue = MISTAKES[mistake]
    script, *flags = command.split()
    assert clue in one_line_error(ROOT / script, *flags, cwd=tmp_path)


# Errors


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_a_byte_order_mark_is_no_character_of_the_text(script, tmp_path):
    module = {"bigram.py": bigram, "char_gpt.py": char_gpt, "bpe_gpt.py": bpe_gpt}[script]
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfTo be, or not")
    assert module.load_text(tmp_path / "x.txt") == "To be, or not"


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_a_text_in_another_encoding_is_named(script, encoding, tmp_path):
    (tmp_path / "x.txt").write_text("caf\xe9 " * 1000, encoding=encoding)
    error = one_line_error(ROOT / script, "--data", "x.txt", cwd=tmp_path)
    assert "x.txt is not in UTF-8: save it in this encoding" in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_abbreviated_flag_is_refused(script, tmp_path):
    """It could be a slip, and a run replaces the checkpoint of the one before."""
    flag = "--max_iter" if script != "sample.py" else "--temp"
    _, error = run(ROOT / script, flag, "3", cwd=tmp_path, status=2)
    assert f"unrecognized arguments: {flag}" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["char_gpt.py", "bpe_gpt.py"])
def test_an_error_of_the_readers_own_keeps_its_traceback_and_line(script, tmp_path):
    """Also if it is a ValueError, as that of a split into too many parts."""
    edited = source(script).replace(".split(C, dim=2)", ".split(C // 2, dim=2)")
    assert edited != source(script)
    (tmp_path / script).write_text(edited, encoding="utf-8")
    (tmp_path / "x.txt").write_text("To be, or not to be. " * 500)
    _, error = run(tmp_path / script, "--data", "x.txt", cwd=tmp_path, status=1)
    assert "Traceback" in error and "q, k, v = self.c_attn(x)" in error
    assert "ValueError: too many values to unpack" in error.splitlines()[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for terabytes")
@pytest.mark.parametrize("script", ["char_gpt.py", "bpe_gpt.py"])
def test_out_of_memory_on_a_cpu_gets_one_line_with_the_way_out(script, tmp_path):
    (tmp_path / "x.txt").write_text("To be, or not to be. " * 500)
    flags = "--data x.txt --n_embd 2000000 --n_head 1 --n_layer 1"
    error = one_line_error(ROOT / script, *flags.split(), cwd=tmp_path)
    assert error == "error: out of memory; lower --batch_size, then --block_size"


def test_an_older_checkpoint_of_characters_is_sampled_from(clone):
    """Its configuration had settings that the scripts do not have any more."""
    checkpoint = torch.load(clone / "out" / "char_gpt.pt")
    checkpoint["config"]["dropout"] = 0.1
    torch.save(checkpoint, clone / "older.pt")
    text, _ = run("sample.py", "older.pt", "--prompt", "The", "--max_new_tokens", "5", cwd=clone)
    assert text.startswith("The")
