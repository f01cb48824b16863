"""The exercises of the README's section "Write it yourself", in the order of its table.

A test that fails says in words what is wrong, and does not show its own lines. The names of all
tests of an exercise begin with the word by which its command selects them. They use nothing of the
scripts but what comes before the exercise: the examples are small, and their results were computed
by hand or with plain arithmetic. tests/tools/wrong_answers.py makes sure that wrong answers fail."""

import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import instruct

import bigram
import bpe_gpt
import char_gpt
import sample


def check(truth, message):
    if not truth:
        pytest.fail(message, pytrace=False)


def check_tensor(y, shape, name):
    """So that what follows can compute with y."""
    check(y is not None, f"{name} is None: the function returns nothing")
    check(isinstance(y, torch.Tensor), f"{name} is of type {type(y).__name__}, not a tensor")
    check(y.shape == shape, f"{name} has the shape {tuple(y.shape)}, not {tuple(shape)}")


def close(a, b, tolerance=1e-4):
    """Also of lists and tensors. (A result that is not a number is close to nothing.)"""
    a = torch.as_tensor(a, dtype=torch.float)
    return torch.allclose(a, torch.as_tensor(b, dtype=torch.float), rtol=0, atol=tolerance)


def show(numbers):
    """A list of numbers, or a single one, with as many digits as are easy to read."""
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.tolist()
    if isinstance(numbers, list):
        return "[" + ", ".join(map(show, numbers)) + "]"
    return f"{round(numbers, 4) + 0:g}" if isinstance(numbers, float) else f"{numbers}"  # no -0


# `cross_entropy` in bigram.py


def loss_of(logits, targets):
    loss = bigram.cross_entropy(torch.as_tensor(logits), torch.tensor(targets))
    check_tensor(loss, (), "the loss")
    return loss.item()


def test_cross_entropy_is_minus_the_logarithm_of_the_probability_of_the_target():
    probs = [0.5, 0.25, 0.25]
    for target, p in enumerate(probs):
        loss = loss_of(torch.tensor([[probs]]).log(), [[target]])
        expected = -math.log(p)
        check(close(loss, expected), f"the model gave a probability of {p} to the token that came "
              f"next: the loss is -ln({p}) = {expected:.4f}, not {loss:.4f}")


def test_cross_entropy_is_the_mean_over_all_positions():
    """Two rows of three positions, and four tokens: the target's probability is given, the others
    share the rest."""
    given = torch.tensor([[0.5, 0.25, 0.1], [0.9, 0.7, 0.3]])
    targets = [[0, 1, 2], [3, 2, 1]]
    probs = ((1 - given) / 3).unsqueeze(-1).repeat(1, 1, 4)
    probs.scatter_(-1, torch.tensor(targets).unsqueeze(-1), given.unsqueeze(-1))
    loss = loss_of(probs.log(), targets)
    losses = [-math.log(p) for p in given.flatten().tolist()]
    check(not close(loss, sum(losses)), "the loss is the sum over all positions, not the mean")
    expected = sum(losses) / 6
    check(close(loss, expected),
          f"the losses of six positions, {show(losses)}, have the mean {expected:.4f}, not "
          f"{loss:.4f}: is the softmax taken over the last dimension, the vocabulary?")


def test_cross_entropy_turns_scores_into_probabilities():
    loss = loss_of([[[5.0, 5.0 + math.log(3)]]], [[0]])
    expected = math.log(4)
    check(close(loss, expected),
          "the scores are 5 and 5 + ln(3), so softmax gives the probabilities 1/4 and 3/4: if "
          f"token 0 comes next, the loss is -ln(1/4) = {expected:.4f}, not {loss:.4f}")


def test_cross_entropy_has_no_trouble_with_large_scores():
    for target, expected in ((0, 0.0), (1, 1000.0)):
        loss = loss_of([[[1000.0, 0.0]]], [[target]])
        start = f"with scores of 1000 and 0, and token {target} coming next, the loss is "
        check(math.isfinite(loss), f"{start}{expected:.0f}, not {loss}: exp(1000) is too large for "
              "a float, and log(softmax(...)) can be log(0); log_softmax() avoids both")
        check(close(loss, expected, 0.01), f"{start}{expected:.0f}, not {loss:.4f}")


def test_cross_entropy_has_a_gradient():
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    loss = bigram.cross_entropy(logits, torch.tensor([[0]]))
    check_tensor(loss, (), "the loss")
    check(loss.requires_grad, "the loss has no gradient: compute it from the logits with PyTorch's "
          "operations, without item(), tolist() or a new tensor in between")
    loss.backward()
    check(close(logits.grad[0, 0], [-0.5, 0.5]), "the gradient of the loss is the probabilities "
          f"minus 1 at the target: [-0.5, 0.5] here, not {show(logits.grad[0, 0])}")


# `count_bigrams` in bigram.py


def frequencies_after(data, vocab_size, **settings):
    """The probabilities that the model of count_bigrams() gives to each token after each other."""
    model = bigram.count_bigrams(torch.tensor(data), vocab_size, **settings)
    check(isinstance(model, bigram.BigramLanguageModel),
          f"count_bigrams() returns {show(model)}, not a BigramLanguageModel")
    check_tensor(model.table.weight, (vocab_size, vocab_size), "the table")
    return model.table.weight.detach().softmax(dim=-1).tolist()


def test_count_bigrams_gives_the_frequencies_of_pairs():
    table = frequencies_after([0, 1, 2, 0, 1, 0, 1], 3)
    counts = [[0, 3, 0], [1, 0, 1], [1, 0, 0]]
    for a, b in itertools.product(range(3), repeat=2):
        n = counts[a][b]
        total = sum(counts[a])
        check(close(table[a][b], n / total),
              f"in the data 0 1 2 0 1 0 1, token {a} is followed by token {b} in {n} of {total} "
              f"cases: softmax of row {a} must give {n / total:.2f} in column {b}, not "
              f"{table[a][b]:.2f}")


def test_count_bigrams_adds_to_every_count():
    table = frequencies_after([0, 1, 0, 1], 3, add=1)
    counts = [[0, 2, 0], [1, 0, 0], [0, 0, 0]]
    for a, b in itertools.product(range(3), repeat=2):
        n = counts[a][b]
        total = sum(counts[a])
        expected = (n + 1) / (total + 3)
        check(close(table[a][b], expected),
              f"with the data 0 1 0 1, three tokens and add=1, token {a} is followed by token {b} "
              f"in {n} + 1 of {total} + 3 cases: softmax of row {a} must give {expected:.2f} in "
              f"column {b}, not {table[a][b]:.2f}")


# `get_batch` in bigram.py


NUMBERS = torch.arange(1000)  # data in which a token is its own position
BATCHES = bigram.BigramConfig(batch_size=4, block_size=8)
STEPS_PER_EPOCH = 30  # there is room for 123 windows of 8 tokens: 30 batches, and 3 left over


