"""sample.py: from scores to text, through the real command line."""

import itertools
import math
import os
import re
import sys

import pytest
import torch
from conftest import one_line_error, run

import bpe_gpt
import char_gpt
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
    "settings",
    [
        {"temperature": 0},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"temperature": 1e-44},
        {"temperature": 1e-99},
    ],
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
# The likeliest text


def tiny(script, vocab_size=5, block_size=8, std=0.5):
    """A GPT whose guesses are far from even."""
    torch.manual_seed(0)
    settings = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=vocab_size, block_size=block_size)
    model = script.GPT(script.GPTConfig(**settings))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


@pytest.mark.parametrize("script", [char_gpt, bpe_gpt])
@pytest.mark.parametrize("n", [5, 20])
def test_a_beam_of_1_takes_the_likeliest_token_each_time(script, n):
    """Within the context, with the cache and without, and past it."""
    model, idx = tiny(script), torch.tensor([[1, 3]])
    greedy = [c.item() for c in script.generate(model, idx, n, make_choice(temperature=0))]
    assert sample.beam_search(model, idx, n, width=1) == greedy


@pytest.mark.parametrize("script", [char_gpt, bpe_gpt])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_that_keeps_all_prefixes_finds_the_best_of_all_texts(script, seed):
    V, n, end = 3, 5, 2
    model, idx = tiny(script, V, std=0.8), torch.tensor([[seed, 1, 0]])
    best = (-math.inf, None)
    for text in itertools.product(range(V), repeat=n):
        length = text.index(end) + 1 if end in text else n
        text = list(text[:length])
        logits, _ = model(torch.tensor([idx[0].tolist() + text]))
        log_probs = logits[0].log_softmax(-1)
        score = sum(log_probs[2 + i, token].item() for i, token in enumerate(text)) / length
        best = max(best, (score, text))
    assert sample.beam_search(model, idx, n, width=V**n, end=end) == best[1]


def test_a_wider_beam_finds_likelier_texts():
    model = tiny(bpe_gpt, vocab_size=20)

    def log_prob(start, text):
        logits, _ = model(torch.tensor([[start, *text]]))
        return logits[0].log_softmax(-1)[range(len(text)), text].sum().item()

    greedy, wide = [
        [log_prob(i, sample.beam_search(model, torch.tensor([[i]]), 6, width)) for i in range(20)]
        for width in (1, 50)
    ]
    assert all(w > g - 1e-5 for g, w in zip(greedy, wide)) and sum(wide) > sum(greedy) + 0.1


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    expected = torch.tensor([0, 0.5, 0, 0.3, 0]) / 0.8
    assert torch.allclose(shares(make_choice(min_p=0.5)), expected, atol=0.015)
    assert shares(make_choice(min_p=1.0)).tolist() == [0, 1, 0, 0, 0]


# ---------------------------------------------------------------------------------------------
# Text as it comes


def streamed(pieces, **settings):
    """What a stream gives out after each of the pieces (bytes), and at the end."""
    stream = sample.Stream(lambda i: pieces[i], **settings)
    return [stream.push(i) for i in range(len(pieces))] + [stream.close()]


def test_text_ends_before_what_it_is_to_stop_at():
    assert streamed([b"one ", b"two ", b"three"], stop="two") == ["one ", "", "", ""]
    assert streamed([b"a\n", b"\nb"], stop="\n\n") == ["a", "", ""], "in two tokens"
    assert streamed([b"xSTO", b"P"], stop="STOP") == ["x", "", ""]


def test_what_only_begins_like_the_stop_is_shown_in_the_end():
    assert streamed([b"xST", b"AR"], stop="STOP") == ["x", "STAR", ""]
    assert streamed([b"xST"], stop="STOP") == ["x", "ST"]
    assert streamed([b"aab", b"aac"], stop="aabaad") == ["", "aabaac", ""]


