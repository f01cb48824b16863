"""sample.py: from scores to text, and what can be seen inside a model."""

import io
import itertools
import math
import os
import re
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import instruct, one_line_error, run

import bpe_gpt
import char_gpt
import sample
from bigram import BigramConfig, BigramLanguageModel
from sample import SampleConfig, UserError, beam_search, choose, load_model

SCRIPTS = ["bigram", "char_gpt", "bpe_gpt"]
GPTS = pytest.mark.parametrize("script", [char_gpt, bpe_gpt], ids=lambda script: script.__name__)


@pytest.fixture
def command(clone, monkeypatch, capsys):
    """`python sample.py FLAGS` in the clone, within this process."""
    monkeypatch.chdir(clone)
    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        sample.main()
        return capsys.readouterr()
    return main


def tiny(script, vocab_size=5, block_size=8, std=0.5, seed=0):
    """A GPT whose guesses are far from even."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=vocab_size, block_size=block_size)
    model = script.GPT(script.GPTConfig(**sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


PROBS = torch.tensor([0.05, 0.5, 0.1, 0.3, 0.05])


def chances(logits, **settings):
    """The probability with which choose() draws each token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "sample", lambda logits: seen.append(logits) or every_rank)
        seen, every_rank = [], torch.arange(len(logits))[None]
        tokens = choose(logits[None], SampleConfig(**settings))[0]
    return torch.zeros(len(logits)).index_copy(0, tokens, seen[0][0].softmax(-1))


def chances_by_hand(logits, temperature, top_k, top_p, min_p):
    probs = (logits / temperature).softmax(-1)
    least = probs.sort(descending=True).values[: top_k or None][-1]
    probs = torch.where(probs >= least, probs, 0)
    probs /= probs.sum()
    likelier = torch.stack([probs[probs > p].sum() for p in probs])
    probs[(likelier >= top_p) | (probs < min_p * probs.max())] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("settings", [
    dict(temperature=0.0), dict(temperature=1e-38), dict(top_k=1), dict(top_p=1e-50),
    dict(min_p=1.0)], ids=str)
def test_greedy_takes_the_likeliest_token(settings):
    logits = PROBS.log() + 50  # softmax does not change, but 50 / 1e-38 is infinite
    assert (choose(logits.expand(100, 5), SampleConfig(**settings)) == 1).all()


def test_tokens_are_drawn_by_their_probabilities():
    tokens = choose(PROBS.log().expand(50_000, 5), SampleConfig()).flatten()
    assert torch.allclose(tokens.bincount(minlength=5) / 50_000, PROBS, atol=0.015)


def test_temperature_sharpens_and_cuts_keep_the_likeliest():
    torch.manual_seed(0)
    values = (0.3, 1.0, 2.5), (0, 2, 6, 99), (0.2, 0.6, 0.93, 1.0), (0.0, 0.07, 0.5)
    for settings in itertools.product(*values):
        settings = dict(zip(("temperature", "top_k", "top_p", "min_p"), settings))
        logits = 2 * torch.randn(12)
        expected = chances_by_hand(logits, **settings)
        assert torch.allclose(chances(logits, **settings), expected, atol=1e-5), settings


def test_of_100_equal_tokens_top_p_keeps_k_for_k_percent():
    """The sum of 50 times 1/100 is 0.5, also where it is rounded to a little less."""
    kept = [(chances(torch.zeros(100), top_p=k / 100) > 0).sum().item() for k in range(1, 100)]
    assert kept == list(range(1, 100))


def test_scores_in_bfloat16_are_added_up_with_more_precision():
    probs = chances(torch.zeros(4000, dtype=torch.bfloat16), top_p=0.9)
    assert (probs > 0).sum().item() == pytest.approx(3600, abs=2)


@GPTS
@pytest.mark.parametrize("n", [5, 20], ids=["within context", "past it"])
def test_a_beam_of_1_takes_the_likeliest_token_each_time(script, n):
    model, idx, greedy = tiny(script), torch.tensor([[1, 3]]), SampleConfig(temperature=0)
    new = [c.item() for c in script.generate(model, idx, n, lambda scores: choose(scores, greedy))]
    assert beam_search(model, idx, n, width=1, end=-1) == [new]


