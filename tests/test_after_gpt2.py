"""The README's section "After GPT-2": each diff in data/after_gpt2/ applies to char_gpt.py as it is,
and what comes out is a GPT that trains, resumes and can be looked at. (A reader who edits char_gpt.py
moves the lines to which the diffs apply. So these tests run with CI=1 only.)"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PLAY, ROOT, SHAKESPEARE, needs_shakespeare, run

import char_gpt

pytestmark = [
    pytest.mark.skipif(not os.environ.get("CI"), reason="the diffs: set CI=1 to check them"),
    pytest.mark.skipif(not shutil.which("git"), reason="git applies the diffs, and is not here"),
]

DIFFS = sorted((ROOT / "data" / "after_gpt2").glob("*.diff"))
SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16)
FLAGS = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --eval_interval 5 --data play.txt "


def only(*numbers):
    """A test of these diffs alone."""
    chosen = [diff for diff in DIFFS if int(diff.stem[0]) in numbers]
    return pytest.mark.parametrize("diff", chosen, ids=lambda diff: diff.stem, indirect=True)


@pytest.fixture(scope="module", params=DIFFS, ids=lambda diff: diff.stem)
def diff(request):
    return request.param


@pytest.fixture(scope="module")
def folder(diff, tmp_path_factory):
    """The scripts, with one diff applied by README's command."""
    folder = tmp_path_factory.mktemp(diff.stem)
    for script in ("bigram.py", "char_gpt.py", "bpe_gpt.py", "sample.py"):
        shutil.copy(ROOT / script, folder)
    (folder / "data" / "after_gpt2").mkdir(parents=True)
    for name in ("explore.html", "gpt2.js"):
        shutil.copy(ROOT / "data" / name, folder / "data")
    shutil.copy(diff, folder / "data" / "after_gpt2")
    text = PLAY.read_text(encoding="utf-8")[:8000]
    (folder / "play.txt").write_text(text, encoding="utf-8")
    command = ["git", "apply", f"data/after_gpt2/{diff.name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def script(diff, folder):
    """char_gpt.py with the diff, as a module."""
    spec = importlib.util.spec_from_file_location(f"after_{diff.stem}", folder / "char_gpt.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def build(script):
    torch.manual_seed(0)
    return script.GPT(script.GPTConfig(**SMALL))


def rows():
    """Those of the table, by the name of the diff."""
    table = (ROOT / "data" / "after_gpt2" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (?:\[`([\w-]+)\.diff`\]\(\1\.diff\)|as it is) (.*)", table, re.M)
    return {name: [cell.strip() for cell in cells.split("|")[1:-1]] for name, cells in found}


def test_each_diff_has_its_row_in_the_table():
    assert list(rows()) == ["", *(diff.stem for diff in DIFFS)]


def test_a_diff_is_short_and_the_table_counts_its_lines(diff):
    lines = diff.read_text(encoding="utf-8").splitlines()[2:]
    added = sum(line.startswith("+") for line in lines)
    removed = sum(line.startswith("-") for line in lines)
    assert added <= 30 and all(len(line) <= 101 for line in lines)
    assert rows()[diff.stem][0] == f"+{added} \N{MINUS SIGN}{removed}"


def test_the_table_counts_the_parameters(diff, script):
    for name, module in (("", char_gpt), (diff.stem, script)):
        model = module.GPT(module.GPTConfig(**module.CPU_SETTINGS))
        assert rows()[name][1] == f"{sum(p.numel() for p in model.parameters()):,}"


def test_no_token_sees_its_future(script):
    model = build(script)
    idx = torch.randint(65, (2, 16))
    before, _ = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 65
        after, _ = model(changed)
        assert torch.equal(before[:, :t], after[:, :t]), f"something before {t} sees position {t}"
        assert not torch.equal(before[:, t:], after[:, t:]), f"position {t} does not see itself"


def test_the_order_of_tokens_matters(script):
    model = build(script)
    a, _ = model(torch.tensor([[1, 2, 3, 4]]))
    b, _ = model(torch.tensor([[2, 1, 3, 4]]))
    assert not torch.allclose(a[0, -1], b[0, -1], atol=1e-5)


def test_training_begins_with_a_uniform_guess(script):
    model = build(script)
    idx, targets = torch.randint(65, (2, 64, 16))
    assert model(idx, targets)[1].item() == pytest.approx(math.log(65), abs=0.05)


def test_by_hand_or_not_it_is_the_same_model(script):
    model = build(script)
    idx = torch.randint(65, (2, 16))
    expected, _ = model(idx)
    for module in model.modules():
        module.by_hand = True
    assert torch.allclose(model(idx)[0], expected, atol=1e-6)


@only(1)
def test_rms_norm_divides_by_the_root_mean_square(script):
    layer = script.RMSNorm(4)
    layer.by_hand = True
    layer.weight.data = torch.tensor([1.0, 1.0, 1.0, 2.0])
    y = layer(torch.tensor([[1.0, 1.0, 3.0, 5.0]]))  # mean square (1 + 1 + 9 + 25) / 4 = 9
    assert y[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1, 10 / 3], abs=1e-4)


@only(2, 6)
def test_rotary_positions_depend_on_the_distance_only(script):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    scores = script.rotate(q.repeat(1, 1, 16, 1)) @ script.rotate(k.repeat(1, 1, 16, 1)).mT
    for distance in range(16):
        same = scores[0, 0].diagonal(-distance)
        assert torch.allclose(same, same[:1].expand_as(same), atol=1e-5)
    assert scores[0, 0, :, 0].std() > 0.1, "different distances, different scores"
    assert torch.allclose(script.rotate(q), q), "at position 0, nothing turns"
    x = torch.randn(1, 1, 16, 8)
    assert torch.allclose(script.rotate(x).norm(dim=-1), x.norm(dim=-1), atol=1e-5)


@only(5, 6)
def test_heads_of_a_group_share_keys_and_values(script):
    config = script.GPTConfig(n_head=4, n_kv_head=2, n_embd=32)
    attention = script.CausalSelfAttention(config)
    assert attention.c_attn.weight.shape == (32 + 2 * 16, 32)
    seen = []
    attention.by_hand = True
    original, script.attention = script.attention, lambda q, k, v: seen.append((q, k, v)) or q
    attention(torch.randn(1, 5, 32))
    script.attention = original
    q, k, v = seen[0]
    assert q.shape == k.shape == v.shape == (1, 4, 5, 8)
    for part in (k, v):
        assert torch.equal(part[:, 0], part[:, 1]) and torch.equal(part[:, 2], part[:, 3])
        assert not torch.equal(part[:, 0], part[:, 2])
    assert not torch.equal(q[:, 0], q[:, 1])


@only(4, 6)
def test_scores_of_normalized_queries_and_keys_are_bounded(script):
    """They are sqrt(head_size) times a cosine, however large the weights are."""
    attention = script.CausalSelfAttention(script.GPTConfig(n_head=4, n_embd=32))
    attention.c_attn.weight.data *= 1000
    seen = []
    attention.by_hand = True
    original, script.attention = script.attention, lambda q, k, v: seen.append((q, k)) or v
    attention(torch.randn(1, 5, 32))
    script.attention = original
    q, k = seen[0]
    assert (q @ k.mT / math.sqrt(8)).abs().max() <= math.sqrt(8) + 1e-4


def test_a_run_that_is_resumed_ends_with_the_same_bits(folder):
    run("char_gpt.py", *FLAGS.split(), "--max_iters", "20", "--out", "whole.pt", cwd=folder)
    script = (folder / "char_gpt.py").read_text(encoding="utf-8")
    stopped = script.replace("            report(checkpoint", "            sys.exit() if step == 10 else 0\n            report(checkpoint")
    assert stopped != script
    (folder / "stopped.py").write_text(stopped, encoding="utf-8")
    run("stopped.py", *FLAGS.split(), "--max_iters", "20", "--out", "parts.pt", cwd=folder)
    run("char_gpt.py", "--resume", "--out", "parts.pt", cwd=folder)
    whole, parts = [
        torch.load(folder / name, weights_only=True) for name in ("whole.pt", "parts.pt")]
    assert whole["history"] == parts["history"] and len(whole["history"]) == 4
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_sample_py_writes_and_looks_inside_without_an_edit(folder, script):
    run("char_gpt.py", *FLAGS.split(), "--max_iters", "5", "--out", "x.pt", cwd=folder)
    text, _ = run("sample.py", "x.pt", "--max_new_tokens", "50", cwd=folder)
    assert len(text) == 51
    assert "perplexity" in run("sample.py", "x.pt", "--probs", "The sea", cwd=folder)[0]
    shapes, _ = run("sample.py", "x.pt", "--shapes", "The sea", cwd=folder)
    assert "transformer.h.1.attn.c_attn" in shapes
    run("sample.py", "x.pt", "--explore", "The sea", cwd=folder)
    assert (folder / "explore.html").stat().st_size > 10_000


@needs_shakespeare
@only(2, 6)  # those that change most; each takes a minute or more
def test_300_steps_reach_the_loss_in_the_readme(diff, script):
    """Of the 2,100 steps of the small model, the first 300, with the seed 1337."""
    config = script.GPTConfig(**script.CPU_SETTINGS)
    text = script.load_text(SHAKESPEARE)
    tokenizer = script.CharTokenizer(text)
    train_data, val_data = script.split_data(torch.tensor(tokenizer.encode(text)), config)
    torch.manual_seed(config.seed)
    model = script.GPT(config)
    optimizers = script.make_optimizers(model, config)
    autocast = torch.autocast("cpu", enabled=False)
    for step in range(300):
        x, y = script.get_batch(train_data, config, step)
        script.training_step(model, optimizers, x, y, step, config, autocast)
    loss = script.evaluate(model, val_data, config)
    assert loss == pytest.approx(float(rows()[diff.stem][3]), abs=0.02)
