"""GPT-2's published weights give what others have published of them. These tests run where
`python sample.py gpt2` has downloaded the weights into data/gpt2/, and are skipped elsewhere."""

import pytest
import torch
from conftest import ROOT, SHAKESPEARE, needs_gpt2_tokenizer, needs_shakespeare

from bpe_gpt import GPT, generate, gpt2_tokenizer

pytestmark = [
    needs_gpt2_tokenizer,
    pytest.mark.skipif(
        not (ROOT / "data" / "gpt2" / "model.safetensors").exists(),
        reason="data/gpt2/model.safetensors is not there: run `python sample.py gpt2` once"),
]


def test_the_greedy_text_is_picogpts():
    """From the README of https://github.com/jaymody/picoGPT."""
    tokenizer = gpt2_tokenizer()
    prompt = "Alan Turing theorized that computers would one day become"
    idx = torch.tensor([tokenizer.encode(prompt)])
    model = GPT.from_pretrained("gpt2")
    new = generate(model, idx, 40, lambda logits: logits.argmax(dim=-1, keepdim=True))
    text = tokenizer.decode([token.item() for token in new])
    assert text.strip() == (
        "the most powerful machines on the planet.\n\n"
        "The computer is a machine that can perform complex calculations, and it can perform these "
        "calculations in a way that is very similar to the human brain.")


@needs_shakespeare
def test_the_first_losses_of_training_are_those_of_llm_c():
    """From test_gpt2.c of https://github.com/karpathy/llm.c: steps of AdamW on the same batch of 4 x
    64 tokens, the beginning of Tiny Shakespeare with an end of text before each section."""
    text = SHAKESPEARE.read_text(encoding="utf-8")[:5000]
    text = "<|endoftext|>" + text.replace("\n\n", "\n\n<|endoftext|>")
    tokens = torch.tensor(gpt2_tokenizer().encode(text, {"<|endoftext|>"})[: 4 * 64 + 1])
    x = tokens[:-1].view(4, 64)
    y = tokens[1:].view(4, 64)
    model = GPT.from_pretrained("gpt2", dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    losses = []
    for _ in range(5):
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([5.2700, 4.0597, 3.3751, 2.8008, 2.3154], abs=0.01)