@GPTS
def test_beams_are_all_results_in_order_by_the_mean_over_their_new_tokens(script):
    """After a prompt of 20 tokens, with a cache where there is one; and each as if alone."""
    model, prompt, end = tiny(script, block_size=32, std=0.8), list(range(5)) * 4, 2
    found = beam_search(model, torch.tensor([prompt]), 6, width=4, end=end)
    means = []
    for text in found:
        ids = torch.tensor([prompt + text])
        log_probs = model(ids)[0][0, 19:-1].log_softmax(-1)
        means.append(log_probs[range(len(text)), text].mean().item())
        assert text[-1] == end or len(text) == 6
    assert len(found) >= 4 and means == sorted(means, reverse=True)


@GPTS
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_that_keeps_all_prefixes_finds_the_best_of_all_texts(script, seed):
    """The best by the mean log-probability of their tokens: texts that end early are shorter."""
    V, n, end = 3, 5, 2
    model, start, means = tiny(script, V, std=0.8, seed=seed), [seed, 1, 0], {}
    for text in itertools.product(range(V), repeat=n):
        text = text[: text.index(end) + 1] if end in text else text
        log_probs = model(torch.tensor([start + [*text]]))[0][0, 2:].log_softmax(-1)
        means[text] = log_probs[range(len(text)), text].mean().item()
    found = beam_search(model, torch.tensor([start]), n, width=V**n, end=end)
    assert tuple(found[0]) == max(means, key=means.get) and len(found) == len(means)


def test_beam_search_does_not_favour_short_texts():
    """After 0 the end (2) has probability 0.4; 1 has 0.6, and after it the end has 0.6. In all, [2]
    is likelier than [1, 2]; its tokens are not."""
    model = BigramLanguageModel(BigramConfig(vocab_size=3))
    model.table.weight.data = torch.tensor([[1e-9, 0.6, 0.4], [0.1, 0.3, 0.6], [1, 1, 1]]).log()
    assert beam_search(model, torch.tensor([[0]]), 3, width=20, end=2)[0] == [1, 2]


@pytest.mark.parametrize("ignore_end, expected", [(False, "x\n"), (True, "x!!!!\n")])
def test_a_beam_search_goes_on_after_the_end_of_text_if_that_is_to_be_ignored(
        capsys, ignore_end, expected):
    model = BigramLanguageModel(BigramConfig(vocab_size=3))
    model.table.weight.data = torch.tensor([[0.1, 0.1, 0.8]] * 3).log()
    tokenizer = SimpleNamespace(tokens=[b"a", b"b", b"!"], end_of_text=2)
    config = SampleConfig(beam=2, max_new_tokens=4, ignore_end=ignore_end)
    sample.print_texts(model, tokenizer, torch.tensor([[0]]), "x", config)
    assert capsys.readouterr().out == expected


def streamed(*pieces, stop=""):
    """What is shown after each of the pieces, and at the end."""
    tokenizer = SimpleNamespace(tokens=pieces)
    return list(sample.stream(iter(range(len(pieces))), tokenizer, -1, stop))


def test_text_ends_before_what_it_is_to_stop_at():
    assert streamed(b"one ", b"two three", stop="two") == ["one ", ""]
    assert streamed(b"a\n", b"-", b"\nb", stop="\n-\n") == ["a", "", ""], "in three tokens"
    tokens = iter(range(3))
    "".join(sample.stream(tokens, SimpleNamespace(tokens=[b"a", b".b", b"c"]), -1, "."))
    assert list(tokens) == [2], "nothing is generated after it"


def test_what_may_become_a_stop_or_a_character_is_held_back_until_it_is_certain():
    assert streamed(b"xST", b"AR", stop="STOP") == ["x", "STAR", ""]
    assert streamed(b"xST", stop="STOP") == ["x", "ST"]
    assert streamed(b"aab", b"aac", stop="aabaad") == ["", "aabaac", ""]
    assert "".join(streamed(*[bytes([c]) for c in b"xaaab!"], stop="aab")) == "xa"
    star = "\u2605".encode()
    assert streamed(b"a" + star[:1], star[1:2], star[2:] + b"b") == ["a", "", "\u2605b", ""]
    assert streamed(b"a" + star[:2]) == ["a", "\ufffd"]


