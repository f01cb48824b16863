"""bpe_gpt.py: GPT-2 against transformers and numpy, its cache, its tokens, and its training."""

import json
import math
import random
import re
import sys
import types
from collections import Counter

import numpy as np
import pytest
import regex  # comes with tiktoken
import torch
import torch.nn.functional as F
from conftest import (
    PLAY, ROOT, SHAKESPEARE, hugging_face, instruct, load_script, needs_gpt2_tokenizer,
    needs_shakespeare, run)
from numpy_gpt2 import gpt2

import bpe_gpt
import char_gpt
from bpe_gpt import (
    GPT,
    SIZES,
    BPETokenizer,
    Cache,
    GPTConfig,
    TextData,
    encode_word,
    evaluate,
    generate,
    load_pretrained,
    make_optimizers,
    train_bpe,
    training_step,
)

FIXTURES = ROOT / "tests" / "fixtures"
NAMES = ["tied", "half", "bfloat16", "published"]  # see fixtures/make.py
SMALL = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=300, block_size=48, dropout=0.0)


def build(**settings):
    """A small model whose scores are far apart, so that rounding decides nothing."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
        model.transformer.wpe.weight *= 5  # so that what it says changes from place to place
    return model


def greedy(logits):
    return logits.argmax(dim=-1, keepdim=True)


# The model


@pytest.mark.parametrize(
    "name, n_layer, n_head, n_embd, count",
    [
        ("gpt2", 12, 12, 768, 124_439_808),
        ("gpt2-medium", 24, 16, 1024, 354_823_168),
        ("gpt2-large", 36, 20, 1280, 774_030_080),
        ("gpt2-xl", 48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_four_sizes_are_those_that_were_published(name, n_layer, n_head, n_embd, count):
    """The weights do not show the number of heads: any that divides n_embd would fit them."""
    config = GPTConfig(**SIZES[name])
    with torch.device("meta"):  # shapes only
        model = GPT(config)
    assert (config.vocab_size, config.block_size) == (50257, 1024)
    assert (config.n_layer, config.n_head, config.n_embd) == (n_layer, n_head, n_embd)
    assert [block.attn.n_head for block in model.transformer.h] == [n_head] * n_layer
    assert sum(p.numel() for p in model.parameters()) == count


def test_gpt2_at_full_size_knows_nothing_before_training_and_something_after_a_step():
    torch.manual_seed(0)
    config = GPTConfig(dropout=0.0, muon_learning_rate=0)
    model = GPT(config)
    assert model.transformer.wte.weight.shape == (50257, 768) and model.context_size == 1024
    assert model.lm_head.weight is model.transformer.wte.weight
    idx = torch.randint(50257, (1, 65))
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    assert logits.shape == (1, 64, 50257)
    assert loss.item() == pytest.approx(math.log(50257), abs=0.3)  # 10.82, and random scores
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    for optimizer in make_optimizers(model, config):
        optimizer.step()
    with torch.no_grad():
        assert model(idx[:, :-1], idx[:, 1:])[1] < loss - 0.5


def test_no_token_sees_its_future():
    model, idx = build(), torch.randint(300, (1, 48))
    changed = idx.clone()
    changed[0, 30:] = (changed[0, 30:] + 1) % 300
    with torch.no_grad():
        before = model(idx)[0]
        after = model(changed)[0]
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.isclose(before[:, 30:], after[:, 30:]).all(dim=-1).any()


def test_more_tokens_than_the_context_holds_are_refused():
    with pytest.raises(ValueError, match="49 tokens do not fit"):
        build()(torch.zeros(1, 49, dtype=torch.long))


def test_a_target_of_minus_100_does_not_count():
    model, idx = build(), torch.randint(300, (1, 20))
    targets = idx.clone()
    targets[0, :15] = -100
    logits, loss = model(idx, targets)
    expected = -logits[0, 15:].log_softmax(-1)[range(5), idx[0, 15:]].mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


# Against others


@pytest.fixture(params=NAMES)
def fixture(request):
    """A model made by transformers, and what it must say."""
    expected = np.load(FIXTURES / request.param / "expected.npz")
    return request.param, {name: torch.from_numpy(expected[name]) for name in expected}


def test_logits_are_those_of_transformers(fixture):
    name, expected = fixture
    model = hugging_face.load_model(FIXTURES / name)
    with torch.no_grad():
        logits, _ = model(expected["idx"])
    assert logits.dtype == torch.float32
    assert (logits - expected["logits"]).abs().max() < 1e-5


def test_greedy_text_is_that_of_transformers(fixture):
    name, expected = fixture
    model = hugging_face.load_model(FIXTURES / name)
    new = torch.cat(list(generate(model, expected["idx"], 40, greedy)), dim=1)
    assert torch.equal(new, expected["greedy"])


def test_logits_are_those_of_the_formulas_in_numpy(fixture):
    name, expected = fixture
    folder = FIXTURES / name
    weights = {}
    for parameter, tensor in bpe_gpt.read_safetensors(folder / "model.safetensors").items():
        if parameter.endswith(bpe_gpt.TRANSPOSED):  # numpy_gpt2.py has the matrices as published
            tensor = tensor.t()
        weights[parameter.removeprefix("transformer.")] = tensor.double().numpy()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for ids, logits in zip(expected["idx"], expected["logits"]):
        ours = gpt2(ids.numpy(), weights, config["n_layer"], config["n_head"])
        assert np.abs(ours - logits.numpy()).max() < 1e-5


@pytest.mark.parametrize("T", [1, 5, 16])
def test_attention_is_that_of_char_gpt_and_a_cache_changes_nothing(T):
    """The same weights in both scripts' CausalSelfAttention; read at once, or one after another."""
    torch.manual_seed(0)
    sizes = dict(n_head=4, n_embd=32)
    ours = bpe_gpt.CausalSelfAttention(GPTConfig(**sizes))
    theirs = char_gpt.CausalSelfAttention(char_gpt.GPTConfig(**sizes))
    theirs.by_hand = True
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, T, 32)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    cache = Cache(16)
    parts = [ours(x[:, t : t + 1], cache) for t in range(T)]
    assert torch.allclose(torch.cat(parts, dim=1), theirs(x), atol=1e-6)


