"""What must be true of training, in whichever script: batches, optimizers, the schedule, the best
weights, stopping and resuming. Each test runs with every script that the claim is about."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import PLAY, ROOT, one_line_error, run, without_gpu

import bigram
import bpe_gpt
import char_gpt

GPTS = [char_gpt, bpe_gpt]
for_each_gpt = pytest.mark.parametrize("script", GPTS, ids=lambda script: script.__name__)
for_each_script = pytest.mark.parametrize(
    "script", [bigram, *GPTS], ids=lambda script: script.__name__)

# ---- Batches ------------------------------------------------------------------------------------

B = 4
T = 16


def get_batch(script, tokens, step, seed=5):
    """Inputs and targets of a step: B windows of T tokens."""
    if script is bpe_gpt:
        config = bpe_gpt.GPTConfig(block_size=T, total_batch_size=B * T, seed=seed)
        return bpe_gpt.TextData(np.asarray(tokens), config).training_batch(step)
    Config = bigram.BigramConfig if script is bigram else char_gpt.GPTConfig
    config = Config(block_size=T, batch_size=B, seed=seed)
    return script.get_batch(torch.as_tensor(tokens), config, step)


TEXT = torch.arange(1000)
STEPS = (999 // T - 1) // B  # in an epoch


@for_each_script
def test_targets_are_the_inputs_one_token_later(script):
    x, y = get_batch(script, TEXT, 0)
    assert x.shape == y.shape == (B, T)
    assert torch.equal(y, x + 1)


@for_each_script
def test_a_batch_depends_on_seed_and_step_alone(script):
    x, _ = get_batch(script, TEXT, 3)
    torch.manual_seed(99)  # whatever else uses random numbers
    np.random.seed(99)
    assert torch.equal(x, get_batch(script, TEXT, 3)[0])
    assert not torch.equal(x, get_batch(script, TEXT, 4)[0])
    assert not torch.equal(x, get_batch(script, TEXT, 3, seed=6)[0])


@for_each_script
def test_each_token_comes_once_in_an_epoch(script):
    """At most once, and all but those that do not fill a batch, or a window, do come."""
    for epoch in range(3):
        steps = range(epoch * STEPS, (epoch + 1) * STEPS)
        tokens = torch.cat([get_batch(script, TEXT, step)[0].flatten() for step in steps])
        assert len(tokens.unique()) == len(tokens) == STEPS * B * T
        assert len(TEXT) - len(tokens) < (B + 2) * T


@for_each_script
def test_every_epoch_cuts_the_text_in_other_places_and_another_order(script):
    epochs = []
    for epoch in range(3):
        steps = range(epoch * STEPS, (epoch + 1) * STEPS)
        epochs.append(torch.cat([get_batch(script, TEXT, step)[0][:, 0] for step in steps]))
    cuts = [epoch[0].item() % T for epoch in epochs]
    assert all(torch.all(epoch % T == cut) for epoch, cut in zip(epochs, cuts))
    assert len(set(cuts)) > 1, "an offset that changes"
    orders = [(epoch - cut).tolist() for epoch, cut in zip(epochs, cuts)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != sorted(orders[0])


@for_each_script
def test_another_seed_takes_the_windows_in_another_order(script):
    """And not only from another offset on."""
    orders = []
    for seed in (5, 6):
        starts = [get_batch(script, TEXT, step, seed)[0][:, 0] for step in range(STEPS)]
        orders.append(torch.cat(starts).diff().tolist())  # from each window to the next
    assert orders[0] != orders[1]


@for_each_script
@pytest.mark.parametrize("length", [200, 201, 207, 216])
def test_no_part_of_the_text_is_left_out(script, length):
    seen = set()
    for step in range(400):
        for part in get_batch(script, torch.arange(length), step):
            seen.update(part.flatten().tolist())
    assert seen == set(range(length))


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 40])
def test_a_text_shorter_than_the_context_is_used_as_it_is(length):
    for step in range(20):
        x, y = get_batch(bpe_gpt, torch.arange(length), step)
        assert torch.equal(y, x + 1) and x.shape[1] == min(T, length - 1)

# ---- Steps --------------------------------------------------------------------------------------

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=65)


def build(script, **settings):
    torch.manual_seed(0)
    no_dropout = dict(dropout=0.0) if script is bpe_gpt else {}
    return script.GPT(script.GPTConfig(**SMALL | no_dropout | settings))


def take_step(script, model, config, step=0, optimizers=None, length=16, dtype=torch.float32):
    """One training step on a batch that is always the same; returns the loss."""
    torch.manual_seed(0)
    x = torch.randint(65, (4, length))
    optimizers = optimizers or script.make_optimizers(model, config)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    return script.training_step(
        model, optimizers, x, x.roll(-1, 1), step, config, autocast)


@for_each_gpt
def test_muon_gets_the_matrices_of_the_blocks_and_adam_the_rest(script):
    model = build(script)
    optimizers = script.make_optimizers(model, script.GPTConfig())
    names = {id(p): name for name, p in model.named_parameters()}
    given = {script.Muon: [], script.Adam: []}
    for optimizer in optimizers:
        for stack in optimizer.stacks:
            given[type(optimizer)] += [names[id(p)] for p in stack]
    assert len(given[script.Muon]) == 2 * 4
    assert all(re.search(r"c_(attn|proj|fc)\.weight$", name) for name in given[script.Muon])
    assert sorted(given[script.Muon] + given[script.Adam]) == sorted(names.values())


def test_without_muon_adam_gets_all():
    model = build(bpe_gpt)
    optimizers = bpe_gpt.make_optimizers(model, bpe_gpt.GPTConfig(muon_learning_rate=0))
    assert {type(optimizer) for optimizer in optimizers} == {bpe_gpt.Adam}
    n = sum(len(stack) for optimizer in optimizers for stack in optimizer.stacks)
    assert n == len(list(model.parameters()))


@for_each_gpt
def test_a_gradient_that_is_too_long_is_shortened(script):
    model = build(script)
    take_step(script, model, script.GPTConfig(grad_clip=0.01))
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@for_each_gpt
def test_a_grad_clip_of_0_leaves_the_gradient_as_it_is(script):
    norms = []
    for grad_clip in (0.0, 1e9):
        model = build(script)
        take_step(script, model, script.GPTConfig(grad_clip=grad_clip))
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    assert norms[0] > 0.1 and norms[0] == norms[1]


@for_each_gpt
def test_no_step_is_made_with_a_gradient_that_is_not_finite(script):
    model = build(script)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.inf
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="step 8: try lower learning rates"):
        take_step(script, model, script.GPTConfig(), step=7)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@for_each_gpt
def test_a_step_is_made_in_training_mode(script):
    model = build(script).eval()
    take_step(script, model, script.GPTConfig())
    assert model.training


@pytest.mark.parametrize("script, muon", [(char_gpt, True), (bpe_gpt, True), (bpe_gpt, False)])
def test_weight_decay_shrinks_matrices_and_leaves_gains_and_biases_alone(script, muon):
    """With gradients of zero, a step is the decay alone: p * (1 - rate * decay). char_gpt.py leaves
    the embeddings alone, too."""
    model = build(script)
    rate = 0.02 if muon else 0.0
    config = script.GPTConfig(learning_rate=0.01, muon_learning_rate=rate, weight_decay=5.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in script.make_optimizers(model, config):
        optimizer.step()
    for name, p in model.named_parameters():
        rate = 0.0
        if p.dim() == 2 and ".h." in name:
            rate = 0.02 if muon else 0.01
        elif p.dim() == 2 and script is bpe_gpt:
            rate = 0.01
        assert torch.allclose(p, before[name] * (1 - rate * 5.0)), name


@for_each_gpt
def test_the_projections_onto_the_residual_stream_start_smaller(script):
    model = build(script, n_layer=8, n_embd=128)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name


def test_dropout_is_of_what_a_part_adds_and_not_of_the_stream():
    """With all dropped, a block leaves its input as it is; with all embeddings dropped, nothing is
    left, and the scores are those of ln_f's bias, which starts at zero."""
    model = build(bpe_gpt, dropout=1.0).train()
    x = torch.randn(2, 16, 32)
    assert torch.equal(model.transformer.h[0](x), x)
    assert torch.all(model(torch.randint(65, (2, 16)))[0] == 0)


