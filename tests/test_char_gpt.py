"""char_gpt.py: a transformer, its parts against PyTorch's own, and its training."""

import math
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import PLAY, one_line_error, run

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
    learning_rate_share,
    load_checkpoint,
    make_optimizers,
    split_text,
    train,
)

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, dropout=0.0)


def build(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **settings})).eval()


# ---------------------------------------------------------------------------------------------
# Shapes and sizes


def test_every_part_keeps_the_shape_of_the_residual_stream():
    config = GPTConfig(**SMALL)
    x = torch.randn(3, 16, 32)
    for part in (LayerNorm, GELU, CausalSelfAttention, MLP, Block):
        assert part(config)(x).shape == (3, 16, 32), part
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
    with pytest.raises(ValueError, match="block_size"):
        build()(torch.zeros(1, 17, dtype=torch.long))


# ---------------------------------------------------------------------------------------------
# Before training


@pytest.mark.parametrize("settings", [{}, CPU_SETTINGS], ids=["full", "small"])
def test_before_training_the_loss_is_that_of_an_even_guess(settings):
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


# ---------------------------------------------------------------------------------------------
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


def test_gelu_equals_pytorch(fused):
    same(GELU(GPTConfig(fused=fused)), nn.GELU(approximate="tanh"), torch.linspace(-6, 6, 99))


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


# ---------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------
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