PUBLISHED = bpe_gpt.DATA / "gpt2" / "model.safetensors"


@needs_gpt2_tokenizer
@pytest.mark.skipif(not PUBLISHED.exists(), reason="GPT-2's weights are not in data/gpt2")
@pytest.mark.parametrize(
    "prompt, n_tokens, continuation",
    [
        (
            "Alan Turing theorized that computers would one day become",
            40,
            " the most powerful machines on the planet.\n\nThe computer is a machine that can"
            " perform complex calculations, and it can perform these calculations in a way that is"
            " very similar to the human brain.",  # as published by picoGPT
        ),
        (
            "I enjoy walking with my cute dog",
            43,
            ", but I'm not sure if I'll ever be able to walk with my dog. I'm not sure if I'll ever"
            " be able to walk with my dog.",  # as published in Hugging Face's introduction
        ),
    ],
)
def test_gpt2_says_what_others_have_published(prompt, n_tokens, continuation):
    model, tokenizer = GPT.from_pretrained("gpt2"), bpe_gpt.gpt2_tokenizer()
    idx = torch.tensor([tokenizer.encode(prompt)])
    ids = [column.item() for column in generate(model, idx, n_tokens, greedy)]
    assert tokenizer.decode(ids).startswith(continuation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [511, 512, 513, 600])
