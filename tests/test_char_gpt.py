"""char_gpt.py: a transformer, its parts against PyTorch's own, and its training."""

import math
import os
import re
import signal
import sys
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import PLAY, ROOT, one_line_error, run

import char_gpt
from char_gpt import (
    CPU_SETTINGS,
    GELU,
    GPT,
    MLP,
    Block,
    CausalSelfAttention,
    CharTokenizer,
    GPTConfig,
    LayerNorm,
    attention,
    evaluate,
    load_checkpoint,
    make_optimizers,
    split_data,
    train,
    training_step,
)

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, dropout=0.0)


def build(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **settings})).eval()


# Shapes and sizes


def test_every_part_keeps_the_shape_of_the_residual_stream():
    config = GPTConfig(**SMALL)
    x = torch.randn(3, 16, 32)
    for part in (LayerNorm, CausalSelfAttention, MLP, Block):
        assert part(config)(x).shape == (3, 16, 32), part
    assert GELU()(x).shape == (3, 16, 32)
    q = torch.randn(3, 4, 16, 8)
    assert attention(q, q, q).shape == (3, 4, 16, 8)


def test_shapes_of_logits_and_loss():
    model = build()
    for T in (1, 7, 16):
        idx = torch.randint(65, (3, T))
        logits, loss = model(idx)
        assert logits.shape == (3, T, 65) and loss is None
        assert model(idx, idx)[1].shape == ()


def test_the_full_model_has_10_770_816_parameters():
    model = GPT(GPTConfig())
    config = GPTConfig()
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (6, 6, 384, 256)
    assert sum(p.numel() for p in model.parameters()) == 10_770_816
    C, V, T = 384, 65, 256
    block = 2 * 2 * C + (C + 1) * 3 * C + (C + 1) * C + (C + 1) * 4 * C + (4 * C + 1) * C
    assert V * C + T * C + 6 * block + 2 * C == 10_770_816


def test_parameters_have_the_names_of_gpt2():
    names = set(GPT(GPTConfig(**{**SMALL, "n_layer": 1})).state_dict())
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    layers = [f"transformer.h.0.{part}" for part in parts] + ["transformer.ln_f"]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    tables = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert names == expected | tables


def test_input_and_output_embeddings_are_one():
    model = build()
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        model.transformer.wte.weight[5] += 1.0
    assert torch.equal(model.lm_head.weight[5], model.transformer.wte.weight[5])


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        build()(torch.zeros(1, 17, dtype=torch.long))


# Before training


@pytest.mark.parametrize("settings", [{}, CPU_SETTINGS], ids=["full", "small"])
def test_before_training_the_loss_is_that_of_a_uniform_guess(settings):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**settings)).eval()
    idx = torch.randint(65, (4, model.block_size))
    with torch.no_grad():
        _, loss = model(idx, torch.randint(65, idx.shape))
    assert loss.item() == pytest.approx(math.log(65), abs=0.1)


def test_weights_start_as_in_gpt2():
    model = build(n_layer=8, n_embd=128)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(p == 0), name
        elif "ln_" in name:
            assert torch.all(p == 1), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name


# The parts written out by hand equal PyTorch's own, forward and backward


def same(ours, theirs, *inputs):
    """Both functions give the same result, and the same gradients, to 1e-6."""
    results = []
    for function in (ours, theirs):
        copies = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*copies)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y.detach(), *(x.grad for x in copies)])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-6), (a - b).abs().max()


@pytest.fixture(params=[False, True], ids=["by_hand", "fused"])
def fused(request):
    return request.param


def test_layer_norm_equals_pytorch(fused):
    torch.manual_seed(0)
    ours, theirs = LayerNorm(GPTConfig(**SMALL, fused=fused)), nn.LayerNorm(32)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        q.data = p.data = torch.randn(32)
    same(ours, theirs, 3 + 2 * torch.randn(2, 8, 32))
    x = torch.randn(2, 8, 32)
    for layer in (ours, theirs):
        layer(x).pow(2).sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5)


def test_gelu_equals_pytorch():
    same(GELU(), nn.GELU(approximate="tanh"), torch.linspace(-6, 6, 99))


def test_attention_equals_pytorch():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 16, 8)
    same(attention, partial(F.scaled_dot_product_attention, is_causal=True), q, k, v)