def test_a_sample_ends_where_the_model_ends_its_text(command, monkeypatch):
    tokenizer = load_model("out/bpe_gpt.pt")[1]
    a, b, end = *tokenizer.encode("ab"), tokenizer.end_of_text
    def say(rows, *flags, more=True):
        def generate(*args):
            yield from torch.tensor(rows).t()[:, :, None]  # (T, B, 1)
            assert more, "all samples have ended: there is nothing left to do"
        monkeypatch.setattr(bpe_gpt, "generate", generate)
        return command("out/bpe_gpt.pt", "--prompt", "x", "--num_samples", len(rows), *flags).out
    line = "-" * 40
    assert say([[a, end, b, b], [b, a, end, a]]) == f"xa\n{line}\nxba\n"
    assert say([[a, end], [end, a]], more=False) == f"xa\n{line}\nx\n"
    assert say([[a, end, b, b]], "--ignore_end") == "xa<|endoftext|>bb\n"
    assert say([[a, b, a, a], [b, b, a, b]], "--stop", "ba") == f"xa\n{line}\nxb\n"


# ---- Looking inside ------------------------------------------------------------------------------

@GPTS
@pytest.mark.parametrize("n", [6, 21], ids=["within context", "past it"])
def test_the_probabilities_are_those_of_the_model(script, n):
    model, ids = tiny(script), torch.randint(5, (1, n))
    size = model.context_size
    step = max(1, size // 2)
    for t, row in enumerate(sample.next_log_probs(model, ids)):
        start = 0 if t < size else step * ((t - size) // step + 1)
        assert t + 1 - start > size // 2 or start == 0, "at least half a context is seen"
        logits, _ = model(ids[:, start : t + 1])
        assert torch.allclose(row, logits[0, -1].log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_probs_shows_each_token_with_its_probability_and_rank(command, script):
    text = "A harbour:\nships, and more ships, and yet more of them."
    _, *lines, end = command(f"out/{script}.pt", "--probs", text).out.splitlines()
    model, tokenizer, _ = load_model(f"out/{script}.pt")
    ids = tokenizer.encode(text)
    before = tokenizer.encode("\n")
    log_probs = sample.next_log_probs(model, torch.tensor([[*before, *ids[:-1]]]))
    for line, token, row in zip(lines, ids, log_probs.exp(), strict=True):
        name, share, rank, others = re.match(r"('.+?') +([\d.]+)% +(\d+)   (.*)", line).groups()
        assert name == sample.quote(tokenizer, token)
        assert float(share) == pytest.approx(100 * row[token].item(), abs=0.02)
        assert int(rank) == 1 + (row > row[token]).sum()
        row[token] = 0
        found = [float(p) / 100 for p in re.findall(r"' ([\d.]+)%", others)]
        assert found == pytest.approx(row.topk(3).values.tolist(), abs=0.001)
    assert sample.quote(SimpleNamespace(tokens=[b"\xf0\n"]), 0) == r"'\xf0\n'"
    mean = -log_probs[range(len(ids)), ids].mean().item()
    expected = pytest.approx([len(ids) * mean, mean, math.exp(mean)], rel=2e-3)
    assert [float(n) for n in re.findall(r"[\d.]+", end)] == expected


@GPTS
def test_the_attention_shown_is_the_attention_at_work(script):
    """The values' means by these weights, projected, are what the attention module puts out."""
    model, ids = tiny(script), [1, 3, 0, 2, 4]
    weights = sample.attention_weights(model, ids)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 5))
    assert (weights.triu(1) == 0).all(), "no token looks ahead"
    x = model.transformer.wte(torch.tensor([ids])) + model.transformer.wpe(torch.arange(5))
    for layer, block in enumerate(model.transformer.h):
        normed = block.ln_1(x)
        v = block.attn.c_attn(normed)[0, :, 16:].view(5, 2, 4).transpose(0, 1)
        mixed = (weights[layer] @ v).transpose(0, 1).reshape(1, 5, 8)
        assert torch.allclose(block.attn.c_proj(mixed), block.attn(normed), atol=1e-5)
        x = block(x)


class Windowed(char_gpt.CausalSelfAttention):
    """Attention as a reader may change it: a token sees itself and the one before it."""
    def forward(self, x):
        T = x.shape[1]
        q, k, v = [part.view(1, T, 2, 4).transpose(1, 2) for part in self.c_attn(x).split(8, dim=2)]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=WINDOW[:T, :T], scale=0.3)
        return self.c_proj(y.transpose(1, 2).reshape(1, T, 8))


