"""Teaching a model to answer: the layout, the mask, the command."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PLAY, ROOT, one_line_error, run

import bpe_gpt
from bpe_gpt import GPT, GPTConfig, encode_record, lay_out, pad, read_records

RECORDS = [
    {"instruction": f"{verb} the word.", "input": word, "output": f"{a} {word}{b}"}
    for verb, a, b in (("Greet", "Hello,", "!"), ("Doubt", "Is it", "?"), ("Praise", "Good", "."))
    for word in ("crown", "river", "night", "sword")
]
RECORDS.append({"instruction": "Say nothing much.", "output": "Hm."})


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_gpt.train_bpe(PLAY.read_text(encoding="utf-8")[:5000], 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=300, block_size=512)).eval()


def test_the_layout_can_be_read_back():
    for record in RECORDS:
        parts = re.split(r"\n\n### (\w+):\n", "\n\n" + lay_out(record).split("\n\n", 1)[1])
        read = {name.lower(): text for name, text in zip(parts[1::2], parts[2::2])}
        assert read.pop("response") == ""
        assert read == {name: text for name, text in record.items() if name != "output"}


def test_braces_in_a_record_are_only_braces():
    record = {"instruction": "Explain {input} and {x}.", "input": "{instruction}", "output": "-"}
    assert "Explain {input} and {x}." in lay_out(record)
    assert "\n\n### Input:\n{instruction}\n\n" in lay_out(record)


def test_the_output_and_its_end_are_learned_and_nothing_else(tokenizer):
    for record in RECORDS:
        x, y = encode_record(tokenizer, record)
        learned = y[y != -100]
        assert tokenizer.decode(learned.tolist()) == record["output"] + bpe_gpt.END_OF_TEXT
        assert (y[-len(learned) :] == learned).all(), "they are the last ones"
        assert tokenizer.decode(x[: len(x) - len(learned) + 1].tolist()) == lay_out(record)


def test_the_loss_is_blind_to_the_prompt(tokenizer, model):
    """The loss is the mean over the tokens of the output alone: what the model says to the tokens
    of the prompt has no part in it, and brings no gradient."""
    x, y = (torch.from_numpy(part)[None] for part in encode_record(tokenizer, RECORDS[0]))
    logits, loss = model(x, y)
    n = (y != -100).sum()
    assert loss.item() == pytest.approx(F.cross_entropy(logits[0, -n:], y[0, -n:]).item())
    logits.retain_grad()
    F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    assert torch.all(logits.grad[0, :-n] == 0) and torch.all(logits.grad[0, -n:].abs().sum(-1) > 0)


def test_padding_changes_nothing(tokenizer, model):
    """A record has the same loss among longer ones as alone, whatever token fills it up."""
    records = [encode_record(tokenizer, record) for record in (RECORDS[0], RECORDS[-1], RECORDS[5])]
    x, y = pad(records)
    assert x.shape == y.shape == (3, max(len(x) for x, _ in records))
    for filler in (0, 299):
        for row, (own, _) in enumerate(records):
            x[row, len(own) :] = filler
        for row, (own_x, own_y) in enumerate(records):
            alone = model(*pad([(own_x, own_y)]))[1].item()
            logits, _ = model(x)
            padded = F.cross_entropy(logits[row], y[row])
            assert padded.item() == pytest.approx(alone, abs=1e-6)


def test_evaluation_gives_every_token_of_the_outputs_the_same_weight(tokenizer, model):
    records = [encode_record(tokenizer, record) for record in RECORDS]
    total = n = 0
    for x, y in records:
        logits, _ = model(torch.from_numpy(x)[None])
        total += F.cross_entropy(logits[0], torch.from_numpy(y), reduction="sum").item()
        n += (y != -100).sum()
    for batch_size in (1, 5):
        config = GPTConfig(batch_size=batch_size)
        loss = bpe_gpt.evaluate(model, records, config)
        assert loss == pytest.approx(total / n, abs=1e-5)


def test_each_record_comes_once_an_epoch(tokenizer):
    records = [encode_record(tokenizer, record) for record in RECORDS[:12]]
    config = GPTConfig(block_size=128, total_batch_size=3 * 128)
    for epoch in range(2):
        seen = []
        for step in range(4 * epoch, 4 * epoch + 4):
            _, y = bpe_gpt.get_batch(records, config, step)
            seen += [tokenizer.decode(row[row != -100].tolist()) for row in y]
        wanted = [record["output"] + bpe_gpt.END_OF_TEXT for record in RECORDS[:12]]
        assert sorted(seen) == sorted(wanted) and seen != wanted


def test_a_step_in_parts_is_the_step_of_the_whole(tokenizer, tmp_path):
    """Also where the parts have outputs of different lengths."""
    records = [encode_record(tokenizer, record) for record in RECORDS]
    after = []
    for batch_size in (8, 3):
        config = GPTConfig(
            n_layer=1, n_head=2, n_embd=16, vocab_size=300, block_size=256, dropout=0.0,
            total_batch_size=8 * 256, batch_size=batch_size,
            max_iters=1, muon_learning_rate=0, warmup_iters=1, out=str(tmp_path / "x.pt"),
        )  # fmt: skip
        torch.manual_seed(0)
        part = GPT(config)
        checkpoint = dict(script="bpe_gpt", vocab=[], history=[], last=None, config={})
        autocast = torch.autocast("cpu", enabled=False)
        bpe_gpt.train(part, tokenizer, records, records[:2], config, autocast, checkpoint)
        after.append(torch.cat([p.flatten() for p in part.parameters()]))
    assert torch.allclose(*after, atol=1e-5)


def test_a_file_has_a_list_or_a_record_in_each_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=1))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "b.jsonl") == RECORDS


@pytest.mark.parametrize(
    "record, clue",
    [
        ("text", "record 5 is not an object"),
        ({"instruction": "x"}, "record 5: its output is missing"),
        ({"output": "x"}, "record 5: its instruction is missing"),
        ({"instruction": "x", "output": " "}, "record 5: its output is not a text, or empty"),
        ({"instruction": 7, "output": "x"}, "record 5: its instruction is not a text"),
        ({"instruction": "x", "input": 7, "output": "x"}, "record 5: its input"),
    ],
)
def test_a_record_with_a_fault_is_named_by_number_and_field(tmp_path, record, clue):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([*RECORDS[:5], record, *RECORDS[5:]]))
    flags = ("--init", "scratch", "--offline", "--instructions", str(path))
    assert clue in one_line_error(ROOT / "bpe_gpt.py", *flags, cwd=tmp_path)


@pytest.mark.parametrize(
    "content, flags, clue",
    [
        ("[1, 2", "", "neither JSON nor lines of JSON"),
        ("", "", "0 records; it takes 10 at least"),
        ("[" * 100_000, "", "neither JSON"),
        (json.dumps(RECORDS), "--data x.json", "without --data"),
        (json.dumps(RECORDS), "--block_size 4", "--block_size 4 is too short"),
        (None, "", "cannot read"),
    ],
)
def test_a_file_of_no_use_is_named(tmp_path, content, flags, clue):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    command = f"--init scratch --offline --instructions x.json {flags}".split()
    assert clue in one_line_error(ROOT / "bpe_gpt.py", *command, cwd=tmp_path)


SMALL = "--n_layer 2 --n_head 2 --n_embd 64 --learned_vocab_size 300 --dropout 0 --batch_size 5 "
SMALL += "--total_batch_size 1280 --eval_interval 60 --warmup_iters 5"


@pytest.fixture(scope="module")
def taught(clone):
    """What bpe_gpt.py prints as it learns RECORDS. The checkpoint is out/taught.pt."""
    (clone / "records.json").write_text(json.dumps(RECORDS))
    flags = f"--init scratch --offline --instructions records.json --out out/taught.pt {SMALL}"
    return run("bpe_gpt.py", *flags.split(), "--max_iters", "120", cwd=clone)[0]


def test_answers_that_were_learned_come_back_and_others_cost_less_than_before(taught, clone):
    assert "11 and 1 and 1 records" in taught
    before = float(re.search(r"before training: validation loss (\S+)", taught)[1])
    after = float(re.search(r"(\S+) at best", taught)[1])
    assert after < before - 2
    assert "test loss" in taught and taught.count("### Response:") == 3, "before, between, after"
    order = np.random.default_rng(1337).permutation(len(RECORDS))
    for i in order[2:5]:
        flags = ["--instruct", RECORDS[i]["instruction"], "--input", RECORDS[i].get("input", "")]
        text, _ = run("sample.py", "out/taught.pt", *flags, "--temperature", "0", cwd=clone)
        assert text == RECORDS[i]["output"] + "\n"


def test_what_is_too_long_is_cut_and_counted(clone):
    long = {"instruction": "Say much.", "output": "much " * 200}
    longer = {"instruction": "Say more. " * 100, "output": "more"}
    (clone / "long.json").write_text(json.dumps([*RECORDS, long, longer]))
    flags = f"--init scratch --offline --instructions long.json --out out/long.pt {SMALL}"
    text, _ = run("bpe_gpt.py", *flags.split(), "--max_iters", "1", cwd=clone)
    assert "longer than --block_size, and cut: 2, of which no answer was left in 1" in text


def test_a_model_that_was_not_taught_says_so(clone):
    error = one_line_error("sample.py", "out/bpe_gpt.pt", "--instruct", "Sing.", cwd=clone)
    assert "follows no instructions" in error


def test_a_run_on_instructions_is_resumed_and_evaluated(taught, clone):
    flags = ["--resume", "--out", "out/taught.pt", "--max_iters", "121", "--offline"]
    text, _ = run("bpe_gpt.py", *flags, cwd=clone)
    assert "going on after step 120" in text and "test loss" in text
    flags = ["--eval_only", "--out", "out/taught.pt", "--instructions", "records.json"]
    text, _ = run("bpe_gpt.py", *flags, "--offline", cwd=clone)
    assert "13 records" in text and float(re.search(r"loss (\S+)", text)[1]) < 2


def test_the_records_in_data_are_many_and_good():
    records = read_records(ROOT / "data" / "instructions.json")
    assert len(records) >= 300
    assert len({(r["instruction"], r["input"]) for r in records}) == len(records)
    assert 0.3 < sum(bool(r["input"]) for r in records) / len(records) < 0.7