def test_long_texts_are_causal_in_every_type(T, dtype):
    """Whichever way attention is computed. The last position sees all, the first only itself."""
    torch.manual_seed(0)
    layer = bpe_gpt.CausalSelfAttention(GPTConfig(n_head=2, n_embd=8)).to(dtype)
    x = torch.randn(1, T, 8, dtype=dtype, requires_grad=True)
    y = layer(x)
    for position in (0, T // 2, T - 1):
        (gradient,) = torch.autograd.grad(y[0, position].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        assert not seen[position + 1 :].any(), f"position {position} sees a later one"
        assert seen[position]


@pytest.mark.parametrize("script", [bpe_gpt, char_gpt], ids=lambda script: script.__name__)
def test_on_other_devices_attention_is_causal_by_a_constant(script, monkeypatch):
    """A comparison in its place would become symbolic when compiled. Shapes alone are computed."""
    seen = []
    kernel = F.scaled_dot_product_attention

    def spy(*args, is_causal=False):
        seen.append(is_causal)
        return kernel(*args, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.device("meta"):
        layer = script.CausalSelfAttention(script.GPTConfig(n_head=2, n_embd=8))
        for T in (2, 513):
            layer(torch.randn(1, T, 8))
    assert seen == [True, True] and all(type(value) is bool for value in seen)


# The cache


@pytest.mark.parametrize("n", [1, 7, 39])
def test_the_cache_changes_no_score(n):
    """A prompt of n tokens is read at once, then the others one at a time."""
    model, idx = build(), torch.randint(300, (3, 40))
    with torch.no_grad():
        expected, _ = model(idx)
        caches = [Cache(40) for _ in model.transformer.h]
        parts = [model(idx[:, :n], caches=caches)[0]]
        for t in range(n, 40):
            parts.append(model(idx[:, t : t + 1], caches=caches)[0])
    # With caches, the scores are those of the last token alone: generation needs no others.
    assert [len(part[0]) for part in parts] == [1] * (41 - n)
    assert (torch.cat(parts, dim=1) - expected[:, n - 1 :]).abs().max() < 1e-5


def test_several_tokens_at_once_are_refused_when_the_cache_is_in_use():
    """They would need a mask of their own, and nothing here needs them."""
    model, idx = build(), torch.randint(300, (1, 10))
    caches = [Cache(40) for _ in model.transformer.h]
    model(idx, caches=caches)
    with pytest.raises(AssertionError, match="one token at a time"):
        model(idx[:, :2], caches=caches)


@pytest.mark.parametrize(
    "settings, B, prompt",
    [
        (dict(block_size=256), 1, 5),
        (dict(block_size=256, n_layer=3, n_head=2), 4, 30),
        (dict(block_size=64), 2, 10),  # soon longer than its context
        (dict(block_size=16, n_head=1), 3, 40),  # from the start
    ],
)
def test_the_cache_changes_no_token_of_200(settings, B, prompt):
    """char_gpt.py's generate(), without a cache, reads all the text again for each token."""
    model = build(**settings)
    idx = torch.randint(300, (B, prompt))
    fast = torch.cat(list(generate(model, idx, 200, greedy)), dim=1)
    plain = torch.cat(list(char_gpt.generate(model, idx, 200, greedy)), dim=1)
    assert fast.shape == (B, 200) and torch.equal(fast, plain)
    if model.context_size > 16:
        assert len(fast.unique()) > 5, "a text that says one thing only proves little"


def test_with_the_cache_each_token_is_read_once():
    model, seen = build(), []
    model.transformer.h[0].register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    list(generate(model, torch.zeros(2, 9, dtype=torch.long), 6))
    assert seen == [9, 1, 1, 1, 1, 1]


# Tokens

def token_bytes(tokenizer):
    return tokenizer.tokens


def encode(tokenizer, text):
    return np.array(tokenizer.encode(text, {"<|endoftext|>"}))


STRINGS = [
    "",
    "Hello, world! I'll say it's 2026; we've 1,000 reasons.",
    "  two spaces,\n\n\n three line breaks \t and a tab ",
    "naïve café, Straße, Ελληνικά, русский, 日本語, العربية, हिन्दी, 🙂👍🏽",
    "aaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!",
    "\x00\x01\x7f\ufeff\u200b",
    "x²½Ⅷ٣",
]


@pytest.fixture(scope="module")
def learned():
    return train_bpe(PLAY.read_text(encoding="utf-8"), 600)


def slow_encode(text, tokens):
    """Byte-pair encoding as one would explain it: in each word, merge the pair learned first."""
    number = {token: i for i, token in enumerate(tokens)}
    ids = []
    for word in regex.findall(bpe_gpt.WORDS, text):
        parts = [bytes([b]) for b in word.encode("utf-8")]
        while len(parts) > 1:
            learned_when = [number.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
            i = learned_when.index(min(learned_when))
            if learned_when[i] == math.inf:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [number[part] for part in parts]
    return ids


def slow_train(text, vocab_size):
    """Byte-pair training as one would explain it: count all pairs anew for each merge."""
    words = regex.findall(bpe_gpt.WORDS, text)
    words = Counter(tuple(bytes([b]) for b in word.encode()) for word in words)
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        pairs = Counter()
        for word, count in words.items():
            # "aaa" has two pairs of "aa", which is how often they stand side by side
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        most = max(pairs.values())
        best = min((p for p in pairs if pairs[p] == most), key=lambda p: [*map(tokens.index, p)])
        tokens.append(best[0] + best[1])
        merged = Counter()
        for word, count in words.items():
            parts, i = [], 0
            while i < len(word):
                size = 2 if word[i : i + 2] == best else 1
                parts.append(b"".join(word[i : i + size]))
                i += size
            merged[tuple(parts)] += count
        words = merged
    return [*tokens, b"<|endoftext|>"]


@pytest.mark.parametrize("text", STRINGS)
def test_any_string_comes_back_from_its_tokens(learned, text):
    ids = encode(learned, text).tolist()
    assert learned.decode(ids) == text
    assert ids == slow_encode(text, token_bytes(learned))


def test_random_strings_are_encoded_as_by_the_slow_encoder(learned):
    rng = random.Random(0)
    tokens = token_bytes(learned)
    for _ in range(300):
        letters = rng.choice(["abc e", "the and', \n", "aA1 .\u00e9\u3042\t", "\n  x"])
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(40)))
        ids = learned.encode(text)
        assert ids == slow_encode(text, tokens) and learned.decode(ids) == text


def assert_encode_word_is_what_tiktoken_does(tokenizer, text):
    ranks = {token: i for i, token in enumerate(tokenizer.tokens) if i != tokenizer.end_of_text}
    words = regex.findall(bpe_gpt.WORDS, text)
    ids = [token for word in words for token in encode_word(word.encode(), ranks)]
    assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("text", [*STRINGS, PLAY.read_text(encoding="utf-8")[:50_000]])
def test_encode_word_does_what_tiktoken_does(learned, text):
    assert_encode_word_is_what_tiktoken_does(learned, text)


@needs_gpt2_tokenizer
@pytest.mark.parametrize("text", [*STRINGS, PLAY.read_text(encoding="utf-8")[:50_000]])
def test_encode_word_does_what_tiktoken_does_with_gpt2s_vocabulary(text):
    assert_encode_word_is_what_tiktoken_does(bpe_gpt.gpt2_tokenizer(), text)


def test_the_example_in_the_docstring_of_encode_word_is_so():
    ranks = {bytes([b]): b for b in range(256)} | {b"lo": 256, b"ow": 257, b"er": 258}
    tokens = list(ranks)
    assert [tokens[i] for i in encode_word(b"lower", ranks)] == [b"lo", b"w", b"er"]


def test_words_are_split_by_gpt2s_rule():
    """Written out by hand: no letters with digits, a space with the word after it, endings apart."""
    for text, expected in [
        ("I'll say", ["I", "'ll", " say"]),
        ("it's we've can't", ["it", "'s", " we", "'ve", " can", "'t"]),
        ("they're he'd I'm", ["they", "'re", " he", "'d", " I", "'m"]),
        ("I'LL don'tcha", ["I", "'", "LL", " don", "'t", "cha"]),
        ("Hello   world", ["Hello", "  ", " world"]),
        ("x1 22!? ok", ["x", "1", " 22", "!?", " ok"]),
        ("a\n\nb \n", ["a", "\n", "\n", "b", " \n"]),
        ("na\u00efve \u65e5\u672c", ["na\u00efve", " \u65e5\u672c"]),
    ]:
        assert regex.findall(bpe_gpt.WORDS, text) == expected, text


def test_a_vocabulary_is_learned_from_the_training_part_alone(tmp_path):
    """What occurs in the validation part only must not have shaped it."""
    (tmp_path / "x.txt").write_text("abab cdcd " * 90 + "qzqz vwvw " * 10, encoding="utf-8")
    config = GPTConfig(data=str(tmp_path / "x.txt"), vocab_size=300, block_size=8)
    _, _, tokenizer = bpe_gpt.load_tokens(config, None)
    tokens = token_bytes(tokenizer)
    assert b"ab" in tokens and b"cd" in tokens
    assert not any(b"qz" in token or b"vw" in token for token in tokens)


def test_vocabularies_are_learned_as_by_the_slow_trainer():
    text = PLAY.read_text(encoding="utf-8")[:20_000]
    text += " aaa aaaa aaaaa" * 40 + " h\u00e9 \u00e9" * 30 + " " + "\u65e5\u672c\u8a9e" * 100
    assert token_bytes(train_bpe(text, 330)) == slow_train(text, 330)


def test_a_text_without_spaces_is_learned_like_any_other():
    """DNA is one word of millions of letters; here 100,000."""
    dna = "".join(random.Random(1).choices("ACGT", k=100_000))
    tokenizer = train_bpe(dna, 300)
    assert token_bytes(tokenizer) == slow_train(dna, 300)
    assert tokenizer.decode(tokenizer.encode(dna)) == dna


def test_a_learned_vocabulary_has_the_bytes_then_what_occurs_most_then_the_end(learned):
    tokens = token_bytes(learned)
    assert len(tokens) == len(set(tokens)) == len(learned.tokens) == 600
    assert tokens[:256] == [bytes([b]) for b in range(256)]
    assert tokens[-1] == b"<|endoftext|>" and learned.end_of_text == 599
    assert {b" the", b" and"} <= set(tokens)
    assert not any(b" " in token[1:] and token.strip() for token in tokens), "words stay apart"


def test_learned_tokens_are_fewer_where_nothing_meets_twice():
    assert len(train_bpe("ab cd", 400).tokens) == 257
    assert len(train_bpe("abab", 400).tokens) == 258


def test_a_vocabulary_has_all_bytes_and_the_end_however_small_it_is_to_be():
    assert len(train_bpe("abab", 1).tokens) == 257


def test_the_example_in_the_docstring_is_so():
    tokens = token_bytes(train_bpe("low lower lowest", 1000))
    assert tokens[256:] == [b"lo", b"low", b" low", b" lowe", b"<|endoftext|>"]


@needs_shakespeare
def test_a_learned_token_of_shakespeare_says_two_and_a_half_characters():
    text = SHAKESPEARE.read_text(encoding="utf-8")
    tokenizer = train_bpe(text, 1024)
    assert len(tokenizer.tokens) == 1024
    assert len(text) / len(tokenizer.encode(text)) > 2.4


def test_end_of_text_is_one_token(learned):
    assert encode(learned, "a<|endoftext|>b").tolist()[1] == learned.end_of_text


@needs_gpt2_tokenizer
def test_gpt2s_tokenizer_cuts_shakespeare_into_as_many_tokens_as_known():
    tokenizer = bpe_gpt.gpt2_tokenizer()
    assert len(tokenizer.tokens) == 50257 and tokenizer.end_of_text == 50256
    assert tokenizer.encode("Hello world") == [15496, 995]
    if SHAKESPEARE.exists():
        assert len(encode(tokenizer, SHAKESPEARE.read_text(encoding="utf-8"))) == 338_025


# Evaluation


def data_of(tokens, **settings):
    return TextData(np.asarray(tokens), GPTConfig(**{**SMALL, **settings}))


@pytest.mark.parametrize("length", [2, 10, 16, 17, 18, 50, 51])
def test_evaluation_counts_every_token_once(length):
    """Token i is predicted from the tokens before it in its window, which begins at 0, 16, 32..."""
    model = build(block_size=16)
    tokens = np.random.default_rng(0).integers(300, size=length)
    losses = []
    for i in range(1, length):
        start = (i - 1) // 16 * 16
        with torch.no_grad():
            logits, _ = model(torch.from_numpy(tokens[None, start:i]))
        losses.append(-logits[0, -1].log_softmax(-1)[tokens[i]].item())
    data = data_of(tokens, block_size=16, batch_size=3)
    counted = sum((y != -100).sum().item() for _, y in data.evaluation_batches())
    assert counted == length - 1
    assert evaluate(model, data) == pytest.approx(np.mean(losses), abs=1e-4)


def test_in_training_at_most_a_million_tokens_are_evaluated_evenly_spread():
    tokens = np.arange(2_500_000, dtype=np.int32) % 300
    data = data_of(tokens, block_size=1000, batch_size=100)
    starts = []
    data.row = lambda start: starts.append(start) or (torch.zeros(1), torch.zeros(1))
    list(data.evaluation_batches())
    assert starts == list(range(0, 2_499_999, 3000))
    starts.clear()
    data.max_evaluated = len(tokens) + 1
    list(data.evaluation_batches())
    assert starts == list(range(0, 2_499_999, 1000)), "data/evaluate.py reads all"


@pytest.mark.parametrize("n", [2, 3, 7])
def test_processes_share_an_evaluation(monkeypatch, n):
    """What each has summed up gives, added together, the loss that one process finds."""
    model = build(block_size=16)
    data = data_of(np.random.default_rng(0).integers(300, size=100), block_size=16, batch_size=2)
    expected = evaluate(model, data)
    sums = []
    monkeypatch.setattr(bpe_gpt, "N_PROCESSES", n)
    for rank in range(n):
        monkeypatch.setattr(bpe_gpt, "RANK", rank)
        monkeypatch.setattr(bpe_gpt.dist, "all_reduce", lambda tensor: sums.append(tensor.clone()))
        evaluate(model, data)
    total, count = sum(sums).tolist()
    assert len(sums) == n and count == 99
    assert total / count == pytest.approx(expected, abs=1e-5)


def test_evaluation_is_without_dropout_whatever_the_model_did_before():
    model = build(block_size=16, dropout=0.5)
    data = data_of(np.arange(100) % 300, block_size=16)
    expected = evaluate(model.eval(), data)
    assert evaluate(model.train(), data) == expected


def test_bits_per_byte_compares_vocabularies():
    """Two bytes a character, a bit a token. The end of text is a token without bytes."""
    tokenizer = train_bpe("", 257)  # tokens are bytes
    data = data_of(encode(tokenizer, "x\u00e9\u00e0\u00e9<|endoftext|>"), vocab_size=257)
    n_bytes = bpe_gpt.bytes_per_token(data, tokenizer)
    assert n_bytes == 6 / 7
    assert f"{7 / 6:.3f} bits/byte" in bpe_gpt.describe(math.log(2), n_bytes)
    assert "perplexity 2.00" in bpe_gpt.describe(math.log(2), n_bytes)
    assert "perplexity" in bpe_gpt.describe(5000.0, n_bytes), "no overflow if training goes wrong"


# Training


@pytest.mark.parametrize("batch_size", [5, 3])  # with 3, the last part is a smaller one
def test_a_step_in_parts_is_the_step_of_the_whole(batch_size):
    """The gradient of 10 sequences, added up over parts, is that of all 10 at once."""
    gradients, losses = [], []
    data = data_of(np.random.default_rng(0).integers(300, size=400), block_size=8,
                   total_batch_size=80)
    for size in (10, batch_size):
        model, config = build(), GPTConfig(batch_size=size, grad_clip=1e9)
        optimizers, autocast = make_optimizers(model, config), torch.autocast("cpu", enabled=False)
        losses.append(
            training_step(model, optimizers, *data.training_batch(0), 0, config, autocast))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0.1 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


# The command


def test_the_command_says_what_it_does(clone):
    output = (clone / "logs" / "bpe_gpt.txt").read_text(encoding="utf-8")
    before = re.search(r"^val loss (\S+) \(.*; a uniform guess: ln\(300\) = 5\.7038", output, re.MULTILINE)[1]
    assert float(before) == pytest.approx(5.7038, abs=0.3)
    loss, perplexity, bits = re.search(
        r"step 60: .* (\S+) \(perplexity (\S+), (\S+) bits/byte\) val", output).groups()
    assert float(loss) < 4.5 and 2 < float(bits) < 5
    assert float(perplexity) == pytest.approx(math.exp(float(loss)), abs=0.01)
    for part in ("--full trains", "not the defaults: vocab_size 300, n_layer 2", "parameters",
                 "steps 0 to 60 of about 512 tokens: 30,720 in all, ", "best val loss"):
        assert part in output
    assert "next: python sample.py out/bpe_gpt.pt" in output


TEXT = PLAY.read_text(encoding="utf-8")[:6000]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs bpe_gpt.py's main() with some flags, in this process. Returns the checkpoint."""
    (tmp_path / "play.txt").write_text(TEXT, encoding="utf-8")

    def run(out, *flags):
        out = tmp_path / out
        data = [] if "--data" in flags else ["--data", tmp_path / "play.txt"]
        flags = ["--device", "cpu", "--out", out, *data, *flags]
        monkeypatch.setattr(sys, "argv", ["bpe_gpt.py", *map(str, flags)])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        bpe_gpt.main()
        return bpe_gpt.load_checkpoint(out, "bpe_gpt") if out.exists() else None

    return run


@pytest.fixture(scope="module")
def untrained(learned, tmp_path_factory):
    """A checkpoint of a model that has learned nothing, with its vocabulary."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "untrained.pt"
    config = GPTConfig(**{**SMALL, "vocab_size": len(learned.tokens)})
    torch.save(dict(written_by="bpe_gpt", config=vars(config), model=GPT(config).state_dict(),
                    vocab=token_bytes(learned), text_before="\n"), path)
    return path


SIZE = "--n_layer 2 --n_head 2 --n_embd 16 --vocab_size 300 --block_size 16"
STEPS = "--max_iters 8 --eval_interval 3 --warmup_iters 2 --dropout 0.2 "
STEPS += "--batch_size 3 --total_batch_size 128 --learning_rate 0.01"


def test_fine_tuning_that_was_stopped_goes_on_as_if_it_had_not_been(
    command, untrained, monkeypatch
):
    flags = ["--init", untrained, *STEPS.split(), "--block_size", "16"]
    whole = command("whole.pt", *flags)
    step = bpe_gpt.training_step

    def stop_in_step_5(*args):
        if args[4] == 4:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bpe_gpt, "training_step", stop_in_step_5)
        command("part.pt", *flags)
    resumed = command("part.pt", "--resume")
    assert resumed["history"] == whole["history"] and len(whole["history"]) == 3
    for name, weight in whole["last"]["model"].items():
        assert torch.equal(weight, resumed["last"]["model"][name]), name
        assert torch.equal(whole["model"][name], resumed["model"][name]), name


def test_fine_tuning_goes_on_from_the_weights_it_was_given(command, untrained, capsys):
    checkpoint = command("x.pt", "--init", untrained, *STEPS.split())
    before = float(re.search(r"^val loss (\S+) ", capsys.readouterr().out, re.MULTILINE)[1])
    model = GPT.from_pretrained(untrained)
    tokenizer = BPETokenizer(load_pretrained(untrained)["vocab"])
    val_data = TextData(encode(tokenizer, TEXT[int(0.9 * len(TEXT)) :]), model.config)
    assert before == pytest.approx(evaluate(model, val_data), abs=0.01)
    assert checkpoint["history"][-1][3] < before - 0.5


def test_a_fine_tuned_checkpoint_is_fine_tuned_again(command, untrained, tmp_path, capsys):
    command("a.pt", "--init", untrained, *STEPS.split())
    command("b.pt", "--init", tmp_path / "a.pt", *STEPS.split())
    output = capsys.readouterr().out
    after, before = re.search(r"best val loss (\S+) (?s:.*)\nval loss (\S+) ", output).groups()
    assert after == before


@pytest.mark.parametrize("text_before", ["\n", "<|endoftext|>"])
def test_a_fine_tuned_model_begins_a_text_as_it_did_before(
    command, untrained, tmp_path, text_before
):
    """GPT-2 knows the end of text as the beginning of the next one, whatever it is fine-tuned on."""
    torch.save(torch.load(untrained) | {"text_before": text_before}, tmp_path / "a.pt")
    checkpoint = command("b.pt", "--init", tmp_path / "a.pt", *STEPS.split(), "--max_iters", "1")
    assert checkpoint["text_before"] == text_before


def test_data_evaluate_py_evaluates_the_val_bin_of_a_folder(untrained, tmp_path, monkeypatch, capsys):
    """This model has no folder, which holds GPT-2's tokens. So the two files are made up here."""
    train, val = np.arange(90) % 300, np.arange(50) % 300
    monkeypatch.setattr(bpe_gpt, "read_folder", lambda path, tokenizer: [train, val])
    monkeypatch.setattr(sys, "argv", f"x {untrained} {tmp_path} --device cpu --dtype float32".split())
    load_script("evaluate").main()
    model = GPT.from_pretrained(untrained)
    expected = evaluate(model, TextData(val, model.config))
    assert f"50 tokens, on cpu in torch.float32\nloss {expected:.4f} " in capsys.readouterr().out


def test_data_evaluate_py_evaluates_the_whole_text(untrained, tmp_path):
    text = "To be, or not to be? " * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model = GPT.from_pretrained(untrained)
    tokenizer = BPETokenizer(load_pretrained(untrained)["vocab"])
    flags = (untrained, tmp_path / "text.txt", "--dtype", "float32")
    output, _ = run(ROOT / "data" / "evaluate.py", *flags, cwd=tmp_path)
    pattern = r"loss (\S+) \(perplexity (\S+), (\S+) bits/byte\)"
    loss, perplexity, bits = map(float, re.search(pattern, output).groups())
    data = TextData(encode(tokenizer, text), model.config)
    expected = evaluate(model, data)
    assert loss == pytest.approx(expected, abs=1e-3)
    assert perplexity == pytest.approx(math.exp(expected), rel=1e-3)
    n_bytes = len(text.encode()) - len(tokenizer.tokens[data.tokens[0]])
    n_targets = len(data.tokens) - 1
    assert bits == pytest.approx(expected * n_targets / math.log(2) / n_bytes, abs=2e-3)


GPT2 = dict(vocab_size=50257, n_layer=12, n_head=12, n_embd=768, block_size=1024)
ON_A_CPU = bpe_gpt.CPU_SETTINGS
FINE_TUNING = bpe_gpt.FINE_TUNING_SETTINGS
TO_ANSWER = instruct.SETTINGS
MEDIUM = GPT2 | SIZES["gpt2-medium"]


@pytest.mark.parametrize(
    "flags, device, expected",
    [
        ({}, "cpu", ON_A_CPU),
        ({}, "mps", ON_A_CPU),
        ({}, "cuda", GPT2),
        (dict(full=True), "cpu", GPT2),
        (dict(full=True, n_layer=3), "cpu", GPT2),
        (dict(dropout=0.3, n_head=2), "cpu", ON_A_CPU),
        (dict(init="x"), "cpu", FINE_TUNING | MEDIUM),
        (dict(init="x"), "cuda", FINE_TUNING | MEDIUM),
        (dict(init="x", learning_rate=0.5, block_size=512), "cpu", FINE_TUNING | MEDIUM),
        (dict(init="x", full=True), "cpu", FINE_TUNING | MEDIUM),
    ],
    ids=str,
)
def test_the_settings_of_a_run_are_those_of_its_kind(flags, device, expected):
    """And what is given as a flag counts most. Fine-tuning on a CPU, for example, has the sizes of
    the model that it begins with, but neither its other settings nor those of the small model."""
    trained = {"config": vars(GPTConfig(**MEDIUM, seed=99, weight_decay=9.0, data="z"))}
    trained = trained if "init" in flags else None
    config = bpe_gpt.choose_settings(flags, torch.device(device), False, trained)
    assert config == GPTConfig(**expected | flags)
    # To answer instructions, it has some others, but for the sizes of what is fine-tuned.
    config = bpe_gpt.choose_settings(flags, torch.device(device), False, trained, TO_ANSWER)
    sizes = MEDIUM if trained else {}
    assert config == GPTConfig(**expected | TO_ANSWER | sizes | flags)


def test_a_resumed_run_has_its_own_settings_but_for_where_it_runs_and_the_flags():
    others = dict(device="cuda", out="a.pt", seed=5, weight_decay=9.0, init="x")
    saved = vars(GPTConfig(**ON_A_CPU | others))
    flags = dict(resume=True, out="b.pt", max_iters=3000)
    config = bpe_gpt.choose_settings(flags, torch.device("cpu"), True, {"config": saved})
    assert config == GPTConfig(**saved | flags | dict(device="auto"))


def test_of_several_processes_the_first_alone_prints(monkeypatch, capsys):
    """The others write to nowhere. (With one process there is no group to join.)"""
    for rank, expected in ((0, "text\n"), (1, ""), (3, "")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", sys.stdout)  # to be put back
            patch.setattr(bpe_gpt, "RANK", rank)
            bpe_gpt.join_processes(torch.device("cpu"))
            print("text", flush=True)
            if rank > 0:
                sys.stdout.close()
        assert capsys.readouterr().out == expected


def test_a_folder_of_tokens_is_trained_on_without_being_read_whole(command, tmp_path, monkeypatch):
    for name, n in (("train", 1000), ("val", 200)):
        tokens = np.random.default_rng(0).integers(300, size=n).astype("<u2")
        tokens.tofile(tmp_path / f"{name}.bin")
    kinds = []
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)] + [
        b"%d." % i for i in range(100, 143)] + [b"<|endoftext|>"])
    monkeypatch.setattr(bpe_gpt, "gpt2_tokenizer", lambda: tokenizer)
    init = TextData.__init__
    monkeypatch.setattr(
        TextData, "__init__", lambda self, t, c: kinds.append(type(t)) or init(self, t, c))
    monkeypatch.setattr(GPTConfig, "vocab_size", 300)
    monkeypatch.setitem(bpe_gpt.FOLDER_SETTINGS, "vocab_size", 300)
    size = SIZE.replace("--vocab_size 300", "").split()
    checkpoint = command("x.pt", "--data", tmp_path, *size, *STEPS.split())
    assert set(kinds) == {np.memmap} and len(checkpoint["history"]) == 3
    assert checkpoint["text_before"] == "<|endoftext|>", "it stands between the texts"
    with pytest.raises(ValueError, match="GPT-2's tokens, not those of another vocabulary"):
        command("x.pt", "--data", tmp_path, *size, "--vocab_size", 280)
    other = train_bpe(TEXT, 300)  # as many tokens, but others
    vocab = other.tokens
    torch.save({**checkpoint, "vocab": vocab}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="GPT-2's tokens, not those of another vocabulary"):
        command("x.pt", "--data", tmp_path, "--init", tmp_path / "other.pt")


