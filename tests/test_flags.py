"""Every flag of all four scripts with every kind of bad value: one line that says what to do."""

from dataclasses import fields

import pytest
from conftest import ROOT, one_line_error

import bigram
import bpe_gpt
import char_gpt

CONFIGS = {
    "bigram.py": bigram.BigramConfig,
    "char_gpt.py": char_gpt.GPTConfig,
    "bpe_gpt.py": bpe_gpt.GPTConfig,
}
MAY_BE_ZERO = {
    "dropout",
    "minutes",
    "seed",
    "warmup_iters",
    "weight_decay",
    "stride",
    "muon_learning_rate",
}


def cases():
    for script, Config in CONFIGS.items():
        for field in fields(Config):
            if field.name == "vocab_size" or field.type not in (int, float):
                continue
            bad = ["-1", "nan", "inf", "many", "", "2147483648"]
            if field.type is int:
                bad += ["1.5"]
            if field.name not in MAY_BE_ZERO or script == "bpe_gpt.py" and field.name == "x":
                bad += ["0"]
            for value in bad:
                yield script, field.name, value


@pytest.mark.parametrize("script", CONFIGS)
def test_a_number_out_of_range_is_named_with_its_flag(script, tmp_path):
    tried = 0
    for name, flag, value in cases():
        if name == script:
            tried += 1
            error = one_line_error(ROOT / script, f"--{flag}={value}", cwd=tmp_path)
            assert f"--{flag}" in error and str(value) in error, error
            assert "must be" in error or "invalid" in error, error
    assert tried >= 30 and not list(tmp_path.iterdir())


OTHERS = {
    "char_gpt.py --dropout 1": "below 1",
    "bpe_gpt.py --dropout 1.5": "below 1",
    "char_gpt.py --n_layer 1000000": "1000 at most",
    "bpe_gpt.py --n_layer 1000000": "1000 at most",
    "char_gpt.py --n_head 5": "divide --n_embd",
    "bpe_gpt.py --n_head 5 --init scratch": "a divisor of --n_embd, 128",
    "char_gpt.py --device tpu": "auto, cpu",
    "bpe_gpt.py --device tpu": "auto, cpu",
    "char_gpt.py --dtype half": "auto, float32 or bfloat16",
    "bpe_gpt.py --dtype half --init scratch": "auto, float32 or bfloat16",
    "bpe_gpt.py --tokenizer words --init scratch": "gpt2 or learned",
    "bpe_gpt.py --learned_vocab_size 3 --init scratch": "above 256",
    "bpe_gpt.py --init gpt7": "gpt2-xl",
    "bpe_gpt.py --init .": "model.safetensors",
    "bigram.py --offline=yes": "--offline",
    "bigram.py --data": "--data",
    "bigram.py --block_size 2000000000 --data TEXT": "block_size",
    "char_gpt.py --block_size 9000000 --data TEXT": "block_size",
    "bpe_gpt.py --init scratch --block_size 9000000 --data TEXT": "block_size",
    "bigram.py --batch_size 2000000 --data TEXT": "batch_size",
    "char_gpt.py --batch_size 2000000 --data TEXT": "batch_size",
    "bpe_gpt.py --init scratch --total_batch_size 200000000": "100000000 at most",
    "char_gpt.py --n_embd 2147483640 --n_head 1 --data TEXT": "out of memory",
    "bpe_gpt.py --init scratch --n_embd 2147483640 --n_head 1 --data TEXT": "out of memory",
    "sample.py --max_new_tokens 0": "above 0",
    "sample.py --max_new_tokens x": "--max_new_tokens",
    "sample.py --num_samples 0": "from 1 to 1000",
    "sample.py --temperature -0.1": "0 or more",
    "sample.py --temperature inf": "0 or more",
    "sample.py --top_k 0": "above 0",
    "sample.py --top_k -3": "above 0",
    "sample.py --top_p 0": "above 0",
    "sample.py --top_p nan": "above 0",
    "sample.py --seed -1": "0 or more",
    "sample.py --seed 2147483648": "below 2**31",
    "sample.py --dtype half": "auto, float32, bfloat16, float16",
    "sample.py --no_such_flag": "--no_such_flag",
    "sample.py a b": "b",
}


@pytest.mark.parametrize("command", OTHERS)
def test_any_other_mistake_is_named_with_what_is_allowed(command, tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 1000)
    (tmp_path / "x").mkdir()
    script, *flags = command.replace("TEXT", "text.txt").split()
    if script != "sample.py":
        flags += ["--offline"] * ("--offline=yes" not in flags)
    error = one_line_error(ROOT / script, *flags, cwd=tmp_path)
    assert OTHERS[command] in error, error


@pytest.mark.parametrize("script", CONFIGS)
@pytest.mark.parametrize(
    "content, clue",
    [
        (None, "cannot read"),
        (b"", "too little"),
        (b"short\n", "too little"),
        (b"a" * 5000, "too little"),
        ("caf\xe9 ".encode("latin-1") * 1000, "not UTF-8"),
        (b"\xff\xfe" + "text".encode("utf-16-le") * 1000, "not UTF-8"),
    ],
)
def test_a_text_of_no_use_is_named(script, content, clue, tmp_path):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    if script == "bpe_gpt.py" and content == b"a" * 5000:
        pytest.skip("for a model of tokens, 'a' and 'aa' are two: it can learn from that")
    flags = ["--data", "text.txt"] + ["--init", "scratch"] * (script == "bpe_gpt.py")
    error = one_line_error(ROOT / script, *flags, cwd=tmp_path)
    assert "text.txt" in error and clue in error