WINDOW = torch.ones(8, 8).tril().triu(-1).bool()


def test_the_attention_shown_is_that_of_a_readers_own_mask():
    model = tiny(char_gpt)
    for block in model.transformer.h:
        block.attn.__class__ = Windowed
    weights = sample.attention_weights(model, [1, 3, 0, 2, 4])
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 5))
    assert torch.equal(weights > 0, WINDOW[:5, :5].expand(2, 2, 5, 5))


def test_attention_that_a_reader_computes_in_another_way_is_not_shown_in_part():
    model = tiny(char_gpt)
    model.transformer.h[0].attn.by_hand = True
    with pytest.raises(UserError, match="only where a block calls scaled_dot_product_attention"):
        sample.attention_weights(model, [1, 3])


def test_attention_is_pytorchs_again_after_a_look_inside_and_after_an_error():
    usual = F.scaled_dot_product_attention
    for ids in ([1, 3], [99]):
        with pytest.raises(IndexError) if ids == [99] else nullcontext():
            sample.attention_weights(tiny(char_gpt), ids)
        assert F.scaled_dot_product_attention is usual


@pytest.mark.parametrize("script", SCRIPTS)
def test_shapes_walks_through_all_modules_and_counts_all_parameters(command, script):
    _, *rows, total = command(f"out/{script}.pt", "--shapes", "The sea").out.splitlines()
    model, tokenizer, _ = load_model(f"out/{script}.pt")
    row = r"(\S+) +\w+ +(\[.+?\]) +(\[.+?\]) +([\d,]+)"
    names, befores, afters, counts = zip(*re.findall(row, "\n".join(rows)))
    n_params = sum(p.numel() for p in model.parameters())
    assert total.split()[-1] == f"{n_params:,}"
    assert sum(int(count.replace(",", "")) for count in counts) == n_params
    modules, T = dict(model.named_modules()), len(tokenizer.encode("The sea"))
    assert {name for name, module in modules.items() if module._parameters} <= set(names)
    for name, *shapes in zip(names, befores, afters):
        if isinstance(modules[name], torch.nn.Linear):  # its weight is (out, in)
            assert shapes == [f"[1, {T}, {n}]" for n in modules[name].weight.shape[::-1]]


@pytest.fixture
def changed(clone, tmp_path):
    """Writes the clone's checkpoint with other contents; returns its path."""
    def save(script, **changes):
        checkpoint = torch.load(clone / "out" / f"{script}.pt", weights_only=True)
        changes["config"] = checkpoint["config"] | changes.get("config", {})
        torch.save(checkpoint | changes, tmp_path / f"{script}.pt")
        return tmp_path / f"{script}.pt"
    return save


def test_curves_show_losses_in_bits_per_byte_of_their_own_text(command, changed):
    """Training losses by the bytes per token of the training text, as is what was read."""
    history = [(10, 1000, 4.0, 3.0), (20, 3000, 2.0, 2.5)]
    path = changed("bpe_gpt", bytes_per_token=[2.0, 3.0], history=history)
    _, name, *lines = command("--curve", path).out.splitlines()
    expected = []
    for _, n_tokens, train, val in history:
        bits = train / 2.0 / math.log(2), val / 3.0 / math.log(2)
        expected.append(f"{n_tokens * 2.0 / 1e6:.2f} {bits[0]:.3f} {bits[1]:.3f}")
    assert name == str(path)
    assert [" ".join(line.split()) for line in lines] == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_says_what_was_read_and_how_long_its_tokens_are(clone, script):
    checkpoint = torch.load(clone / "out" / f"{script}.pt", weights_only=True)
    config = checkpoint["config"]
    per_step = {"bigram": 32 * 256, "char_gpt": 16 * 32, "bpe_gpt": 512}[script]
    for step, n_read, _, _ in checkpoint["history"]:
        assert n_read == step * per_step
    text = (clone / config["data"]).read_text(encoding="utf-8")
    n = int(0.9 * len(text))
    if script == "bpe_gpt":
        tokenizer = bpe_gpt.BPETokenizer(checkpoint["vocab"])
        lengths = []
        for part in (text[:n], text[n:]):
            ids = tokenizer.encode(part)[1:]  # all that are predicted
            lengths.append(len(b"".join(tokenizer.tokens[i] for i in ids)) / len(ids))
        assert checkpoint["bytes_per_token"] == pytest.approx(lengths, rel=1e-6)
    else:
        assert checkpoint["bytes_per_token"] == [1.0, 1.0]