def test_dropout_drops_other_activations_in_every_step():
    """And the same ones where the seed and the step are the same."""
    config = bpe_gpt.GPTConfig()
    losses = [take_step(bpe_gpt, build(bpe_gpt, dropout=0.5), config, s) for s in (1, 1, 2, 3)]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_dropout_is_of_other_random_numbers_in_each_process_each_step_and_each_run(monkeypatch):
    """Or all processes would drop the same places of their rows."""
    monkeypatch.setattr(bpe_gpt, "N_PROCESSES", 3)
    monkeypatch.setattr(bpe_gpt.dist, "all_reduce", lambda tensor: None)
    seeds = []
    for seed in (1, 2):
        for step in range(3):
            for rank in range(3):
                monkeypatch.setattr(bpe_gpt, "RANK", rank)
                take_step(bpe_gpt, build(bpe_gpt), bpe_gpt.GPTConfig(seed=seed), step)
                seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 2 * 3 * 3


@for_each_gpt
def test_a_step_starts_from_gradients_of_zero(script):
    """Two steps on the same batch do not add up: with a rate of 0, the gradient stays the same."""
    model = build(script)
    config = script.GPTConfig(learning_rate=0.0, muon_learning_rate=1e-30, grad_clip=1e9)
    take_step(script, model, config)
    before = model.transformer.ln_f.bias.grad.clone()
    take_step(script, model, config)
    assert torch.allclose(before, model.transformer.ln_f.bias.grad, rtol=1e-4)


@for_each_gpt
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_can_be_compiled_whole_for_any_length(script, dtype):
    """Without a place where the compiler gives up, and with the same losses as not compiled."""
    torch._dynamo.reset()
    config = script.GPTConfig(warmup_iters=0)
    models = build(script), build(script)
    compiled = torch.compile(models[0], backend="aot_eager", fullgraph=True)
    optimizers = [script.make_optimizers(model, config) for model in models]
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for step, length in enumerate((16, 12, 9, 16)):
        losses = [
            take_step(script, model, config, step, own, length, dtype)
            for model, own in zip((compiled, models[1]), optimizers)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=tolerance), f"step {step}"

# ---- Runs of the real command -------------------------------------------------------------------