def test_each_process_has_a_row_in_every_step(monkeypatch):
    data = data_of(np.arange(1000) % 300, block_size=16, total_batch_size=31)
    assert len(data.training_batch(0)[0]) == 1
    monkeypatch.setattr(bpe_gpt, "N_PROCESSES", 3)
    assert len(data.training_batch(0)[0]) == 3


# A corpus


def folder_of_tokens(path, n=20_000):
    """What data/prepare.py writes, with tokens at random."""
    path.mkdir(exist_ok=True)
    for name, size in (("train", n), ("val", n // 10)):
        tokens = np.random.default_rng(len(name)).integers(1, 50257, size=size)
        tokens.astype("<u2").tofile(path / f"{name}.bin")
    return path


def settings_for(*flags, device="cpu", resumed=False, trained=None):
    given = dict(zip(flags[::2], flags[1::2]))
    return bpe_gpt.choose_settings(given, torch.device(device), resumed, trained, {})


def test_a_folder_has_settings_of_its_own_for_one_pass_through_the_data(tmp_path, capsys):
    data = str(folder_of_tokens(tmp_path / "x", n=1_200_000))
    full = settings_for("data", data, device="cuda")
    assert (full.n_layer, full.n_embd, full.vocab_size) == (12, 768, 50257)
    assert full.dropout == 0 and full.total_batch_size == 2**19 and full.max_iters == 2
    assert "max_iters 2" in capsys.readouterr().out, "what is not the default is shown"
    small = settings_for("data", data)
    assert (small.n_layer, small.n_embd, small.vocab_size) == (4, 128, 50257)
    assert small.dropout == 0 and small.max_iters == 1_200_000 // small.total_batch_size > 50
    assert small.warmup_iters == small.max_iters // 10, "or a small folder would never be learned"
    long = settings_for("data", data, "total_batch_size", 512)
    assert long.max_iters > 2000 and long.warmup_iters == 100
    mine = settings_for("data", data, "total_batch_size", 4096, "dropout", 0.1)
    assert mine.max_iters == 292 and mine.dropout == 0.1, "flags count most"
    assert settings_for("data", data, "max_iters", 7).max_iters == 7
    assert settings_for("data", "play.txt").dropout == 0.05, "a text file has not"


def test_a_folder_does_not_change_how_a_model_is_fine_tuned(tmp_path):
    data = str(folder_of_tokens(tmp_path / "x"))
    trained = {"config": dict(vars(GPTConfig()))}
    tuned = settings_for("data", data, "init", "gpt2", trained=trained)
    plain = settings_for("data", "", "init", "gpt2", trained=trained)
    assert vars(tuned) | {"data": ""} == vars(plain)


def test_what_a_run_will_take_is_printed_before_it_begins(capsys):
    config = GPTConfig(**{**SMALL, "block_size": 16, "total_batch_size": 160, "max_iters": 37,
                          "eval_interval": 10})
    data = TextData(np.arange(1000) % 300, config)  # 61 rows of 16 in an epoch, 10 per step
    model = GPT(config)
    bpe_gpt.show_cost(config, model, data, dict(step=12, n_read=12 * 320))  # with larger steps so far
    n = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == (
        f"steps 12 to 37 of about 160 tokens: 7,840 in all, {490 / 61:.2g} passes through the data; "
        f"a checkpoint of at most {16 * n / 1e9:.2g} GB every 10 steps\n")
    bpe_gpt.show_cost(config, model, data, dict(step=40, n_read=6400))  # nothing is left to do
    assert "6,400 in all" in capsys.readouterr().out


def test_a_checkpoint_is_not_larger_than_it_was_said_to_be(command, tmp_path, capsys):
    command("x.pt", *SIZE.split(), *STEPS.split())
    said = re.search(r"of at most (\S+) GB", capsys.readouterr().out)[1]
    assert (tmp_path / "x.pt").stat().st_size < 1.05e9 * float(said) + 50_000


def test_the_utilization_is_what_is_computed_over_what_could_be(monkeypatch):
    """6 operations per parameter and token, and those of attention; on two devices."""
    config = GPTConfig(**SMALL)
    model = GPT(config)
    monkeypatch.setattr(bpe_gpt, "matrix_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(bpe_gpt, "N_PROCESSES", 2)
    n = sum(p.numel() for p in model.parameters())
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    expected = (6 * n + attention) * 1000 / 2e9
    assert bpe_gpt.utilization(model, config, 1000) == pytest.approx(expected)


def test_the_matrix_rate_is_that_of_large_products():
    rate = bpe_gpt.matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14 and rate == bpe_gpt.matrix_rate(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("foreign", ["meta.pkl", "32 bits", "a header"])
def test_tokens_of_another_program_are_refused(tmp_path, foreign, monkeypatch):
    folder = folder_of_tokens(tmp_path / "x")
    tokens = np.fromfile(folder / "train.bin", "<u2")
    if foreign == "meta.pkl":  # nanoGPT's name for the vocabulary of characters
        (folder / foreign).write_bytes(b"")
    elif foreign == "32 bits":
        tokens.astype("<u4").tofile(folder / "train.bin")
    else:  # as llm.c's files begin
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens)
        (folder / "train.bin").write_bytes(header.tobytes() + tokens.tobytes())
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)] + [b"<|endoftext|>"])
    monkeypatch.setattr(bpe_gpt, "gpt2_tokenizer", lambda: tokenizer)
    with pytest.raises(bpe_gpt.UserError, match="was not written by data/prepare.py"):
        bpe_gpt.read_folder(folder, tokenizer)