@pytest.mark.parametrize("text_before", ["\n", "<|endoftext|>"])
def test_a_text_begins_as_texts_do_in_the_training_data(command, changed, monkeypatch, text_before):
    """With what comes before it there: a learned vocabulary has an end of text, but has not seen
    it if it was learned from a single text."""
    seen = []
    monkeypatch.setattr(sample, "print_texts", lambda model, tok, idx, *rest: seen.append(idx))
    monkeypatch.setattr(sample, "show_probs", lambda model, tok, ids: seen.append(ids))
    path = changed("bpe_gpt", text_before=text_before)
    tokenizer = load_model(path)[1]
    expected = tokenizer.encode(text_before, {"<|endoftext|>"})
    command(path)
    command(path, "--probs", "The sea")
    assert seen[0].tolist() == [expected]
    assert seen[1] == expected + tokenizer.encode("The sea")
    assert torch.load("out/bpe_gpt.pt", weights_only=True)["text_before"] == "\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_line_breaks_a_text_begins_with_the_first_character(clone, tmp_path, script):
    """Of the vocabulary of characters. (Tokens include all bytes, and so the line break.)"""
    text = "to be or not to be that is the question " * 60
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    flags = "--data x.txt --block_size 16 --max_iters 2 --eval_interval 1 --out x.pt"
    if script != "bigram":
        flags += " --n_layer 1 --n_head 1 --n_embd 8"
    if script == "bpe_gpt":
        flags += " --vocab_size 260 --total_batch_size 64"
    run(clone / f"{script}.py", *flags.split(), cwd=tmp_path)
    flags = "x.pt --max_new_tokens 40 --num_samples 2".split()
    output, _ = run(clone / "sample.py", *flags, cwd=tmp_path)
    assert len(output) >= 80
    output, _ = run(clone / "sample.py", "x.pt", "--probs", "to be", cwd=tmp_path)
    lines = output.splitlines()
    assert len(lines) >= 3 and lines[1].startswith("'t'"), "what came before is not shown"


@pytest.mark.parametrize("script", ["bigram", "char_gpt"])
def test_without_a_prompt_characters_continue_the_first_of_the_vocabulary(
    command, changed, monkeypatch, script
):
    """That is the line break if there is one. Whatever it is, training has seen it."""
    seen = []
    monkeypatch.setattr(sample, "print_texts", lambda model, tok, idx, *rest: seen.append(idx))
    monkeypatch.setattr(sample, "show_probs", lambda model, tok, ids: seen.append(ids))
    vocab = load_model(f"out/{script}.pt")[2]["vocab"]
    for others in (vocab, sorted({*vocab, "_"} - {"\n"})):
        path = changed(script, vocab=others)
        command(path)
        command(path, "--probs", "sea")
        assert seen[0].tolist() == [[0]] and seen[1] == [0, *map(others.index, "sea")]
        seen.clear()


CURVES = ("--curve", "out/bigram.pt", "out/char_gpt.pt")


def test_without_matplotlib_one_line_says_so(clone, tmp_path):
    folder = shutil.copytree(clone, tmp_path / "clone")
    (folder / "matplotlib.py").write_text("raise ImportError('No module')")
    assert "pip install matplotlib" in one_line_error("sample.py", *CURVES, "--plot", "x.png", cwd=folder)