SIZE = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16"
RUN = SIZE + " --max_iters 12 --eval_interval 4 --warmup_iters 2 --learning_rate 0.01"
FLAGS = {
    char_gpt: RUN + " --batch_size 4",
    bpe_gpt: RUN + " --vocab_size 300 --batch_size 3 --total_batch_size 128 --dropout 0.2",
}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(script, out, flags): what `python SCRIPT FLAGS` does, in this process, on a short text.
    Returns the checkpoint, or None if there is none (or load is False)."""
    text = PLAY.read_text(encoding="utf-8")[:6000]
    (tmp_path / "play.txt").write_text(text, encoding="utf-8")
    (tmp_path / "other.txt").write_text(text[::-1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)

    def train(script, out, flags, load=True):
        if "--data" not in flags:
            flags += " --data play.txt"
        argv = [f"{script.__name__}.py", "--device", "cpu", "--out", out, *flags.split()]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            script.main()
        except KeyboardInterrupt:
            pass
        path = tmp_path / out
        return script.load_checkpoint(path, script.__name__) if load and path.exists() else None

    return train


def same(a, b):
    """Whether two parts of checkpoints are the same, to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_seconds(checkpoint):
    checkpoint["last"]["seconds"] = 0
    return {part: checkpoint[part] for part in ("history", "model", "last", "vocab")}


def stop_at(script, monkeypatch, step):
    """Ctrl-C, at the beginning of this training step."""
    training_step = script.training_step

    def stop(*args):
        if args[4] == step:
            raise KeyboardInterrupt
        return training_step(*args)

    monkeypatch.setattr(script, "training_step", stop)


@for_each_gpt
def test_the_same_seed_trains_the_same_model(script, train):
    a = without_seconds(train(script, "a.pt", FLAGS[script]))
    torch.manual_seed(99)
    b = without_seconds(train(script, "b.pt", FLAGS[script]))
    c = without_seconds(train(script, "c.pt", FLAGS[script] + " --seed 7"))
    assert same(a, b) and not same(a, c)


@for_each_gpt
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(script, train, monkeypatch):
    whole = without_seconds(train(script, "whole.pt", FLAGS[script]))
    with monkeypatch.context() as patch:
        stop_at(script, patch, 6)
        stopped = train(script, "part.pt", FLAGS[script])
    assert stopped["last"]["step"] == 4, "the last evaluation"
    assert len(stopped["history"]) == 1
    resumed = without_seconds(train(script, "part.pt", "--resume"))
    assert same(resumed, whole)


@for_each_gpt
def test_a_resumed_run_has_the_settings_with_which_it_began(script, train):
    flags = FLAGS[script] + " --seed 7 --grad_clip 0.5 --weight_decay 0.05 --learning_rate 0.003"
    flags += " --muon_learning_rate 0.01 --dtype float32 --no-compile --full"
    begun = train(script, "x.pt", flags)["config"]
    usual = vars(script.GPTConfig())
    always = {"by_hand", "init", "resume", "vocab_size"}  # they are not given here
    assert all(begun[name] != usual[name] for name in begun.keys() - always)
    resumed = train(script, "x.pt", "--resume --max_iters 16")["config"]
    assert resumed == begun | {"resume": True, "max_iters": 16}