def batch(step, config=BATCHES):
    result = bigram.get_batch(NUMBERS, config, step)
    check(isinstance(result, (tuple, list)) and len(result) == 2,
          f"get_batch() returns {show(result)}, not a pair of tensors, x and y")
    check_tensor(result[0], (4, 8), "x")
    check_tensor(result[1], (4, 8), "y")
    return result


def starts_of(epoch, config=BATCHES):
    """Where in the data the rows of x begin, row by row, in all steps of an epoch."""
    steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
    return torch.cat([batch(step, config)[0][:, 0] for step in steps]).tolist()


def test_get_batch_takes_windows_of_the_data():
    for step in range(3):
        x, _ = batch(step)
        for b, row in enumerate(x.tolist()):
            for here, there in zip(row, row[1:]):
                check(there == here + 1, f"row {b} of x is not a window of the data: it has "
                      f"{there} after {here}, and the data has {here + 1} after {here}")


def test_get_batch_has_targets_one_token_later():
    for step in range(3):
        x, y = batch(step)
        for b, (inputs, targets) in enumerate(zip(x.tolist(), y.tolist())):
            check(targets == [token + 1 for token in inputs],
                  f"row {b} of y is not row {b} of x one token later: x has {inputs} and y has "
                  f"{targets}")


def test_get_batch_uses_each_window_once_in_an_epoch():
    used = {}
    for step in range(STEPS_PER_EPOCH):
        x, _ = batch(step)
        for token in x.flatten().tolist():
            check(token not in used, f"with 1,000 tokens, and 4 x 8 in a batch, an epoch has "
                  f"{STEPS_PER_EPOCH} steps, and each token comes once; but token {token} is in x "
                  f"twice, in step {used.get(token)} and in step {step}")
            used[token] = step


def test_get_batch_shuffles_the_windows():
    starts = starts_of(0)
    check(starts != sorted(starts), "the windows come in the order of the text: shuffle them")
    differences = [b - a for a, b in zip(starts, starts[1:])]
    check(differences.count(8) < 20, "most windows come right after the one before: it is the "
          "windows that should be shuffled, not only the batches")


def test_get_batch_cuts_every_epoch_in_another_way():
    epochs = [starts_of(epoch) for epoch in range(5)]
    check(epochs[0] != epochs[1], "the second epoch has the same batches as the first: the random "
          "numbers must depend on the epoch, too")
    offsets = {starts[0] % 8 for starts in epochs}
    check(len(offsets) > 1, "all epochs cut the data in the same places: begin at a random offset")


def test_get_batch_depends_on_the_seed_and_the_step_alone():
    x, _ = batch(7)
    again, _ = batch(7)
    check(torch.equal(x, again), "step 7 has another batch when it is asked for again: the random "
          "numbers must depend only on the seed and the step")
    other = bigram.BigramConfig(batch_size=4, block_size=8, seed=1)
    check(starts_of(0) != starts_of(0, other), "another seed gives the same batches")


# `generate` in bigram.py


class NextNumber(nn.Module):
    """A model that expects 4 after 3, 5 after 4, and 0 after 9. It records what it is shown."""
    context_size = 4

    def __init__(self):
        super().__init__()
        self.shown = []
        self.training_mode = []

    def forward(self, idx, targets=None, **others):
        self.shown.append(idx.tolist())
        self.training_mode.append(self.training)
        return 100.0 * F.one_hot((idx + 1) % 10, 10), None


def generated(model, idx, n, *choose):
    """A list for each row of idx, with its n new tokens."""
    columns = bigram.generate(model, torch.tensor(idx), n, *choose)
    check(columns is not None, "generate() returns None: it must yield the new tokens")
    columns = list(itertools.islice(columns, n + 1))
    check(len(columns) <= n, f"with max_new_tokens = {n}, there are more columns of new tokens")
    check(len(columns) == n, f"columns of new tokens: {len(columns)}, not {n}")
    for new in columns:
        check_tensor(new, (len(idx), 1), "a column of new tokens")
    return torch.cat(columns, dim=1).tolist()


def test_generate_continues_every_row():
    rows = generated(NextNumber(), [[1, 3], [5, 7]], 5)
    for start, row, expected in ((3, rows[0], [4, 5, 6, 7, 8]), (7, rows[1], [8, 9, 0, 1, 2])):
        check(row == expected, f"the model expects 4 after 3, 5 after 4 and so on, so that a text "
              f"that ends with {start} goes on with {expected}, not with {row}: is each choice "
              "made from the scores of the last position, and appended to the text?")


def test_generate_shows_the_model_as_many_tokens_as_fit():
    model = NextNumber()
    generated(model, [[1, 2, 3]], 4)
    expected = [[[1, 2, 3]], [[1, 2, 3, 4]], [[2, 3, 4, 5]], [[3, 4, 5, 6]]]
    for i, (shown, wanted) in enumerate(zip(model.shown, expected)):
        check(len(shown[0]) <= 4, f"for new token {i + 1} of 4, the model was shown "
              f"{len(shown[0])} tokens, but its context_size is 4")
        check(shown == wanted, f"for new token {i + 1} of 4, the model was shown {shown[0]}, not "
              f"{wanted[0]}")


def test_generate_takes_the_tokens_it_is_told_to_take():
    asked = []

    def choose(logits):
        asked.append(logits)
        return torch.full((1, 1), 6)

    row = generated(NextNumber(), [[1, 2]], 2, choose)[0]
    check(len(asked) == 2, f"calls of choose(): {len(asked)}, not 2 (one for each new token)")
    check_tensor(asked[0], (1, 10), "what choose() is given")
    check(row == [6, 6], f"choose() returned 6 each time, but the new tokens are {row}")


def test_generate_yields_each_token_as_soon_as_it_is_chosen():
    model = NextNumber()
    columns = bigram.generate(model, torch.tensor([[1]]), 3)
    check(hasattr(columns, "__next__"), "generate() must yield the new tokens one by one")
    next(columns)
    check(len(model.shown) == 1, f"calls of the model before the first new token comes out: "
          f"{len(model.shown)}, not 1: each token must be yielded as soon as it is chosen")


def test_generate_is_not_training():
    model = NextNumber().train()
    generated(model, [[1]], 1)
    check(model.training_mode == [False], "the model is in training mode: call model.eval()")


# `LayerNorm.forward` in char_gpt.py


def layer_norm(x, weight=(1.0, 1.0, 1.0, 1.0), bias=(0.0, 0.0, 0.0, 0.0)):
    """The layer norm for vectors of 4 numbers, by hand, of x (T, 4)."""
    layer = char_gpt.LayerNorm(4)
    layer.by_hand = True
    layer.weight.data = torch.tensor(weight)
    layer.bias.data = torch.tensor(bias)
    y = layer(torch.tensor([x]))
    check_tensor(y, (1, len(x), 4), "the result")
    return y.detach()[0]