def test_attention_is_an_average_of_past_values():
    """By the definition, with loops: shares are exp(q.k / root of size), summed up to the query."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    y = attention(q, k, v)[0, 0]
    q, k, v = q[0, 0], k[0, 0], v[0, 0]
    for t in range(5):
        shares = [math.exp(q[t] @ k[s] / 2) for s in range(t + 1)]
        expected = sum(share * v[s] for s, share in enumerate(shares)) / sum(shares)
        assert torch.allclose(y[t], expected, atol=1e-6)


def test_causal_self_attention_equals_pytorch_multi_head_attention(fused):
    torch.manual_seed(0)
    ours = CausalSelfAttention(GPTConfig(**SMALL, fused=fused))
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    weights = [ours.c_attn.weight, ours.c_attn.bias, ours.c_proj.weight, ours.c_proj.bias]
    for p, q in zip(theirs.parameters(), weights):
        p.data = q.data
    mask = nn.Transformer.generate_square_subsequent_mask(16)
    reference = lambda x: theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    same(ours, reference, torch.randn(2, 16, 32))


def test_a_block_equals_pytorch_transformer_layer(fused):
    torch.manual_seed(0)
    ours = Block(GPTConfig(**SMALL, fused=fused))
    gelu = nn.GELU(approximate="tanh")
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, gelu, batch_first=True, norm_first=True)
    for part, layer in (
        (ours.attn.c_proj, theirs.self_attn.out_proj),
        (ours.mlp.c_fc, theirs.linear1),
        (ours.mlp.c_proj, theirs.linear2),
        (ours.ln_1, theirs.norm1),
        (ours.ln_2, theirs.norm2),
    ):
        part.weight, part.bias = layer.weight, layer.bias
    ours.attn.c_attn.weight = theirs.self_attn.in_proj_weight
    ours.attn.c_attn.bias = theirs.self_attn.in_proj_bias
    mask = nn.Transformer.generate_square_subsequent_mask(16)
    same(ours, partial(theirs, src_mask=mask), torch.randn(2, 16, 32))


def test_gpt_is_embeddings_blocks_norm_and_scores():
    model, idx = build(), torch.randint(65, (2, 16))
    parts = model.transformer
    x = parts.wte.weight[idx] + parts.wpe.weight[:16]
    for block in parts.h:
        x = block(x)
    x = F.layer_norm(x, (32,), parts.ln_f.weight, parts.ln_f.bias)
    logits, loss = model(idx, idx)
    assert torch.allclose(logits, x @ parts.wte.weight.T, atol=1e-6)
    assert torch.allclose(loss, -logits.log_softmax(-1).gather(-1, idx[..., None]).mean())


def test_fused_and_by_hand_are_the_same_model():
    model, by_hand = build(fused=True), build(fused=False)
    by_hand.load_state_dict(model.state_dict())
    idx = torch.randint(65, (2, 16))
    for m in (model, by_hand):
        m(idx, idx)[1].backward()
    assert torch.allclose(model(idx)[0], by_hand(idx)[0], atol=1e-6)
    for p, q in zip(model.parameters(), by_hand.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)


# What a GPT may and may not know


def test_no_token_sees_its_future(fused):
    """Change token t: what the model says at the places before t stays the same to the last bit."""
    model = build(fused=fused)
    idx = torch.randint(65, (2, 16))
    before, _ = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 65
        after, _ = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


def test_every_token_sees_all_of_its_past():
    model = build()
    x = model.transformer.wte(torch.randint(65, (1, 16))).detach().requires_grad_()
    for block in model.transformer.h:
        y = block(x) if block is model.transformer.h[0] else block(y)
    y[0, -1].sum().backward()
    assert torch.all(x.grad[0].abs().sum(-1) > 0)


def test_the_order_of_tokens_matters():
    model = build()
    a, _ = model(torch.tensor([[1, 2, 3]]))
    b, _ = model(torch.tensor([[2, 1, 3]]))
    assert not torch.allclose(a[0, -1], b[0, -1])


def test_sequences_of_a_batch_do_not_mix():
    model = build()
    idx = torch.randint(65, (4, 16))
    together, _ = model(idx)
    alone = torch.cat([model(row[None])[0] for row in idx])
    assert torch.allclose(together, alone, atol=1e-6)


# Training


def test_a_small_gpt_learns_one_batch_by_heart():
    model = build().train()
    x = torch.randint(65, (4, 16))
    optimizers = make_optimizers(model, GPTConfig())
    for _ in range(300):
        _, loss = model(x, x.roll(-1, dims=1))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 0.05


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = build()
    muon, adamw = make_optimizers(model, GPTConfig())
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon, of_adamw = (
        {names[id(p)] for group in o.param_groups for p in group["params"]} for o in (muon, adamw)
    )
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert len(of_muon) == 2 * 4
    assert all(re.search(r"c_(attn|proj|fc)\.weight$", name) for name in of_muon)


def step_of(model, config, step=0, fraction=0.0, optimizers=None):
    """One training step on a batch that is always the same; returns the loss."""
    torch.manual_seed(0)
    x = torch.randint(65, (4, 16))
    optimizers = optimizers or make_optimizers(model, config)
    autocast = torch.autocast("cpu", enabled=False)
    return training_step(model, optimizers, x, x.roll(-1, 1), step, fraction, config, autocast)


def test_the_learning_rate_rises_soon_and_falls_to_zero_as_half_a_cosine():
    model, config, rates = build(), GPTConfig(warmup_iters=9, learning_rate=1.0), []
    optimizers = make_optimizers(model, config)
    for step in range(100):
        step_of(model, config, step, step / 100, optimizers)
        rates.append(optimizers[1].param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1) and rates[:10] == sorted(rates[:10])
    wave = [0.5 + 0.5 * math.cos(math.pi * step / 100) for step in range(10, 100)]
    assert rates[10:] == pytest.approx(wave)


def test_a_gradient_that_is_too_long_is_shortened():
    model = build()
    step_of(model, GPTConfig(grad_clip=0.01))
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_no_step_is_made_by_a_gradient_that_is_not_finite():
    model = build()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.inf
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="step 8: try lower learning rates"):
        step_of(model, GPTConfig(), step=7)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_dropout_drops_other_activations_in_every_step():
    """And the same ones where the seed and the step are the same."""
    losses = [step_of(build(dropout=0.5), GPTConfig(), step) for step in (1, 1, 2, 3)]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_dropout_is_for_training_only():
    model = build(dropout=0.5)
    idx = torch.randint(65, (2, 16))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def train_here(tmp_path, checkpoint=None, **settings):
    """Train a tiny model with dropout on the shipped play; returns the checkpoint on disk."""
    few = {"dropout": 0.2, "batch_size": 4, "max_iters": 12, "eval_interval": 4}
    config = GPTConfig(**{**SMALL, **few, **settings}, out=str(tmp_path / "char_gpt.pt"))
    text = PLAY.read_text(encoding="utf-8")[:4000]
    tokenizer = CharTokenizer(text)
    config.vocab_size = len(tokenizer.chars)
    data = split_data(torch.tensor(tokenizer.encode(text)), config)
    torch.manual_seed(config.seed)
    model = GPT(config)
    if checkpoint is None:
        checkpoint = dict(script="char_gpt", history=[], bytes_per_token=1.0)
        checkpoint |= dict(model=model.state_dict(), last=dict(step=0, losses=[], seconds=0))
    checkpoint["config"] = vars(config)
    autocast = torch.autocast("cpu", enabled=False)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        train(model, *data, tokenizer, config, checkpoint, autocast)
    except SystemExit:
        pass  # stopped
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return load_checkpoint(config.out, "char_gpt"), data[1], config


def test_the_same_seed_trains_the_same_model(tmp_path):
    a, _, _ = train_here(tmp_path)
    torch.manual_seed(99)
    b, _, _ = train_here(tmp_path)
    c, _, _ = train_here(tmp_path, seed=7)
    for name, weight in a["last"]["model"].items():
        assert torch.equal(weight, b["last"]["model"][name])
    assert a["history"] == b["history"] != c["history"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, number):
    whole, _, _ = train_here(tmp_path)

    def stop_in_step_6(data, config, step):
        if step == 5:
            signal.raise_signal(number)
        return get_batch(data, config, step)

    get_batch = char_gpt.get_batch
    monkeypatch.setattr(char_gpt, "get_batch", stop_in_step_6)
    stopped, _, _ = train_here(tmp_path)
    assert stopped["last"]["step"] == 6 and len(stopped["last"]["losses"]) == 2
    monkeypatch.undo()
    resumed, _, _ = train_here(tmp_path, checkpoint=stopped)
    assert resumed["history"] == whole["history"]
    for name, weight in whole["last"]["model"].items():
        assert torch.equal(weight, resumed["last"]["model"][name])
        assert torch.equal(whole["model"][name], resumed["model"][name])


def test_the_weights_kept_for_sampling_are_the_best(tmp_path, monkeypatch):
    """A ninth step that goes wild spoils a run that began well."""

    def step_then_leap(model, optimizers, x, y, step, *rest):
        loss = training_step(model, optimizers, x, y, step, *rest)
        with torch.no_grad():
            for p in model.parameters():
                p += (step == 8) * torch.randn_like(p)
        return loss

    monkeypatch.setattr(char_gpt, "training_step", step_then_leap)
    checkpoint, val_data, config = train_here(tmp_path, warmup_iters=0)
    losses = [val_loss for _, _, val_loss in checkpoint["history"]]
    assert min(losses) == losses[1] < losses[2]
    model = GPT(config)
    kept, last = checkpoint["model"], checkpoint["last"]["model"]
    for weights, loss in ((kept, losses[1]), (last, losses[2])):
        model.load_state_dict(weights)
        assert evaluate(model, val_data, config) == pytest.approx(loss, rel=1e-5)


def test_a_flag_given_on_resuming_counts(tmp_path):
    """Also one that the optimizers keep in their state."""
    begun, _, _ = train_here(tmp_path, max_iters=4)
    kept, _, _ = train_here(tmp_path, checkpoint=begun, max_iters=8)
    begun, _, _ = train_here(tmp_path, max_iters=4)
    changed, _, _ = train_here(tmp_path, checkpoint=begun, max_iters=8, weight_decay=30.0)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert changed["last"]["model"][name].norm() < 0.9 * kept["last"]["model"][name].norm()


# The command


def test_the_command_says_what_it_does(clone):
    output = (clone / "logs" / "char_gpt.txt").read_text(encoding="utf-8")
    before = re.search(r"before training: val loss (\S+); uniform: ln\(65\) = 4\.1744", output)[1]
    assert float(before) == pytest.approx(4.1744, abs=0.1)
    assert float(re.search(r"best val loss (\S+) at step 60", output)[1]) < 3.0
    for part in ("--full trains the full", "on cpu in torch.", "parameters", "bits/byte", "    | "):
        assert part in output
    assert "next: python sample.py out/char_gpt.pt" in output


FLAGS = "--data data/the-glass-harbour.txt --n_layer 1 --n_head 1 --n_embd 16 --block_size 16"


def test_resume_trains_for_longer_and_refuses_another_size_or_text(clone):
    few = f"{FLAGS} --max_iters 4 --eval_interval 2 --out r.pt"
    assert "before training" in run("char_gpt.py", "--resume", *few.split(), cwd=clone)[0]
    before = (clone / "r.pt").read_bytes()
    resume = ("--resume", "--out", "r.pt")
    (clone / "other.txt").write_text("".join(sorted(PLAY.read_text(encoding="utf-8"))))
    for other in ("--n_layer 2", "--n_head 2", "--n_embd 32", "--block_size 8", "--data other.txt"):
        error = one_line_error("char_gpt.py", *resume, *other.split(), cwd=clone)
        assert "--resume: the run has n_layer 1, n_head 1" in error
    assert (clone / "r.pt").read_bytes() == before
    output, _ = run("char_gpt.py", *resume, "--max_iters", "6", cwd=clone)
    assert "before training" not in output and "step 6:" in output


STOP = """
import runpy, signal, sys
sys.argv, train = sys.argv[1:], None
sys.path.insert(0, {root!r})
import char_gpt
step = char_gpt.training_step
def stop_in_step_3(*args):
    if args[4] == 2:
        signal.raise_signal(signal.SIGINT)
    return step(*args)
