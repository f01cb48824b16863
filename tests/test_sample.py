"""sample.py: from scores to text, through the real command line."""

import os

import pytest
import torch
from conftest import one_line_error, run

import sample
from sample import load_model, make_choice

# ---------------------------------------------------------------------------------------------
# Ways to choose


PROBS = torch.tensor([0.05, 0.5, 0.1, 0.3, 0.05])


def shares(choose, n=20_000):
    """How often each of five tokens is chosen when the model gives them PROBS."""
    torch.manual_seed(0)
    return choose(PROBS.log().expand(n, 5)).flatten().bincount(minlength=5) / n


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-44}]
)
def test_greedy_takes_the_likeliest_token(settings):
    assert shares(make_choice(**settings)).tolist() == [0, 1, 0, 0, 0]


def test_without_settings_tokens_are_drawn_by_their_probabilities():
    assert torch.allclose(shares(make_choice()), PROBS, atol=0.015)


def test_temperature_sharpens_and_flattens():
    for temperature in (0.5, 2.0):
        expected = PROBS ** (1 / temperature)
        expected /= expected.sum()
        assert torch.allclose(shares(make_choice(temperature)), expected, atol=0.015)


def test_top_p_of_1_keeps_even_the_unlikeliest_token(monkeypatch):
    """Rounding must not let the sum of the likelier tokens reach 1 before the last one's turn."""
    seen = []
    draw = sample.draw
    monkeypatch.setattr(sample, "draw", lambda logits: seen.append(logits) or draw(logits))
    logits = torch.zeros(1, 50_000)
    logits[0, -1] = -20
    make_choice(top_p=1.0)(logits)
    assert torch.isfinite(seen[0]).all()


def test_scores_in_bfloat16_are_added_up_with_more_precision(monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "draw", lambda logits: seen.append(logits) or logits[:, :1].long())
    make_choice(top_p=0.9)(torch.zeros(1, 4000, dtype=torch.bfloat16))
    assert seen[0].isfinite().sum().item() == pytest.approx(3600, abs=2)


def test_top_k_keeps_the_k_likeliest():
    expected = torch.tensor([0, 0.5, 0, 0.3, 0]) / 0.8
    assert torch.allclose(shares(make_choice(top_k=2)), expected, atol=0.015)
    assert torch.allclose(shares(make_choice(top_k=99)), PROBS, atol=0.015)


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.85, [1, 2, 3])):
        expected = torch.zeros(5)
        expected[kept] = PROBS[kept] / PROBS[kept].sum()
        assert torch.allclose(shares(make_choice(top_p=top_p)), expected, atol=0.015)


# ---------------------------------------------------------------------------------------------
# The command: train -> checkpoint -> sample


@pytest.mark.parametrize("script", ["bigram", "char_gpt"])
def test_a_trained_model_speaks(clone, script):
    flags = ("--prompt", "ISAURA:\n", "--max_new_tokens", "300")
    text, notes = run("sample.py", f"out/{script}.pt", *flags, cwd=clone)
    assert text.startswith("ISAURA:\n") and len(text) == len("ISAURA:\n") + 300 + 1
    assert f"out/{script}.pt" in notes and "validation loss" in notes
    assert sum(c in " etaoin" for c in text) > 100, "it should know which letters are common"


