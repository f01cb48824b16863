"""The loss of a model on the whole of a text, and its perplexity and bits per byte.

    python data/evaluate.py gpt2 wiki.test.raw            # a published model, on a text file
    python data/evaluate.py out/bpe_gpt.pt data/corpus    # a checkpoint, on a folder's val.bin

The text is cut into windows as long as the model's context, end to end.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bpe_gpt
from bpe_gpt import UserError


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a checkpoint")
    parser.add_argument("data", help="a text file, or a folder of tokens")
    parser.add_argument("--batch_size", type=int, default=8, help="windows at once; default: 8")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="float32 or bfloat16")
    args = parser.parse_args()
    checkpoint = bpe_gpt.load_pretrained(args.model)
    config = bpe_gpt.GPTConfig(**checkpoint["config"] | dict(batch_size=args.batch_size))
    tokenizer = bpe_gpt.BPETokenizer(checkpoint["vocab"])
    if os.path.isdir(args.data):
        _, tokens = bpe_gpt.read_folder(args.data, tokenizer)
    else:
        text = bpe_gpt.load_text(args.data)
        tokens = np.array(tokenizer.encode(text))
    data = bpe_gpt.TextData(tokens, config)
    data.max_evaluated = len(tokens) + 1  # all
    device = bpe_gpt.pick_device(args.device)
    dtype = bpe_gpt.pick_dtype(args.dtype, device)
    model = bpe_gpt.build_model(checkpoint, config).to(device)
    print(f"{len(tokens):,} tokens, on {device} in {dtype}")
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = bpe_gpt.evaluate(model, data)
    print("loss", bpe_gpt.describe(loss, bpe_gpt.bytes_per_token(data, tokenizer)))


if __name__ == "__main__":
    try:
        main()
    except (OSError, UserError) as error:
        sys.exit(f"error: {error}")