def test_layer_norm_makes_mean_0_and_variance_1():
    for row in layer_norm([[1.0, 2.0, 3.0, 6.0], [100.0, 300.0, 200.0, 400.0]]):
        mean = sum(row.tolist()) / 4
        check(close(mean, 0), f"the mean of a token's numbers is {mean:.4f}, not 0: {show(row)}")
        variance = sum(number**2 for number in row.tolist()) / 4
        check(not close(variance, 0.75, 1e-3), "the variance of a token's numbers is 0.75, not 1: "
              "divide the sum of the squares by C = 4, not by C - 1 = 3")
        check(close(variance, 1, 1e-3), f"the variance of a token's numbers is {variance:.4f}, "
              f"not 1: {show(row)}")


def test_layer_norm_treats_each_token_by_itself():
    alone = layer_norm([[1.0, 2.0, 3.0, 6.0]])[0]
    together = layer_norm([[1.0, 2.0, 3.0, 6.0], [100.0, 0.0, 0.0, 0.0]])[0]
    check(close(alone, together), "another token in the sequence changes the result of the first "
          f"token from {show(alone)} to {show(together)}: mean and variance are those of the C "
          "numbers of one token, the last dimension")


def test_layer_norm_is_as_computed_by_hand():
    y = layer_norm([[1.0, 2.0, 3.0, 6.0]])[0]  # mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    expected = [number / math.sqrt(3.5) for number in (-2.0, -1.0, 0.0, 3.0)]
    check(close(y, expected),
          f"[1, 2, 3, 6] has mean 3 and variance 3.5: it becomes {show(expected)}, not {show(y)}")


def test_layer_norm_applies_gain_and_bias():
    weight = [1.0, 2.0, 3.0, 4.0]
    bias = [10.0, 20.0, 30.0, 40.0]
    y = layer_norm([[-1.0, 1.0, -1.0, 1.0]], weight, bias)[0]
    expected = [9.0, 22.0, 27.0, 44.0]
    check(close(y, expected, 1e-3),
          f"[-1, 1, -1, 1] has mean 0 and variance 1 already; with the weight {show(weight)} and "
          f"the bias {show(bias)} it becomes {show(expected)}, not {show(y)}")


def test_layer_norm_does_not_divide_by_zero():
    y = layer_norm([[7.0, 7.0, 7.0, 7.0]])[0]
    check(close(y, [0.0] * 4), f"four equal numbers become {show(y)}, not zeros: add 1e-5 to the "
          "variance")
    a = 0.002
    y = layer_norm([[-a, a, -a, a]])[0, 1].item()
    expected = a / math.sqrt(a**2 + 1e-5)
    check(close(y, expected, 1e-3), f"numbers whose variance is only {a**2:.0e} become "
          f"{expected:.4f}, not {y:.4f}: 1e-5 is added to the variance, before the square root")


# `GELU.forward` in char_gpt.py


def gelu(x):
    layer = char_gpt.GELU()
    layer.by_hand = True
    y = layer(torch.tensor(x))
    check_tensor(y, (len(x),), "the result")
    return y.tolist()


def test_gelu_is_x_or_zero_far_from_zero():
    y = gelu([-10.0, 0.0, 10.0])
    check(close(y, [0, 0, 10]), f"GELU is about 0 at -10, 0 at 0 and about 10 at 10, not {show(y)}")


def test_gelu_has_these_values():
    values = {-3.0: -0.003637, -1.0: -0.158808, 0.5: 0.345714, 1.0: 0.841192, 2.0: 1.954598}
    y = gelu(list(values))
    exact = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in values]
    check(not close(y, exact, 1e-5), "this is x * P(Z <= x) itself: GPT-2 has the approximation "
          "with tanh")
    for result, (x, expected) in zip(y, values.items()):
        check(close(result, expected, 1e-5), f"GELU({x}) is {expected}, not {result:.6f}: the "
              "formula is x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))")


# `attention` in char_gpt.py


def attend(q, k, v):
    y = char_gpt.attention(q, k, v)
    check_tensor(y, v.shape, "the result")
    for t in range(len(y[0, 0])):
        check(not y[0, 0, t].isnan().any(), f"the result at position {t} is nan: if all scores of "
              "a row are masked, there is nothing to take a mean of; every token sees itself")
    return y


def weights_of(q, k):
    """The weights (T, T) of one head, with T = head_size: the mean of the rows of the identity
    matrix, by these weights."""
    return attend(q[None, None], k[None, None], torch.eye(len(q))[None, None])[0, 0]


def test_attention_sees_no_later_token():
    torch.manual_seed(0)
    weights = weights_of(*torch.randn(2, 6, 6) / 2)
    for t, s in itertools.product(range(6), repeat=2):
        if s > t:
            check(close(weights[t, s], 0), f"position {t} sees position {s}: its weight is "
                  f"{weights[t, s]:.2f}, not 0")


def test_attention_sees_itself_and_every_earlier_token():
    torch.manual_seed(0)
    weights = weights_of(*torch.randn(2, 6, 6) / 2)
    for t, s in itertools.product(range(6), repeat=2):
        if s <= t:
            check(weights[t, s] > 0.001, f"position {t} does not see position {s}: its weight is "
                  f"{weights[t, s]:.2f}")


def test_attention_weights_sum_to_1():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 6, 4)
    sums = attend(q, k, torch.ones(2, 3, 6, 4))[0, 0, :, 0]  # of the weights, times 1
    for t, total in enumerate(sums.tolist()):
        check(close(total, 1), f"the weights of row {t} sum to {total:.2f}, not 1")


def test_attention_weights_come_from_the_scores_divided_by_sqrt_of_head_size():
    """With a head_size of 4, the dot products of query 1 with keys 0 and 1 are 2 ln(3) and 0."""
    q = torch.zeros(1, 1, 2, 4)
    k = torch.zeros(1, 1, 2, 4)
    v = torch.tensor([10.0, 20.0]).view(1, 1, 2, 1).repeat(1, 1, 1, 4)
    q[0, 0, 1, 0] = 2.0
    k[0, 0, 0, 0] = math.log(3)
    result = attend(q, k, v)[0, 0, 1, 0].item()
    reason = ("a query has the dot products 2 ln(3) and 0 with two keys of size 4, and the values "
              "are 10 and 20: divided by sqrt(4), the scores are ln(3) and 0, so that the weights "
              f"are 3/4 and 1/4, and the result is 12.5, not {result:.2f}")
    check(not close(result, 11), reason + " (the scores are not divided by sqrt(head_size))")
    check(not close(result, 15), reason + " (the rows of the scores belong to the queries, and the "
          "columns to the keys)")
    check(close(result, 12.5), reason)


def test_attention_treats_each_table_by_itself():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    together = attend(q, k, v)
    for b, h in itertools.product(range(2), range(3)):
        alone = attend(q[b, h][None, None], k[b, h][None, None], v[b, h][None, None])[0, 0]
        check(close(together[b, h], alone), f"head {h} of text {b} has another result when it is "
              "computed alone: the matrix products must work on the last two dimensions")