@for_each_gpt
def test_a_matrix_that_a_reader_ties_to_another_transposed_is_saved_as_it_is(
        script, train, monkeypatch):
    """Two parameters in one memory, with different shapes."""
    class MLP(script.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.c_proj.weight = nn.Parameter(self.c_fc.weight.t())

    monkeypatch.setattr(script, "MLP", MLP)
    whole = without_seconds(train(script, "whole.pt", FLAGS[script]))
    weights = whole["last"]["model"]
    for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"):
        assert weights[name].shape == (64, 16)
        assert torch.equal(weights[name].T, weights[name.replace("c_fc", "c_proj")])
    with monkeypatch.context() as patch:
        stop_at(script, patch, 6)
        train(script, "part.pt", FLAGS[script])
    assert same(without_seconds(train(script, "part.pt", "--resume")), whole)


def test_dropout_that_a_reader_adds_is_at_work_and_a_stopped_run_goes_on_with_it(train, monkeypatch):
    plain = train(char_gpt, "plain.pt", FLAGS[char_gpt])

    class Block(char_gpt.Block):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    monkeypatch.setattr(char_gpt, "Block", Block)
    whole = without_seconds(train(char_gpt, "whole.pt", FLAGS[char_gpt]))
    assert not same(whole["history"], plain["history"])
    with monkeypatch.context() as patch:
        stop_at(char_gpt, patch, 6)
        train(char_gpt, "part.pt", FLAGS[char_gpt])
    assert same(without_seconds(train(char_gpt, "part.pt", "--resume")), whole)


@for_each_gpt
def test_parameters_that_a_reader_freezes_stay_as_they_are(script, train, monkeypatch):
    """Also in the middle of a run, when there are means of their earlier gradients."""
    begun = train(script, "x.pt", FLAGS[script] + " --max_iters 4")
    make_optimizers = script.make_optimizers

    def freeze_and_make(model, config):
        model.transformer.h[0].requires_grad_(False)
        return make_optimizers(model, config)

    monkeypatch.setattr(script, "make_optimizers", freeze_and_make)
    resumed = train(script, "x.pt", "--resume --max_iters 8")
    for name, before in begun["last"]["model"].items():
        frozen = name.startswith("transformer.h.0.")
        assert torch.equal(before, resumed["last"]["model"][name]) == frozen, name


@for_each_gpt
def test_a_parameter_of_any_shape_that_a_reader_adds_is_trained(script):
    model = build(script)
    added = {"scale": nn.Parameter(torch.ones(())), "per_head": nn.Parameter(torch.ones(2, 32, 16))}
    block = model.transformer.h[0]
    for name, p in added.items():
        block.register_parameter(name, p)
        p.grad = torch.ones_like(p)
    for optimizer in script.make_optimizers(model, script.GPTConfig(warmup_iters=0)):
        optimizer.step()
    assert all((p < 1).all() for p in added.values())


@for_each_gpt
def test_a_run_that_is_stopped_before_its_first_evaluation_changes_no_file(
    script, train, monkeypatch, tmp_path
):
    train(script, "old.pt", FLAGS[script])
    before = (tmp_path / "old.pt").read_bytes()
    stop_at(script, monkeypatch, 3)
    train(script, "old.pt", FLAGS[script])
    assert (tmp_path / "old.pt").read_bytes() == before
    assert train(script, "new.pt", FLAGS[script]) is None
    assert train(script, "new.pt", FLAGS[script] + " --resume") is None


@for_each_gpt
def test_the_weights_kept_for_sampling_are_the_best(script, train, monkeypatch):
    """A ninth step that goes wild spoils a run that began well."""
    training_step = script.training_step
    losses = []

    def step_then_leap(model, *rest):
        loss = training_step(model, *rest)
        if rest[3] == 8:
            with torch.no_grad():
                for p in model.parameters():
                    p += torch.randn_like(p)
        return loss

    def evaluate(model, *rest):
        losses.append((true_evaluate(model, *rest), model.lm_head.weight.clone()))
        return losses[-1][0]

    true_evaluate = script.evaluate
    monkeypatch.setattr(script, "training_step", step_then_leap)
    monkeypatch.setattr(script, "evaluate", evaluate)
    checkpoint = train(script, "x.pt", FLAGS[script] + " --dtype float32")
    _, first, second, third = losses  # before training, and at steps 4, 8 and 12
    assert second[0] < first[0] and second[0] < third[0]
    assert [entry[3] for entry in checkpoint["history"]] == [first[0], second[0], third[0]]
    assert torch.equal(checkpoint["model"]["lm_head.weight"], second[1])
    assert torch.equal(checkpoint["last"]["model"]["lm_head.weight"], third[1])


@for_each_gpt
def test_of_several_losses_the_lowest_decides_and_its_weights_are_a_copy(
    script, train, monkeypatch, capsys
):
    losses = [9.0, 3.0, 1.0, 2.5, 2.0]  # before training, and at four evaluations
    weights = []

    def evaluate(model, *rest):
        weights.append(model.lm_head.weight.detach().clone())
        return losses[len(weights) - 1]

    monkeypatch.setattr(script, "evaluate", evaluate)
    checkpoint = train(script, "x.pt", FLAGS[script] + " --max_iters 16")
    assert [entry[3] for entry in checkpoint["history"]] == losses[1:]
    assert torch.equal(checkpoint["model"]["lm_head.weight"], weights[2])
    assert torch.equal(checkpoint["last"]["model"]["lm_head.weight"], weights[4])
    assert "\nbest val loss 1.0000 at step 8; next: " in capsys.readouterr().out


@for_each_gpt
def test_the_best_weights_stay_the_best_when_a_run_is_resumed(script, train, monkeypatch, capsys):
    """A run is stopped after its best evaluation, and what comes later is worse."""
    losses = [9.0, 1.0]  # before training, and after 4 steps
    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", lambda *args: losses.pop(0))
        best = train(script, "x.pt", FLAGS[script] + " --max_iters 4")["model"]
    monkeypatch.setattr(script, "evaluate", lambda *args: 2.0)
    resumed = train(script, "x.pt", "--resume --max_iters 12")
    assert resumed["last"]["step"] == 12
    assert same(resumed["model"], best)
    assert not same(resumed["last"]["model"], best)
    assert capsys.readouterr().out.endswith(
        "\nbest val loss 1.0000 at step 4; next: python sample.py x.pt\n")


@for_each_gpt
def test_the_training_loss_is_the_mean_since_the_last_evaluation(script, train, monkeypatch):
    training_step = script.training_step
    losses = []

    def record(*args):
        losses.append(training_step(*args))
        return losses[-1]

    monkeypatch.setattr(script, "training_step", record)
    checkpoint = train(script, "x.pt", FLAGS[script])
    for i, entry in enumerate(checkpoint["history"]):
        assert entry[2] == pytest.approx(np.mean(losses[4 * i : 4 * i + 4]), rel=1e-6)


def test_the_training_loss_of_the_bigram_model_is_this_mean_too():
    """Of 12 steps, each with a gradient: the evaluations after 5, 10 and 12 have none."""
    losses = []

    class Recording(bigram.BigramLanguageModel):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            if torch.is_grad_enabled():
                losses.append(loss.item())
            return logits, loss

    config = bigram.BigramConfig(block_size=8, batch_size=2, max_iters=12, eval_interval=5)
    tokenizer = bigram.CharTokenizer(map(chr, range(65)))
    checkpoint = dict(history=[], bytes_per_token=[1.0, 1.0])
    data = torch.arange(400) % 65
    bigram.train(Recording(config), data, data, tokenizer, config, checkpoint)
    assert len(losses) == 12
    means = [np.mean(losses[:5]), np.mean(losses[5:10]), np.mean(losses[10:])]
    assert [entry[2] for entry in checkpoint["history"]] == pytest.approx(means)
    assert [entry[:2] for entry in checkpoint["history"]] == [(5, 80), (10, 160), (12, 192)]


@for_each_gpt
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_trains_and_evaluates_in_the_type_that_is_asked_for(
    script, train, monkeypatch, dtype
):
    """The matrix products; the weights are in float32 all the time."""
    seen = {True: set(), False: set()}  # in training; in evaluation
    forward = script.GPT.forward

    def watched_forward(model, idx, targets=None, *rest, **more):
        logits, loss = forward(model, idx, targets, *rest, **more)
        if targets is not None:
            seen[torch.is_grad_enabled()].add(logits.dtype)
        return logits, loss

    monkeypatch.setattr(script.GPT, "forward", watched_forward)
    name = str(dtype).removeprefix("torch.")
    checkpoint = train(script, "x.pt", f"{FLAGS[script]} --max_iters 4 --dtype {name}")
    assert seen == {True: {dtype}, False: {dtype}}
    assert {p.dtype for p in checkpoint["last"]["model"].values()} == {torch.float32}


@for_each_gpt
def test_the_learning_rate_rises_soon_and_falls_to_zero_in_a_straight_line(
    script, train, monkeypatch
):
    """The rates that the optimizers have in each step of a run."""
    optimizer_step = script.Optimizer.step
    rates = {"Muon": [], "Adam": []}

    def record(self, multiplier):
        optimizer_step(self, multiplier)
        rates[type(self).__name__].append(multiplier * self.learning_rate)

    monkeypatch.setattr(script.Optimizer, "step", record)
    flags = " --max_iters 40 --eval_interval 40 --warmup_iters 9 --muon_learning_rate 0.02"
    train(script, "x.pt", FLAGS[script] + flags)
    expected = [min((step + 1) / 10, 1 - step / 40) for step in range(40)]
    assert rates["Muon"] == pytest.approx([0.02 * share for share in expected])
    n = len(rates["Adam"]) // 40  # optimizers of this kind
    assert rates["Adam"] == pytest.approx([0.01 * share for share in expected for _ in range(n)])


@for_each_gpt
def test_a_flag_given_on_resuming_counts(script, train, tmp_path):
    """Even if the optimizers keep its value in their state."""
    train(script, "a.pt", FLAGS[script] + " --max_iters 4")
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes())
    kept = train(script, "a.pt", "--resume --max_iters 8")
    changed = train(script, "b.pt", "--resume --max_iters 8 --weight_decay 30")
    name = "transformer.h.0.mlp.c_fc.weight"
    norms = [c["last"]["model"][name].norm() for c in (kept, changed)]
    assert norms[1] < 0.9 * norms[0]


