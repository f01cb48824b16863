"""sample.py --explore: the page for the browser has the model's numbers, and the model itself, which
computes in JavaScript what PyTorch computes."""

import html
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PLAY, ROOT, one_line_error
from test_sample import chances, tiny

import bpe_gpt
import char_gpt
import sample
from bigram import BigramConfig, BigramLanguageModel
from char_gpt import CharTokenizer
from sample import SampleConfig, load_model

SCRIPTS = ["bigram", "char_gpt", "bpe_gpt"]
TEMPLATE = (ROOT / "data" / "explore.html").read_text(encoding="utf-8")
TEXT = "A harbour:\nships, and more"
BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)
ATTENTION = torch.nn.functional.scaled_dot_product_attention
needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason="chromium is not installed: the page's JavaScript is not tested")


def read_page(path):
    """The page, and the data in it."""
    page = path.read_text(encoding="utf-8")
    return page, json.loads(re.search('<script [^>]* id="data">(.*)</script>', page)[1])


@pytest.fixture
def command(clone, monkeypatch, tmp_path, capsys):
    """`python sample.py FLAGS` in the clone, within this process; a page goes to tmp_path."""
    monkeypatch.chdir(clone)
    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        sample.main()
        return capsys.readouterr().out
    return main


@pytest.fixture
def explore(command, tmp_path):
    def explored(script, text=TEXT):
        path = tmp_path / f"{script}.html"
        command(f"out/{script}.pt", "--explore", text, "--plot", path)
        return read_page(path)
    return explored


class Numbers:
    """A tokenizer whose tokens are their own numbers."""
    end_of_text = -1
    def __init__(self, n):
        self.tokens = [str(i).encode() for i in range(n)]

    def decode(self, ids):
        return "".join(map(str, ids))


def write_page(model, tokenizer, ids, folder):
    """The page that sample.py makes of a model that is no checkpoint."""
    sample.explore(model, tokenizer, ids, "x", None, SampleConfig(plot=folder / "x.html"))
    return read_page(folder / "x.html")[0]


def browse(page, script, folder):
    """Opens a page in a browser, which has to run without an error, and runs a script in it, the
    value of which is returned. The page must not have asked for any other file."""
    path = folder / "browsed.html"
    spy = """<script>const errors = [];
        onerror = (text) => { errors.push(text); };
        onunhandledrejection = (event) => { errors.push(String(event.reason)); };</script>"""
    page = page.replace("<script>", spy + "<script>", 1)
    # A function, since a script cannot use names that the page has used at its top level.
    page += f"<script>const value = (async () => {{ {script} }})();</script>"
    page += """<script>value.catch((error) => { errors.push(error.stack); }).then((value) => {
        const asked = performance.getEntriesByType("resource").map((entry) => entry.name);
        document.body.textContent = JSON.stringify({ value, errors, asked });
        document.body.id = "result"; });</script>"""
    path.write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'user'}",
             "--virtual-time-budget=60000", "--dump-dom"]  # it ends when nothing is left to do
    done = subprocess.run([CHROMIUM, *flags, path.as_uri()],
                          capture_output=True, encoding="utf-8", timeout=300)
    result = re.search('<body id="result">(.*)</body>', done.stdout, re.DOTALL)
    result = json.loads(html.unescape(result[1]))
    assert result["errors"] == [] and result["asked"] == []
    return result["value"]