def test_the_learning_rate_rises_soon_and_falls_in_a_line_to_zero():
    config = GPTConfig(warmup_iters=9, max_iters=100)
    shares = [learning_rate_share(step, config) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[:10] == sorted(shares[:10])
    assert shares[10:] == pytest.approx([1 - step / 100 for step in range(10, 100)])


def test_dropout_is_for_training_only():
    model = build(dropout=0.5)
    idx = torch.randint(65, (2, 16))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_where_compiling_fails_the_model_runs_as_it_is(monkeypatch):
    def no_compiler(model):
        raise RuntimeError("no C compiler")

    model, idx = build(), torch.randint(65, (2, 16))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert char_gpt.try_compile(model, idx, idx) is model
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert char_gpt.try_compile(model, idx, idx) is model


def train_here(tmp_path, checkpoint=None, interrupted_at=None, **settings):
    """Train a tiny model with dropout on the shipped play; returns the checkpoint on disk."""
    few = {"dropout": 0.2, "batch_size": 4, "max_iters": 12, "eval_interval": 4}
    config = GPTConfig(**{**SMALL, **few, **settings}, out=str(tmp_path / "char_gpt.pt"))
    text = PLAY.read_text(encoding="utf-8")[:4000]
    tokenizer = CharTokenizer(text)
    config.vocab_size = tokenizer.vocab_size
    data = [torch.tensor(tokenizer.encode(part)) for part in split_text(text)]
    torch.manual_seed(config.seed)
    model = GPT(config)
    if checkpoint is None:
        checkpoint = dict(script="char_gpt", vocab=text, history=[], last=None)
        checkpoint["model"] = model.state_dict()
    checkpoint["config"] = vars(config)
    autocast = torch.autocast("cpu", enabled=False)
    handler = signal.getsignal(signal.SIGINT)
    try:
        train(model, tokenizer, *data, config, autocast, checkpoint)
    finally:
        signal.signal(signal.SIGINT, handler)
    return load_checkpoint(config.out, "char_gpt"), data[1], config


def test_the_same_seed_trains_the_same_model(tmp_path):
    a, _, _ = train_here(tmp_path)
    torch.manual_seed(99)
    b, _, _ = train_here(tmp_path)
    c, _, _ = train_here(tmp_path, seed=7)
    for name, weight in a["last"]["model"].items():
        assert torch.equal(weight, b["last"]["model"][name])
    assert a["history"] == b["history"] != c["history"]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole, _, _ = train_here(tmp_path)

    def stop_in_step_6(data, config, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
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
    """A learning rate that goes wild in the ninth step spoils a run that began well."""
    monkeypatch.setattr(char_gpt, "learning_rate_share", lambda step, _: 1 if step < 8 else 300)
    checkpoint, val_data, config = train_here(tmp_path)
    losses = [val_loss for _, _, val_loss in checkpoint["history"]]
    assert min(losses) == losses[1] < losses[2]
    model = GPT(config)
    kept, last = checkpoint["model"], checkpoint["last"]["model"]
    for weights, loss in ((kept, losses[1]), (last, losses[2])):
        model.load_state_dict(weights)
        assert evaluate(model, val_data, config) == pytest.approx(loss, rel=1e-5)


# ---------------------------------------------------------------------------------------------
# The command


def test_the_command_says_what_it_does(clone):
    output = (clone / "logs" / "char_gpt.txt").read_text(encoding="utf-8")
    before = re.search(r"before training: validation loss (\S+); .* ln\(65\) = 4\.1744", output)[1]
    assert float(before) == pytest.approx(4.1744, abs=0.1)
    after = re.search(r"validation loss (\S+) at the end, (\S+) at best", output)
    assert float(after[1]) < 3.0
    for part in ("text: the-glass-harbour.txt", "parameters, on ", "60 steps of", "bits per byte"):
        assert part in output
    assert "to sample from it: python sample.py out/char_gpt.pt" in output


def test_resume_trains_for_longer_and_refuses_another_shape(clone):
    flags = ("--resume", "--offline", "--max_iters", "70")
    folder = clone
    assert "n_layer" in one_line_error("char_gpt.py", *flags, "--n_layer", "3", cwd=folder)
    assert "max_iters" in one_line_error("char_gpt.py", "--resume", "--offline", cwd=folder)
    output, _ = run("char_gpt.py", *flags, cwd=folder)
    assert "going on after step 60" in output and "step 70/70" in output


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_saves_and_says_how_to_go_on(clone):
    flags = "--offline --n_layer 1 --max_iters 100000 --out out/long.pt"
    process = subprocess.Popen(
        [sys.executable, "-u", "char_gpt.py", *flags.split()],
        cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("at this speed"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ""
    assert "to go on: python char_gpt.py --resume --out out/long.pt" in output
    checkpoint = load_checkpoint(clone / "out" / "long.pt", "char_gpt")
    (clone / "out" / "long.pt").unlink()
    assert checkpoint["last"]["step"] >= 11


def test_a_run_by_the_clock_settles_its_steps_from_its_speed(monkeypatch):
    config = GPTConfig(minutes=2.0, max_iters=1000, eval_interval=250)
    char_gpt.set_steps(config, first=100, seconds=0.1, n_val_tokens=30_000, n_tokens=1000)
    # 1,200 steps fit into two minutes; four evaluations cost as much as ten steps each.
    assert config.max_iters == 100 + 1200 - 40 and config.minutes == 0
    assert config.eval_interval == pytest.approx(config.max_iters / 4, abs=1)


@pytest.mark.parametrize("script", ["char_gpt", "bpe_gpt"])
def test_minutes_end_a_run_in_time_with_the_learning_rate_gone_to_zero(clone, script):
    size = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 8 --offline"
    size += " --init scratch --learned_vocab_size 300 --total_batch_size 128" * (
        script == "bpe_gpt"
    )
    flags = f"{size} --minutes 0.03 --out out/timed.pt"
    started = time.perf_counter()
    out, _ = run(f"{script}.py", *flags.split(), cwd=clone)
    assert time.perf_counter() - started < 30
    checkpoint = load_checkpoint(clone / "out" / "timed.pt", script)
    config, last = checkpoint["config"], checkpoint["last"]
    assert config["minutes"] == 0 and last["step"] == config["max_iters"] not in (1800, 2400)
    assert f"at this speed, {config['max_iters']:,} steps take" in out
    assert 4 <= len(checkpoint["history"]) <= 7, "as many evaluations as without --minutes"
    (clone / "out" / "timed.pt").unlink()
