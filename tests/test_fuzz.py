"""Files from elsewhere, damaged in thousands of ways: each is loaded, or refused in one line.

python -m pytest tests/test_fuzz.py --mutations 50000     # more than the 2,500 of each test run
"""

import json
import random
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import PLAY, ROOT

import bpe_gpt
import char_gpt
import sample
from bpe_gpt import GPT, GPTConfig

SMALL = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=300, block_size=16)
ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**40,
    1.5,
    float("nan"),
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
]


def mutate_bytes(data, rng):
    """One to three times: a bit changed, a piece left out, repeated or put in, the end missing."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(min(len(data), rng.choice([100, 2000, len(data)])) or 1)
        n = rng.randint(1, 40)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[i : i + n]
        elif kind == 2:
            data[i:i] = data[i : i + n]
        elif kind == 3:
            data[i:i] = rng.randbytes(n)
        elif kind == 4:
            del data[i:]
        else:
            data[i : i + n] = rng.choice([b"\0" * n, b"9" * n, b"[" * n, b"\xff" * n, b'"' * n])
    return bytes(data)


def mutate_value(value, rng):
    """A structure like `value` in which one thing is something else, or missing, or there twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        kind = rng.randrange(5)
        if kind == 0:
            return {n: v for n, v in value.items() if n != name}
        if kind == 1:
            return {**value, rng.choice(["extra", 7, name * 2]): value[name]}
        return {**value, name: mutate_value(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        if rng.random() < 0.3:
            return value[:i] + value[i + 1 :]
        return value[:i] + [mutate_value(value[i], rng)] + value[i + 1 :]
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        return rng.choice(
            [
                value[None],
                value.flatten(),
                value.double(),
                value.bool(),
                value[:0],
                value.to("meta"),
            ]
            if value.dim()
            else [value[None], value.double(), value * float("nan")]
        )
    return rng.choice(ODD)


def attempt(action, counts):
    """The action must succeed or be refused as main() can tell it in one line, and in seconds."""
    started = time.perf_counter()
    try:
        action()
        counts["loaded"] += 1
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error), repr(error)
        counts["refused"] += 1
    assert time.perf_counter() - started < 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of each kind, in its files."""
    folder = tmp_path_factory.mktemp("fuzz")
    text = PLAY.read_text(encoding="utf-8")[:3000]
    (folder / "play.txt").write_text(text, encoding="utf-8")
    tokenizer = bpe_gpt.train_bpe(text, 300)
    torch.manual_seed(0)
    config = GPTConfig(**SMALL, max_iters=2, eval_interval=1, out=str(folder / "bpe.pt"))
    config.total_batch_size = config.muon_learning_rate = 32
    model = GPT(config)
    bpe_gpt.export(model, tokenizer, folder / "model")
    shutil.copytree(ROOT / "tests" / "fixtures" / "old", folder / "old")
    data = [bpe_gpt.encode(tokenizer, text)] * 2
    checkpoint = dict(script="bpe_gpt", vocab=bpe_gpt.pack_vocab(tokenizer), history=[], last=None)
    checkpoint.update(config=vars(config), data="digest", model=model.state_dict())
    config.muon_learning_rate = 0.01
    autocast = torch.autocast("cpu", enabled=False)
    checkpoint["layouts"] = [bpe_gpt.LAYOUT, bpe_gpt.LAYOUT_WITH_INPUT]
    bpe_gpt.train(model, tokenizer, *data, config, autocast, checkpoint)
    return folder


@pytest.fixture
def n(request):
    return request.config.getoption("--mutations") // 5


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json", "merges.txt"])
def test_a_damaged_model_is_loaded_or_refused(folder, tmp_path, n, name):
    rng, counts = random.Random(name), {"loaded": 0, "refused": 0}
    whole = (folder / "model" / name).read_bytes()
    shutil.copytree(folder / "model", tmp_path / "model")
    for i in range(n // 4):
        if name.endswith("json") and i % 2:
            data = json.dumps(mutate_value(json.loads(whole), rng)).encode()
        elif name.endswith("safetensors") and i % 2:
            size = 8 + int.from_bytes(whole[:8], "little")
            header = json.dumps(mutate_value(json.loads(whole[8:size]), rng)).encode()
            data = len(header).to_bytes(8, "little") + header + whole[size:]
        else:
            data = mutate_bytes(whole, rng)
        (tmp_path / "model" / name).unlink()  # the old one may still be mapped
        (tmp_path / "model" / name).write_bytes(data)
        attempt(lambda: bpe_gpt.load_pretrained(tmp_path / "model"), counts)
    assert counts["refused"] > n // 4 * 0.3, counts


def test_a_damaged_pytorch_model_is_loaded_or_refused(folder, tmp_path, n):
    rng, counts = random.Random(0), {"loaded": 0, "refused": 0}
    shutil.copytree(folder / "old", tmp_path / "old")
    path = tmp_path / "old" / "pytorch_model.bin"
    whole, tensors = path.read_bytes(), torch.load(path, weights_only=True)
    for i in range(n):
        if i % 2:
            torch.save(mutate_value(tensors, rng), path)
        else:
            path.write_bytes(mutate_bytes(whole, rng))
        attempt(lambda: bpe_gpt.load_pretrained(tmp_path / "old"), counts)
    assert counts["refused"] > n * 0.3, counts


def test_a_damaged_checkpoint_is_loaded_or_refused_by_sample(folder, tmp_path, n):
    rng, counts = random.Random(0), {"loaded": 0, "refused": 0}
    whole = torch.load(folder / "bpe.pt", weights_only=True)
    data = (folder / "bpe.pt").read_bytes()
    for i in range(n):
        if i % 2:
            torch.save(mutate_value(whole, rng), tmp_path / "x.pt")
        else:
            (tmp_path / "x.pt").write_bytes(mutate_bytes(data, rng))

        attempt(lambda: bpe_gpt.load_pretrained(tmp_path / "x.pt"), counts)

        def speak():
            model, tokenizer, checkpoint = sample.load_model(str(tmp_path / "x.pt"))
            sample.best_loss(checkpoint["history"])
            if layouts := sample.read_layouts(checkpoint):
                bpe_gpt.lay_out({"instruction": "a", "input": "b"}, layouts)
            idx = torch.tensor([tokenizer.encode("a")])
            next(bpe_gpt.generate(model, idx, 1))

        attempt(speak, counts)
    assert counts["refused"] > n * 0.3, counts


def test_a_damaged_checkpoint_is_resumed_or_refused(folder, tmp_path, n):
    """All that `--resume` reads from a checkpoint, and a training step with it."""
    rng, counts = random.Random(0), {"loaded": 0, "refused": 0}
    whole = torch.load(folder / "bpe.pt", weights_only=True)
    for module, name in ((bpe_gpt, "bpe_gpt"), (char_gpt, "char_gpt")):
        if module is char_gpt:  # the settings of char_gpt.py, and all else as it is
            known = {field.name for field in char_gpt.fields(char_gpt.GPTConfig)}
            whole["config"] = {k: v for k, v in whole["config"].items() if k in known}
            whole["config"]["muon_learning_rate"] = 0.01
        for _ in range(n // 2):
            torch.save(mutate_value({**whole, "script": name}, rng), tmp_path / "x.pt")

            def resume():
                checkpoint = module.load_checkpoint(tmp_path / "x.pt", name)
                given = {"max_iters": 5}
                config = module.resume_settings(module.GPTConfig, checkpoint, given, ())
                if module is bpe_gpt:
                    bpe_gpt.unpack_vocab(checkpoint["vocab"])
                module.check_resumable(checkpoint, "digest", config)
                model = module.GPT(config)
                optimizers = module.make_optimizers(model, config)
                module.restore(checkpoint["last"], model, optimizers)
                idx = torch.zeros(1, 4, dtype=torch.long)
                model(idx, idx)[1].backward()
                for optimizer in optimizers:
                    optimizer.step()

            attempt(resume, counts)
    assert counts["refused"] > n * 0.2, counts


def test_damaged_tokens_are_loaded_or_refused(folder, tmp_path, n):
    rng, counts = random.Random(0), {"loaded": 0, "refused": 0}
    tokens = np.random.default_rng(0).integers(300, size=400).astype("<u2").tobytes()
    _, tokenizer = bpe_gpt.load_pretrained(folder / "model")
    for _ in range(n):
        for name in ("train.bin", "val.bin"):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).write_bytes(
                mutate_bytes(tokens, rng) if rng.random() < 0.7 else tokens
            )
        config = GPTConfig(**SMALL, data=str(tmp_path), total_batch_size=64)

        def read():
            _, data = bpe_gpt.load_data(config, tokenizer)
            x, _ = bpe_gpt.get_batch(data[0], config, 0)
            assert x.max() < 300

        attempt(read, counts)
    assert counts["refused"] > n * 0.1, counts


def test_damaged_instructions_are_loaded_or_refused(folder, tmp_path, n):
    rng, counts = random.Random(0), {"loaded": 0, "refused": 0}
    record = {"instruction": "Say the word.", "input": "sea", "output": "The word is sea."}
    records = [{**record, "input": f"sea {i}"} for i in range(12)]
    _, tokenizer = bpe_gpt.load_pretrained(folder / "model")
    path = tmp_path / "x.json"
    config = GPTConfig(**{**SMALL, "block_size": 200}, instructions=str(path))
    for i in range(n):
        if i % 2:
            path.write_text(json.dumps(mutate_value(records, rng)), encoding="utf-8")
        elif i % 4:
            lines = "\n".join(map(json.dumps, records)).encode()
            path.write_bytes(mutate_bytes(lines, rng))
        else:
            path.write_bytes(mutate_bytes(json.dumps(records).encode(), rng))

        def read():
            _, data = bpe_gpt.load_records(config, tokenizer)
            x, y = bpe_gpt.get_batch(data[0], config, 0)
            assert x.max() < 300 and (y != -100).any()

        attempt(read, counts)
    assert counts["refused"] > n * 0.3, counts