# `CausalSelfAttention.forward` in char_gpt.py


def two_heads():
    """A module of two heads of size 2, for vectors of 4 numbers. c_proj changes nothing."""
    torch.manual_seed(0)
    module = char_gpt.CausalSelfAttention(char_gpt.GPTConfig(n_head=2, n_embd=4))
    for p in module.parameters():
        nn.init.normal_(p)
    module.c_proj.weight.data = torch.eye(4)
    module.c_proj.bias.data = torch.zeros(4)
    return module


@torch.no_grad()
def result_of(module, x):
    y = module(x)
    check_tensor(y, x.shape, "the result")
    return y


def test_heads_see_no_later_token():
    module = two_heads()
    x = torch.randn(1, 6, 4)
    before = result_of(module, x)
    for t in range(6):
        changed = x.clone()
        changed[0, t] += 1
        after = result_of(module, changed)
        for s in range(t):
            check(close(before[0, s], after[0, s]), f"position {s} sees position {t}")


def test_heads_put_their_results_side_by_side():
    """With queries and keys of zero, all scores are equal. The values are x itself."""
    module = two_heads()
    module.c_attn.bias.data.zero_()
    module.c_attn.weight.data = torch.cat((torch.zeros(8, 4), torch.eye(4)))
    x = torch.arange(24.0).view(2, 3, 4) ** 2
    y = result_of(module, x)
    for b, t, c in itertools.product(range(2), range(3), range(4)):
        expected = x[b, : t + 1, c].mean().item()
        check(close(y[b, t, c], expected),
              f"c_attn gives q = 0, k = 0 and v = x here, so that the result at position {t} is "
              f"the mean of x up to there; number {c} of it, which head {c // 2} computes, is "
              f"{y[b, t, c]:.2f}, not {expected:.2f}: are q, k and v taken in this order, and are "
              "the heads' results transposed back before they are joined?")


def test_heads_have_queries_and_keys_of_their_own():
    module = two_heads()
    x = torch.randn(2, 5, 4)
    y = result_of(module, x)
    with torch.no_grad():
        numbers = module.c_attn(x).tolist()
    for b, t, head in itertools.product(range(2), range(5), range(2)):
        i = 2 * head  # where the head begins: queries from 0 on, keys from 4 on, values from 8 on
        query = numbers[b][t][i : i + 2]
        total = 0.0
        expected = [0.0, 0.0]
        for row in numbers[b][: t + 1]:
            score = (query[0] * row[4 + i] + query[1] * row[5 + i]) / math.sqrt(2)
            total += math.exp(score)
            expected[0] += math.exp(score) * row[8 + i]
            expected[1] += math.exp(score) * row[9 + i]
        expected = [number / total for number in expected]
        found = y[b, t, i : i + 2]
        check(close(found, expected, 1e-3),
              f"head {head} has the result {show(found)} at position {t} of text {b}, not "
              f"{show(expected)}: are q, k and v taken in this order, and does each head use its "
              "own head_size numbers of each of them?")


def test_heads_are_combined_by_c_proj():
    module = two_heads()
    x = torch.randn(1, 3, 4)
    before = result_of(module, x)
    module.c_proj.weight.data = 2 * torch.eye(4)
    module.c_proj.bias.data = torch.ones(4)
    after = result_of(module, x)
    check(not close(before, after), "c_proj is not used: it combines what the heads found")
    check(close(after, 2 * before + 1), "c_proj must be applied once, to the heads' results, last")


# `Block.forward` in char_gpt.py


class Part(nn.Module):
    """In place of a part of the block: a function of one number, which records what it reads."""
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.reads = []

    def forward(self, x):
        self.reads.append(x.flatten()[0].item())
        return self.function(x)


def block_of_parts():
    """ln_1 doubles, attn adds 1, ln_2 triples and mlp adds 5."""
    block = char_gpt.Block(char_gpt.GPTConfig(n_head=2, n_embd=4))
    block.ln_1 = Part(lambda x: 2 * x)
    block.attn = Part(lambda x: x + 1)
    block.ln_2 = Part(lambda x: 3 * x)
    block.mlp = Part(lambda x: x + 5)
    return block


def result_for_1(block):
    y = block(torch.ones(1, 2, 4))
    check_tensor(y, (1, 2, 4), "the result")
    return y.flatten()[0].item()


def test_block_adds_each_result_to_the_stream():
    """x = 1 becomes 1 + (2 * 1 + 1) = 4, and that becomes 4 + (3 * 4 + 5) = 21."""
    block = block_of_parts()
    result = result_for_1(block)
    story = "ln_1 doubles, attn adds 1, ln_2 triples and mlp adds 5 here, and x is 1: "
    for name, expected, what in (
        ("ln_1", 1, "x"),
        ("attn", 2, "the result of ln_1"),
        ("ln_2", 4, "x with the result of attn added to it"),
        ("mlp", 12, "the result of ln_2"),
    ):
        reads = getattr(block, name).reads
        check(len(reads) == 1, f"calls of {name}: {len(reads)}, not 1")
        check(reads[0] == expected,
              f"{story}{name} reads {reads[0]:.0f}, but {what} is {expected}")
    check(result == 21, f"{story}after attention, x is 4, and mlp gives 17; the block returns "
          f"{result:.0f}, not their sum, 21")


# `Adam.update` in char_gpt.py


def adam_updates(*grads):
    """The updates of a parameter of two numbers, in steps with these gradients, and the means."""
    adam = char_gpt.Adam([torch.zeros(2)], learning_rate=1.0)
    updates = []
    for grad in grads:
        adam.n_steps += 1
        update = adam.update(torch.tensor([grad]), adam.means[0])
        check_tensor(update, (1, 2), "the update")
        updates.append(update[0].tolist())
    return updates, adam.means[0]


def test_adam_keeps_running_means():
    _, means = adam_updates([1.0, -2.0], [3.0, 0.0])
    check(means.any(), "m and v are still 0: update() has to change means in place, with m.lerp_() "
          "or m += ..., since they are needed in the next step")
    # m is 0.1 * 1, then 0.9 * 0.1 + 0.1 * 3; v is 0.001 * 1, then 0.999 * 0.001 + 0.001 * 9
    check(close(means[0, 0], [0.39, -0.18]),
          "after the gradients [1, -2] and [3, 0], m is [0.39, -0.18]: each time, it moves a tenth "
          f"of the way to the gradient; here it is {show(means[0, 0])}")
    check(close(1000 * means[1, 0], [9.999, 3.996], 1e-3),
          "after the gradients [1, -2] and [3, 0], v is [0.009999, 0.003996]: each time, it moves "
          "a thousandth of the way to the square of the gradient; here 1000 v is "
          f"{show(1000 * means[1, 0])}")


