"""data/instruct.py: teaching a model to respond."""

import json
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PLAY, ROOT, instruct, one_line_error, run

import bpe_gpt
from bpe_gpt import END_OF_TEXT, GPT, GPTConfig, make_batch

InstructionData = instruct.InstructionData
encode_record = instruct.encode_record
make_prompt = instruct.make_prompt
read_records = instruct.read_records
SCRIPT = ROOT / "data" / "instruct.py"
RECORDS = [
    {"instruction": f"{verb} the word.", "input": word, "output": f"{a} {word}{b}"}
    for verb, a, b in (("Greet", "Hello,", "!"), ("Doubt", "Is it", "?"), ("Praise", "Good", "."))
    for word in ("crown", "river", "night", "sword")
]
RECORDS.append({"instruction": "Say nothing much.", "input": "", "output": "Hm."})


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_gpt.train_bpe(PLAY.read_text(encoding="utf-8")[:5000], 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=300, block_size=512)).eval()


def responses(tokenizer, y):
    """What the targets of a batch make the model learn, row by row."""
    return [tokenizer.decode(row[row != -100].tolist()) for row in y]


def write_records(path, records):
    path.write_text(json.dumps(records))
    return str(path)

# ---- The prompt ---------------------------------------------------------------------------------

def test_a_prompt_with_an_input_is_alpacas():
    assert make_prompt({"instruction": "Add.", "input": "1 and 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")


@pytest.mark.parametrize("nothing", ["", " ", " \n\t "])
def test_an_input_of_only_spaces_counts_as_none(nothing):
    assert make_prompt({"instruction": "Add.", "input": nothing}) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n")


def test_braces_in_a_record_are_only_braces():
    prompt = make_prompt({"instruction": "Explain {input} and {x} and {}.", "input": "{context}"})
    assert "### Instruction:\nExplain {input} and {x} and {}.\n\n" in prompt
    assert "### Input:\n{context}\n\n" in prompt

# ---- What is learned ----------------------------------------------------------------------------

def test_the_response_and_its_end_are_learned_and_nothing_else(tokenizer):
    for record in RECORDS:
        x, y = encode_record(record, tokenizer)
        n = (y != -100).sum()
        assert tokenizer.decode(y[-n:].tolist()) == record["output"] + END_OF_TEXT
        assert (y[:-n] == -100).all() and y[-1] == tokenizer.end_of_text
        whole = tokenizer.decode(x.tolist()) + END_OF_TEXT
        assert whole == make_prompt(record) + record["output"] + END_OF_TEXT


def test_an_end_of_text_that_a_record_spells_out_is_only_text(tokenizer):
    record = {"instruction": f"What is {END_OF_TEXT}?", "input": "", "output": END_OF_TEXT}
    x, y = encode_record(record, tokenizer)
    assert tokenizer.end_of_text not in x and (y == tokenizer.end_of_text).sum() == 1


def test_the_loss_is_that_of_the_response_alone(tokenizer, model):
    x, y = make_batch([encode_record(RECORDS[0], tokenizer)])  # each (1, T)
    logits, loss = model(x, y)
    n = (y != -100).sum()
    assert loss.item() == pytest.approx(F.cross_entropy(logits[0, -n:], y[0, -n:]).item())
    logits.retain_grad()
    F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    assert torch.all(logits.grad[0, :-n] == 0) and torch.all(logits.grad[0, -n:].abs().sum(-1) > 0)


def test_padding_changes_nothing(tokenizer, model):
    """A record has the same loss among longer ones as alone, whatever token fills it up."""
    rows = [encode_record(record, tokenizer) for record in (RECORDS[0], RECORDS[-1], RECORDS[5])]
    x, y = make_batch(rows)
    lengths = [len(row_x) for row_x, _ in rows]
    assert x.shape == y.shape == (3, max(lengths)) and len(set(lengths)) > 1
    for filler in (None, 0, 299):
        for i, n in enumerate(lengths):
            assert (y[i, n:] == -100).all()
            if filler is not None:
                x[i, n:] = filler
        for i, row in enumerate(rows):
            _, alone = model(*make_batch([row]))
            _, padded = model(x[i : i + 1], y[i : i + 1])
            assert padded.item() == pytest.approx(alone.item(), abs=1e-6)


def test_each_record_comes_once_an_epoch_and_in_another_order(tokenizer):
    config = GPTConfig(block_size=256, total_batch_size=3 * 256)
    data = InstructionData(RECORDS[:12], tokenizer, config)
    epochs = []
    for epoch in range(3):
        batches = [data.training_batch(step) for step in range(4 * epoch, 4 * epoch + 4)]
        assert all(len(x) == len(y) == 3 for x, y in batches)
        epochs.append(sum((responses(tokenizer, y) for _, y in batches), []))
    wanted = sorted(record["output"] + END_OF_TEXT for record in RECORDS[:12])
    assert all(sorted(epoch) == wanted for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    x, _ = data.training_batch(7)
    again, _ = InstructionData(RECORDS[:12], tokenizer, config).training_batch(7)
    assert torch.equal(again, x), "the step alone decides"
    data.config.seed += 1
    batches = [data.training_batch(step) for step in range(4)]
    assert sum((responses(tokenizer, y) for _, y in batches), []) != epochs[0], "and the seed"


def test_the_last_few_records_of_an_epoch_are_left_out_if_they_do_not_fill_a_step(tokenizer):
    config = GPTConfig(block_size=256, total_batch_size=5 * 256)
    data = InstructionData(RECORDS[:12], tokenizer, config)
    left_out = set()
    for epoch in range(8):
        seen = responses(tokenizer, data.training_batch(2 * epoch)[1])
        seen += responses(tokenizer, data.training_batch(2 * epoch + 1)[1])
        assert len(seen) == len(set(seen)) == 10
        left_out |= {record["output"] + END_OF_TEXT for record in RECORDS[:12]} - set(seen)
    assert len(left_out) > 6, "not the same ones each time"


def test_records_too_few_for_a_step_are_a_step_together(tokenizer):
    data = InstructionData(RECORDS[:3], tokenizer, GPTConfig(block_size=256))
    for step in range(3):
        batch = responses(tokenizer, data.training_batch(step)[1])
        assert sorted(batch) == sorted(record["output"] + END_OF_TEXT for record in RECORDS[:3])


def test_evaluation_gives_every_token_of_the_responses_the_same_weight(tokenizer, model):
    total = n = 0
    for record in RECORDS:
        x, y = encode_record(record, tokenizer)
        total += F.cross_entropy(model(x[None])[0][0], y, reduction="sum").item()
        n += (y != -100).sum().item()
    for batch_size in (1, 5, 100):
        data = InstructionData(RECORDS, tokenizer, GPTConfig(batch_size=batch_size))
        assert sum(len(x) for x, _ in data.evaluation_batches()) == len(RECORDS)
        assert bpe_gpt.evaluate(model, data) == pytest.approx(total / n, abs=1e-5)


def test_a_step_in_parts_is_the_step_of_the_whole(tokenizer):
    """Also where the parts have responses of different lengths."""
    records = [dict(record, output=record["output"] * (1 + 3 * (i < 2)))
               for i, record in enumerate(RECORDS[:8])]
    rows = [encode_record(record, tokenizer) for record in records]
    after = []
    for batch_size in (8, 3, 1):
        config = GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=300, block_size=512,
                           dropout=0.0, batch_size=batch_size, warmup_iters=0, grad_clip=1e9)
        torch.manual_seed(0)
        part = GPT(config)
        x, y = make_batch(rows)
        optimizer = types.SimpleNamespace(step=lambda multiplier: None)  # changes no gradient
        autocast = torch.autocast("cpu", enabled=False)
        loss = bpe_gpt.training_step(part, [optimizer], x, y, 0, config, autocast)
        assert loss == pytest.approx(part(x, y)[1].item(), abs=1e-5)
        after.append(torch.cat([p.grad.flatten() for p in part.parameters()]))
    assert after[0].norm() > 0.1
    assert all(torch.allclose(after[0], other, atol=1e-6) for other in after[1:])

# ---- Files of records ---------------------------------------------------------------------------

def test_a_record_may_lack_an_input(tmp_path):
    records = [{name: text for name, text in record.items() if text} for record in RECORDS]
    assert "input" not in records[-1]
    (tmp_path / "x.json").write_text(json.dumps(records))
    assert read_records(tmp_path / "x.json") == RECORDS


def test_records_without_an_output_are_skipped(tmp_path):
    useless = [{"instruction": "x", "output": ""}, {"instruction": "x", "output": None}]
    (tmp_path / "x.json").write_text(json.dumps(RECORDS[:5] + useless + RECORDS[5:]))
    assert read_records(tmp_path / "x.json") == RECORDS


def test_an_input_may_be_null_and_an_answer_no_text(tmp_path):
    """It is written as in JSON; the answers 0 and false are answers."""
    outputs = [3, 0, -1.5, True, False, ["ä", 1], None]
    outputs.append(float("nan"))  # as pandas writes a missing field
    records = [{"instruction": "x", "input": None, "output": output} for output in outputs]
    records[0]["input"] = float("nan")
    (tmp_path / "x.json").write_text(json.dumps(records), encoding="utf-8-sig")  # as Windows does
    expected = [{"instruction": "x", "input": "", "output": text}
                for text in ("3", "0", "-1.5", "true", "false", '["ä", 1]')]
    assert read_records(tmp_path / "x.json") == expected


NEEDED = "x.json is not a list of records with instruction and output"


@pytest.mark.parametrize("content, clue", [
    (json.dumps(RECORDS[:9]), "too few records"),
    (json.dumps([*RECORDS[:9], {"instruction": "x", "output": ""}]), "too few records"),
    ("[]", "too few records"),
    (json.dumps([*RECORDS, {"instruction": "x"}]), NEEDED),
    (json.dumps([*RECORDS, {"output": "x"}]), NEEDED),
    (json.dumps([*RECORDS, "text"]), NEEDED),
    (json.dumps([*RECORDS, None]), NEEDED),
    (json.dumps([*RECORDS, [1, 2]]), NEEDED),
    (json.dumps({"data": RECORDS}), NEEDED),
    ("null", NEEDED),
    ("[1, 2", NEEDED),
    ("", NEEDED),
    (None, "x.json"),
])
def test_a_file_of_no_use_is_refused_in_one_line(tmp_path, content, clue):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    flags = "--data", "x.json", "--vocab_size", "300"
    assert clue in one_line_error(SCRIPT, *flags, cwd=tmp_path)
    assert not list(tmp_path.glob("out/*"))


LONG = [{"instruction": "Say more. " * 100, "input": "", "output": "more"},
        {"instruction": "Say much.", "input": "", "output": "much " * 200}]


def test_records_that_do_not_fit_are_left_out(tokenizer):
    data = InstructionData([LONG[0], *RECORDS, LONG[1]], tokenizer, GPTConfig(block_size=256))
    _, y = make_batch(data.rows)
    assert responses(tokenizer, y) == [record["output"] + END_OF_TEXT for record in RECORDS]
    n = len(encode_record(RECORDS[0], tokenizer)[0])
    for block_size, kept in ((n - 1, 0), (n, 1)):
        config = GPTConfig(block_size=block_size)
        assert len(InstructionData(RECORDS[:1], tokenizer, config).rows) == kept


def test_records_that_fit_are_counted_and_some_must(tmp_path, tokenizer, capsys):
    path = write_records(tmp_path / "x.json", RECORDS * 2 + LONG * 2)
    config = GPTConfig(data=path, block_size=256)
    train_data, val_data, _ = instruct.load_instructions(config, tokenizer)
    n_train, n_val = len(train_data.rows), len(val_data.rows)
    assert n_train + n_val == 26 and n_val > 0
    assert capsys.readouterr().out == (f"{n_train} of 27 records to train on and {n_val} of 3 to "
                                       "validate on fit into block_size\n")
    config.block_size = 20
    with pytest.raises(ValueError, match="records have up to .* tokens, and this model reads 20:"):
        instruct.load_instructions(config, tokenizer)
    assert capsys.readouterr().out.startswith("0 of 27 records to train on and 0 of 3 to ")


def test_a_tenth_is_held_back(tmp_path, tokenizer):
    config = GPTConfig(data=write_records(tmp_path / "x.json", RECORDS * 3))
    train_data, val_data, same = instruct.load_instructions(config, tokenizer)
    assert [len(train_data.rows), len(val_data.rows)] == [36, 3] and same is tokenizer
    inputs = sorted(x.tolist() for x, _ in train_data.rows + val_data.rows)
    assert inputs == sorted(encode_record(r, tokenizer)[0].tolist() for r in RECORDS * 3)


def test_the_seed_decides_which_records_are_held_back(tmp_path, tokenizer):
    """Not the first or last ones of the file, which may be of one kind."""
    path = write_records(tmp_path / "x.json", RECORDS * 3)
    held_back = []
    for seed in (1, 1, 2, 3):
        config = GPTConfig(data=path, seed=seed)
        _, val_data, _ = instruct.load_instructions(config, tokenizer)
        held_back.append([x.tolist() for x, _ in val_data.rows])
    assert held_back[0] == held_back[1]
    assert held_back[0] != held_back[2] != held_back[3] != held_back[0]


def test_a_vocabulary_is_learned_from_the_records_to_train_on(tmp_path):
    records = [dict(RECORDS[0], output=10 * f"{letter}{letter}" + str(i))
               for i, letter in enumerate("bcdfghjklm")]
    config = GPTConfig(data=write_records(tmp_path / "x.json", records), vocab_size=999)
    train_data, val_data, tokenizer = instruct.load_instructions(config, None)
    tokens = {tokenizer.tokens[i].decode("utf-8", "replace")
              for i in range(256, len(tokenizer.tokens))}
    (held_back,) = responses(tokenizer, val_data.rows[0][1][None])
    learned = {letter for letter in "bcdfghjklm" if 4 * letter in tokens}
    assert learned == set("bcdfghjklm") - {held_back[0]}

# ---- The command line ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder in which data/instruct.py has taught RECORDS to a model, and what it printed."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    flags = "--data records.json --n_layer 2 --n_head 2 --n_embd 64 --vocab_size 300 "
    flags += "--dropout 0 --batch_size 6 --total_batch_size 1536 --warmup_iters 5 "
    flags += "--max_iters 80 --eval_interval 40"
    return folder, run(SCRIPT, *flags.split(), cwd=folder)[0]


def test_a_run_prints_its_records_its_losses_and_a_response(taught):
    _, text = taught
    assert "12 of 12 records to train on and 1 of 1 to validate on fit into block_size\n" in text
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) train", text)]
    assert len(losses) == 2 and losses[1] < losses[0] / 3
    assert text.count("    | ### Response:\n") == 2, "one validation record, two evaluations"