def test_a_picture_is_written(command, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no pictures to test")
    path = tmp_path / "x.png"
    assert command(*CURVES, "--plot", path).out.endswith(f"saved {path}\n")
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- The command: train -> checkpoint -> sample --------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_the_newest_model_speaks_and_the_same_seed_gives_the_same_text(command, script):
    for name in SCRIPTS:
        os.utime(f"out/{name}.pt", (1e9, 1e9 + (name == script)))
    flags = ("--prompt", "ISAURA:\n", "--max_new_tokens", "100", "--ignore_end")
    text, notes = command(*flags)
    assert text.startswith("ISAURA:\n") and len(text) >= len("ISAURA:\n") + 100
    assert f"out/{script}.pt" in notes and sum(c in " etaoin" for c in text) > 25
    assert command(f"out/{script}.pt", *flags, "--seed", "1337").out == text
    assert command(f"out/{script}.pt", *flags, "--seed", "2").out != text


def test_only_large_models_have_half_the_bits_unless_told_otherwise(command, monkeypatch):
    _, tokenizer, checkpoint = load_model("out/bpe_gpt.pt")
    def chosen(n_params, *flags):
        parameter = SimpleNamespace(numel=lambda: n_params)
        model = SimpleNamespace(parameters=lambda: [parameter], to=lambda device, dtype: None)
        patch.setattr(sample, "load_model", lambda name: (model, tokenizer, checkpoint))
        return command("out/bpe_gpt.pt", *flags).err.split()[-1]

    with monkeypatch.context() as patch:
        patch.setattr(sample, "print_texts", lambda *arguments: None)
        for capable, expected in (True, "torch.bfloat16"), (False, "torch.float32"):
            patch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": capable})
            assert chosen(10_770_816) == "torch.float32", "the full model of char_gpt.py"
            assert chosen(124_439_808) == expected, "GPT-2"
            assert chosen(10**6, "--dtype", "bfloat16") == "torch.bfloat16"
            assert chosen(10**8, "--dtype", "float32") == "torch.float32"
    for name in ("float32", "bfloat16"):
        _, notes = command("out/bpe_gpt.pt", "--dtype", name, "--max_new_tokens", "20")
        assert notes.endswith(f"torch.{name}\n")


@GPTS
def test_scores_in_bfloat16_are_nearly_the_same(script):
    model = tiny(script, vocab_size=87, std=0.2)
    idx = torch.tensor([[5, 1, 86, 0, 29]])
    expected, _ = model(idx)
    logits, _ = model.bfloat16()(idx)
    limit = 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert logits.dtype == torch.bfloat16 and (logits - expected).abs().max() < limit
    if script is bpe_gpt:
        caches = [bpe_gpt.Cache(8) for _ in model.transformer.h]
        parts = [model(part, caches=caches)[0] for part in idx.split((2, 1, 1, 1), dim=1)]
        assert (torch.cat(parts, dim=1) - expected[:, 1:]).abs().max() < limit


@pytest.mark.parametrize("beam", [0, 4])
def test_several_samples_are_several_texts(command, beam):
    flags = ("--num_samples", "3", "--max_new_tokens", "40", "--prompt", "The ", "--beam", beam,
             "--dtype", "bfloat16")
    samples = command("out/char_gpt.pt", *flags).out.split("-" * 40 + "\n")
    assert len(set(samples)) == 3 and all(re.match("The (?s:.{40})\n$", s) for s in samples)


def test_temperature_0_is_the_argmax_of_the_model(command):
    flags = ("--temperature", "0", "--max_new_tokens", "60", "--prompt", "The ")
    model, tokenizer, _ = load_model("out/char_gpt.pt")
    ids = tokenizer.encode("The ")
    for _ in range(60):
        ids.append(model(torch.tensor([ids[-32:]]))[0][0, -1].argmax().item())
    assert command("out/char_gpt.pt", *flags).out == tokenizer.decode(ids) + "\n"


def test_an_exported_model_says_what_the_checkpoint_says(command, clone, tmp_path):
    folder = tmp_path / "model"
    run("data/hugging_face.py", "out/bpe_gpt.pt", folder, cwd=clone)
    run("data/hugging_face.py", folder, tmp_path / "again.pt", cwd=clone)
    flags = ("--max_new_tokens", "60", "--prompt", "The ", "--ignore_end")
    assert command(tmp_path / "again.pt", *flags).out == command("out/bpe_gpt.pt", *flags).out


def test_instructions_become_prompts_of_ordinary_text(command, changed, monkeypatch):
    seen, text = [], "Add <|endoftext|>."
    monkeypatch.setattr(sample, "print_texts", lambda *args: seen.append(args))
    path = changed("bpe_gpt", templates=instruct.TEMPLATES)
    command(path, "--instruct", text, "--input", "1 2")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    command(path, "--interactive", "--input", "1 2")
    expected = instruct.make_prompt({"instruction": text, "input": "1 2"})
    for _, tokenizer, idx, prompt, _ in seen:
        assert tokenizer.decode(idx[0].tolist()) == expected and prompt == ""
        assert tokenizer.end_of_text not in idx
    assert len(seen) == 2
    command(path, "--input", "1 2")  # is not left out, although no instruction came with it
    _, tokenizer, idx, *_ = seen[2]
    assert "### Input:\n1 2\n" in tokenizer.decode(idx[0].tolist())


def test_prompts_are_answered_one_after_the_other(command, monkeypatch):
    flags = ("out/char_gpt.pt", "--interactive", "--max_new_tokens", "20")
    monkeypatch.setattr(sys, "stdin", io.StringIO("The sea\n\n\u3042\nA ship\n"))
    out, error = command(*flags)
    assert re.fullmatch(r"> The sea.{20}\n> .{20}\n> > A ship.{20}\n> \n", out, re.DOTALL)
    assert "error: characters that are not in the vocabulary: ['\u3042']" in error
    monkeypatch.setattr(sys, "stdin", None)  # closed, as after `<&-`
    assert command(*flags).out == ""


def test_an_ascii_terminal_gets_question_marks(command, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as with PYTHONIOENCODING=ascii
    monkeypatch.setattr(sys, "stdout", stdout)
    command("out/bpe_gpt.pt", "--prompt", "\u2605", "--max_new_tokens", "1")
    assert stdout.buffer.getvalue().startswith(b"?")


MISTAKES = [
    (["out/nothing.pt"], "out/nothing.pt is missing, damaged or not a checkpoint"),
    (["char_gpt.py"], "char_gpt.py is missing, damaged"),
    (["half.pt"], "half.pt is missing, damaged"),
    (["out/bigram.pt", "out/char_gpt.pt"], "only --curve takes several models"),
    (["--beam", "3", "--temperature", "0.5"], "--temperature has no effect"),
    (["--beam", "2", "--num_samples", "3"], "--beam 2 finds 2 texts"),
    (["--device", "cuda"], "no such device"),
    (["--top_k", "-1"], "--top_k must be at least 0"),
    (["--input", "heavy"], "was not trained on instructions"),
    (["--temperature", "-1"], "--temperature must be at least 0"),
    (["--temperature", "nan"], "--temperature must be at least 0"),
    (["--max_new_tokens", "-4"], "--max_new_tokens must be at least 0"),
    (["--num_samples", "0"], "--num_samples must be at least 1"),
    (["--shapes", "The sea " * 20], "160 tokens do not fit"),
    (["--probs", "\u3042"], "not in the vocabulary: ['\u3042']"),
]


@pytest.mark.parametrize("flags, clue", MISTAKES, ids=[clue for _, clue in MISTAKES])
def test_a_mistake_gets_one_line_that_names_it(clone, flags, clue):
    os.utime(clone / "out" / "char_gpt.pt")
    data = (clone / "out" / "char_gpt.pt").read_bytes()
    (clone / "half.pt").write_bytes(data[: len(data) // 2])
    assert clue in one_line_error("sample.py", *flags, cwd=clone)


def test_the_model_is_looked_at_in_one_way_at_a_time(clone):
    _, error = run("sample.py", "--probs", "The", "--explore", "sea", cwd=clone, status=2)
    assert "argument --explore: not allowed with argument --probs" in error


def test_models_may_be_named_before_and_after_the_flags(command):
    usual = command(*CURVES).out
    assert command("out/bigram.pt", "--curve", "out/char_gpt.pt").out == usual


def test_curves_are_of_texts_only(clone, changed):
    path = changed("bpe_gpt", templates=instruct.TEMPLATES)
    error = one_line_error("sample.py", "--curve", path, cwd=clone)
    assert "bpe_gpt.pt has no losses on a text" in error


def test_without_a_checkpoint_there_is_no_text(clone, tmp_path):
    assert "train a model first" in one_line_error(clone / "sample.py", cwd=tmp_path)