def test_adam_corrects_the_means_for_their_start_at_zero():
    updates, _ = adam_updates([0.001, -50.0])
    check(close(updates[0], [1, -1], 1e-3), "in the first step, m is 0.1 g and v is 0.001 g^2. "
          "Divided by 1 - beta1 and by 1 - beta2, they are g and g^2, and the update is 1 or -1, "
          f"whatever the gradient g; here [0.001, -50] gives {show(updates[0])}")
    updates, _ = adam_updates([1.0, 1.0], [1.0, -1.0], [1.0, 1.0])
    # m of the second number: 0.1, -0.01, 0.091; divided by 0.1, 0.19, 0.271: 1, -0.0526, 0.3358
    check(close(updates, [[1, 1], [1, -0.0526], [1, 0.3358]], 1e-3),
          "with the gradients [1, 1], [1, -1], [1, 1], the updates are [1, 1], [1, -0.0526], "
          f"[1, 0.3358]; here they are {show(updates)}. In step n, the means are divided by "
          "1 - beta**n, and n is self.n_steps")


def test_adam_divides_by_the_square_root():
    updates, _ = adam_updates([0.0, 1.0], [0.0, 3.0])
    check(not math.isnan(updates[0][0]), "a gradient of 0 gives 0 / 0: add eps to the square root")
    check(close(updates[1], [0, 0.9179], 1e-3), "with the gradients 1 and 3, m_hat is 0.39 / 0.19 "
          "and v_hat 0.009999 / 0.001999, so that the update m_hat / sqrt(v_hat) is 0.9179; here "
          f"it is {show(updates[1][1])}")


# `orthogonalize` in char_gpt.py


def strengths_after(strengths, rounds, shape=(3, 3)):
    """orthogonalize() of two copies of a matrix with these singular values, in the directions of
    the axes. Returns what stands on the diagonal; the rest must be 0."""
    x = torch.zeros(shape)
    x.diagonal().copy_(torch.tensor(strengths))
    y = char_gpt.orthogonalize(torch.stack([x, x]), rounds)
    check_tensor(y, (2, *shape), "the result")
    check(close(y[0], y[1]), "two equal matrices give different results: each of the n matrices is "
          "worked on by itself")
    diagonal = y[0].diagonal()
    check(close(y[0].abs().sum(), diagonal.abs().sum()), "a matrix that is diagonal must stay so: "
          "only its strengths change, not the directions")
    return diagonal


def test_orthogonalize_divides_by_the_length_first():
    result = strengths_after([6.0, 0.0, 8.0], rounds=0)
    check(close(result, [0.6, 0, 0.8]), "the diagonal matrix [6, 0, 8] has the length 10: without "
          f"any rounds, the result is [0.6, 0, 0.8]; here it is {show(result)}")
    result = strengths_after([0.0, 0.0, 0.0], rounds=1)
    check(close(result, [0, 0, 0]), f"a matrix of zeros must stay one; here it becomes "
          f"{show(result)}: do not divide by a length of 0")


def test_orthogonalize_applies_the_polynomial():
    result = strengths_after([6.0, 0.0, 8.0], rounds=1)
    # 3.4445 * 0.6 - 4.7750 * 0.6**3 + 2.0315 * 0.6**5; the same with 0.8
    check(close(result, [1.1933, 0, 0.9765], 1e-3), "a round turns 0.6 into 1.1933 and 0.8 into "
          "0.9765 (a s + b s^3 + c s^5); here the diagonal matrix [6, 0, 8] becomes "
          f"{show(result)}")


def test_orthogonalize_repeats_it():
    result = strengths_after([1.0, 0.01, 0.0001], rounds=4)
    check(close(result, [1.0896, 1.0926, 0.0141], 2e-3), "after 4 rounds, the strengths 1, 0.01 and "
          f"0.0001 are 1.0896, 1.0926 and 0.0141; here they are {show(result)}")


def test_orthogonalize_works_for_matrices_of_any_shape():
    for shape in ((2, 5), (5, 2)):
        result = strengths_after([6.0, 8.0], 1, shape)
        check(close(result, [1.1933, 0.9765], 1e-3), f"in a matrix of shape {shape}, a round turns "
              f"the strengths 0.6 and 0.8 into 1.1933 and 0.9765, not into {show(result)}")
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(4, 4))
    v, _ = torch.linalg.qr(torch.randn(3, 3))
    s = torch.tensor([0.6, 0.64, 0.48])  # of length 1
    after = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    result = char_gpt.orthogonalize((u[:, :3] * s) @ v.T[None], 1)
    check_tensor(result, (1, 4, 3), "the result")
    check(close(result[0], (u[:, :3] * after) @ v.T, 1e-3), "the directions (U and V in U S V^T) "
          "have changed: the result must be U S' V^T, with other strengths only")


# `training_step` in char_gpt.py


class Products(nn.Module):
    """The loss is the sum of the products of x and the parameters, so that its gradient is x."""
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x, y):
        return None, (self.p * x).sum()


class Descent:
    """Plain gradient descent, as an optimizer; it remembers the multiplier that it was given."""
    def __init__(self, p, learning_rate):
        self.p = p
        self.learning_rate = learning_rate

    def step(self, multiplier=1.0):
        self.multiplier = multiplier
        with torch.no_grad():
            self.p -= multiplier * self.learning_rate * self.p.grad


def step_of(model, optimizers, step=3, grad_clip=1000.0):
    """A step of 1,000,000 on x = [3, 4], a gradient of length 5. Returns the loss."""
    config = char_gpt.GPTConfig(warmup_iters=3, max_iters=1_000_000, grad_clip=grad_clip)
    x = torch.tensor([3.0, 4.0])
    loss = char_gpt.training_step(model, optimizers, x, x, step, config, nullcontext())
    check(loss is not None, "training_step() returns None, not the loss")
    return float(loss)


def test_training_step_returns_the_loss():
    model = Products()
    loss = step_of(model, [Descent(model.p, 0.1)])
    check(loss == 11, f"the loss of this batch is 11; training_step() returns {loss}")


def test_training_step_moves_the_parameters_against_the_gradient():
    model = Products()
    model.p.grad = torch.tensor([100.0, 100.0])  # what the step before has left
    step_of(model, [Descent(model.p, 0.1)])
    moved = (torch.tensor([1.0, 2.0]) - model.p.detach()).tolist()
    check(moved != [0, 0], "the parameters have not moved: call loss.backward(), and step() of "
          "each optimizer")
    check(not close(moved, [10.3, 10.4]), "the gradient of the step before has been added to that "
          "of this one: call model.zero_grad() before loss.backward()")
    check(close(moved, [0.3, 0.4]), "the gradient is [3, 4] and the learning rate 0.1: the "
          f"parameters must become smaller by [0.3, 0.4], not by {show(moved)}")