def test_a_response_is_shown_up_to_its_end(tokenizer, monkeypatch, capsys):
    """The model answers three prompts: with nothing, with a response, and with one without an end."""
    a, b, end = *tokenizer.encode("ab"), tokenizer.end_of_text
    texts = [[end, b, a], [a, b, end, b], [b, a]]

    def generate(model, idx, max_new_tokens):
        assert tokenizer.end_of_text not in idx, "as in training, a prompt is ordinary text"
        yield from torch.tensor(texts.pop(0))

    monkeypatch.setattr(bpe_gpt, "generate", generate)
    head = types.SimpleNamespace(weight=torch.zeros(1))
    checkpoint = dict(
        bytes_per_token=[1.0, 1.0], history=[(10, 100, 4.0, 4.0)], last=dict(seconds=1.0))
    data = types.SimpleNamespace(prompts=["one:", "two <|endoftext|>:", "three:"])
    model = types.SimpleNamespace(lm_head=head)
    monkeypatch.setattr(bpe_gpt, "utilization", lambda *args: 0.5)
    bpe_gpt.report(checkpoint, model, tokenizer, data, GPTConfig())
    shown = capsys.readouterr().out.splitlines()[2:]
    assert shown == ["    | one:", "    | two <|endoftext|>:ab", "    | three:ba"]