def test_half_a_character_is_held_back_until_it_is_whole():
    star = "\u2605".encode()
    assert streamed([b"a" + star[:1], star[1:2], star[2:] + b"b"]) == ["a", "", "\u2605b", ""]
    assert streamed([b"a" + star[:2]]) == ["a", "\ufffd"]


# ---------------------------------------------------------------------------------------------
# Looking inside


def test_the_probabilities_are_those_of_the_model():
    model, ids = tiny(char_gpt), [1, 3, 0, 2, 4, 4, 1]
    ours = sample.next_log_probs(model, ids)
    assert torch.allclose(ours, model(torch.tensor([ids]))[0][0, :-1].log_softmax(-1), atol=1e-6)


def test_a_text_longer_than_the_context_is_read_in_windows():
    model = tiny(char_gpt, block_size=8)
    ids = torch.randint(5, (31,)).tolist()
    ours = sample.next_log_probs(model, ids)
    assert ours.shape == (30, 5)
    for t in range(30):  # with a context of 4 to 8 tokens (or all there are)
        starts = range(max(t - 7, 0), max(t - 3, 0) + 1)
        each = [model(torch.tensor([ids[s : t + 1]]))[0][0, -1].log_softmax(-1) for s in starts]
        assert any(torch.allclose(ours[t], one, atol=1e-5) for one in each), t


@pytest.mark.parametrize("script", ["bigram", "char_gpt", "bpe_gpt"])
def test_probs_shows_each_token_with_its_probability_and_rank(clone, script):
    text = "A harbour:\nships, and more ships, and yet more of them."
    out, _ = run("sample.py", f"out/{script}.pt", "--probs", text, cwd=clone)
    *lines, end = out.splitlines()[1:]
    assert "\033" not in out, "no colours but on a terminal"
    n, total, mean, perplexity = re.match(
        r"(\d+) tokens: loss (\S+) in all, (\S+) a token, perplexity (\S+)", end
    ).groups()
    assert len(lines) == int(n)
    shown = [re.match(r"('.+?') +([\d.]+)% +(\d+) ", line).groups() for line in lines]
    assert "".join(name[1:-1] for name, _, _ in shown) == text.replace("\n", "\\n")
    assert float(perplexity) == pytest.approx(math.exp(float(mean)), rel=1e-2)
    assert float(total) == pytest.approx(float(mean) * len(lines), abs=0.01)
    for line, (name, share, rank) in zip(lines, shown):
        others = [float(p) for p in re.findall(r" ([\d.]+)%", line.split(rank, 1)[1])]
        assert others == sorted(others, reverse=True) and len(others) == 3
        assert (float(share) >= others[0] - 0.06) == (int(rank) == 1) or int(rank) == 2


def test_colours_are_for_terminals_and_for_those_who_want_them(clone, monkeypatch, capsys):
    model, tokenizer, _ = load_model(str(clone / "out" / "char_gpt.pt"))
    ids, to_bytes = tokenizer.encode("The sea"), lambda token: tokenizer.decode([token]).encode()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    sample.print_probs(model, ids, to_bytes)
    assert capsys.readouterr().out.count("\033[38;5;") == 6
    monkeypatch.setenv("NO_COLOR", "1")
    sample.print_probs(model, ids, to_bytes)
    assert "\033" not in capsys.readouterr().out


@pytest.mark.parametrize("script", [char_gpt, bpe_gpt])
def test_the_attention_shown_is_the_attention_at_work(script):
    """Values mixed in the shares shown, then projected, are what the attention module puts out."""
    model, ids = tiny(script), [1, 3, 0, 2, 4]
    shares = sample.attention_shares(model, ids)
    assert shares.shape == (2, 2, 5, 5)
    assert torch.allclose(shares.sum(-1), torch.ones(2, 2, 5))
    assert torch.all(shares.triu(1) == 0), "no token looks ahead"
    x = model.transformer.wte(torch.tensor([ids])) + model.transformer.wpe(torch.arange(5))
    for layer, block in enumerate(model.transformer.h):
        normed = block.ln_1(x)
        v = block.attn.c_attn(normed)[0, :, 16:].view(5, 2, 4).transpose(0, 1)
        mixed = (shares[layer] @ v).transpose(0, 1).reshape(1, 5, 8)
        assert torch.allclose(block.attn.c_proj(mixed), block.attn(normed), atol=1e-5)
        x = block(x)


