"""char_gpt.py: a transformer, its parts against PyTorch's own, and its training."""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from char_gpt import (
    CPU_SETTINGS,
    GELU,
    GPT,
    MLP,
    Block,
    CausalSelfAttention,
    GPTConfig,
    LayerNorm,
    attention,
    make_optimizers,
)

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16)


def build(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **settings})).eval()


# Shapes and sizes


def test_every_part_keeps_the_shape_of_the_residual_stream():
    config = GPTConfig(**SMALL)
    x = torch.randn(3, 16, 32)
    parts = [LayerNorm(32), GELU(), CausalSelfAttention(config), MLP(config), Block(config)]
    for part in parts:
        assert part(x).shape == (3, 16, 32), part
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


def test_more_tokens_than_the_context_holds_are_refused():
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        build()(torch.zeros(1, 17, dtype=torch.long))


# Before training


@pytest.mark.parametrize("settings", [{}, CPU_SETTINGS], ids=["full", "small"])
def test_before_training_the_loss_is_that_of_a_uniform_guess(settings):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**settings)).eval()
    idx = torch.randint(65, (4, model.context_size))
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


@pytest.fixture(params=[False, True], ids=["built in", "by hand"])
def by_hand(request):
    return request.param


def set_by_hand(module, by_hand):
    """A layer with the formulas of char_gpt.py (by_hand), or with PyTorch's built-ins."""
    for part in module.modules():
        part.by_hand = by_hand
    return module


def test_layer_norm_equals_pytorch(by_hand):
    torch.manual_seed(0)
    ours = set_by_hand(LayerNorm(32), by_hand)
    theirs = nn.LayerNorm(32)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        q.data = p.data = torch.randn(32)
    same(ours, theirs, 3 + 2 * torch.randn(2, 8, 32))
    x = torch.randn(2, 8, 32)
    for layer in (ours, theirs):
        layer(x).pow(2).sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5)


def test_layer_norm_makes_mean_0_and_variance_1(by_hand):
    y = set_by_hand(LayerNorm(32), by_hand)(5 + 7 * torch.randn(2, 8, 32))
    assert torch.allclose(y.mean(-1), torch.zeros(2, 8), atol=1e-5)
    assert torch.allclose(y.var(-1, correction=0), torch.ones(2, 8), atol=1e-4)


def test_gelu_equals_pytorch(by_hand):
    ours = set_by_hand(GELU(), by_hand)
    same(ours, nn.GELU(approximate="tanh"), torch.linspace(-6, 6, 99))


def test_gelu_is_near_x_times_the_normal_distribution():
    x = torch.linspace(-6, 6, 99)
    expected = x * torch.distributions.Normal(0, 1).cdf(x)
    assert torch.allclose(set_by_hand(GELU(), True)(x), expected, atol=1e-3)


def test_attention_equals_pytorch():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 16, 8)
    same(attention, partial(F.scaled_dot_product_attention, is_causal=True), q, k, v)


def test_attention_is_a_weighted_mean_of_past_values():
    """By the definition, with loops: the weight of token s is exp(q . k / sqrt(head_size)), divided
    by the sum of these over all tokens up to the query."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    result = attention(q, k, v)[0, 0]
    for t in range(5):
        weights = [math.exp(q[0, 0, t] @ k[0, 0, s] / 2) for s in range(t + 1)]
        expected = sum(w * v[0, 0, s] for s, w in enumerate(weights)) / sum(weights)
        assert torch.allclose(result[t], expected, atol=1e-6), f"token {t}"


def test_the_example_in_the_docstring_of_attention_is_right():
    """Keys that are the rows of the identity matrix make the scores those of the queries."""
    table = re.findall(r"^ +(-?\d.*)$", attention.__doc__, re.MULTILINE)
    rows = [[float(word) for word in row.split()] for row in table]
    scores, masked, weights, result = torch.tensor(rows).split((3, 3, 3, 1), dim=1)
    assert scores.shape == (3, 3)
    q = scores * math.sqrt(3)
    k = torch.eye(3)
    values = torch.tensor([[10.0], [20.0], [30.0]]).expand(3, 3)
    y = attention(q[None, None], k[None, None], values[None, None])[0, 0, :, :1]
    assert torch.allclose(y, result, atol=0.05)
    assert torch.allclose(attention(q[None, None], k[None, None], k[None, None]), weights, atol=0.005)
    assert torch.equal(masked, scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf))


def test_causal_self_attention_equals_pytorch_multi_head_attention(by_hand):
    torch.manual_seed(0)
    ours = set_by_hand(CausalSelfAttention(GPTConfig(**SMALL)), by_hand)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    weights = [ours.c_attn.weight, ours.c_attn.bias, ours.c_proj.weight, ours.c_proj.bias]
    for p, q in zip(theirs.parameters(), weights):
        p.data = q.data
    mask = nn.Transformer.generate_square_subsequent_mask(16)
    reference = lambda x: theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    same(ours, reference, torch.randn(2, 16, 32))


def test_a_block_equals_pytorch_transformer_layer(by_hand):
    torch.manual_seed(0)
    ours = set_by_hand(Block(GPTConfig(**SMALL)), by_hand)
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
    assert torch.allclose(logits, x @ model.lm_head.weight.T, atol=1e-6)
    assert torch.allclose(loss, -logits.log_softmax(-1).gather(-1, idx[..., None]).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_hand_or_not_it_is_the_same_model(dtype):
    model = build()
    by_hand = build(by_hand=True)
    by_hand.load_state_dict(model.state_dict())
    assert all(part.by_hand for part in by_hand.modules())
    assert not any(part.by_hand for part in model.modules())
    idx = torch.randint(65, (2, 16))
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    for m in (model, by_hand):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            m(idx, idx)[1].backward()
    for p, q in zip(model.parameters(), by_hand.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=tolerance)


# What a GPT may and may not know


def test_no_token_sees_its_future(by_hand):
    """Change token t: what the model predicts before t stays the same, to the last bit."""
    model = build(by_hand=by_hand)
    idx = torch.randint(65, (2, 16))
    before, _ = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 65
        after, _ = model(changed)
        for s in range(16):
            unchanged = torch.equal(before[:, s], after[:, s])
            assert unchanged or s >= t, f"position {s} sees position {t}"
        assert not torch.equal(before[:, t:], after[:, t:]), f"position {t} does not see itself"


def test_every_token_sees_all_of_its_past():
    model = build()
    x = model.transformer.wte(torch.randint(65, (1, 16))).detach().requires_grad_()
    y = x
    for block in model.transformer.h:
        y = block(y)
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
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss.item() < 0.05


# The command


def test_the_command_says_what_it_does(clone):
    output = (clone / "logs" / "char_gpt.txt").read_text(encoding="utf-8")
    before = re.search(r"before training: val loss (\S+); a uniform guess: ln\(65\) = 4\.1744", output)
    assert float(before[1]) == pytest.approx(4.1744, abs=0.1)
    assert float(re.search(r"best val loss (\S+) at step 60", output)[1]) < 3.0
    for part in ("the full model's (--full): n_layer 2", "on cpu in torch.", "parameters", "bits/byte", "    | "):
        assert part in output
    assert "next: python sample.py out/char_gpt.pt" in output