def test_the_newest_checkpoint_speaks_by_default(clone):
    for path in (clone / "out").glob("*.pt"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    os.utime(clone / "out" / "bigram.pt")
    text, notes = run("sample.py", "--max_new_tokens", "50", cwd=clone)
    named, _ = run("sample.py", "out/bigram.pt", "--max_new_tokens", "50", cwd=clone)
    assert "bigram.pt" in notes and text == named


def test_a_model_of_tokens_speaks(clone):
    flags = ("--prompt", "ISAURA:\n", "--max_new_tokens", "100", "--ignore_end")
    text, notes = run("sample.py", "out/bpe_gpt.pt", *flags, cwd=clone)
    assert text.startswith("ISAURA:\n") and len(text) > len("ISAURA:\n") + 100
    assert "out/bpe_gpt.pt" in notes and "validation loss" in notes
    assert sum(c in " etaoin" for c in text) > 60


@pytest.fixture
def folder(clone, tmp_path):
    """The trained model as Hugging Face has it."""
    run("bpe_gpt.py", "--export", tmp_path / "model", cwd=clone)
    return tmp_path / "model"


def test_an_exported_model_says_what_the_checkpoint_says(clone, folder):
    flags = ("--max_new_tokens", "60", "--temperature", "0", "--prompt", "The ", "--ignore_end")
    text, notes = run("sample.py", "out/bpe_gpt.pt", *flags, cwd=clone)
    assert run("sample.py", folder, *flags, cwd=clone)[0] == text
    assert run("sample.py", folder / "model.safetensors", *flags, cwd=clone)[0] == text


def test_less_precision_says_much_the_same(clone, folder):
    flags = ("--max_new_tokens", "5", "--temperature", "0", "--prompt", "The ", "--ignore_end")
    text, notes = run("sample.py", folder, *flags, "--dtype", "bfloat16", cwd=clone)
    assert "bfloat16" in notes and text.startswith("The ")


def say(monkeypatch, capsys, clone, rows, *flags):
    """What sample.py prints where the model of tokens chooses those in rows (B, T)."""
    path = str(clone / "out" / "bpe_gpt.pt")
    columns = torch.tensor(rows).t()[:, :, None]  # (T, B, 1)
    monkeypatch.setattr(sample.bpe_gpt, "generate", lambda *args: iter(columns))
    monkeypatch.setattr("sys.argv", ["sample.py", path, "--prompt", "x", *flags])
    sample.main()
    return capsys.readouterr().out


def test_a_sample_ends_where_the_model_ends_its_text(monkeypatch, capsys, clone):
    _, tokenizer, _ = load_model(str(clone / "out" / "bpe_gpt.pt"))
    a, b, end = *tokenizer.encode("ab"), tokenizer.eot_token
    line = "-" * 40
    rows = [[a, end, b, b], [b, a, end, a]]
    text = say(monkeypatch, capsys, clone, rows, "--num_samples", "2")
    assert text == f"xa\n{line}\nxba\n"
    text = say(monkeypatch, capsys, clone, rows[:1], "--ignore_end")
    assert text == "xa<|endoftext|>bb\n"

    def columns(*args):
        yield torch.tensor([[end]])
        raise AssertionError("all samples have ended: there is nothing left to do")

    monkeypatch.setattr(sample.bpe_gpt, "generate", columns)
    monkeypatch.setattr("sys.argv", ["sample.py", str(clone / "out" / "bpe_gpt.pt")])
    sample.main()


def test_a_character_is_shown_when_all_its_bytes_are_there(monkeypatch, capsys, clone):
    _, tokenizer, _ = load_model(str(clone / "out" / "bpe_gpt.pt"))
    ids = tokenizer.encode("a\u3042b")
    assert len(ids) == 5
    assert say(monkeypatch, capsys, clone, [ids]) == "xa\u3042b\n"
    assert say(monkeypatch, capsys, clone, [ids[:3]]) == "xa\ufffd\n"


def test_the_same_seed_gives_the_same_text(clone):
    command = ("sample.py", "out/char_gpt.pt", "--max_new_tokens", "100")
    a, b, c = [run(*command, "--seed", seed, cwd=clone)[0] for seed in (1, 1, 2)]
    assert a == b != c


def test_samples_are_made_side_by_side(clone):
    flags = ("--num_samples", "3", "--max_new_tokens", "40", "--prompt", "The ")
    text, _ = run("sample.py", "out/char_gpt.pt", *flags, cwd=clone)
    samples = text.split("-" * 40 + "\n")
    assert len(samples) == 3 == len(set(samples))
    assert all(s.startswith("The ") and len(s) == 4 + 40 + 1 for s in samples)


def test_temperature_0_is_the_argmax_of_the_model(clone):
    model, tokenizer, _ = load_model(str(clone / "out" / "char_gpt.pt"))
    model.eval()
    ids = tokenizer.encode("The ")
    for _ in range(60):
        logits, _ = model(torch.tensor([ids[-32:]]))
        ids.append(logits[0, -1].argmax().item())
    flags = ("--temperature", "0", "--max_new_tokens", "60", "--prompt", "The ")
    text, _ = run("sample.py", "out/char_gpt.pt", *flags, cwd=clone)
    assert text == tokenizer.decode(ids) + "\n"


MISTAKES = {
    "a character never seen": (["--prompt", "naïve"], "'ï'"),
    "an empty prompt": (["--prompt", ""], "--prompt"),
    "no such checkpoint": (["out/nothing.pt"], "out/nothing.pt"),
    "a file that is no checkpoint": (["char_gpt.py"], "not a checkpoint"),
    "half a checkpoint": (["half.pt"], "half.pt"),
    "a checkpoint with weights missing": (["holes.pt"], "damaged"),
    "a folder": (["out"], "out has no model.safetensors"),
    "a name that is no model's": (["gpt5"], "cannot read gpt5"),
    "no such number format": (["--dtype", "float8"], "--dtype"),
    "a checkpoint with half a vocabulary": (["mute.pt"], "vocabulary"),
    "a negative temperature": (["--temperature", "-1"], "--temperature"),
    "no temperature at all": (["--temperature", "nan"], "--temperature"),
    "top_k of 0": (["--top_k", "0"], "--top_k"),
    "top_p above 1": (["--top_p", "1.5"], "--top_p"),
    "no tokens": (["--max_new_tokens", "0"], "--max_new_tokens"),
    "no samples": (["--num_samples", "-2"], "--num_samples"),
    "more samples than fit": (["--num_samples", "2000000000"], "--num_samples"),
    "a word for a number": (["--seed", "x"], "--seed"),
    "an unknown flag": (["--tmeperature", "1"], "--tmeperature"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_that_names_it(clone, mistake):
    flags, clue = MISTAKES[mistake]
    checkpoint = clone / "out" / "char_gpt.pt"
    os.utime(checkpoint)
    if flags == ["mute.pt"]:
        mute = torch.load(clone / "out" / "bpe_gpt.pt", weights_only=True)
        torch.save({**mute, "vocab": mute["vocab"][100:]}, clone / "mute.pt")
    if flags == ["half.pt"]:
        data = checkpoint.read_bytes()
        (clone / "half.pt").write_bytes(data[: len(data) // 2])
    if flags == ["holes.pt"]:
        checkpoint = torch.load(checkpoint, weights_only=True)
        del checkpoint["model"]["transformer.wpe.weight"]
        torch.save(checkpoint, clone / "holes.pt")
    assert clue in one_line_error("sample.py", *flags, cwd=clone)


def test_without_any_checkpoint_it_says_what_to_do(clone, tmp_path):
    assert "train a model first" in one_line_error(clone / "sample.py", cwd=tmp_path)
