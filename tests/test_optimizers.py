"""Adam and Muon, as they are written out in both scripts, against PyTorch's own."""

import math
import re
from collections import Counter

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import bpe_gpt
import char_gpt

for_each_gpt = pytest.mark.parametrize(
    "script", [char_gpt, bpe_gpt], ids=lambda script: script.__name__)

# All shapes that the parameters of a GPT have, with C = 32: gains and biases, embeddings, and the
# matrices of two blocks.
VECTORS = [(32,), (32,), (96,), (128,), (96,)]
EMBEDDINGS = [(65, 32), (16, 32)]
MATRICES = [(96, 32), (32, 32), (128, 32), (32, 128)] * 2


def parameters(shapes):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def give_gradients(*lists):
    """The same random gradients for the parameters of each list."""
    for same in zip(*lists):
        grad = torch.randn(same[0].shape)
        for p in same:
            p.grad = grad.clone()


def distance(ours, theirs):
    return max((p - q).abs().max().item() for p, q in zip(ours, theirs))


@for_each_gpt
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_makes_the_steps_of_pytorch(script, weight_decay):
    ours, theirs = parameters(VECTORS + EMBEDDINGS + MATRICES), parameters(VECTORS + EMBEDDINGS + MATRICES)
    adam = script.Adam(ours, 0.02, weight_decay)
    reference = torch.optim.AdamW(theirs, lr=0.02, weight_decay=weight_decay)
    for _ in range(10):
        give_gradients(ours, theirs)
        adam.step()
        reference.step()
        assert distance(ours, theirs) < 2e-6


@for_each_gpt
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_makes_the_steps_of_pytorch(script, weight_decay, dtype, monkeypatch):
    """PyTorch's works in bfloat16, with 8 bits: a step of 0.02 is right to about a hundredth."""
    monkeypatch.setattr(script, "pick_dtype", lambda name, device: dtype)
    ours, theirs = parameters(MATRICES), parameters(MATRICES)
    muon = script.Muon(ours, 0.02, weight_decay)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=weight_decay, ns_steps=4)
    for _ in range(10):
        give_gradients(ours, theirs)
        muon.step()
        reference.step()
    assert distance(ours, parameters(MATRICES)) > 0.02
    assert distance(ours, theirs) < 0.002