@for_each_gpt
@pytest.mark.parametrize("change", [
    "--data other.txt", "--block_size 8", "--n_head 4", "--n_layer 1", "--n_embd 32"])
def test_another_text_or_size_is_refused_on_resuming(script, train, tmp_path, change):
    train(script, "x.pt", FLAGS[script] + " --max_iters 4")
    before = (tmp_path / "x.pt").read_bytes()
    with pytest.raises(ValueError, match="was started with"):
        train(script, "x.pt", f"--resume --max_iters 8 {change}")
    assert (tmp_path / "x.pt").read_bytes() == before


@for_each_gpt
def test_an_edited_text_is_refused_on_resuming_even_if_the_first_batch_is_the_same(
    script, train, tmp_path
):
    train(script, "x.pt", FLAGS[script] + " --max_iters 4")
    text = (tmp_path / "play.txt").read_text(encoding="utf-8")
    for place in (10, len(text) // 2, 5000):  # all in the training part
        edited = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
        if edited != text:
            (tmp_path / "play.txt").write_text(edited, encoding="utf-8")
            with pytest.raises(ValueError, match="was started with a different text"):
                train(script, "x.pt", "--resume --max_iters 8")
    (tmp_path / "moved.txt").write_text(text, encoding="utf-8")
    resumed = train(script, "x.pt", "--resume --max_iters 8 --data moved.txt")
    assert resumed["last"]["step"] == 8, "the same text, in another place"


@pytest.mark.parametrize("first, then", [("0.02", "0"), ("0", "0.02")])
def test_the_kind_of_optimizer_cannot_change_in_the_middle_of_a_run(train, first, then):
    train(bpe_gpt, "x.pt", FLAGS[bpe_gpt] + f" --max_iters 4 --muon_learning_rate {first}")
    with pytest.raises(ValueError, match="was started with a different optimizer"):
        train(bpe_gpt, "x.pt", f"--resume --max_iters 8 --muon_learning_rate {then}")


def test_a_run_from_scratch_is_not_resumed_as_one_that_fine_tunes(train):
    train(bpe_gpt, "base.pt", FLAGS[bpe_gpt] + " --max_iters 4")
    train(bpe_gpt, "x.pt", FLAGS[bpe_gpt] + " --max_iters 4")
    with pytest.raises(bpe_gpt.UserError, match="--resume: x.pt was started with a different init"):
        train(bpe_gpt, "x.pt", "--resume --init base.pt --max_iters 8")
    train(bpe_gpt, "tuned.pt", "--init base.pt --max_iters 4")
    resumed = train(bpe_gpt, "tuned.pt", "--resume --init base.pt --max_iters 8")
    assert resumed["last"]["step"] == 8


@for_each_gpt
def test_a_run_from_another_machine_is_resumed_on_this_one(script, train, tmp_path):
    checkpoint = train(script, "x.pt", FLAGS[script] + " --max_iters 4")
    checkpoint["config"]["device"] = "cuda"
    torch.save(checkpoint, tmp_path / "x.pt")
    sys_argv = f"{script.__name__}.py --out x.pt --resume --max_iters 8 --data play.txt".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys_argv)
        script.main()
    resumed = script.load_checkpoint(tmp_path / "x.pt", script.__name__)
    assert resumed["last"]["step"] == 8 and resumed["config"]["device"] == "auto"