# ---- The numbers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_probabilities_and_ranks_are_those_of_probs(command, explore, script):
    _, data = explore(script)
    _, *lines, _ = command(f"out/{script}.pt", "--probs", TEXT).splitlines()
    shown = [re.match(r"'.+?' +([\d.]+)% +(\d+) ", line).groups() for line in lines]
    probs = torch.tensor(data["log_probs"]).exp().tolist()
    assert probs == pytest.approx([float(share) / 100 for share, _ in shown], abs=6e-5)
    assert data["ranks"] == [int(rank) for _, rank in shown]
    model, tokenizer, _ = load_model(f"out/{script}.pt")
    assert data["ids"] == tokenizer.encode("\n" + TEXT)
    assert data["model"] == f"out/{script}.pt" and data["text"] == TEXT
    assert re.fullmatch(r"[\d,]+ parameters, validation loss \d\.\d{4} nats after \d+ steps", data["about"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_has_the_best_tokens_and_scores_at_known_ranks(explore, script):
    _, data = explore(script)
    model, tokenizer, _ = load_model(f"out/{script}.pt")
    log_probs = sample.next_log_probs(model, torch.tensor([data["ids"]]))
    ranks = torch.tensor(data["score_ranks"])
    assert ranks[:100].tolist() == list(range(1, len(ranks[:100]) + 1))
    assert ranks[-1] == len(data["names"]) == log_probs.shape[1]
    assert (ranks[1:] <= 1.02 * ranks[:-1] + 1).all()
    for row, scores, best in zip(log_probs, data["scores"], data["best"], strict=True):
        descending = row.sort(descending=True).values
        assert torch.allclose(descending[ranks - 1], torch.tensor(scores), atol=1e-4)
        assert torch.equal(row[best], descending[:100])


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_weights_are_those_of_attention(explore, script):
    _, data = explore(script)
    weights = sample.attention_weights(load_model(f"out/{script}.pt")[0], data["ids"])
    assert (torch.tensor(data["attention"]) / 1000 - weights).abs().max() < 0.00051


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_each_layer_says_what_a_model_that_stops_there_predicts(explore, script):
    """From a model without blocks to one with all: the last layer is the model's own prediction."""
    _, data = explore(script)
    model = load_model(f"out/{script}.pt")[0]
    blocks = model.transformer.h
    assert len(data["lens"]["probs"]) == len(blocks) + 1
    for n in range(len(blocks) + 1):
        model.transformer.h = blocks[:n]
        probs = model(torch.tensor([data["ids"]]))[0][0].softmax(-1)
        best, tokens = probs.max(-1)
        assert best.tolist() == pytest.approx(data["lens"]["probs"][n], abs=1e-5)
        assert tokens.tolist() == data["lens"]["tokens"][n]


def test_a_bigram_has_no_attention_and_no_layers(explore):
    _, data = explore("bigram")
    assert "attention" not in data and "lens" not in data


@pytest.mark.parametrize(
    "name, loss", [("bigram", "2.7000 nats after 3,000"), ("gpt", "2.5000 nats after 2,000")])
def test_the_loss_on_the_page_is_that_of_the_weights_that_were_saved(name, loss, tmp_path):
    """bigram.py saves the last table, the others the best weights."""
    torch.manual_seed(0)
    model = BigramLanguageModel(BigramConfig(5)) if name == "bigram" else tiny(char_gpt)
    history = [(1000, 1, 3.0, 2.9), (2000, 2, 3.0, 2.5), (3000, 3, 3.0, 2.7)]
    sample.explore(model, Numbers(5), [0, 1], "x", history, SampleConfig(plot=tmp_path / "x.html"))
    assert f"validation loss {loss} steps" in read_page(tmp_path / "x.html")[1]["about"]


def test_spaces_line_breaks_and_bytes_can_be_seen(explore):
    _, data = explore("bpe_gpt", "a \n\u2605\t\u2028")
    names = [data["names"][i] for i in data["ids"]]
    assert names[0] == r"\n" and "".join(names[1:]) == r"a␣\n\xe2\x98\x85\t\xe2\x80\xa8"


@pytest.mark.parametrize("script, longest", [("bigram", 80), ("char_gpt", 31), ("bpe_gpt", 31)])
def test_too_long_a_text_is_refused_and_the_longest_is_not(clone, explore, script, longest):
    """A model with a short context takes no more than that, and all texts begin with one token."""
    _, data = explore(script, "q" * longest)
    assert len(data["ids"]) == longest + 1
    flags = (f"out/{script}.pt", "--explore", "q" * (longest + 1))
    error = one_line_error("sample.py", *flags, cwd=clone)
    assert f"--explore takes at most {longest} tokens" in error and f"{longest + 1}" in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_text_with_the_line_breaks_of_windows_is_the_same_text(explore, script):
    """A text field knows only \\n."""
    _, data = explore(script, "A sea\n\nand\nships")
    _, windows = explore(script, "A sea\r\n\r\nand\rships")
    assert data["text"] == windows["text"] == "A sea\n\nand\nships" and data == windows


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_without_numbers_has_no_page(tmp_path, number):
    """JSON has no nan. One weight is enough, even of a position that this text does not reach."""
    model = tiny(char_gpt, vocab_size=5, block_size=32)
    model.transformer.wpe.weight.data[30, 0] = number
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_page(model, Numbers(5), [1, 2, 3], tmp_path)
    model.transformer.wpe.weight.data[30, 0] = 0
    model.transformer.wte.weight.data[:] = 1e38
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_page(model, Numbers(5), [1, 2, 3], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_file_is_named_explore_html_unless_plot_says_otherwise(command, clone):
    assert "saved explore.html" in command("out/bigram.pt", "--explore", "The sea")
    read_page(clone / "explore.html")
    (clone / "explore.html").unlink()


def too_large():
    """A model of GPT-2's depth and vocabulary, with more than 16 million parameters."""
    config = bpe_gpt.GPTConfig(n_layer=12, n_head=12, n_embd=324, vocab_size=50257, block_size=64)
    return bpe_gpt.GPT(config).eval()


def test_sixty_tokens_of_a_model_like_gpt2_take_at_most_4_megabytes(tmp_path):
    page = write_page(too_large(), Numbers(50257), list(range(61)), tmp_path)
    assert len(page) <= 4e6 and '"weights":' not in page


def test_a_page_does_not_replace_a_checkpoint_or_a_script(clone):
    for name in ("out/bigram.pt", "sample.py"):
        before = (clone / name).read_bytes()
        flags = ("out/bigram.pt", "--explore", "The sea", "--plot", name)
        assert "must end in .html" in one_line_error("sample.py", *flags, cwd=clone)
        assert (clone / name).read_bytes() == before


# ---- The page ------------------------------------------------------------------------------------

MODEL = (ROOT / "data" / "gpt2.js").read_text(encoding="utf-8")


def test_the_page_is_short_and_has_nothing_from_elsewhere():
    lines = TEMPLATE.splitlines()
    assert len(lines) <= 480 and max(map(len, [*lines, *MODEL.splitlines()])) <= 100
    for word in ("http:", "https:", "src=", "href=", "link", "import ", "import(", "url(", "fetch", "Request"):
        assert word not in TEMPLATE + MODEL
    assert "innerHTML" not in TEMPLATE + MODEL, "a token is text, not HTML"
    assert "</script" not in MODEL and TEMPLATE.count("/* data/gpt2.js comes here */") == 1


HARMFUL = [*"\"'`&\\", "</script>", "<script>", "<!--", "-->", "<b>", "&lt;", "\u2028", "$&",
           "${T}", "\U0001f600", b"\xf0", b"\xff\xfe"]


def harmful_page(tmp_path):
    pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in HARMFUL]
    model = tiny(char_gpt, vocab_size=len(pieces), block_size=32)
    ids = list(range(len(pieces)))
    text = b"".join(pieces[1:]).decode(errors="replace")
    tokenizer = SimpleNamespace(tokens=pieces, end_of_text=-1, decode=lambda ids: text)
    sample.explore(model, tokenizer, ids, "</script><b>", None, SampleConfig(plot=tmp_path / "x.html"))
    return *read_page(tmp_path / "x.html"), text


def test_a_harmful_text_stays_within_the_data(tmp_path):
    page, data, _ = harmful_page(tmp_path)
    for tag in ("<script", "</script", "<!--", "<b>"):
        assert page.count(tag) == (TEMPLATE + MODEL).count(tag)
    assert "\u2028" not in page
    expected = ["\"", "'", "`", "&", "\\", *HARMFUL[5:11], r"\u2028", "$&", "${T}", "\U0001f600"]
    assert data["names"] == [*expected, r"\xf0", r"\xff\xfe"]


@needs_chromium
def test_a_harmful_text_is_shown_as_it_is(tmp_path):
    page, data, text = harmful_page(tmp_path)
    script = """return [[...find("text").children].map((button) => button.firstChild.textContent),
        find("model").textContent, find("input").value, document.querySelectorAll("#text b").length,
        document.scripts.length]"""
    names, model, typed, n_bold, n_scripts = browse(page, script, tmp_path)
    assert (names, model, typed) == (data["names"], "</script><b>", text)
    assert n_bold == 0 and n_scripts == TEMPLATE.count("<script") + 2  # those of browse()


# ---- The model in the page -----------------------------------------------------------------------

TYPED = ["", "T", "The sea, the sea!\n\nA harbour", "ships and ships and ships"]


def learned(block_size=32):
    """A GPT with tokens that were learned from the play, and large weights."""
    text = PLAY.read_text(encoding="utf-8")[:20000]
    tokenizer = bpe_gpt.train_bpe(text, 400)
    return tiny(bpe_gpt, len(tokenizer.tokens), block_size), tokenizer


def models():
    """The four kinds: a bigram table, characters, learned tokens, and one with rounded weights."""
    characters = CharTokenizer(PLAY.read_text(encoding="utf-8"))
    n = len(characters.tokens)
    torch.manual_seed(0)
    table = sample.BigramLanguageModel(sample.BigramConfig(vocab_size=n)).eval()
    torch.nn.init.normal_(table.table.weight)
    yield "bigram", table, characters
    yield "characters", tiny(char_gpt, n, block_size=32), characters
    yield "learned tokens", *learned()
    large = char_gpt.GPTConfig(n_layer=2, n_head=6, n_embd=384, vocab_size=n, block_size=32)
    yield "rounded", char_gpt.GPT(large).eval(), characters


KINDS = {name: (model, tokenizer) for name, model, tokenizer in models()}
every_kind = pytest.mark.parametrize("kind", KINDS)


def expected_numbers(model, ids):
    """Log-probabilities, attention weights and lens, as PyTorch computes them."""
    log_probs = sample.next_log_probs(model, torch.tensor([ids]))
    if not hasattr(model, "transformer"):
        return log_probs, None, None
    calls = sample.record(model, ids, model.transformer.h)
    stream = torch.cat([calls[0][1], *(output for _, _, output in calls)])
    lens = model.lm_head(model.transformer.ln_f(stream)).softmax(-1).max(-1).values
    return log_probs, sample.attention_weights(model, ids), lens


@needs_chromium
@every_kind
def test_javascript_computes_what_pytorch_computes(kind, tmp_path):
    model, tokenizer = KINDS[kind]
    first = tokenizer.encode("\n")
    page = write_page(model, tokenizer, first + tokenizer.encode("ships"), tmp_path)
    code = f"""return [state.canRun, data.rounded, {json.dumps(TYPED)}.map((text) => {{
        find("input").value = text;
        type();
        return state.steps.map((step) => [step.id, [...step.logProbs],
            step.heads.map((layer) => layer.map((head) => [...head.weights])), lens(step)]);
    }})]"""
    can_run, rounded, found = browse(page, code, tmp_path)
    assert can_run and rounded == (kind == "rounded")
    tolerance = 2e-2 if rounded else 1e-4
    for text, steps in zip(TYPED, found, strict=True):
        ids = [step[0] for step in steps]
        assert ids == first + tokenizer.encode(text)
        log_probs, attention, lens = expected_numbers(model, ids)
        assert (torch.tensor([step[1] for step in steps]) - log_probs).abs().max() < tolerance
        for t, (_, _, heads, guesses) in enumerate(steps if attention is not None else []):
            weights = torch.tensor(heads)  # (n_layer, n_head, t + 1)
            assert (weights - attention[:, :, t, : t + 1]).abs().max() < tolerance
            shares = torch.tensor([share for _, share in guesses])
            assert (shares - lens[:, t]).abs().max() < tolerance


def odd_texts(n):
    rng = random.Random(0)
    pieces = ["the ", "ships", "  ", "\n", "\r\n", "\t", "'s", "'ll", "'", "12", "\u00bd", "\u0967",
              "caf\u00e9", "e\u0301", "\u65e5\u672c", "\u3000", "\u00a0", "\u0085", "\u001c", "\ufeff",
              "\u200b", "\u2028", "\U0001f600", "\u0130", "\u01c5", "!?", "<|endoftext|>", "_", "-"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(n)]


@needs_chromium
def test_the_page_splits_300_odd_texts_as_tiktoken_does(tmp_path):
    model, tokenizer = KINDS["learned tokens"]
    page = write_page(model, tokenizer, tokenizer.encode("\nThe"), tmp_path)
    texts = ["\ufeffThe", *odd_texts(300)]
    found = browse(page, f"return {json.dumps(texts)}.map((text) => [encode(text), "
                         "decode(encode(text))])", tmp_path)
    for text, (ids, decoded) in zip(texts, found, strict=True):
        assert ids == tokenizer.encode(text), repr(text)
        assert decoded == text, repr(text)


ANEW = """
    const numbers = (steps) => steps.map((step) => [step.id, ...step.logProbs]);
    const same = (a, b) => JSON.stringify(numbers(a)) === JSON.stringify(numbers(b));
    const fresh = () => {
        const ids = [data.ids[0], ...encode(find("input").value)];
        return readAll(ids.slice(contextStart(ids.length)), state.off);
    };
"""


@needs_chromium
@every_kind
def test_typing_and_switching_give_the_numbers_of_a_fresh_start(kind, tmp_path):
    model, tokenizer = KINDS[kind]
    page = write_page(model, tokenizer, tokenizer.encode("\nThe sea"), tmp_path)
    code = ANEW + """
    const seen = [same(state.steps, fresh())];
    const edits = ["The se", "The seas", "A seas", "A seas and a seas", "", "s", "ships ".repeat(40)];
    for (const text of edits) {
        find("input").value = text;
        type();
        seen.push(same(state.steps, fresh()));
    }
    find("input").value = "The sea";
    type();
    const before = numbers(state.steps);
    const changes = [];
    for (const part of n_layer ? ["0.0", "1.1", "0.mlp"] : []) {
        choosePart(part);
        find("switch").click();
        seen.push(same(state.steps, fresh()));
        changes.push(Math.abs(total(state.steps) - total(state.base)) > 1e-9);
        seen.push(find("finding").textContent.includes("With everything on"));
        find("switch").click();
        seen.push(JSON.stringify(numbers(state.steps)) === JSON.stringify(before));
    }
    return [seen, changes, state.steps.length, memory.size]"""
    seen, changes, _, kept = browse(page, code, tmp_path)
    assert all(seen) and all(changes) and kept <= 2


@needs_chromium
def test_a_part_that_is_switched_off_adds_nothing_to_the_residual_stream(tmp_path):
    """PyTorch's numbers, with a hook that sets to zero what the part puts out."""
    model, tokenizer = KINDS["characters"]
    ids = tokenizer.encode("\nThe sea, the sea")
    page = write_page(model, tokenizer, ids, tmp_path)
    parts = ["0.0", "0.1", "1.0", "1.1", "0.mlp", "1.mlp"]
    code = f"""await findWorth();
        return {parts}.map((part) => [[...readAll(data.ids, new Set([part])).at(-1).logProbs],
                                     state.worth[part]])"""
    found = browse(page, code, tmp_path)
    base = model(torch.tensor([ids]), torch.tensor([ids[1:] + [-100]]))[1].item()

    def without_head(head, inputs):
        x = inputs[0].clone()
        x[..., 4 * head : 4 * head + 4] = 0  # heads of four numbers each
        return (x,)

    for part, (log_probs, worth) in zip(parts, found, strict=True):
        layer, head = part.split(".")
        block = model.transformer.h[int(layer)]
        if head == "mlp":
            handle = block.mlp.register_forward_hook(lambda *_: torch.zeros(1))
        else:
            hook = lambda _, inputs, head=int(head): without_head(head, inputs)
            handle = block.attn.c_proj.register_forward_pre_hook(hook)
        logits, loss = model(torch.tensor([ids]), torch.tensor([ids[1:] + [-100]]))
        handle.remove()
        assert log_probs == pytest.approx(logits[0, -1].log_softmax(-1).tolist(), abs=1e-4)
        assert worth == pytest.approx((loss.item() - base) / math.log(2), abs=1e-4)


@needs_chromium
def test_a_part_that_is_off_has_its_worth_too_and_one_button_switches_all_on(tmp_path):
    model, tokenizer = KINDS["characters"]
    page = write_page(model, tokenizer, tokenizer.encode("\nThe sea, the sea"), tmp_path)
    code = """
    const seen = [find("allOn").checkVisibility()];
    const loss = (off) => total(readAll(data.ids, new Set(off))) / (state.steps.length - 1);
    for (const part of ["0.1", "1.mlp"]) {
        choosePart(part);
        find("switch").click();
    }
    find("order").value = "worth";
    await findWorth();
    const sorted = [...find("parts").children].map((button) => state.worth[button.value]);
    find("order").value = "place";
    drawParts();
    const right = sortedParts().map((part) => {
        const others = [...state.off].filter((each) => each !== part);
        return loss([...others, part]) - loss(others);
    });
    const shown = [...find("parts").children].map((button) => button.lastChild.textContent);
    seen.push(find("allOn").checkVisibility());
    const label = find("allOn").textContent;
    const expected = [loss([...state.off]), loss([])].map((bits) => bits.toFixed(2)).join(" \u2192 ");
    find("order").value = "worth";
    find("allOn").click();
    seen.push(find("allOn").checkVisibility(), state.off.size > 0);
    return [seen, right, shown, find("finding").textContent, sorted, label.includes(expected),
            find("order").value]"""
    seen, right, shown, finding, in_order, labelled, order = browse(page, code, tmp_path)
    assert seen == [False, True, False, False] and "everything on" not in finding and labelled
    assert in_order == sorted(in_order, reverse=True)
    assert order == "place", "what a part is worth has to be found anew"
    assert [float(text.replace("\u2212", "-")) for text in shown] == pytest.approx(right, abs=0.0051)
    assert len(shown) == 6 and max(map(abs, right)) > 0.05, "else any numbers would do"


@needs_chromium
def test_habits_are_mean_shares_of_attention(tmp_path):
    model, tokenizer = KINDS["characters"]
    ids = tokenizer.encode("\nthe sea the sea the")
    page = write_page(model, tokenizer, ids, tmp_path)
    found = browse(page, 'return ["0.0", "0.1", "1.0", "1.1"].map(habitOf)', tmp_path)
    T = len(ids)
    for weights, habit in zip(sample.attention_weights(model, ids).flatten(0, 1), found, strict=True):
        shares = {
            "itself": sum(weights[t, t] for t in range(3, T)),
            "the token before": sum(weights[t, t - 1] for t in range(3, T)),
            "two tokens before": sum(weights[t, t - 2] for t in range(3, T)),
            "the first token": sum(weights[t, 0] for t in range(3, T)),
            "what came next": sum(weights[t, s] for t in range(3, T) for s in range(1, t - 2)
                                  if ids[s - 1] == ids[t]),
        }
        place = max(shares, key=shares.get)
        assert habit["place"] == place
        assert habit["share"] == pytest.approx(shares[place].item() / (T - 3), abs=1e-4)
        assert habit["label"] == (place if habit["share"] > 0.5 else "mixed")


@needs_chromium
def test_writing_draws_from_the_distribution_of_the_sliders(tmp_path):
    model, tokenizer = KINDS["characters"]
    page = write_page(model, tokenizer, tokenizer.encode("\nThe"), tmp_path)
    code = """
    const step = state.steps.at(-1);
    const counts = data.names.map(() => 0);
    const chosen = { temperature: 0.9, top_k: 6, top_p: 1, min_p: 0 };
    for (let n = 0; n < 20000; n++) counts[draw(step, chosen, 1337, n)] += 1;
    const texts = [];
    for (const seed of [1, 1, 2]) {
        find("input").value = "The";
        find("seed").value = seed;
        type();
        for (let n = 0; n < 45; n++) find("draw").click(); // more than the context of 32
        texts.push(find("input").value);
    }
    find("presets").children[2].click(); // the likeliest
    find("draw").click();
    const likeliest = ranking(state.steps.at(-2)).ids[0] === state.steps.at(-1).id;
    return [counts, texts, likeliest, state.steps.length, state.chosen]"""
    counts, texts, likeliest, length, chosen = browse(page, code, tmp_path)
    ids = tokenizer.encode("\nThe")
    expected = chances(sample.next_log_probs(model, torch.tensor([ids]))[-1], temperature=0.9, top_k=6)
    assert (torch.tensor(counts) / 20000 - expected).abs().max() < 0.015
    assert texts[0] == texts[1] != texts[2] and all(len(text) == 48 for text in texts)
    assert likeliest and 16 <= length <= 32 and chosen == length - 1


@needs_chromium
def test_whatever_token_is_chosen_one_is_appended_at_the_end(tmp_path):
    model, tokenizer = KINDS["characters"]
    page = write_page(model, tokenizer, tokenizer.encode("\nThe sea"), tmp_path)
    code = """choose(2); find("draw").click();
        return [find("draw").textContent, find("input").value, state.chosen]"""
    label, text, chosen = browse(page, code, tmp_path)
    assert "at the end" in label and text[:-1] == "The sea" and chosen == 8


@needs_chromium
def test_writing_stops_at_the_end_of_text(tmp_path):
    model, tokenizer = learned()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    page = write_page(model, tokenizer, tokenizer.encode("\nThe"), tmp_path)
    code = """
    const before = find("input").value;
    parameters["lm_head.weight"].fill(1, data.end_of_text * 8); // all tokens but the last: 0
    parameters["transformer.ln_f.bias"].fill(100);
    memory.clear();
    update();
    find("write").click();
    await new Promise((resolve) => setTimeout(resolve, 500));
    return [before === find("input").value, find("write").textContent]"""
    assert browse(page, code, tmp_path) == [True, "Write"]


@needs_chromium
def test_a_character_that_the_model_never_saw_is_named_and_left_out(tmp_path):
    model, tokenizer = KINDS["characters"]
    page = write_page(model, tokenizer, tokenizer.encode("\nThe"), tmp_path)
    code = """
    find("input").value = "T\\u65e5h\\u{1f600}e";
    type();
    const seen = [find("note").textContent, state.steps.map((step) => visible(step.id)).join("")];
    find("draw").click();
    seen.push(find("note").textContent);
    find("input").value = "The ".repeat(20);
    type();
    return [...seen, find("note").textContent]"""
    note, text, later, full = browse(page, code, tmp_path)
    assert "Left out" in note and "\u65e5" in note and "\U0001f600" in note and text == r"\nThe"
    assert later == "" and "The context is full" in full


def windowed_attention(q, k, v, is_causal):
    """A token looks back at 12 tokens only."""
    T = q.shape[2]
    visible = torch.ones(T, T, dtype=torch.bool).tril().triu(-11)
    return ATTENTION(q, k, v, attn_mask=visible)


@needs_chromium
@pytest.mark.parametrize("change", ["another activation", "a window longer than the text"])
def test_a_model_that_is_built_differently_is_not_run(tmp_path, monkeypatch, change):
    """The page compares its own scores with PyTorch's, for the text and for a longer one."""
    model, tokenizer = tiny(char_gpt, len(KINDS["characters"][1].tokens), 32), KINDS["characters"][1]
    if change == "another activation":
        for block in model.transformer.h:
            block.mlp.gelu = torch.nn.ReLU()
    else:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", windowed_attention)
    ids = tokenizer.encode("\nThe sea")
    page = write_page(model, tokenizer, ids, tmp_path)
    code = """return [state.canRun, find("note").textContent, find("input").disabled,
        find("write").disabled, state.steps.map((step, t) => [step.id, step.logProbs[data.ids[t + 1]]])]"""
    can_run, note, *disabled, steps = browse(page, code, tmp_path)
    assert not can_run and "cannot run this model" in note and disabled == [True, True]
    log_probs = sample.next_log_probs(model, torch.tensor([ids]))
    for t, (token, log_prob) in enumerate(steps[:-1]):
        assert token == ids[t] and log_prob == pytest.approx(log_probs[t, ids[t + 1]].item(), abs=1e-5)


@needs_chromium
@pytest.mark.parametrize("words", [r"\p{L}++|\W", r" ?\w+|\W"])
def test_words_that_javascript_splits_otherwise_are_not_used(tmp_path, monkeypatch, words):
    """JavaScript does not know ++, and its \\w has no letters with accents."""
    monkeypatch.setattr(bpe_gpt, "WORDS", words)
    tokenizer = bpe_gpt.train_bpe("K\u00f6nig K\u00f6nig", 262)
    model = tiny(bpe_gpt, len(tokenizer.tokens), 32)
    page = write_page(model, tokenizer, tokenizer.encode("\nK\u00f6nig"), tmp_path)
    code = """return [state.canRun, find("note").textContent, state.steps.length]"""
    can_run, note, n = browse(page, code, tmp_path)
    assert not can_run and "cannot run this model" in note and n > 1


def test_a_block_that_a_reader_uses_in_every_layer_has_a_row_for_each(tmp_path):
    model = tiny(char_gpt, vocab_size=5, block_size=32)
    model.transformer.h = torch.nn.ModuleList([model.transformer.h[0]] * 3)
    write_page(model, Numbers(5), [1, 2, 3], tmp_path)
    _, data = read_page(tmp_path / "x.html")
    assert len(data["lens"]["probs"]) == 4 and len(data["attention"]) == 3


@needs_chromium
def test_the_numbers_of_a_large_model_are_pytorchs(tmp_path):
    torch.manual_seed(0)
    model, ids = too_large(), [5, 6, 5, 7]
    page = write_page(model, Numbers(50257), ids, tmp_path)
    code = """choosePart("3.2"); choose(2);
        return [find("note").textContent, find("input").disabled, find("text").children.length,
                [...find("lens").rows].length, look = looks("3.2")[2].weights, lens(state.steps[1]),
                surprise(state.steps, 3), find("left").textContent]"""
    code = code.replace("look = ", "")
    note, disabled, n, n_rows, weights, guesses, bits, left = browse(page, code, tmp_path)
    assert "too large" in note and disabled and (n, n_rows) == (4, 5)
    log_probs, attention, lens = expected_numbers(model, ids)
    assert weights == pytest.approx(attention[3, 2, 2, :3].tolist(), abs=6e-4)
    assert [share for _, share in guesses] == pytest.approx(lens[:, 1].tolist(), abs=1e-4)
    assert bits == pytest.approx(-log_probs[2, 7].item() / math.log(2), abs=1e-4)
    assert left == "50257 of 50257 tokens are left to draw from"


# ---- What the page shows -------------------------------------------------------------------------

GRID = [dict(zip(("temperature", "top_k", "top_p", "min_p"), values)) for values in
        itertools.product((0, 0.3, 1, 2), (0, 1, 6, 40), (0, 0.2, 0.6, 0.93, 1), (0, 0.07, 0.5, 1))]


def expected(log_probs, settings):
    """The probabilities of the tokens that choose() leaves, in descending order."""
    if settings["temperature"] == 0:
        return [1]
    probs = chances(log_probs, **settings)
    return probs[probs > 0].sort(descending=True).values.tolist()


@needs_chromium
@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_the_sliders_do_what_choose_does(explore, tmp_path, script):
    page, data = explore(script, "The sea")
    model = load_model(f"out/{script}.pt")[0]
    log_probs = sample.next_log_probs(model, torch.tensor([data["ids"]]))
    code = f"""return state.steps.map((step) => {GRID}.map(
        (settings) => distribution(ranking(step).logProbs, settings)))"""
    for row, found in zip(log_probs, browse(page, code, tmp_path), strict=True):
        for settings, probs in zip(GRID, found, strict=True):
            assert probs == pytest.approx(expected(row, settings), abs=2e-4), settings


@needs_chromium
@pytest.mark.parametrize("given, values", [
    ({}, [1, 0, 1, 0]),
    (dict(temperature=0.73, top_k=7, top_p=0.9, min_p=0.05), [0.73, 7, 0.9, 0.05]),
    (dict(temperature=3, top_k=250), [3, 250, 1, 0]),  # more than the sliders usually have
    (dict(temperature="inf"), [1e6, 0, 1, 0])], ids=str)  # JSON has no infinity
def test_the_sliders_begin_with_the_settings_that_were_given(command, tmp_path, given, values):
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    command("out/bigram.pt", "--explore", "The sea", *flags, "--plot", tmp_path / "x.html")
    page, _ = read_page(tmp_path / "x.html")
    code = """const shown = [...find("settings").querySelectorAll("output")];
        return [Object.values(settings()), shown.map((output) => +output.textContent)]"""
    assert browse(page, code, tmp_path) == [values, values]


@needs_chromium
def test_of_100_equal_tokens_top_p_keeps_k_for_k_percent(tmp_path):
    page = write_page(tiny(char_gpt), Numbers(5), [1, 2], tmp_path)
    code = """return [...Array(99).keys()].map((i) => distribution(
        Array(100).fill(-Math.log(100)), { temperature: 1, top_k: 0, top_p: (i + 1) / 100, min_p: 0 },
    ).length)"""
    assert browse(page, code, tmp_path) == list(range(1, 100))


@needs_chromium
def test_of_50257_tokens_the_sliders_know_those_at_the_end_nearly(tmp_path):
    """The page does not have all scores, but a straight line comes near to what is between."""
    model = tiny(bpe_gpt, vocab_size=50257, std=0.7)
    page = write_page(model, Numbers(50257), [1, 2, 3], tmp_path)
    settings = [s for s in GRID if s["temperature"] > 0] + [
        dict(temperature=t, top_k=0, top_p=p, min_p=m)
        for t in (1, 2) for p, m in ((0.99, 0), (1, 0.001), (1, 0.0001))]
    code = f"""return {settings}.map((settings) => {{
        const probs = distribution(given()[1].ranking.logProbs, settings);
        return [probs.length, probs.slice(0, 100)];
    }})"""
    row = sample.next_log_probs(model, torch.tensor([[1, 2, 3]]))[1]
    for choice, (n, probs) in zip(settings, browse(page, code, tmp_path), strict=True):
        right = expected(row, choice)
        assert n == len(right) if len(right) <= 100 else n == pytest.approx(len(right), rel=0.01)
        assert probs == pytest.approx(right[:100], rel=1e-3, abs=1e-6), choice


@needs_chromium
def test_keys_clicks_and_sliders_lead_through_the_page(explore, tmp_path):
    page, data = explore("char_gpt", "The sea")
    code = """
    const seen = [];
    const press = (element, key, more) => element.dispatchEvent(
        new KeyboardEvent("keydown", { key, bubbles: true, ...more }));
    const pressed = (id) => [...find(id).querySelectorAll("[aria-pressed=true][tabindex='0']")];
    const note = () => seen.push([state.chosen, pressed("text").length,
        [...find("text").children].indexOf(pressed("text")[0]),
        find("lens").querySelector(".chosen").rowIndex - 1, pressed("parts")[0].value]);
    note();
    press(document.body, "ArrowLeft"); note();
    press(document.body, "ArrowLeft", { altKey: true }); note(); // goes back in a browser
    press(find("input"), "ArrowLeft"); note(); // moves in the text
    find("text").children[0].click(); press(find("text").children[0], "ArrowLeft"); note();
    find("parts").querySelector("button").focus();
    press(document.activeElement, "ArrowDown"); note();
    press(document.activeElement, "ArrowRight"); note();
    press(document.activeElement, "ArrowRight"); note();
    const focus = document.activeElement.value;
    find("lens").rows[3].click(); note();
    find("top_k").value = 3; find("top_k").dispatchEvent(new Event("input", { bubbles: true }));
    const rows = [...find("next").querySelectorAll("tr")].map((row) => row.cells[3].textContent);
    press(find("top_k"), "ArrowLeft"); note(); // moves the slider
    const nameless = [...document.querySelectorAll("button, input, select, textarea")].filter(
        (control) => !control.labels?.[0]?.textContent && !control.textContent && !control.title);
    choosePart("0.mlp");
    const shown = find("matrix").checkVisibility();
    find("parts").querySelector("button").click();
    find("order").value = "worth";
    await findWorth();
    const worths = [...find("parts").children].map((button) => state.worth[button.value]);
    return [seen, focus, find("left").textContent, rows, nameless.length, worths, shown]"""
    seen, focus, left, rows, nameless, worths, shown = browse(page, code, tmp_path)
    assert not shown, "an MLP has no attention"
    assert [row[0] for row in seen] == [row[2] for row in seen] == [7, 6, 6, 6, 0, 0, 0, 0, 2, 2]
    assert [row[3] for row in seen] == [row[0] for row in seen] and {row[1] for row in seen} == {1}
    assert [row[4] for row in seen[4:8]] == ["0.0", "1.0", "1.1", "1.mlp"]
    assert focus == "1.mlp", "the focus moves along"
    assert left == f"3 of {len(data['names'])} tokens are left to draw from"
    assert "cut off" not in rows[:3] and set(rows[3:]) == {"cut off"}
    assert nameless == 0 and worths == sorted(worths, reverse=True) and len(worths) == 6


@needs_chromium
@pytest.mark.parametrize("n_head", [2, 8, 12])
def test_heads_and_mlps_are_in_sight_and_a_layer_begins_a_line(tmp_path, n_head):
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=n_head, n_embd=24, vocab_size=5, block_size=8)
    model = char_gpt.GPT(char_gpt.GPTConfig(**sizes)).eval()
    page = write_page(model, Numbers(5), [1, 2, 3, 4], tmp_path)
    code = """return [1200, 390].map((width) => {
        document.documentElement.style.width = `${width}px`;
        const frame = find("parts").getBoundingClientRect();
        const boxes = [...find("parts").children].map((button) => button.getBoundingClientRect());
        return [frame.width, boxes.map(({ left, right, top }) => [left - frame.left, right - frame.left, top])];
    })"""
    for (width, boxes), most in zip(browse(page, code, tmp_path), (9, 6), strict=True):
        assert len(boxes) == 2 * (n_head + 1)
        assert all(left >= 0 and right <= width for left, right, _ in boxes)
        assert boxes[0][0] == boxes[n_head + 1][0] and boxes[0][2] < boxes[n_head + 1][2]
        lines = {top for _, _, top in boxes}
        assert len(lines) == 2 * math.ceil((n_head + 1) / most)


@needs_chromium
def test_the_page_shows_the_numbers_that_it_has(explore, tmp_path):
    page, data = explore("char_gpt", "The sea")
    code = """
    const texts = (elements) => [...elements].map((element) => element.textContent);
    choosePart("1.1");
    choose(5);
    showCell(5, 3);
    return { text: texts(find("text").children), titles: [...find("text").children].map(
                 (button) => button.title), finding: find("finding").textContent,
             guesses: texts(find("lens").rows[6].querySelectorAll("td")), after: find("after").textContent,
             next: texts(find("next").rows), cell: find("cell").textContent }"""
    found = browse(page, code, tmp_path)
    names = [data["names"][i] for i in data["ids"]]
    def percent(p):
        return f"{100 * p:#.2g}%" if p < 0.01 else f"{100 * p:.1f}%"
    bits = [-log_prob / math.log(2) for log_prob in data["log_probs"]]
    assert found["text"] == [names[0], *(f"{n}{b:.1f}" for n, b in zip(names[1:], bits))]
    assert found["titles"][3] == f"probability {percent(2 ** -bits[2])}"
    mean = sum(bits) / len(bits)
    assert f"{mean:.2f} bits per token, {sum(bits):.1f} in all (perplexity {2**mean:.2f})" in found["finding"]
    worst = max(range(len(bits)), key=bits.__getitem__)
    assert f"surprised at \u201c{names[worst + 1]}\u201d: {bits[worst]:.1f} bits" in found["finding"]
    for layer, guess in enumerate(found["guesses"]):
        token = data["lens"]["tokens"][layer][5]
        mark = " \u2713" if token == data["ids"][6] else ""
        assert guess == f"{data['names'][token]}{mark} {percent(data['lens']['probs'][layer][5])}"
    assert found["after"] == f"What comes after \u201c{''.join(names[1:6])}\u201d?"
    row = [text for text in found["next"] if "\u2713" in text]
    assert len(row) == 1 and row[0].startswith(names[6])
    assert percent(math.exp(data["log_probs"][5])) in row[0]
    model = load_model("out/char_gpt.pt")[0]
    weight = sample.attention_weights(model, data["ids"])[1, 1, 5, 3].item()
    assert f"\u201c{names[5]}\u201d looks at \u201c{names[3]}\u201d" in found["cell"]
    assert f"with {percent(weight)} of its attention" in found["cell"]
    product, score, exp, total = map(float, re.search(
        r"key is (\S+); divided by \S+, this is a score of (\S+); .* is (\S+), of (\S+) for",
        found["cell"]).groups())
    assert score == pytest.approx(product / 4, abs=0.01)  # heads of 16 numbers
    assert exp == pytest.approx(math.exp(score), rel=0.02)
    assert exp / total == pytest.approx(weight, abs=0.01)


@needs_chromium
def test_a_bigram_has_a_page_without_attention(explore, tmp_path):
    page, _ = explore("bigram")
    code = 'return [find("inside").hidden, find("layers").hidden, state.canRun]'
    assert browse(page, code, tmp_path) == [True, True, True]