def test_training_step_uses_every_optimizer():
    model = Products()
    step_of(model, [Descent(model.p, rate) for rate in (0.1, 0.2)])
    moved = (torch.tensor([1.0, 2.0]) - model.p.detach()).tolist()
    check(close(moved, [0.9, 1.2]),
          "the gradient is [3, 4], and there are two optimizers, with learning rates of 0.1 and "
          f"0.2: the parameters must become smaller by [0.9, 1.2], not by {show(moved)}")


def test_training_step_follows_the_schedule():
    """1/4, 2/4 and 3/4 are the warmup; what follows is the part of the run that is left."""
    model = Products()
    optimizers = [Descent(model.p, rate) for rate in (0.1, 0.4)]
    config = char_gpt.GPTConfig(warmup_iters=3, max_iters=100, grad_clip=1000.0)
    x = torch.tensor([3.0, 4.0])
    for step, expected in ((0, 0.25), (1, 0.5), (2, 0.75), (3, 0.97), (40, 0.6), (99, 0.01)):
        char_gpt.training_step(model, optimizers, x, x, step, config, nullcontext())
        for optimizer in optimizers:
            share = optimizer.multiplier
            check(close(share, expected), f"in step {step} of 100, with warmup_iters = 3, step() of "
                  f"each optimizer is to be called with {expected:.2f}, not with {share:.2f}: the "
                  "smaller of (step + 1) / (warmup_iters + 1) and 1 - step / max_iters")


def test_training_step_clips_the_gradient():
    model = Products()
    step_of(model, [Descent(model.p, 0.1)], grad_clip=1.0)
    moved = (torch.tensor([1.0, 2.0]) - model.p.detach()).tolist()
    check(close(moved, [0.06, 0.08]),
          "the gradient [3, 4] has the length 5, and grad_clip is 1: after backward(), scale it "
          "down to [0.6, 0.8], so that with a learning rate of 0.1 the parameters become smaller "
          f"by [0.06, 0.08], not by {show(moved)}")


# `find_pair` in bpe_gpt.py


def check_find_pair(ids, pair, expected, hint=""):
    result = bpe_gpt.find_pair(np.array(ids), pair)
    check(result is not None, "find_pair() returns None, not an array")
    check(list(result) == expected, f"in {ids}, the pair {pair} begins at {expected}, not at "
          f"{list(result)}{hint}")


def test_find_pair_finds_every_occurrence():
    check_find_pair([1, 2, 3, 1, 2], (1, 2), [0, 3])
    check_find_pair([1, 2, 1, 2, 1], (1, 2), [0, 2])


def test_find_pair_leaves_out_the_rest():
    check_find_pair([2, 1, 3, 2, 1, 2], (1, 2), [4], ": the order of the two matters")


def test_find_pair_uses_no_token_twice():
    hint = ": going from left to right, each token belongs to one pair at most"
    check_find_pair([1, 1, 1], (1, 1), [0], hint)
    check_find_pair([1, 1, 1, 1, 2, 1, 1], (1, 1), [0, 2, 5], hint)


# `train_bpe` in bpe_gpt.py


def learned(text, vocab_size):
    """The tokens that were learned: those between the 256 single bytes and the end of text."""
    tokenizer = bpe_gpt.train_bpe(text, vocab_size)
    check(hasattr(tokenizer, "tokens"), f"train_bpe() returns {show(tokenizer)}, not the "
          "tokenizer that BPETokenizer() makes of the list of tokens")
    check(len(tokenizer.tokens) > 256, f"there are {len(tokenizer.tokens)} tokens: the 256 single "
          "bytes and the end-of-text token are always among them")
    for i in range(256):
        token = tokenizer.tokens[i]
        check(token == bytes([i]), f"token {i} is {token}, not the byte {bytes([i])}")
    check(tokenizer.end_of_text == len(tokenizer.tokens) - 1,
          "the end-of-text token must be the last")
    return tokenizer.tokens[256:-1]


def test_train_bpe_begins_with_the_most_frequent_pair():
    tokens = learned("aaabdaaabac", 258)
    check(len(tokens) == 1, f"with a vocabulary of 258 tokens, there is room for one more than the "
          f"256 bytes and the end of text, but {len(tokens)} were learned")
    check(tokens == [b"aa"], f"in aaabdaaabac, a-a is the most frequent pair, but the first token "
          f"that was learned is {tokens[0]}")


def test_train_bpe_takes_lower_numbers_when_there_is_a_tie():
    tokens = learned("aaabdaaabac", 400)[:3]
    check(tokens == [b"aa", b"ab", b"aaab"],
          "in aaabdaaabac, the first merge makes aa. After it, a-b and aa-a both occur twice; a-b "
          "comes first, because a has a lower number than aa. Then aa-ab becomes aaab. The first "
          f"three tokens that were learned are {tokens}")


def test_train_bpe_ends_when_no_pair_occurs_twice():
    tokens = learned("aaabdaaabac", 400)
    check(len(tokens) <= 3, f"after aa, ab and aaab, no pair in aaabdaaabac occurs twice: "
          f"{tokens[3:]} should not have been learned")


def test_train_bpe_does_not_go_across_words():
    tokens = learned("to be to be to be to be", 400)
    check(tokens, "nothing was learned from a text in which words occur four times")
    for token in tokens:
        check(b" " not in token[1:], f"the token {token} goes from one word into the next: split "
              "the text with WORDS first")


def test_train_bpe_counts_a_word_as_often_as_it_occurs():
    tokens = learned("ab xy xyz xyw ab ab ab ab", 258)
    check(tokens[:1] == [b"ab"], "in `ab xy xyz xyw ab ab ab ab`, a-b occurs five times and x-y "
          f"three times, but the first tokens that were learned are {tokens[:1]}: a pair counts as "
          "often as its words occur")


# `encode_word` in bpe_gpt.py


LETTERS = {bytes([b]): b for b in range(256)}


def check_word(word, expected, *merges, hint=""):
    """The tokens of a word, as bytes; merges are those beyond the single bytes, in their order."""
    ranks = LETTERS | {token: 256 + i for i, token in enumerate(merges)}
    result = bpe_gpt.encode_word(word, ranks)
    check(result is not None, "encode_word() returns None, not a list")
    tokens = list(ranks)
    check(all(isinstance(i, int) and 0 <= i < len(tokens) for i in result),
          f"encode_word() returns {result}, which is not a list of the numbers in ranks")
    found = b" ".join(tokens[i] for i in result).decode("utf-8", "backslashreplace")
    after = " ".join(token.decode() for token in merges)
    check(found == expected, f"with the tokens {after} beyond the single bytes, {word.decode()} is "
          f"encoded as: {expected}. Here it is: {found}{hint}")


def test_encode_word_begins_with_single_bytes():
    check_word(b"xyz", "x y z", b"ab")
    check_word(b"x", "x", b"ab")
    result = bpe_gpt.encode_word("é".encode(), LETTERS)
    check(result == [0xC3, 0xA9], f"é has the bytes c3 and a9, and so the tokens [195, 169]; here "
          f"it has {result}")


