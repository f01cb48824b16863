"""What must be true on a CUDA GPU. Without one, these tests are skipped; tests/tools/gpu.sh runs them and
measures the speed there."""

import pytest
import torch
from conftest import run

import bpe_gpt
import char_gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
GPTS = pytest.mark.parametrize("script", [char_gpt, bpe_gpt], ids=lambda script: script.__name__)


def build(script):
    torch.manual_seed(0)
    config = script.GPTConfig(vocab_size=300, n_layer=2, n_head=2, n_embd=32, block_size=600)
    config.dropout = 0.0  # of bpe_gpt.py
    return script.GPT(config)


@GPTS
@pytest.mark.parametrize("length", [5, 600])
def test_scores_are_those_of_the_cpu(script, length):
    model = build(script).eval()
    idx = torch.randint(300, (2, length))
    with torch.no_grad():
        expected, _ = model(idx)
        logits, _ = model.cuda()(idx.cuda())
    assert (logits.cpu() - expected).abs().max() < 1e-3


@GPTS
def test_greedy_text_is_that_of_the_cpu(script):
    def likeliest(logits):
        return logits.argmax(dim=-1, keepdim=True)

    model = build(script)
    for p in model.parameters():
        p.data *= 20  # so that no two scores are nearly the same
    idx = torch.randint(300, (1, 5))
    expected = torch.cat(list(script.generate(model, idx, 30, likeliest)))
    on_gpu = torch.cat(list(script.generate(model.cuda(), idx.cuda(), 30, likeliest)))
    assert torch.equal(on_gpu.cpu(), expected)


@GPTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_has_the_losses_of_the_cpu(script, dtype):
    losses = {}
    for device in ("cpu", "cuda"):
        model = build(script).to(device)
        config = script.GPTConfig(warmup_iters=0, batch_size=4)
        optimizers = script.make_optimizers(model, config)
        autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        rows = torch.randint(300, (4, 65), generator=torch.Generator().manual_seed(1)).to(device)
        losses[device] = [
            script.training_step(
                model, optimizers, rows[:, :-1], rows[:, 1:], step, config, autocast)
            for step in range(5)
        ]
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=0.02)


@GPTS
def test_the_best_weights_are_kept_in_main_memory(script, tmp_path):
    model = build(script).cuda()
    config = script.GPTConfig()
    checkpoint = {"history": [(1, 1, 5.0, 5.0)]}
    script.save(checkpoint, 0.0, model, script.make_optimizers(model, config), tmp_path / "x.pt")
    assert {p.device.type for p in checkpoint["model"].values()} == {"cpu"}


def test_the_compiled_model_has_the_losses_of_the_other():
    losses = []
    for compiled in (False, True):
        model = build(char_gpt).cuda()
        config = char_gpt.GPTConfig(warmup_iters=0)
        optimizers = char_gpt.make_optimizers(model, config)
        autocast = torch.autocast("cuda", torch.bfloat16)
        rows = torch.randint(300, (4, 65), generator=torch.Generator().manual_seed(1)).cuda()
        x, y = rows[:, :-1], rows[:, 1:]
        forward = torch.compile(model) if compiled else model
        losses.append([
            char_gpt.training_step(forward, optimizers, x, y, step, config, autocast)
            for step in range(5)])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@GPTS
def test_a_run_is_resumed_and_sampled_from_on_the_gpu_and_on_the_cpu(script, clone):
    name = script.__name__
    out = f"out/gpu_{name}.pt"
    on_gpu = {"CUDA_VISIBLE_DEVICES": "0"}
    settings = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --eval_interval 20 --no-compile"
    command = [f"{name}.py", "--data", "data/the-glass-harbour.txt", "--out", out]
    command += settings.split() + (["--vocab_size", "300"] if script is bpe_gpt else [])
    first, _ = run(*command, "--max_iters", "20", cwd=clone, fresh=True, env=on_gpu)
    assert "on cuda in torch.bfloat16" in first
    second, _ = run(
        *command, "--max_iters", "40", "--resume", cwd=clone, fresh=True, env=on_gpu)
    assert "from step 20" in second
    third, _ = run(*command, "--max_iters", "60", "--resume", cwd=clone)
    assert "on cpu" in third and "from step 40" in third
    for device, env in (("cuda", on_gpu), ("cpu", {})):
        for flags in ([], ["--temperature", "0"], ["--beam", "2"]):
            flags += ["--prompt", "The", "--max_new_tokens", "40"]
            text, error = run("sample.py", out, *flags, cwd=clone, fresh=True, env=env)
            assert text.startswith("The") and len(text) > 40 and f"on {device}" in error