@pytest.mark.parametrize("script", ["char_gpt", "bpe_gpt"])
def test_attention_is_drawn_with_tokens_along_both_sides(clone, script):
    flags = ("--attention", "The sea, the sea", "--layer", "1", "--head", "1")
    out, _ = run("sample.py", f"out/{script}.pt", *flags, cwd=clone)
    lines = out.splitlines()
    assert lines[0] == "layer 1, head 1" and "share of attention" in lines[-1]
    rows = [line for line in lines if re.match(r" *'", line)]
    names = [re.match(r" *('.+?') ", line)[1] for line in rows]
    assert "".join(name[1:-1] for name in names) == "The sea, the sea"
    assert set("".join(rows)) & set("\u2591\u2592\u2593\u2588"), "somebody looks at somebody"
    header = lines[1 : lines.index(rows[0])]
    width = re.match(r" *'.+?' ", rows[0]).end()
    columns = ["".join(line.ljust(200)[width + 2 * i] for line in header) for i in range(len(rows))]
    assert "".join(c.rstrip() for c in columns) == "".join(n[1:-1].rstrip() for n in names)


def test_a_bigram_table_has_no_attention_to_show(clone):
    error = one_line_error("sample.py", "out/bigram.pt", "--attention", "The sea", cwd=clone)
    assert "no attention" in error


@pytest.mark.parametrize("script", ["bigram", "char_gpt", "bpe_gpt"])
def test_shapes_walks_through_all_modules_and_counts_all_parameters(clone, script):
    out, _ = run("sample.py", f"out/{script}.pt", "--shapes", "The sea", cwd=clone)
    model, tokenizer, checkpoint = load_model(str(clone / "out" / f"{script}.pt"))
    *lines, total = [line.replace(",", "") for line in out.splitlines()[1:]]
    n_params, operations = map(int, total.split()[-2:])
    assert n_params == sum(p.numel() for p in model.parameters())
    rows = [
        re.match(r"(\S+).*\[(.+?)\] +\[(.+?)\] +(\d+) +(\d+)$", line).groups() for line in lines
    ]
    names = [row[0] for row in rows]
    if script == "bigram":
        assert operations == 0
        return
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert {name for name, _ in linear} < set(names)
    T, C = len(tokenizer.encode("The sea")), 32
    products = sum(2 * T * m.weight.numel() for _, m in linear)
    assert operations == products + 2 * 4 * T * T * C, "attention: q @ k and shares @ v, two layers"
    before = f"1 {T} {C}"
    for name, _, out_shape, _, _ in rows[2:]:  # each block leaves the shape as it was
        if name.endswith(("ln_1", "ln_2", "ln_f", ".attn", "c_proj")):
            assert out_shape == before


def test_curves_show_the_losses_of_each_run(clone):
    out, _ = run("sample.py", "--curve", "out/bigram.pt", "out/char_gpt.pt", cwd=clone)
    assert re.search(r"a training, A validation: out/bigram.pt \(at best 2\.\d+\)", out)
    assert re.search(r"b training, B validation: out/char_gpt.pt \(at best \d\.\d+\)", out)
    drawn = "".join(re.findall(r"\|(.*)", out))
    assert set("AB") <= set(drawn), drawn
    assert "819,200 tokens seen" in out, "100 steps of 32 x 256 of the bigram, the longer run"
    heights = {}
    for i, line in enumerate(re.findall(r"\|(.*)", out)):
        for letter in "AB":
            heights.setdefault(letter, []).extend([i] * line.count(letter))
    assert heights["B"] == sorted(heights["B"]), "a loss that falls"


