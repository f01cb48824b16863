"""Every flag of every script changes what its run does, and a page says what the run was."""

import io
import os
import re
import shutil
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import PLAY

import bigram
import bpe_gpt
import char_gpt
import sample

GPTS = [char_gpt, bpe_gpt]
SCRIPTS = [bigram, *GPTS]
for_each_gpt = pytest.mark.parametrize("script", GPTS, ids=lambda script: script.__name__)
CONFIGS = {bigram: bigram.BigramConfig, char_gpt: char_gpt.GPTConfig, bpe_gpt: bpe_gpt.GPTConfig}

# ---- Runs ---------------------------------------------------------------------------------------

STEPS = "--device cpu --data play.txt --out x.pt --max_iters 4 --eval_interval 2 --batch_size 4 "
SIZE = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --warmup_iters 1 --dtype float32 "
FLAGS = {  # what a run gets before one more flag is given
    bigram: STEPS.replace("--device cpu", "--block_size 16"),
    char_gpt: STEPS + SIZE,
    bpe_gpt: STEPS + SIZE + "--vocab_size 300 --total_batch_size 128 ",
}


class Run:
    """What a run with these flags, in this folder, printed and saved, and the shapes of the batches
    that went through the model in training."""
    def __init__(self, script, flags, folder):
        self.batches = []
        self.n_by_hand = 0  # how often char_gpt.attention() was called
        stdout = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            self.watch(script, patch)
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
            patch.chdir(folder)
            script.main()
        self.text = stdout.getvalue()
        self.files = sorted(path.name for path in folder.glob("*.pt"))
        path = folder / "x.pt"
        self.checkpoint = torch.load(path, weights_only=True) if path.exists() else None

    def watch(self, script, patch):
        Model = script.BigramLanguageModel if script is bigram else script.GPT
        forward = Model.forward

        def watched_forward(model, idx, *rest, **more):
            if torch.is_grad_enabled():
                self.batches.append(tuple(idx.shape))
            return forward(model, idx, *rest, **more)

        patch.setattr(Model, "forward", watched_forward)
        if script is char_gpt:
            attention = script.attention

            def counted_attention(*args):
                self.n_by_hand += 1
                return attention(*args)

            patch.setattr(script, "attention", counted_attention)

    def weights(self):
        """All of them at the end of the run, one after the other."""
        last = self.checkpoint.get("last", self.checkpoint)
        return torch.cat([p.flatten() for p in last["model"].values()]).tolist()

    def steps(self):
        """Those after which the model was evaluated."""
        return [entry[0] for entry in self.checkpoint["history"]]

    def shape(self, name):
        return tuple(self.checkpoint["model"][name].shape)

    def loss_before_training(self):
        return float(re.search(r"^val loss (\S+)", self.text, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(script, flags): a Run in a folder with two texts and model.pt, which is the checkpoint of
    the run without more flags."""
    folders = {}

    def start(script, flags="", resume=False):
        folder = tmp_path_factory.mktemp("run")
        text = PLAY.read_text(encoding="utf-8")[:6000]
        (folder / "play.txt").write_text(text, encoding="utf-8")
        (folder / "other.txt").write_text(text[::-1], encoding="utf-8")
        if flags and script not in folders:
            start(script)
        if flags:
            shutil.copy(folders[script] / "x.pt", folder / "model.pt")
        if resume:
            shutil.copy(folders[script] / "x.pt", folder / "x.pt")
        run = Run(script, FLAGS[script] + flags, folder)
        folders.setdefault(script, folder)
        return run

    return start


@pytest.fixture(scope="module")
def usual(start):
    """usual(script): the run without more flags."""
    runs = {}

    def usual(script):
        if script not in runs:
            runs[script] = start(script)
        return runs[script]

    return usual

# ---- Flags of the training scripts --------------------------------------------------------------

# For each flag: the value that it is given, what is looked at in the run, and what that must be.
# Where this cannot be known, as with the weights, it must be another one than without the flag.
ANOTHER = object()
EFFECTS = {
    "n_layer": ("1", lambda run: sum("c_fc.bias" in name for name in run.checkpoint["model"]), 1),
    "n_head": ("4", Run.weights, ANOTHER),
    "n_embd": ("32", lambda run: run.shape("transformer.ln_f.weight"), (32,)),
    "block_size": ("8", lambda run: run.batches[0][1], 8),
    "dropout": ("0.5", Run.weights, ANOTHER),
    "by_hand": ("", lambda run: run.n_by_hand > 0, True),
    "batch_size": ("2", lambda run: run.batches[0][0], 2),
    "total_batch_size": ("64", lambda run: len(run.batches), 4),  # before, 8: two batches a step
    "max_iters": ("3", Run.steps, [2, 3]),
    "eval_interval": ("3", Run.steps, [3, 4]),
    "learning_rate": ("0.1", Run.weights, ANOTHER),
    "muon_learning_rate": ("0.1", Run.weights, ANOTHER),
    "warmup_iters": ("3", Run.weights, ANOTHER),
    "weight_decay": ("3", Run.weights, ANOTHER),
    "grad_clip": ("0.001", Run.weights, ANOTHER),
    "seed": ("7", Run.weights, ANOTHER),
    "full": ("", Run.weights, ANOTHER),  # a setting that is not given is that of the full model
    "device": ("cpu:0", lambda run: re.search(r"on (\S+) in torch", run.text)[1], "cpu:0"),
    "dtype": ("bfloat16", Run.weights, ANOTHER),
    "data": ("other.txt", Run.weights, ANOTHER),
    "out": ("y.pt", lambda run: "y.pt" in run.files and "x.pt" not in run.files, True),
    "resume": ("", lambda run: len(run.batches), 0),  # all steps have been made
    "init": ("model.pt", Run.loss_before_training, ANOTHER),
}
ON_A_GPU = {"compile"}  # see the next test but one


@pytest.mark.parametrize(
    "script, name",
    [(script, field.name) for script in SCRIPTS for field in fields(CONFIGS[script])
     if field.name not in ON_A_GPU],
    ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_every_flag_changes_what_the_run_does(start, usual, script, name):
    before = usual(script)
    if name == "vocab_size" and script is not bpe_gpt:  # characters: the text alone decides
        assert start(script, "--vocab_size 99").weights() == before.weights()
        return
    effects = EFFECTS
    if script is bpe_gpt:
        effects = EFFECTS | {
            "vocab_size": ("280", lambda run: run.shape("transformer.wte.weight"), (280, 16))}
    if name not in effects and not os.environ.get("CI"):
        pytest.skip(f"a new flag: say in EFFECTS what --{name} changes, and it is tested")
    value, look, expected = effects[name]
    after = start(script, f"--{name} {value}", resume=name == "resume")
    assert look(after) != look(before)
    assert expected is ANOTHER or look(after) == expected


def test_a_flag_that_was_given_twice_counts_as_given_last(start):
    """The test above relies on it."""
    assert start(bigram, "--max_iters 2 --max_iters=3 --eval_interval=1").steps() == [1, 2, 3]


@for_each_gpt
def test_only_on_a_gpu_the_model_is_compiled_and_not_with_no_compile(script, monkeypatch):
    """A run of no steps."""
    compiled = []
    monkeypatch.setattr(script.torch, "compile", compiled.append)
    monkeypatch.setattr(script, "make_optimizers", lambda model, config: [])
    for device, flag, expected in (
            ("cuda", "--compile", 1), ("cuda", "--no-compile", 0), ("cpu", "--compile", 0)):
        monkeypatch.setattr(sys, "argv", ["x.py", flag, "--max_iters", "0"])
        config = script.GPTConfig(**script.parse_flags(script.GPTConfig))
        weight = SimpleNamespace(device=torch.device(device))
        model = SimpleNamespace(lm_head=SimpleNamespace(weight=weight))
        checkpoint = {"last": dict(step=0, n_read=0, seconds=0)}
        compiled.clear()
        script.train(model, None, None, None, config, checkpoint, None)
        assert len(compiled) == expected, (device, flag)


class Stop(Exception):
    """Ends a run when it has its settings."""


def settings_of(script, flags, monkeypatch, tmp_path):
    """The GPTConfig of a run with these flags. It ends before there is a model."""
    def stop(config):
        raise Stop(config)

    (tmp_path / "play.txt").write_text(PLAY.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(script, "GPT", stop)
        if script is bpe_gpt:
            patch.setattr(script, "gpt2_tokenizer", lambda: bpe_gpt.train_bpe("", 257))
        argv = f"x.py --device cpu --data play.txt {flags}".split()
        patch.setattr(sys, "argv", argv)
        with pytest.raises(Stop) as stopped:
            script.main()
    return stopped.value.args[0]


@pytest.mark.parametrize(
    "script, size", [(char_gpt, (6, 6, 384, 256)), (bpe_gpt, (12, 12, 768, 1024))],
    ids=["char_gpt", "bpe_gpt"])
def test_full_trains_the_full_model_with_its_settings(script, size, monkeypatch, tmp_path):
    """On a CPU, which without it trains the small one; what is given counts in both."""
    full = settings_of(script, "--full --seed 5", monkeypatch, tmp_path)
    assert (full.n_layer, full.n_head, full.n_embd, full.block_size) == size
    expected = script.GPTConfig(full=True, seed=5, device="cpu", data="play.txt")
    expected.vocab_size = full.vocab_size
    assert full == expected
    small = settings_of(script, "--seed 5 --n_layer 3", monkeypatch, tmp_path)
    for name, value in (script.CPU_SETTINGS | dict(seed=5, n_layer=3)).items():
        if name != "vocab_size":
            assert getattr(small, name) == value, name

# ---- Flags of sample.py -------------------------------------------------------------------------

# For each flag: what stands before it in both commands, and the flag with a value.
# (With a temperature of 99, tokens are drawn almost evenly, and the end of text comes by chance.)
TEXT = "--max_new_tokens 20 --prompt The"
SAMPLE_FLAGS = {
    "prompt": (TEXT, "--prompt A"),
    "instruct": (TEXT, "--instruct Go"),
    "input": ("--max_new_tokens 20 --instruct Go", "--input home"),
    "interactive": (TEXT, "--interactive"),
    "max_new_tokens": (TEXT, "--max_new_tokens 30"),
    "num_samples": (TEXT, "--num_samples 2"),
    "temperature": (TEXT, "--temperature 0.1"),
    "top_k": (TEXT, "--top_k 1"),
    "top_p": (TEXT, "--top_p 0.1"),
    "min_p": (TEXT, "--min_p 0.9"),
    "beam": (TEXT, "--beam 3"),
    "stop": ("--max_new_tokens 100", "--stop e"),
    "ignore_end": ("--max_new_tokens 100 --num_samples 20 --temperature 99", "--ignore_end"),
    "device": (TEXT, "--device cpu:0"),
    "dtype": (TEXT, "--dtype bfloat16"),
    "seed": (TEXT, "--seed 7"),
    "probs": (TEXT, "--probs sea"),
    "explore": (TEXT, "--explore sea"),
    "shapes": (TEXT, "--shapes sea"),
    "curve": (TEXT, "--curve"),
    "plot": ("--explore sea", "--plot y.html"),
}


@pytest.mark.parametrize("name", [field.name for field in fields(sample.SampleConfig)])
def test_every_flag_of_sample_py_changes_what_is_printed(
    clone, monkeypatch, capsys, tmp_path, name
):
    if name not in SAMPLE_FLAGS and not os.environ.get("CI"):
        pytest.skip(f"a new flag: say in SAMPLE_FLAGS how to use --{name}, and it is tested")
    before, flag = SAMPLE_FLAGS[name]
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(clone / "out" / "bpe_gpt.pt", weights_only=True)
    if name in ("instruct", "input"):  # as data/instruct.py would have saved it
        checkpoint["templates"] = ["{instruction}:", "{instruction} {input}:"]
    torch.save(checkpoint, "x.pt")
    printed = []
    for flags in (before, f"{before} {flag}"):
        argv = f"sample.py x.pt --device cpu {flags}".split()
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Sea\n"))
        sample.main()
        printed.append(capsys.readouterr())
    if name in ("device", "dtype"):  # the text need not change
        assert printed[0].err != printed[1].err
    else:
        assert printed[0].out != printed[1].out

# ---- What is printed ----------------------------------------------------------------------------

def test_a_page_names_the_best_loss_of_the_run_and_its_step(clone, monkeypatch, tmp_path):
    """The weights on the page are those of the best evaluation, which need not be the last one."""
    checkpoint = torch.load(clone / "out" / "char_gpt.pt", weights_only=True)
    history = [(1000, 1, 9.0, 3.0), (2000, 2, 2.0, 1.25), (3000, 3, 1.0, 1.5)]
    torch.save(checkpoint | {"history": history}, tmp_path / "x.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", "sample.py x.pt --explore sea".split())
    sample.main()
    page = (tmp_path / "explore.html").read_text(encoding="utf-8")
    assert "parameters, validation loss 1.2500 nats after 2,000 steps" in page