def test_tokens_of_data_prepare_py_are_read(tmp_path, monkeypatch):
    folder = folder_of_tokens(tmp_path / "x")
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)] + [b"<|endoftext|>"])
    monkeypatch.setattr(bpe_gpt, "gpt2_tokenizer", lambda: tokenizer)
    assert [len(tokens) for tokens in bpe_gpt.read_folder(folder, tokenizer)] == [20_000, 2000]
    other = BPETokenizer([*tokenizer.tokens[1::-1], *tokenizer.tokens[2:]])  # in another order
    with pytest.raises(bpe_gpt.UserError, match="not those of another vocabulary"):
        bpe_gpt.read_folder(folder, other)


def test_the_log_has_every_evaluation_and_hundredth_step_once_after_three_stops(command, tmp_path):
    size = [*SIZE.split(), "--batch_size", "4", "--total_batch_size", "64"]
    for max_iters in (130, 250, 260, 400):
        command("x.pt", *size, "--resume", "--max_iters", max_iters, "--eval_interval", "130")
    lines = (tmp_path / "x.pt.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    steps = [entry["step"] for entry in entries]
    assert steps == [100, 130, 200, 250, 260, 300, 390, 400, 400]
    assert all(entry["tokens"] == 64 * entry["step"] for entry in entries)
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [130, 250, 260, 390, 400]
    history = torch.load(tmp_path / "x.pt")["history"]
    assert [e["val_loss"] for e in entries if "val_loss" in e] == [row[3] for row in history]


def test_resuming_notices_other_validation_data(command, tmp_path):
    size = [*SIZE.split(), "--batch_size", "4", "--total_batch_size", "64", "--eval_interval", "5"]
    command("x.pt", *size, "--max_iters", "5")
    before = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "play.txt").write_text(TEXT[:-1] + "!", encoding="utf-8")
    with pytest.raises(bpe_gpt.UserError, match="x.pt was started with a different text"):
        command("x.pt", "--resume", "--max_iters", "10")
    assert (tmp_path / "x.pt").read_bytes() == before