def test_a_response_that_was_learned_is_brought_back_by_sample_py(taught):
    folder, _ = taught
    records = read_records(folder / "records.json")
    np.random.default_rng(1337).shuffle(records)
    record = next(record for record in records[1:] if record["input"])  # one of those trained on
    flags = "--instruct", record["instruction"], "--input", record["input"], "--temperature", "0"
    text, _ = run(ROOT / "sample.py", "out/bpe_gpt.pt", *flags, cwd=folder)
    assert text == record["output"] + "\n"


def test_fields_that_are_not_used_are_named_once(tmp_path, capsys):
    """Others' records may have a context, a system prompt, or a history."""
    records = [dict(RECORDS[0], context="x"), RECORDS[1], dict(RECORDS[2], system="y")]
    assert read_records(write_records(tmp_path / "x.json", records)) == RECORDS[:3]
    assert capsys.readouterr().out == "these fields of the records are not used: context, system\n"
    read_records(write_records(tmp_path / "x.json", RECORDS))
    assert capsys.readouterr().out == ""


def test_sample_py_answers_only_with_a_model_that_was_taught(clone):
    error = one_line_error(
        ROOT / "sample.py", "out/char_gpt.pt", "--instruct", "Greet the word.", cwd=clone)
    assert "out/char_gpt.pt was not trained on instructions: see data/instruct.py" in error


