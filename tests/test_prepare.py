"""data/prepare.py: texts of any size become train.bin and val.bin. Most tests put a small learned
vocabulary in the place of GPT-2's, so that they need neither a network nor a copy of it."""

import importlib.util
import io
import re
import runpy
import sys

import numpy as np
import pytest
from conftest import PLAY, ROOT, needs_gpt2_tokenizer, one_line_error, run

import bpe_gpt

SCRIPT = ROOT / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

TEXT = PLAY.read_text(encoding="utf-8")[:20_000]
ODD = "  a  \n\n b<|endoftext|>\x1c!\x1c c\n \t'll it's  \u3000\u2003d  é\u0301 日本 語12,3\x85 x"
ODD = f"{ODD}\r \n " * 5


@pytest.fixture(scope="module")
def learned():
    return bpe_gpt.train_bpe(TEXT, 400).tiktoken


@pytest.fixture
def make(learned, tmp_path, monkeypatch):
    """make(texts, share) runs the script on these texts, as the user does but for the vocabulary,
    and returns the tokens of train.bin and of val.bin."""
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: learned)
    monkeypatch.chdir(tmp_path)

    def make(*texts, share="0.1", files=()):
        names = [f"{i}.txt" for i in range(len(texts))]
        for name, text in zip(names, texts):
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        flags = [*names, *map(str, files), "--out", "corpus", "--val_share", share]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        assert sorted(path.name for path in tmp_path.glob("corpus/*")) == ["train.bin", "val.bin"]
        return [np.fromfile(f"corpus/{name}.bin", "<u2").tolist() for name in ("train", "val")]

    return make


def encode(tokenizer, *texts):
    """The tokens of whole texts, with the end of text after each."""
    encoded = [tokenizer.encode(text, allowed_special="all") for text in texts]
    return [token for tokens in encoded for token in [*tokens, tokenizer.eot_token]]


def assert_pieces_change_nothing(tokenizer):
    text = TEXT[:3000] + ODD
    expected = tokenizer.encode(text, allowed_special="all")
    for size in (1, 2, 7, 100, 3001, 10_000):
        parts = list(prepare.pieces(io.StringIO(text, newline=""), size))
        assert "".join(parts) == text and (len(parts) > 10 or size > 100)
        encoded = [tokenizer.encode(part, allowed_special="all") for part in parts]
        assert [token for tokens in encoded for token in tokens] == expected


def test_pieces_have_the_tokens_of_the_whole(learned):
    assert_pieces_change_nothing(learned)


@needs_gpt2_tokenizer
def test_pieces_have_the_tokens_of_the_whole_in_gpt2s_vocabulary():
    assert_pieces_change_nothing(bpe_gpt.gpt2_tokenizer().tiktoken)