def test_two_ends_that_a_reader_unties_are_tuned_apart():
    """Even if the model that they come from has one matrix for both."""
    class Untied(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.lm_head.weight = torch.nn.Parameter(torch.zeros(config.vocab_size, config.n_embd))

    config = GPTConfig(**SMALL)
    for state in (GPT(config).state_dict(), Untied(config).state_dict()):
        state["lm_head.weight"] = state["transformer.wte.weight"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe_gpt, "GPT", Untied)
            model = bpe_gpt.build_model(dict(config=vars(config), model=state), config)
        ends = model.lm_head.weight, model.transformer.wte.weight
        assert torch.equal(*ends) and ends[0].data_ptr() != ends[1].data_ptr()


def test_a_matrix_that_a_reader_shares_between_blocks_stays_a_single_parameter():
    class Shared(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.transformer.h[1].mlp.c_fc.weight = self.transformer.h[0].mlp.c_fc.weight

    config = GPTConfig(**SMALL)
    trained = Shared(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_gpt, "GPT", Shared)
        model = bpe_gpt.build_model(dict(config=vars(config), model=trained.state_dict()), config)
    first, second = [block.mlp.c_fc.weight for block in model.transformer.h[:2]]
    assert first is second and model.lm_head.weight is model.transformer.wte.weight
    assert len(list(model.parameters())) == len(list(trained.parameters()))


def test_the_latest_weights_are_saved_once_if_they_are_the_best(command, tmp_path):
    size = [*SIZE.split(), "--batch_size", "4", "--total_batch_size", "64", "--eval_interval", "5"]
    best = command("best.pt", *size, "--max_iters", "5")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert best["model"][name].data_ptr() == best["last"]["model"][name].data_ptr()
    tied = best["model"]["lm_head.weight"], best["model"]["transformer.wte.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    worse = command("best.pt", "--resume", "--max_iters", "10", "--learning_rate", "5")
    assert worse["history"][-1][3] > worse["history"][0][3]
    assert not torch.equal(worse["model"][name], worse["last"]["model"][name])
    assert torch.equal(worse["model"][name], best["model"][name])


def test_fine_tuning_does_not_replace_the_model_that_it_begins_with(command, tmp_path):
    command("x.pt", *SIZE.split(), *STEPS.split())
    before = (tmp_path / "x.pt").read_bytes()
    for name in (tmp_path / "x.pt", f"{tmp_path}/./x.pt"):
        with pytest.raises(ValueError, match="--init and --out are the same file"):
            command("x.pt", "--init", name, *STEPS.split())
    assert (tmp_path / "x.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flag", ["vocab_size 300", "n_layer 3", "n_head 2", "n_embd 64", "block_size 64"])
def test_a_size_that_a_model_does_not_have_gets_one_line(command, untrained, flag):
    name, value = flag.split()
    with pytest.raises(bpe_gpt.UserError, match=f"--{name} is [0-9]+ in this model"):
        command("x.pt", "--init", untrained, f"--{name}", value)


def test_a_process_without_rows_does_not_make_the_loss_nan(monkeypatch):
    """A short text may have fewer rows than there are processes."""
    config = GPTConfig(**SMALL)
    model = GPT(config)
    data = data_of(np.arange(40) % 300, block_size=48)
    x, y = data.training_batch(0)
    monkeypatch.setattr(bpe_gpt, "N_PROCESSES", 2)
    monkeypatch.setattr(bpe_gpt, "RANK", 1)
    monkeypatch.setattr(bpe_gpt.dist, "all_reduce", lambda tensor: None)
    autocast = torch.autocast("cpu", enabled=False)
    assert len(x) == 1 and bpe_gpt.training_step(model, [], x, y, 0, config, autocast) == 0


def test_each_process_sends_the_gradients_of_all_parameters_that_are_trained(monkeypatch):
    """Also of those that its own rows do not use, such as a block that is left out at random."""
    model = GPT(GPTConfig(**SMALL))
    model.not_used = torch.nn.Linear(3, 3)
    model.transformer.wpe.weight.requires_grad = False
    x, y = data_of(np.arange(2000) % 300, block_size=48).training_batch(0)
    sent = []
    monkeypatch.setattr(bpe_gpt, "N_PROCESSES", 2)
    monkeypatch.setattr(bpe_gpt.dist, "all_reduce", sent.append)
    for step in range(2):
        autocast = torch.autocast("cpu", enabled=False)
        loss = bpe_gpt.training_step(model, [], x, y, step, model.config, autocast)
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert len(sent[step]) == 1 + n_trained and sent[step][0].item() == pytest.approx(loss)
        assert not model.not_used.weight.grad.any() and model.transformer.wpe.weight.grad is None


def test_a_loss_is_added_up_exactly():
    """In float32, a count beyond 16,777,216 would take no more single tokens."""
    y = torch.zeros(1, 1, dtype=torch.long)
    many = torch.zeros(1, 1).expand(1, 2**24).long()
    batches = [(many, many), *[(y, y)] * 5]

    class Model:
        """The loss of a single token is 1, and that of many tokens 0."""
        lm_head = types.SimpleNamespace(weight=torch.zeros(1))

        def eval(self):
            pass

        def __call__(self, x, targets):
            return None, torch.tensor(float(targets.shape[1] == 1))

    data = types.SimpleNamespace(evaluation_batches=lambda: iter(batches))
    assert evaluate(Model(), data) == pytest.approx(5 / (2**24 + 5), rel=1e-9)