@for_each_gpt
def test_a_checkpoint_that_was_moved_is_resumed_and_saved_where_it_lies(
    script, train, tmp_path, monkeypatch
):
    """It says where it was saved before, where nothing is to be written now."""
    train(script, "elsewhere.pt", FLAGS[script] + " --max_iters 4")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / f"{script.__name__}.pt"  # the default
    (tmp_path / "elsewhere.pt").rename(path)
    monkeypatch.setattr(sys, "argv", "x.py --device cpu --resume --max_iters 8".split())
    script.main()
    assert script.load_checkpoint(path, script.__name__)["last"]["step"] == 8
    assert not (tmp_path / "elsewhere.pt").exists()


@for_each_gpt
def test_another_batch_size_on_resuming_is_counted_as_it_is(script, train):
    flag = "batch_size" if script is char_gpt else "total_batch_size"
    train(script, "x.pt", FLAGS[script] + f" --max_iters 4 --{flag} {4 if flag == 'batch_size' else 64}")
    checkpoint = train(
        script, "x.pt", f"--resume --max_iters 8 --{flag} {2 if flag == 'batch_size' else 32}")
    assert [entry[1] for entry in checkpoint["history"]] == [4 * 64, 4 * 64 + 4 * 32]


@for_each_gpt
def test_the_same_command_with_resume_goes_on_with_the_run(script, train):
    """Even if the text gave fewer tokens than --vocab_size asked for."""
    flags = FLAGS[script] + " --max_iters 4"
    if script is bpe_gpt:
        flags += " --vocab_size 5000"
    begun = train(script, "x.pt", flags)
    assert begun["config"]["vocab_size"] < 5000
    resumed = train(script, "x.pt", flags + " --resume --max_iters 8")
    assert resumed["last"]["step"] == 8 and resumed["vocab"] == begun["vocab"]


@for_each_gpt
def test_a_link_stays_a_link(script, train, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "x.pt").symlink_to(tmp_path / "store" / "real.pt")
    assert train(script, "x.pt", FLAGS[script] + " --max_iters 4") is not None
    assert (tmp_path / "x.pt").is_symlink() and (tmp_path / "store" / "real.pt").exists()


@for_each_gpt
def test_optimizer_state_of_another_shape_is_not_restored(script):
    """A model in which two matrices were one matrix before: their means must not be made of one."""
    config = script.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20)
    tied, untied = script.GPT(config), script.GPT(config)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    means = [optimizer.means for optimizer in script.make_optimizers(tied, config)]
    last = dict(step=1, n_read=1, seconds=0, model=tied.state_dict(), optimizers=means)
    script.restore(last, tied, script.make_optimizers(tied, config))
    with pytest.raises(RuntimeError, match="shape"):
        script.restore(last, untied, script.make_optimizers(untied, config))


