"""Teach GPT-2, or another model of bpe_gpt.py, to follow instructions.

    python data/instruct.py --init gpt2                  # learns from data/instructions.json
    python data/instruct.py --init gpt2 --data my.json   # from records of your own
    python data/instruct.py                              # a small model, on a CPU: see below
    python sample.py --instruct "Name the opposite." --input "heavy"

The flags are those of bpe_gpt.py. The file has a list of records, like Stanford Alpaca's (Taori et
al. 2023): [{"instruction": "Name the opposite.", "input": "heavy", "output": "light"}, ...].

A small model that has read nothing else learns the form of an answer from those records, but knows
too little. It can learn small tasks, such as these, in about 5 minutes on two CPU cores:

    import json, re
    text = open("data/tinyshakespeare.txt", encoding="utf-8").read()
    words = sorted(set(re.findall("[a-z]{3,8}", text)))[::8]
    tasks = {"Write the word in capital letters.": str.upper, "Spell the word.": "-".join,
             "Write the word twice.": "{0} {0}".format, "Name the first letter.": lambda x: x[0]}
    records = [dict(instruction=task, input=word, output=answer(word))
               for task, answer in tasks.items() for word in words]
    json.dump(records, open("words.json", "w"))

    python data/instruct.py --data words.json --vocab_size 380 --block_size 80 --batch_size 32 \\
        --total_batch_size 2560 --max_iters 1500 --eval_interval 500 --out out/words.pt
    python sample.py out/words.pt --instruct "Spell the word." --input dragon --temperature 0

Of 500 words that it has never seen, such as this one, it spells 399, writes 359 in capital letters
and 378 twice, and names the first letter of 497, without a mistake.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bpe_gpt
from bpe_gpt import UserError, from_first_process, make_batch, pick_rows

# In place of those of bpe_gpt.py. A fine-tuned model keeps its own block_size.
SETTINGS = dict(
    block_size=256, batch_size=8, total_batch_size=8192, max_iters=130, eval_interval=65)

# ---- Prompts ------------------------------------------------------------------------------------

# Alpaca's prompt: a text that is likely to go on with a response. The second one has an input.
TEMPLATES = ["""Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
""", """Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""]


def make_prompt(record):
    has_input = record["input"].strip() != ""
    return TEMPLATES[has_input].format(instruction=record["instruction"], input=record["input"])


def encode_record(record, tokenizer):
    """Inputs x and targets y of a record, both (T,)."""
    prompt = tokenizer.encode(make_prompt(record), special=())
    response = tokenizer.encode(record["output"], special=()) + [tokenizer.end_of_text]
    tokens = torch.tensor(prompt + response)
    y = tokens[1:].clone()
    # Targets are one token ahead: the last token of the prompt already has to predict the response.
    y[: len(prompt) - 1] = -100
    return tokens[:-1], y

# ---- Data ---------------------------------------------------------------------------------------

FIELDS = ("instruction", "input", "output")


def read_records(path):
    """The records in a JSON file, without those that have no output."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        records = [record | {"input": record.get("input")} for record in records]
        unused = sorted({name for record in records for name in record} - set(FIELDS))
        records = [{name: as_text(record[name]) for name in FIELDS} for record in records]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise UserError(f"{path} is not a list of records with instruction and output") from None
    if unused:
        print(f"these fields of the records are not used: {', '.join(unused)}")
    return [record for record in records if record["output"] != ""]


def as_text(value):
    """A field as text. It may be null, or a number or a list, which is written as in JSON."""
    if value is None or value != value:  # pandas writes a missing field as NaN
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class InstructionData:
    """In place of TextData: each record is a row. Instructions are only read; what the model learns
    is the response, and the end-of-text token after it. Nothing else counts in the loss."""
    templates = TEMPLATES

    def __init__(self, records, tokenizer, config):
        self.config = config
        self.prompts = [make_prompt(record) for record in records[:3]]
        self.hash = hashlib.sha256(json.dumps(records).encode()).hexdigest()
        rows = [encode_record(record, tokenizer) for record in records]
        self.longest = max((len(x) for x, _ in rows), default=0)
        self.rows = [(x, y) for x, y in rows if len(x) <= config.block_size]
        self.n_rows = len(self.rows)

    def training_batch(self, step):
        _, chosen = pick_rows(self.n_rows, step, self.config)
        return make_batch([self.rows[n] for n in chosen])

    def evaluation_batches(self):
        for i in range(0, len(self.rows), self.config.batch_size):
            yield make_batch(self.rows[i : i + self.config.batch_size])


def load_instructions(config, tokenizer):
    """Training data (90%), validation data (10%) and the tokenizer."""
    records = from_first_process(read_records, config.data or bpe_gpt.DATA / "instructions.json")
    np.random.default_rng(config.seed).shuffle(records)
    n_val = len(records) // 10
    if tokenizer is None:
        texts = [make_prompt(record) + record["output"] for record in records[n_val:]]
        tokenizer = from_first_process(bpe_gpt.train_bpe, "\n".join(texts), config.vocab_size)
    train_data = InstructionData(records[n_val:], tokenizer, config)
    val_data = InstructionData(records[:n_val], tokenizer, config)
    print(f"{train_data.n_rows} of {len(records) - n_val} records to train on and "
          f"{val_data.n_rows} of {n_val} to validate on fit into block_size")
    if n_val == 0:
        raise UserError("too few records: there must be at least ten")
    if not train_data.rows or not val_data.rows:
        raise UserError(f"the records have up to {train_data.longest} tokens, and this model reads "
                        f"{config.block_size}: give another --init, or none and a --block_size")
    return train_data, val_data, tokenizer


if __name__ == "__main__":
    try:
        bpe_gpt.main(load_instructions, SETTINGS)
    except (OSError, UserError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        sys.exit("error: out of memory; lower --batch_size, then --block_size")
    except KeyboardInterrupt:
        sys.exit("stopped; if this run has saved a checkpoint, --resume continues from it")