def test_a_small_context_is_named_with_the_way_out(clone):
    flags = "--init", "out/bpe_gpt.pt", "--out", "out/x.pt", "--data", ROOT / "data/instructions.json"
    error = one_line_error(SCRIPT, *flags, cwd=clone)
    assert "tokens, and this model reads 32: give another --init, or none" in error


def test_a_run_on_instructions_is_resumed(taught):
    folder, _ = taught
    before = torch.load(folder / "out" / "bpe_gpt.pt")
    flags = "--resume", "--max_iters", "83", "--out", "out/more.pt"
    (folder / "out" / "more.pt").write_bytes((folder / "out" / "bpe_gpt.pt").read_bytes())
    text, _ = run(SCRIPT, *flags, cwd=folder)
    assert "12 of 12 records to train on" in text and "step 83: " in text
    after = torch.load(folder / "out" / "more.pt")
    assert after["history"][:-1] == before["history"] and after["vocab"] == before["vocab"]
    assert after["last"]["step"] == 83 and after["must_match"] == before["must_match"]


@pytest.mark.parametrize("name", ["instruction", "input", "output"])
def test_a_run_is_not_resumed_with_records_that_were_edited(taught, name):
    """An answer, too: the questions alone do not make it the same data."""
    folder, _ = taught
    records = read_records(folder / "records.json")
    np.random.default_rng(1337).shuffle(records)  # the first is to validate on, the others to train
    record = records[-1]
    edited = read_records(folder / "records.json")
    edited[edited.index(record)][name] = "Hail."
    (folder / "edited.json").write_text(json.dumps(edited))
    before = (folder / "out" / "bpe_gpt.pt").read_bytes()
    flags = "--resume --max_iters 83 --data edited.json"
    error = one_line_error(SCRIPT, *flags.split(), cwd=folder)
    assert "--resume: out/bpe_gpt.pt was started with a different text" in error
    assert (folder / "out" / "bpe_gpt.pt").read_bytes() == before


def test_the_records_in_data_are_many_and_distinct():
    path = ROOT / "data" / "instructions.json"
    records = read_records(path)
    assert records == json.loads(path.read_text(encoding="utf-8")), "all are complete"
    assert len(records) >= 300
    assert len({(r["instruction"], r["input"]) for r in records}) == len(records)
    assert 0.3 < sum(bool(r["input"]) for r in records) / len(records) < 0.7