@for_each_gpt
def test_300_steps_reach_the_loss_that_they_are_known_to_reach(script, train):
    """A change that makes training worse does not go unnoticed, even if nothing else fails."""
    flags = "--n_layer 2 --n_head 2 --n_embd 64 --block_size 32 --max_iters 300 "
    flags += "--eval_interval 300 --dtype float32 --data " + str(PLAY)
    own = {char_gpt: " --batch_size 16", bpe_gpt: " --dropout 0 --vocab_size 300 --total_batch_size 512"}
    checkpoint = train(script, "x.pt", flags + own[script])
    known = {char_gpt: 1.834, bpe_gpt: 2.756}
    assert checkpoint["history"][0][3] == pytest.approx(known[script], abs=0.03)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_the_bigram_model_with_one_line_too(tmp_path):
    process = subprocess.Popen(
        [sys.executable, f"{ROOT}/bigram.py", "--data", PLAY, "--max_iters", "1000000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=without_gpu())
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert (process.returncode, error) == (1, "stopped; nothing has been saved\n")


@for_each_gpt
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_a_run_with_one_line(script, tmp_path):
    flags = FLAGS[script].replace("--max_iters 12", "--max_iters 100000").split()
    process = subprocess.Popen(
        [sys.executable, f"{ROOT}/{script.__name__}.py", *flags, "--data", PLAY, "--out", "x.pt"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=without_gpu())
    for line in process.stdout:
        if line.startswith("step 8:"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch(r"stopped; if this run has saved a checkpoint, --resume continues.*\n", error)
    assert script.load_checkpoint(tmp_path / "x.pt", script.__name__)["last"]["step"] >= 8


def test_resume_trains_for_longer_and_names_what_does_not_match(clone):
    few = "--data data/the-glass-harbour.txt --n_layer 1 --n_head 1 --n_embd 16 --block_size 16 "
    few += "--max_iters 4 --eval_interval 2 --out r.pt"
    output, _ = run("char_gpt.py", "--resume", *few.split(), cwd=clone)
    assert "from step 0 with 16 sequences" in output, "there is nothing to resume yet: a new run"
    resume = ("--resume", "--out", "r.pt")
    (clone / "other.txt").write_text("".join(sorted(PLAY.read_text(encoding="utf-8"))))
    for flags in ("--n_head 2 --n_embd 32", "--n_layer 2", "--data other.txt"):
        error = one_line_error("char_gpt.py", *resume, *flags.split(), cwd=clone)
        assert "--resume: r.pt was started with a different text or size" in error
    output, _ = run("char_gpt.py", *resume, "--max_iters", "6", cwd=clone)
    assert "before training" not in output and "from step 4 with" in output


@for_each_gpt
def test_a_checkpoint_of_another_script_is_not_resumed(script, train, tmp_path):
    """Nor is a model of characters fine-tuned on tokens. And the file stays as it is."""
    other = char_gpt if script is bpe_gpt else bpe_gpt
    train(other, "x.pt", FLAGS[other])
    before = (tmp_path / "x.pt").read_bytes()
    clue = f"x.pt was not written by this version of {script.__name__}$"
    with pytest.raises(script.UserError, match=clue):
        train(script, "x.pt", "--resume")
    if script is bpe_gpt:
        with pytest.raises(script.UserError, match=clue):
            train(script, "y.pt", "--init x.pt")
    assert (tmp_path / "x.pt").read_bytes() == before


@for_each_gpt
def test_the_progress_line_says_how_long_the_rest_will_take(script, monkeypatch, capsys):
    """After a quarter of the steps, which took two minutes, six are left."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(script.time, "perf_counter", lambda: 1000.0 + 120)
    script.show_progress(25, 1.23456, 240_000, 0.25, 1000.0)
    expected = "step 25: loss 1.235, 2,000 tokens/s, 6.0 minutes left \r"
    assert capsys.readouterr() == ("", expected)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    script.show_progress(25, 1.23456, 240_000, 0.25, 1000.0)
    assert capsys.readouterr() == ("", ""), "a file gets no such lines"


@for_each_gpt
def test_the_progress_of_a_run_is_that_of_all_its_steps_without_the_break(
    script, train, monkeypatch
):
    """A run of 12 steps is stopped after 4, and goes on an hour later."""
    clock = [5000.0]
    lines = []
    monkeypatch.setattr(script.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(script, "show_progress", lambda *args: lines.append(args))
    training_step = script.training_step

    def step_of_ten_seconds(*args):
        clock[0] += 10
        lines.append(training_step(*args))
        return lines[-1]

    monkeypatch.setattr(script, "training_step", step_of_ten_seconds)
    train(script, "x.pt", FLAGS[script] + " --max_iters 4")
    clock[0] += 3600
    train(script, "x.pt", "--resume --max_iters 12")
    per_step = 64 if script is char_gpt else 128
    losses, shown = lines[::2], lines[1::2]
    assert len(shown) == 12
    for i, (loss, line) in enumerate(zip(losses, shown), start=1):
        n_steps = 4 if i <= 4 else 12
        started = 5000.0 if i <= 4 else 5000.0 + 3600
        assert line == (i, loss, i * per_step, i / n_steps, started)


def test_a_checkpoint_of_an_older_version_gets_one_line(tmp_path):
    torch.save(dict(script="char_gpt", config={"fused": True}, model={}), tmp_path / "x.pt")
    for command in ("char_gpt.py --resume --out x.pt", "sample.py x.pt"):
        script, *flags = command.split()
        assert "not written by this" in one_line_error(ROOT / script, *flags, cwd=tmp_path)


@for_each_gpt
def test_ctrl_c_while_saving_is_ctrl_c(script, train, monkeypatch, tmp_path):
    """torch.save() makes a RuntimeError of it; and the old checkpoint stays whole."""
    train(script, "x.pt", FLAGS[script] + " --max_iters 4")
    before = (tmp_path / "x.pt").read_bytes()

    def interrupted(*args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(script.torch, "save", interrupted)
    monkeypatch.setattr(sys, "argv", "x --out x.pt --resume --max_iters 8 --data play.txt".split())
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert (tmp_path / "x.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@for_each_gpt
def test_a_run_whose_loss_is_no_number_keeps_the_older_checkpoint(
    script, train, monkeypatch, tmp_path
):
    train(script, "x.pt", FLAGS[script])
    before = (tmp_path / "x.pt").read_bytes()
    monkeypatch.setattr(script, "evaluate", lambda *args: math.nan)
    with pytest.raises(ValueError, match="validation loss nan after step 4: try lower learning"):
        train(script, "x.pt", FLAGS[script])
    assert (tmp_path / "x.pt").read_bytes() == before


@for_each_gpt
def test_a_run_does_not_replace_the_file_of_another_run(script, train, monkeypatch, capsys, tmp_path):
    """Two runs with one --out: the second, of whichever script, saves between two evaluations of the
    first, which is one of bpe_gpt.py."""
    train(script, "other.pt", FLAGS[script] + " --seed 7")
    training_step = bpe_gpt.training_step

    def step_beside_another_run(*args):
        if args[4] == 6:
            shutil.copy("other.pt", "x.pt")
        return training_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(bpe_gpt, "training_step", step_beside_another_run)
        train(bpe_gpt, "x.pt", FLAGS[bpe_gpt], load=False)
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()
    (name,) = tmp_path.glob("x-*.pt")
    assert f"another run has replaced the checkpoint: from now on, this one saves to {name.name}" in (
        capsys.readouterr().out)
    goes_on = bpe_gpt.load_checkpoint(name, "bpe_gpt")
    assert len(goes_on["history"]) == 3 and goes_on["config"]["out"] == name.name
    whole = train(bpe_gpt, "whole.pt", FLAGS[bpe_gpt])
    assert same(without_seconds(goes_on), without_seconds(whole))
    logs = [Path(f"{path}.jsonl").read_text(encoding="utf-8") for path in (name, "whole.pt")]
    assert logs[0] == logs[1]


def test_a_run_writes_its_file_again_if_it_was_deleted(train, monkeypatch, tmp_path):
    training_step = bpe_gpt.training_step

    def delete_and_step(*args):
        if args[4] == 6:
            (tmp_path / "x.pt").unlink()
        return training_step(*args)

    monkeypatch.setattr(bpe_gpt, "training_step", delete_and_step)
    assert len(train(bpe_gpt, "x.pt", FLAGS[bpe_gpt])["history"]) == 3


def test_a_file_that_cannot_be_written_is_noticed_before_training(train, monkeypatch):
    """Here the name is too long: not that of the checkpoint, but of the file that becomes it."""
    stop_at(bpe_gpt, monkeypatch, 0)
    with pytest.raises(OSError):
        train(bpe_gpt, 251 * "x" + ".pt", FLAGS[bpe_gpt])


@for_each_script
def test_each_evaluation_prints_a_sample_with_the_same_random_numbers(script, capsys):
    """Whatever has used others before, and after whichever step: only --seed changes them."""
    tokenizer = bpe_gpt.train_bpe("", 257) if script is bpe_gpt else script.CharTokenizer("\nabc")
    sizes = dict(block_size=16, vocab_size=len(tokenizer.tokens))
    if script is bigram:
        config = bigram.BigramConfig(**sizes)
        model = bigram.BigramLanguageModel(config)
    else:
        config = script.GPTConfig(n_layer=1, n_head=1, n_embd=8, **sizes)
        model = script.GPT(config)
    data = [SimpleNamespace(prompts=["To be\nor", "not"])] if script is bpe_gpt else []

    def sample():
        script.report(checkpoint, model, tokenizer, *data, config)
        losses, *lines = capsys.readouterr().out.split("\n")
        return "\n".join(line for line in lines if not line.startswith("after "))  # the speed

    checkpoint = dict(
        bytes_per_token=[1.0, 1.0], history=[(10, 100, 4.0, 4.0)], last=dict(seconds=1.0))
    torch.manual_seed(1)
    first = sample()
    assert len(first) > 30
    lines = first.split("\n")
    assert len(lines) > 2 and lines.pop() == "", "the sample ends with its last line"
    assert all(line.startswith("    | ") for line in lines)
    torch.manual_seed(2)
    checkpoint["history"].append((20, 200, 3.0, 3.0))
    assert sample() == first
    config.seed += 1
    assert sample() != first


@for_each_script
def test_the_figures_that_are_printed_are_the_losses(script, tmp_path):
    """Bits per byte are the loss, in bits, of all validation tokens, divided by the bytes that they
    stand for. In this text, the characters of the validation part have more bytes."""
    text = "Plain ASCII, and a few more words.\n" * 360
    text += "Ünïcode → größer als Zeichen: 日本語.\n" * 40
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    flags = "--data x.txt --block_size 32 --max_iters 20 --eval_interval 10 --out x.pt".split()
    if script is not bigram:
        flags += "--n_layer 1 --n_head 1 --n_embd 32 --dtype float32 --batch_size 4".split()
    if script is bpe_gpt:
        flags += "--vocab_size 300 --total_batch_size 128".split()
    output, _ = run(f"{ROOT}/{script.__name__}.py", *flags, cwd=tmp_path)
    checkpoint = torch.load(tmp_path / "x.pt")
    history = checkpoint["history"]
    of_train, of_val = checkpoint["bytes_per_token"]
    assert of_train != pytest.approx(of_val, rel=0.2), "the text is right for this test"
    pattern = r"step (\d+): loss (\S+) train, (\S+) (?:val; (\S+)|\(perplexity (\S+), (\S+)) bits"
    lines = re.findall(pattern, output)
    assert [int(line[0]) for line in lines] == [10, 20]
    for line, (step, _, train_loss, val_loss) in zip(lines, history):
        assert float(line[1]) == pytest.approx(train_loss, abs=1e-4)
        assert float(line[2]) == pytest.approx(val_loss, abs=1e-4)
        val_text = text[int(0.9 * len(text)) :]
        n_tokens = len(val_text)
        if script is bpe_gpt:
            assert float(line[4]) == pytest.approx(math.exp(val_loss), rel=1e-3)
            tokenizer = bpe_gpt.BPETokenizer(torch.load(tmp_path / "x.pt")["vocab"])
            tokens = tokenizer.encode(val_text)
            first = tokenizer.tokens[tokens[0]]  # it is not predicted
            n_tokens = len(tokens) - 1
            n_bytes = len(val_text.encode()) - len(first)
            before = re.search(r"^val loss (\S+) \(perplexity \S+, (\S+) bits", output, re.MULTILINE)
            loss, bits = map(float, before.groups())
            assert bits == pytest.approx(loss / math.log(2) * n_tokens / n_bytes, abs=2e-3)
        else:
            n_bytes = len(val_text.encode())
        bits = float(line[3] or line[5])
        assert bits == pytest.approx(val_loss / math.log(2) * n_tokens / n_bytes, abs=2e-3)