def test_encode_word_joins_pairs_as_long_as_it_can():
    check_word(b"lower", "low er", b"lo", b"low", b"er")
    check_word(b"aaaaa", "aaaa a", b"aa", b"aaaa")
    check_word(b"abab", "abab", b"ab", b"abab")


def test_encode_word_joins_the_pair_with_the_lowest_number_first():
    check_word(b"lower", "lo w er", b"lo", b"ow", b"er", hint=" (l-o comes before o-w)")
    check_word(b"lower", "l ow er", b"ow", b"lo", b"er", hint=" (o-w comes before l-o)")
    check_word(b"aaa", "aa a", b"aa", hint=" (of two equal pairs, the left one comes first)")


def test_encode_word_needs_each_step_and_not_only_the_longest_token():
    hint = ": it is joined from pairs, and no pair makes it"
    check_word(b"abcd", "ab c d", b"ab", b"abcd", hint=hint)
    check_word(b"abc", "ab c", b"ab", b"bc", b"abx", hint=hint)


# `Cache.append` in bpe_gpt.py


def owner(number):
    """Whose number it is, among those that append() makes."""
    for name, base in (("key", 0), ("value", 100)):
        if base <= number < base + 8 and number == int(number):
            return f"the {name} of token {number - base:g}"
    return f"{number:g}"


def append(cache, first, n):
    """Appends n tokens, from number `first` on. Token i has the key i (with a little more in each
    text, head and number) and the value 100 + i. Checks what is returned: all tokens so far."""
    more = torch.arange(12).view(2, 2, 1, 3) / 100
    k = torch.arange(first, first + n).view(1, 1, n, 1) + more  # (2, 2, n, 3)
    result = cache.append(k, k + 100)
    check(isinstance(result, (tuple, list)) and len(result) == 2,
          f"append() returns {show(result)}, not a pair of tensors, the keys and the values")
    S = first + n
    for name, kept, base in (("key", result[0], 0), ("value", result[1], 100)):
        start = f"with {first} tokens in the cache, and {n} new, "
        check_tensor(kept, (2, 2, S, 3), f"{start}what is returned as {name}s")
        for i in range(S):
            found = kept[0, 0, i, 0].item()
            check(found == base + i, f"{start}{name} number {i} that is returned is "
                  f"{owner(found)}, not {owner(base + i)}")
        expected = torch.arange(S).view(1, 1, S, 1) + more + base
        check(close(kept, expected), f"{start}the {name}s of different texts or heads are mixed up")


def test_cache_returns_what_it_was_given_first():
    append(bpe_gpt.Cache(8), 0, 3)


def test_cache_puts_new_tokens_after_the_earlier_ones():
    cache = bpe_gpt.Cache(8)
    append(cache, 0, 3)
    append(cache, 3, 1)
    append(cache, 4, 1)


def test_cache_counts_its_tokens():
    cache = bpe_gpt.Cache(8)
    for first, n in ((0, 3), (3, 1), (4, 1)):
        append(cache, first, n)
        check(cache.length == first + n,
              f"after {first + n} tokens, self.length is {cache.length}")


def test_cache_can_be_filled_to_the_last_place():
    cache = bpe_gpt.Cache(4)
    append(cache, 0, 3)
    append(cache, 3, 1)


# `encode_record` in data/instruct.py


class Bytes:
    """A tokenizer whose tokens are single bytes."""
    end_of_text = 256

    def encode(self, text, special=()):
        return list(text.encode())


RECORD = {"instruction": "Name the opposite.", "input": "hot", "output": "cold"}


def encoded():
    """The number of tokens in the prompt, and x and y as lists."""
    result = instruct.encode_record(RECORD, Bytes())
    check(isinstance(result, (tuple, list)) and len(result) == 2,
          f"encode_record() returns {show(result)}, not a pair of tensors, x and y")
    n_prompt = len(Bytes().encode(instruct.make_prompt(RECORD)))
    T = n_prompt + 4
    tokens = f"prompt, response and end of text have {n_prompt} + 4 + 1 tokens, of which"
    check_tensor(result[0], (T,), f"{tokens} x has all but the last: x")
    check_tensor(result[1], (T,), f"{tokens} y has all but the first: y")
    return n_prompt, result[0].tolist(), result[1].tolist()


def spell(token):
    if token == 256:
        return "the end of text"
    return repr(chr(token)) if 32 <= token < 127 else f"{token}"


def test_encode_record_has_prompt_and_response_as_inputs():
    _, x, _ = encoded()
    check(-100 not in x, "x has -100 in it: y must be a copy, as clone() makes it, because a slice "
          "of a tensor shares its memory with the tensor")
    expected = list((instruct.make_prompt(RECORD) + "cold").encode())
    for i, (found, token) in enumerate(zip(x, expected)):
        check(found == token, f"x is the prompt and then the response: number {i} of it is "
              f"{spell(token)}, not {spell(found)}")


def test_encode_record_leaves_the_prompt_out_of_the_loss():
    n_prompt, _, y = encoded()
    for i, target in enumerate(y[: n_prompt - 1]):
        check(target == -100, f"number {i} of y has to be -100, not {spell(target)}: the prompt "
              f"has {n_prompt} tokens, and none of them is to be learned")


def test_encode_record_has_the_whole_response_as_targets():
    n_prompt, _, y = encoded()
    found = y[n_prompt - 1 :]
    check(found[0] != -100, "the first token of the response is left out of the loss: the last "
          "token of the prompt already has to predict it")
    check(found[-1] == 256, "the last target must be the end of text, or the model would not learn "
          f"where to stop: it is {spell(found[-1])}")
    for expected, target in zip([*b"cold", 256], found):
        check(target == expected, f"the targets from the response are 'c', 'o', 'l', 'd' and the "
              f"end of text: {spell(target)} stands in place of {spell(expected)}")


# `choose` in sample.py


PROBS = [0.05, 0.5, 0.15, 0.3]


def check_draws(expected, hint, **settings):
    """The shares of the four tokens among 20,000 draws, from the probabilities PROBS."""
    torch.manual_seed(0)
    logits = torch.tensor(PROBS).log().repeat(20_000, 1)
    names = " and ".join(f"{name} = {value}" for name, value in settings.items()) or "no setting"
    start = f"with the probabilities {PROBS} and {names}, "
    try:
        drawn = sample.choose(logits, sample.SampleConfig(**settings))
    except RuntimeError as error:
        check("probability tensor" not in f"{error}", f"{start}no token is left to draw: {hint}")
        raise
    check_tensor(drawn, (20_000, 1), "what choose() returns for 20,000 rows")
    start += "token"
    for token, share in enumerate(expected):
        found = (drawn == token).sum().item() / 20_000
        if share == 0:
            check(found == 0, f"{start} {token} must not be drawn, but {found:.1%} of the tokens "
                  f"are this one: {hint}")
        check(close(found, share, 0.02), f"{start} {token} is {found:.1%} of those that are drawn, "
              f"not {share:.1%}: {hint}")


