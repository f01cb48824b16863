"""bigram.py: a lookup table, trained."""

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import PLAY, SHAKESPEARE, needs_shakespeare

from bigram import (
    BigramConfig,
    BigramLanguageModel,
    CharTokenizer,
    count_bigrams,
    cross_entropy,
    evaluate,
    generate,
    get_batch,
    split_data,
    train,
)


def test_the_table_has_4225_parameters():
    model = BigramLanguageModel(BigramConfig())
    assert sum(p.numel() for p in model.parameters()) == 65 * 65 == 4225


def test_shapes_of_logits_and_loss():
    model = BigramLanguageModel(BigramConfig())
    idx = torch.randint(65, (4, 8))
    logits, loss = model(idx)
    assert logits.shape == (4, 8, 65) and loss is None
    logits, loss = model(idx, idx)
    assert logits.shape == (4, 8, 65) and loss.shape == ()


def test_before_training_every_guess_is_uniform():
    model = BigramLanguageModel(BigramConfig())
    idx = torch.randint(65, (4, 8))
    _, loss = model(idx, idx)
    assert loss.item() == pytest.approx(torch.tensor(65.0).log().item(), abs=1e-5)


def test_only_the_last_token_matters():
    model = BigramLanguageModel(BigramConfig())
    torch.nn.init.normal_(model.table.weight)
    a, _ = model(torch.tensor([[1, 2, 3]]))
    b, _ = model(torch.tensor([[9, 9, 3]]))
    assert torch.equal(a[0, -1], b[0, -1])


def test_cross_entropy_equals_pytorch():
    torch.manual_seed(0)
    ours = (3 * torch.randn(4, 8, 65)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    targets = torch.randint(65, (4, 8))
    a = cross_entropy(ours, targets)
    b = F.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    a.backward(), b.backward()
    assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_counting_gives_the_frequencies_of_pairs():
    """In `abcabab`, b follows a three times of three; b is followed by c once, by a once."""
    data = torch.tensor(CharTokenizer("abc").encode("abcabab"))
    model = count_bigrams(data, 3)
    expected = torch.tensor([[0, 1, 0], [0.5, 0, 0.5], [1, 0, 0]])
    assert torch.allclose(model.table.weight.softmax(-1), expected)


def test_adding_one_makes_nothing_impossible():
    table = count_bigrams(torch.tensor([0, 1, 0, 1]), 3, add=1).table.weight.softmax(-1)
    expected = torch.tensor([[1 / 5, 3 / 5, 1 / 5], [2 / 4, 1 / 4, 1 / 4], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(table, expected)


def test_the_gradient_is_zero_where_counting_ends():
    """softmax(row) minus the frequencies of what follows: why no table does better."""
    data = torch.randint(5, (400,))
    model = count_bigrams(data, 5)
    model(data[None, :-1], data[None, 1:])[1].backward()
    assert model.table.weight.grad.abs().max() < 1e-6


def test_a_pair_that_never_occurred_is_never_written():
    text = PLAY.read_text(encoding="utf-8")
    tokenizer = CharTokenizer(text)
    data = torch.tensor(tokenizer.encode(text))
    torch.manual_seed(0)
    model = count_bigrams(data, 65)
    ids = torch.cat(list(generate(model, data[:1].view(1, 1), 2000)), dim=1)[0]
    written = tokenizer.decode(ids.tolist())
    assert all(written[i : i + 2] in text for i in range(1999))


def train_on(path):
    """Train the table with the settings of the script. Returns it, the data and the config."""
    config = BigramConfig()
    text = path.read_text(encoding="utf-8")
    tokenizer = CharTokenizer(text)
    data = split_data(torch.tensor(tokenizer.encode(text)), config)
    model = BigramLanguageModel(config)
    checkpoint = dict(history=[], bytes_per_token=[1.0, 1.0])
    train(model, *data, tokenizer, config, checkpoint)
    assert checkpoint["history"][-1][0] == config.max_iters
    return model, *data, config


def test_a_step_moves_every_parameter_against_its_gradient():
    """By the learning rate of this step, which falls in a line: p - rate * gradient."""
    config = BigramConfig(block_size=8, batch_size=2, max_iters=2, eval_interval=2)
    data = torch.randint(65, (100,))
    model = BigramLanguageModel(config)
    expected = BigramLanguageModel(config)
    tokenizer = CharTokenizer(map(chr, range(65)))
    checkpoint = dict(history=[], bytes_per_token=[1.0, 1.0])
    train(model, data, data, tokenizer, config, checkpoint)
    for step, rate in ((0, 200.0), (1, 100.0)):
        _, loss = expected(*get_batch(data, config, step))
        (gradient,) = torch.autograd.grad(loss, expected.table.weight)
        expected.table.weight.data -= rate * gradient
    assert torch.allclose(model.table.weight, expected.table.weight, atol=1e-4)


def test_gradient_descent_finds_what_counting_finds():
    """But for the rarest characters, whose gradients are too small."""
    model, train_data, _, config = train_on(PLAY)
    counted = evaluate(count_bigrams(train_data, 65), train_data, config)
    assert counted < evaluate(model, train_data, config) < counted + 0.02


@needs_shakespeare
def test_losses_on_tiny_shakespeare():
    """2.452 is the least that any bigram model can reach on the training text, and 2.482 is what
    counts plus one reach on the validation text. The trained table comes within 0.02 of both."""
    model, train_data, val_data, config = train_on(SHAKESPEARE)
    counts, counts_plus_one = [count_bigrams(train_data, 65, add=n) for n in (0, 1)]
    assert evaluate(counts, train_data, config) == pytest.approx(2.452, abs=0.001)
    assert evaluate(counts_plus_one, val_data, config) == pytest.approx(2.482, abs=0.001)
    assert evaluate(model, train_data, config) == pytest.approx(2.452, abs=0.02)
    assert evaluate(model, val_data, config) == pytest.approx(2.482, abs=0.02)


def test_the_command_shows_both_optima(clone):
    output = (clone / "logs" / "bigram.txt").read_text(encoding="utf-8")
    assert "4,225 parameters" in output and "bits/byte" in output
    assert re.search(r"before training: val loss 4\.174\d; a uniform guess: ln\(65\) = 4\.1744", output)
    learned, counted = re.search(r"train loss: learned (\S+), counted (\S+)\n", output).groups()
    assert float(counted) < float(learned) < float(counted) + 0.25
    text = PLAY.read_text(encoding="utf-8")
    data = torch.tensor(CharTokenizer(text).encode(text))
    train_data, val_data = split_data(data, BigramConfig())
    expected = evaluate(count_bigrams(train_data, 65), train_data, BigramConfig())
    assert counted == f"{expected:.4f}", "the least that is possible"
    learned, counted = re.search(r"val loss: learned (\S+), counted (\S+)\n", output).groups()
    expected = evaluate(count_bigrams(train_data, 65, add=1), val_data, BigramConfig())
    assert counted == f"{expected:.4f}", "with one added, or a new pair would make it infinite"
    assert learned == re.findall(r"(\S+) val;", output)[-1]
    assert "next: python sample.py out/bigram.pt" in output