char_gpt.training_step = stop_in_step_3
char_gpt.main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no SIGINT to send")
def test_ctrl_c_saves_but_keeps_an_earlier_runs_model_until_there_is_a_better_one(clone):
    code = STOP.format(root=str(ROOT))
    path, flags = clone / "c.pt", f"{FLAGS} --out c.pt".split()
    path.unlink(missing_ok=True)
    _, error = run("-c", code, "char_gpt.py", *flags, cwd=clone, status=1)
    assert "stopped after step 3; --resume goes on" in error
    assert load_checkpoint(path, "char_gpt")["last"]["step"] == 3
    before = path.read_bytes()
    _, error = run("-c", code, "char_gpt.py", *flags, cwd=clone, status=1)
    assert "stopped after step 3; old file kept" in error and path.read_bytes() == before
    evaluated = [*flags, "--eval_interval", "1"]
    run("-c", code, "char_gpt.py", *evaluated, cwd=clone, status=1)
    assert path.read_bytes() != before


def test_minutes_drive_the_schedule_by_the_clock(tmp_path, monkeypatch):
    """A clock that moves by a second a look: the run ends after the minutes, not by its steps."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(char_gpt.time, "perf_counter", lambda: float(next(seconds)))
    fractions = []

    def record(model, optimizers, x, y, step, fraction, *rest):
        fractions.append(fraction)
        return training_step(model, optimizers, x, y, step, fraction, *rest)

    monkeypatch.setattr(char_gpt, "training_step", record)
    checkpoint, _, _ = train_here(tmp_path, minutes=1.0, max_iters=3, eval_interval=1000)
    assert len(fractions) > 20 and fractions == sorted(fractions)
    assert fractions[0] < 0.1 and 0.9 < fractions[-1] < 1
    assert checkpoint["history"][-1][0] == len(fractions)