def test_a_run_without_losses_has_no_curve(clone):
    checkpoint = torch.load(clone / "out" / "bigram.pt", weights_only=True)
    for history, clue in (([], "no losses yet"), ([[1, "x", 2]], "damaged"), ([7], "damaged")):
        torch.save({**checkpoint, "history": history}, clone / "odd.pt")
        assert clue in one_line_error("sample.py", "--curve", "odd.pt", cwd=clone)


PLOTS = {
    "attention": ["out/char_gpt.pt", "--attention", "The sea, the sea"],
    "curve": ["--curve", "out/bigram.pt", "out/char_gpt.pt"],
}


@pytest.mark.parametrize("plot", PLOTS)
def test_without_matplotlib_one_line_says_so(clone, plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = one_line_error("sample.py", *PLOTS[plot], "--plot", "x.png", cwd=clone)
    assert "pip install matplotlib" in error and not (clone / "x.png").exists()


@pytest.mark.parametrize("plot", PLOTS)
def test_a_picture_is_written(clone, plot, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no pictures to test")
    out, _ = run("sample.py", *PLOTS[plot], "--plot", tmp_path / "x.png", cwd=clone)
    assert out == f"wrote {tmp_path / 'x.png'}\n"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for name, clue in (("x.nonsense", "nonsense"), ("no/folder/x.png", "no/folder/x.png")):
        assert clue in one_line_error("sample.py", *PLOTS[plot], "--plot", name, cwd=clone)


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


# ---------------------------------------------------------------------------------------------
# A conversation


def test_prompts_are_answered_one_after_the_other(clone, monkeypatch, capsys):
    lines = iter(["The sea", "", "\u3042", "A ship"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None  # Ctrl-D

    monkeypatch.setattr("builtins.input", typed)
    path = str(clone / "out" / "char_gpt.pt")
    monkeypatch.setattr("sys.argv", ["sample.py", path, "--interactive", "--max_new_tokens", "20"])
    sample.main()
    out, error = capsys.readouterr()
    first, rest = out[:28], out[28:]
    assert first.startswith("The sea") and rest.startswith("A ship")
    assert len(out) == len("The sea") + 20 + 1 + len("A ship") + 20 + 1 + 1
    assert "the character '\u3042' is not in the vocabulary" in error


def test_a_large_model_speaks_in_float16_where_that_is_fast(clone, folder, monkeypatch):
    """On a CPU, for one text that fits into the context; and it says much the same."""
    flags = ("--max_new_tokens", "5", "--temperature", "0", "--prompt", "The ", "--ignore_end")
    text, notes = run("sample.py", folder, *flags, "--dtype", "float16", cwd=clone)
    assert "float16" in notes
    assert text == run("sample.py", folder, *flags, "--dtype", "float32", cwd=clone)[0]


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
    "no beam": (["--beam", "0"], "--beam"),
    "a beam of many samples": (["--beam", "2", "--num_samples", "2"], "--beam"),
    "min_p above 1": (["--min_p", "1.5"], "--min_p"),
    "nothing to stop at": (["--stop", ""], "--stop"),
    "a layer too many": (["--attention", "The", "--layer", "2"], "--layer must be from 0 to 1"),
    "a head below the first": (["--attention", "The", "--head", "-1"], "--head must be"),
    "more text than the model reads": (["--shapes", "The sea " * 20], "reads 32"),
    "a character never seen to look at": (["--probs", "\u3042"], "vocabulary"),
    "two things at once": (["--probs", "a", "--shapes", "b"], "not allowed with"),
    "a picture of nothing": (["--plot", "x.png"], "--plot"),
    "an input to nothing": (["--input", "x"], "--input"),
    "a curve of nothing": (["--curve", "nothing.pt"], "nothing.pt"),
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