@for_each_gpt
def test_an_optimizer_continues_from_what_was_saved(script, tmp_path):
    """Five steps, saved and restored, and five more, are ten."""
    model, again = [
        script.GPT(script.GPTConfig(vocab_size=65, n_layer=2, n_head=2, n_embd=32, block_size=16))
        for _ in range(2)]
    again.load_state_dict(model.state_dict())
    config = script.GPTConfig()
    optimizers = script.make_optimizers(model, config)
    for step in range(10):
        if step == 5:
            checkpoint = {"history": [(5, 0, 1.0, 1.0)]}
            script.save(checkpoint, 0.0, model, optimizers, tmp_path / "x.pt")
            last = torch.load(tmp_path / "x.pt", weights_only=True)["last"]
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        for optimizer in optimizers:
            optimizer.step()
    others = script.make_optimizers(again, config)
    assert script.restore(last, again, others)[0] == 5
    for step in range(5, 10):
        for i, p in enumerate(again.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        for optimizer in others:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


@for_each_gpt
@pytest.mark.parametrize("no_gradient", ["zeros", "None"])
def test_a_gradient_of_zero_moves_nothing_and_spoils_nothing(script, no_gradient):
    """Whether a parameter has a gradient of zeros, or none, because the model does not use it."""
    for optimizer in (script.Adam, script.Muon):
        used, unused = parameters([(32, 32), (32, 32)])
        before = unused.detach().clone()
        used.grad = torch.randn(32, 32)
        unused.grad = torch.zeros(32, 32) if no_gradient == "zeros" else None
        optimizer([used, unused], 0.02, 0.0).step()
        assert torch.equal(unused, before) and used.isfinite().all()
        assert not torch.equal(used, before)


@for_each_gpt
def test_the_multiplier_scales_the_step_and_the_decay(script):
    for optimizer in (script.Adam, script.Muon):
        half, whole = parameters([(32, 16)]), parameters([(32, 16)])
        give_gradients(half, whole)
        optimizer(half, 0.2, 0.1).step(0.5)
        optimizer(whole, 0.1, 0.1).step()
        assert distance(half, whole) < 1e-7


@for_each_gpt
def test_adams_first_step_is_the_learning_rate_whatever_the_gradient(script):
    """That is what the correction of the means is for."""
    (p,) = parameters([(4,)])
    before = p.detach().clone()
    p.grad = torch.tensor([1e-4, -1.0, 30.0, -1e5])
    script.Adam([p], 0.02).step()
    assert torch.allclose(before - p, 0.02 * p.grad.sign(), rtol=1e-3)


# Newton-Schulz


def singular_values(x):
    return torch.linalg.svdvals(x.float())


@for_each_gpt
@pytest.mark.parametrize("shape", [(24, 24), (8, 32), (32, 8)])
def test_orthogonalize_changes_the_strengths_and_no_direction(script, shape):
    """Each singular value becomes what the polynomial makes of it; U and V stay."""
    torch.manual_seed(0)
    x = torch.randn(2, *shape, dtype=torch.float64)
    U, S, Vt = torch.linalg.svd(x, full_matrices=False)
    s = S / S.norm(dim=-1, keepdim=True)
    for _ in range(4):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert torch.allclose(script.orthogonalize(x), U @ torch.diag_embed(s) @ Vt, atol=1e-9)


def test_the_numbers_in_the_docstring_of_orthogonalize_are_right():
    text = " ".join(char_gpt.orthogonalize.__doc__.split())
    examples = re.findall(r"(0[\d.]+) becomes ((?:\d\.\d+,? ?)+)", text)
    assert [s for s, _ in examples] == ["0.1", "0.001"]
    for start, after in examples:
        rounds = [float(start)]
        for _ in range(4):
            s = rounds[-1]
            rounds.append(3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5)
        expected = [float(number) for number in re.findall(r"\d\.\d+", after)]
        assert rounds[-len(expected) :] == pytest.approx(expected, abs=0.0006)


def test_rounds_of_newton_schulz_keep_strong_directions_between_0_7_and_1_2():
    """What the docstring says of large strengths: from round to round, none leaves this range."""
    s = torch.linspace(0.7, 1.21, 1000)
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert s.min() > 0.67 and s.max() < 1.21
    small = torch.linspace(0.0, 0.05, 100)
    after = 3.4445 * small - 4.7750 * small**3 + 2.0315 * small**5
    assert torch.allclose(after, 3.4445 * small, rtol=0.005)


def test_muon_makes_the_directions_of_a_gradient_about_equally_strong():
    """A gradient in which two of 32 directions are strong. Before, the strongest is more than 300
    times as strong as the weakest but four; after it, not twice as strong."""
    torch.manual_seed(0)
    (p,) = [nn.Parameter(torch.zeros(32, 32))]
    p.grad = torch.randn(32, 2) @ torch.randn(2, 32) + 0.1 * torch.randn(32, 32)
    before = singular_values(p.grad)
    char_gpt.Muon([p], 1.0).step()
    after = singular_values(p.data)
    assert before[0] > 300 * before[28]
    assert after[0] < 2 * after[16]
    assert (after > 0.5).float().mean() > 0.8


# Cost


class Operations(TorchDispatchMode):
    """Counts the elementary operations, views included, that a step asks of the device."""
    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(optimizer):
    optimizer.step()  # the first may have more to do
    with Operations() as counter:
        optimizer.step()
    return counter.counts.total()


@for_each_gpt
def test_a_step_takes_few_operations_since_parameters_of_one_shape_are_stacked(script):
    """On a GPU, each operation has to be launched. PyTorch's Muon takes 602 for as many matrices."""
    model = script.GPT(script.GPTConfig(vocab_size=65, n_layer=6, n_head=6, n_embd=96, block_size=16))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    muon, *adams = script.make_optimizers(model, script.GPTConfig())
    n_matrices = sum(map(len, muon.stacks))  # 24 in 4 stacks: 160 operations
    assert operations(muon) <= 7 * n_matrices
    n_others = sum(len(stack) for adam in adams for stack in adam.stacks)
    assert sum(map(operations, adams)) <= 4 * n_others