def test_text_larger_than_a_piece_is_never_read_whole():
    class Endless:
        """A text of 100 GB, which may be read in small parts only."""
        position, largest = 0, 0

        def read(self, size):
            self.position, self.largest = self.position + size, max(self.largest, size)
            return ("word " * (size // 5 + 1))[:size] if self.position < 10**11 else ""

    file = Endless()
    pieces = prepare.pieces(file, 1000)
    assert all(len(next(pieces)) < 1100 for _ in range(1000)) and file.largest < 1100


@pytest.mark.parametrize("share", ["0.5", "0.1", "0.0123", "0.001", "1e-9", "0.999999"])
def test_validation_data_is_exactly_its_share_at_the_end(make, learned, share):
    texts = [TEXT[:9000], TEXT[9000:10_000], TEXT[10_000:]]
    train, val = make(*texts, share=share)
    expected = encode(learned, *texts)
    assert train + val == expected
    n = len(expected)
    assert len(val) == min(max(round(float(share) * n), 10), n - 10)


def test_the_folder_is_what_bpe_gpt_reads(make, learned, capsys):
    train, val = make(TEXT)
    expected = f"{len(train):,} tokens to train on, {len(val):,} to validate on: corpus\n"
    assert capsys.readouterr().out == expected
    config = bpe_gpt.GPTConfig(
        data="corpus", block_size=16, batch_size=4, vocab_size=learned.n_vocab)
    train_data, val_data, _ = bpe_gpt.load_tokens(config, bpe_gpt.gpt2_tokenizer())
    seen = [token for _, y in val_data.evaluation_batches() for token in y[y != -100].tolist()]
    assert seen == val[1:]
    x, _ = train_data.training_batch(0)
    assert bytes(np.array(x[0].tolist(), "<u2")) in bytes(np.array(train, "<u2"))


def test_an_end_of_text_in_a_text_is_the_token_that_ends_a_document(make, learned):
    """And not the letters of its name; a file that ends with it has two of them at its end."""
    end = learned.eot_token
    train, val = make(f"{TEXT[:500]}<|endoftext|>{TEXT[500:900]}", "To be<|endoftext|>")
    tokens = train + val
    first = learned.encode(TEXT[:500])
    second = learned.encode(TEXT[500:900])
    assert tokens == [*first, end, *second, end, *learned.encode("To be"), end, end]


def test_line_ends_of_windows_are_read_as_newlines_and_its_byte_order_mark_is_dropped(make, learned):
    windows = "\ufeff" + TEXT.replace("\n", "\r\n")
    train, val = make(windows, share="0.01")
    expected = encode(learned, TEXT)
    assert train + val == expected and len(val) == round(0.01 * len(expected))


@pytest.mark.parametrize("word", ["a word, ", "word", "one,two;", "日本語"])
def test_one_line_of_three_million_characters(make, learned, word):
    """Without a space in it there is no piece but the whole."""
    line = word * (3_000_000 // len(word))
    train, val = make(line, share="0.001")
    total = len(train) + len(val)
    assert len(val) == round(0.001 * total)
    tokens = np.array(train + val)
    assert tokens[-1] == learned.eot_token and learned.decode(tokens[:-1]) == line
    assert total == len(encode(learned, line))


def test_a_tiny_text_gives_ten_tokens_to_each_part(make, learned):
    """Both are enough to compute a loss, and bits per byte of it."""
    text = "0123456789 0123456789"
    tokens = encode(learned, text)
    assert len(tokens) > 20
    train, val = make(text, share="0.001")
    assert (train, val) == (tokens[:-10], tokens[-10:])
    train, val = make(text, share="0.999")
    assert (train, val) == (tokens[:10], tokens[10:])


@pytest.mark.parametrize(
    "text, message",
    [
        ("ab", "3 tokens are too few: train.bin and val.bin need 10 each"),
        ("", "1 tokens are too few"),
        (" " * 3_000_000, "0.txt: .*"),  # more in a row than tiktoken can split
        (b"caf\xe9 " * 1_000_000, "0.txt is not text in UTF-8"),
        (b"good " * 1_000_000 + b"\xff", "0.txt is not text in UTF-8"),
    ],
)
def test_what_was_there_stays_whole_when_a_text_is_no_good(make, tmp_path, text, message):
    make(TEXT)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("corpus/*")}
    with pytest.raises(SystemExit, match=message) as end:
        make(text)
    assert re.fullmatch("error: .*", end.value.code)  # one line, and so status 1
    assert {path.name: path.read_bytes() for path in tmp_path.glob("corpus/*")} == before


@pytest.mark.parametrize(
    "flags, clue",
    [
        ("no.txt --out x", "no.txt"),
        ("some.txt no.txt --out x", "no.txt"),
        ("some.txt no*.txt --out x", "no file matches no*.txt"),
        (". --out x", "'.'"),
        ("some.txt --out x --val_share 1", "--val_share is 1"),
        ("some.txt --out x --val_share 0", "--val_share is 0"),
        ("some.txt --out x --val_share nan", "--val_share is nan"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, flags, clue):
    (tmp_path / "some.txt").write_text(TEXT, encoding="utf-8")
    assert clue in one_line_error(SCRIPT, *flags.split(), cwd=tmp_path)
    assert not (tmp_path / "x").exists()


def test_without_a_network_one_line_says_so(tmp_path):
    (tmp_path / "some.txt").write_text(TEXT, encoding="utf-8")
    nowhere = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")}
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), **nowhere}
    _, error = run(SCRIPT, "some.txt", "--out", "x", cwd=tmp_path, status=1, env=env, fresh=True)
    assert re.fullmatch(r"error: cannot fetch GPT-2's vocabulary \(\w+\)\n", error)
    assert not (tmp_path / "x").exists()


def test_a_pattern_that_the_shell_did_not_expand_is_expanded(make, learned, tmp_path):
    """As on Windows."""
    for name in ("second.txt", "first.txt", "no.md"):
        (tmp_path / name).write_text(f"{name[:-4]} text 012345678", encoding="utf-8")
    train, val = make(share="0.1", files=[tmp_path / "*.txt"])
    assert train + val == encode(learned, "first text 012345678", "second text 012345678")


@needs_gpt2_tokenizer
def test_files_become_gpt2s_tokens(tmp_path):
    texts = [TEXT, "Hello world"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    flags = "0.txt 1.txt --out corpus --val_share 0.01".split()
    run(SCRIPT, *flags, cwd=tmp_path, fresh=True)
    parts = [np.fromfile(tmp_path / "corpus" / f"{n}.bin", "<u2") for n in ("train", "val")]
    tokens = [*parts[0], *parts[1]]
    assert tokens == encode(bpe_gpt.gpt2_tokenizer().tiktoken, *texts)
    assert tokens[-3:] == [15496, 995, 50256] and len(parts[1]) == round(0.01 * len(tokens))