def test_choose_draws_tokens_as_often_as_their_probabilities_say():
    check_draws(PROBS, "draw from the softmax of the scores, and return tokens, not their ranks")


def test_choose_takes_the_likeliest_at_temperature_0():
    check_draws([0, 1, 0, 0], "at temperature 0 it is always the likeliest", temperature=0.0)


def test_choose_divides_scores_by_the_temperature():
    total = sum(p**2 for p in PROBS)
    check_draws([p**2 / total for p in PROBS], "the scores are divided by the temperature, and to "
                "divide logarithms by 0.5 squares the probabilities", temperature=0.5)


def test_choose_keeps_the_top_k():
    hint = "the k likeliest tokens stay, and keep their proportions"
    check_draws([0, 0.625, 0, 0.375], hint, top_k=2)
    check_draws([0, 1, 0, 0], hint, top_k=1)
    check_draws(PROBS, hint, top_k=9)


def test_choose_keeps_the_top_p():
    hint = ("a token stays if all likelier ones together have less than top_p (0.95, 0, 0.8 and "
            "0.5 are these sums here); the likeliest always stays")
    check_draws([0, 0.625, 0, 0.375], hint, top_p=0.7)
    check_draws([0, 1, 0, 0], hint, top_p=0.4)
    check_draws([0, 1, 0, 0], hint, top_p=0.0)


def test_choose_keeps_the_min_p():
    hint = "a token stays if its probability is at least min_p times the highest, 0.5"
    check_draws([0, 0.625, 0, 0.375], hint, min_p=0.5)
    check_draws([0, 10 / 19, 3 / 19, 6 / 19], hint, min_p=0.2)


def test_choose_cuts_after_the_temperature():
    """Squared, the probabilities are about 0.007, 0.685, 0.062 and 0.247."""
    hint = "the cuts apply to the probabilities after the temperature, about 0.01, 0.68, 0.06, 0.25"
    check_draws([0, 1, 0, 0], hint, temperature=0.5, top_p=0.6)
    check_draws([0, 1, 0, 0], hint, temperature=0.5, min_p=0.5)


# `beam_search` in sample.py


class Table(nn.Module):
    """A model that predicts the next token from the last one, with probabilities from a table."""
    context_size = 8

    def __init__(self, rows):
        super().__init__()
        self.probs = torch.tensor(rows)

    def forward(self, idx, targets=None, **others):
        return self.probs[idx].log(), None


def search(model, idx, n, width, end=-1):
    texts = sample.beam_search(model, torch.tensor([idx]), n, width, end)
    check(isinstance(texts, list), f"beam_search() returns {show(texts)}, not a list of texts")
    check(texts, "beam_search() returns no text at all")
    return [list(map(int, text)) for text in texts]


# After 0, 1 is the likeliest token, but what follows 1 is uncertain. After 2, 3 is almost certain.
FORK = [
    [0.01, 0.54, 0.44, 0.01], [0.2, 0.1, 0.3, 0.4], [0.01, 0.01, 0.02, 0.96], [0.4, 0.3, 0.2, 0.1]]


def test_beam_search_with_a_width_of_1_takes_the_likeliest_token_each_time():
    texts = search(Table(FORK), [0], 3, width=1)
    check(texts == [[1, 3, 0]], "the likeliest token after 0 is 1, after 1 it is 3, and after 3 it "
          f"is 0: with a width of 1, the texts are [[1, 3, 0]], not {texts}")


def test_beam_search_finds_what_greedy_search_overlooks():
    text = search(Table(FORK), [0], 2, width=2)[0]
    check(text == [2, 3], "after 0, the text [1, 3] has the probability 0.54 * 0.40 = 0.22, and "
          f"[2, 3] has 0.44 * 0.96 = 0.42: with a width of 2, the best text is [2, 3], not {text}")


def test_beam_search_adds_the_scores_of_all_tokens():
    """The best texts of three tokens, found by trying all of them."""
    texts = search(Table(FORK), [0], 3, width=16)
    chances = {}
    for text in itertools.product(range(4), repeat=3):
        path = [0, *text]
        chances[text] = math.prod(FORK[a][b] for a, b in zip(path, path[1:]))
    best = [list(text) for text in sorted(chances, key=chances.get, reverse=True)]
    for i in range(3):
        check(texts[i : i + 1] == best[i : i + 1],
              f"the score of a text is the sum of the log-probabilities of all its tokens: with a "
              f"width of 16, text number {i} is {best[i]}, not {texts[i : i + 1]}")


def test_beam_search_ends_a_text_with_the_end_token():
    """Token 2 is the end. After 0, the end has the probability 0.9."""
    rows = [[0.05, 0.05, 0.9], [0.3, 0.3, 0.4], [0.5, 0.4, 0.1]]
    texts = search(Table(rows), [0], 4, width=2, end=2)
    check(texts[0] == [2], f"the end token has a probability of 0.9, so that [2] is the best text, "
          f"not {texts[0]}: a text is finished with the end token")
    for text in texts:
        check(2 not in text[:-1], f"the text {text} goes on after the end token, 2")


def test_beam_search_ranks_finished_texts_by_the_mean():
    """The end is 2: alone it has the probability 0.4; the tokens 1, 2 have 0.6 * 0.6 = 0.36."""
    rows = [[1e-9, 0.6, 0.4], [0.1, 0.3, 0.6], [1 / 3, 1 / 3, 1 / 3]]
    text = search(Table(rows), [0], 3, width=20, end=2)[0]
    check(text != [2], "the short text [2], of probability 0.4, won over [1, 2], whose two tokens "
          "have 0.6 each: rank finished texts by the mean of the log-probabilities of their tokens")
    check(text == [1, 2],
          f"the best text by the mean of the log-probabilities is [1, 2], not {text}")


class Uncached(nn.Module):
    """The same model, to which every text is shown whole."""
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.context_size = model.context_size

    def forward(self, idx, targets=None, **others):
        return self.model(idx)


def test_beam_search_gives_each_text_the_keys_and_values_of_its_own_past():
    torch.manual_seed(1)
    config = bpe_gpt.GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=5, block_size=16)
    model = bpe_gpt.GPT(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.8)
    for start in range(5):
        cached = search(model, [start, 1, 2], 6, width=4)
        uncached = search(Uncached(model), [start, 1, 2], 6, width=4)
        for with_cache, without in zip(cached, uncached):
            check(with_cache == without, "with the cache of keys and values, a GPT of bpe_gpt.py "
                  f"finds {with_cache}, and without it {without}: a text needs the keys and values "
                  "of the text that it extends, so that the rows of the caches must be chosen anew "
                  "in every step")
        check(len(cached) == len(uncached), "with a cache, the number of texts is another")
