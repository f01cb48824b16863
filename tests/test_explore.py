"""sample.py --explore: the page for the browser has the model's numbers, and computes with them as
sample.py does."""

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, one_line_error
from test_sample import chances, tiny

import bpe_gpt
import sample
from sample import load_model

SCRIPTS = ["bigram", "char_gpt", "bpe_gpt"]
TEMPLATE = (ROOT / "data" / "explore.html").read_text(encoding="utf-8")
TEXT = "A harbour:\nships, and more"
BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)
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
    tokens = [str(i).encode() for i in range(50257)]


def browse(page, script, folder):
    """Opens a page in a browser, which has to run without an error, and runs a script in it, the
    value of which is returned. The page must not have asked for any other file."""
    path = folder / "browsed.html"
    spy = "<script>const errors = []; onerror = (text) => { errors.push(text); }</script>"
    page = page.replace("<script>", spy + "<script>", 1)
    # A function, since a script cannot use names that the page has used at its top level.
    page += f"<script>const value = (() => {{ {script} }})();</script>"
    page += """<script>
        const asked = performance.getEntriesByType("resource").map((entry) => entry.name);
        document.body.textContent = JSON.stringify({ value, errors, asked });
        document.body.id = "result"; </script>"""
    path.write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'user'}"]
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", path.as_uri()],
                          capture_output=True, encoding="utf-8", timeout=120)
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
    assert data["model"] == f"out/{script}.pt"


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
    assert f"--explore takes {longest} tokens at most" in error and f"{longest + 1}" in error


def test_the_file_is_named_explore_html_unless_plot_says_otherwise(command, clone):
    assert "saved explore.html" in command("out/bigram.pt", "--explore", "The sea")
    read_page(clone / "explore.html")
    (clone / "explore.html").unlink()


def test_sixty_tokens_of_a_model_like_gpt2_take_at_most_4_megabytes(tmp_path):
    config = bpe_gpt.GPTConfig(n_layer=12, n_head=12, n_embd=24, vocab_size=50257, block_size=64)
    model = bpe_gpt.GPT(config).eval()
    sample.explore(model, Numbers(), list(range(61)), "gpt2", tmp_path / "x.html")
    assert (tmp_path / "x.html").stat().st_size <= 4e6


# ---- The page ------------------------------------------------------------------------------------

def test_the_page_is_short_and_has_nothing_from_elsewhere():
    lines = TEMPLATE.splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 100
    for word in ("http:", "https:", "src=", "href=", "link", "import", "url(", "fetch", "Request"):
        assert word not in TEMPLATE
    assert "innerHTML" not in TEMPLATE, "a token is text, not HTML"


HARMFUL = [*"\"'`&\\", "</script>", "<script>", "<!--", "-->", "<b>", "&lt;", "\u2028", "$&",
           "${T}", "\U0001f600", b"\xf0", b"\xff\xfe"]


def harmful_page(tmp_path):
    pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in HARMFUL]
    model = tiny(bpe_gpt, vocab_size=len(pieces), block_size=32)
    ids = list(range(len(pieces)))
    sample.explore(model, SimpleNamespace(tokens=pieces), ids, "</script><b>", tmp_path / "x.html")
    return read_page(tmp_path / "x.html")


def test_a_harmful_text_stays_within_the_data(tmp_path):
    page, data = harmful_page(tmp_path)
    for tag in ("<script", "</script", "<!--", "<b>"):
        assert page.count(tag) == TEMPLATE.count(tag)
    assert page.isascii() == TEMPLATE.isascii() and "\u2028" not in page
    expected = ["\"", "'", "`", "&", "\\", *HARMFUL[5:11], r"\u2028", "$&", "${T}", "\U0001f600"]
    assert data["names"] == [*expected, r"\xf0", r"\xff\xfe"]


@needs_chromium
def test_a_harmful_text_is_shown_as_it_is(tmp_path):
    page, data = harmful_page(tmp_path)
    script = """return [[...find("text").children].map((button) => button.firstChild.textContent),
                        find("model").textContent, document.querySelectorAll("b").length]"""
    assert browse(page, script, tmp_path) == [data["names"], "</script><b>", 0]


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
    code = f"""return names.map((_, t) => {GRID}.map(
        (settings) => distribution(allScores(t), settings)))"""
    for row, found in zip(log_probs, browse(page, code, tmp_path), strict=True):
        for settings, probs in zip(GRID, found, strict=True):
            assert probs == pytest.approx(expected(row, settings), abs=2e-4), settings


@needs_chromium
def test_of_50257_tokens_the_sliders_know_those_at_the_end_nearly(tmp_path):
    """The page does not have all scores, but a straight line comes near to what is between."""
    model = tiny(bpe_gpt, vocab_size=50257, std=0.7)
    sample.explore(model, Numbers(), [1, 2, 3], "x", tmp_path / "x.html")
    page, _ = read_page(tmp_path / "x.html")
    settings = [s for s in GRID if s["temperature"] > 0] + [
        dict(temperature=t, top_k=0, top_p=p, min_p=m)
        for t in (1, 2) for p, m in ((0.99, 0), (1, 0.001), (1, 0.0001))]
    code = f"""return {settings}.map((settings) => {{
        const probs = distribution(allScores(1), settings);
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
    const look = () => seen.push([
        find("surprise").textContent, find("head-name").textContent,
        document.querySelectorAll("#text [aria-pressed=true][tabindex='0']").length,
        find("head").querySelector(".chosen").rowIndex - 1,
        find("layers").querySelector(".chosen").rowIndex - 1, document.activeElement.title]);
    look();
    press(document.body, "ArrowLeft"); look();
    press(document.body, "ArrowLeft", { altKey: true }); look(); // goes back in a browser
    find("text").children[0].click(); press(find("text").children[0], "ArrowLeft"); look();
    find("heads").querySelector("button").focus();
    press(document.activeElement, "ArrowDown"); look();
    press(document.activeElement, "ArrowRight"); look();
    press(document.activeElement, "ArrowRight"); look();
    find("layers").rows[3].click(); look();
    find("top_k").value = 3; find("top_k").dispatchEvent(new Event("input", { bubbles: true }));
    const rows = [...find("next").rows].map((row) => row.cells[3].textContent);
    press(find("top_k"), "ArrowLeft"); look(); // moves the slider
    const nameless = [...document.querySelectorAll("button, input")].filter((control) =>
        control.id ? !control.labels[0].textContent.startsWith(control.id)
                   : !control.textContent && !control.title);
    return [seen, find("left").textContent, rows, nameless.length, find("attention").hidden];
    """
    seen, left, rows, nameless, hidden = browse(page, code, tmp_path)
    places = [row[3] for row in seen]
    assert places == [row[4] for row in seen] == [6, 5, 5, 0, 0, 0, 0, 2, 2]
    assert all(row[2] == 1 for row in seen)
    names = [data["names"][i] for i in data["ids"]]
    assert [row[0].split(" ")[0] for row in seen] == [names[place] for place in places]
    assert [row[1] for row in seen[3:7]] == [
        "Layer 0, head 0", "Layer 1, head 0", "Layer 1, head 1", "Layer 1, average of its heads"]
    assert all(row[5] == row[1] for row in seen[4:7]), "the focus moves along"
    assert left == f"3 of {len(data['names'])} tokens are left"
    assert "cut off" not in rows[:3] and set(rows[3:]) == {"cut off"}
    assert nameless == 0 and not hidden


@needs_chromium
def test_the_page_shows_the_numbers_that_it_was_given(explore, tmp_path):
    page, data = explore("char_gpt", "The sea")
    code = """
    const titles = (elements) => [...elements].map((element) => element.title);
    chooseToken(5);
    chooseHead(2); // the average of the first layer
    const texts = (elements) => [...elements].map((element) => element.textContent);
    return { text: titles(find("text").children), weights: titles(find("weights").children),
             head: titles(find("head").rows[6].querySelectorAll("td")),
             guesses: texts(find("layers").rows[6].querySelectorAll("td")),
             next: texts(find("next").rows) };
    """
    found = browse(page, code, tmp_path)
    names = [data["names"][i] for i in data["ids"]]
    def percent(p):
        return f"{100 * p:#.2g}%" if p < 0.01 else f"{100 * p:.1f}%"
    for t, title in enumerate(found["text"][1:]):
        p = torch.tensor(data["log_probs"][t]).exp().item()
        rank = f"{data['ranks'][t]} of {len(data['names'])}"
        assert title == f"{names[t + 1]} had probability {percent(p)} and rank {rank}"
    average = torch.tensor(data["attention"][0], dtype=torch.double).mean(0)[5] / 1000
    for weights in (found["weights"], found["head"]):
        shown = [float(title.split(": ")[-1][:-1]) / 100 for title in weights]
        assert shown == pytest.approx(average.tolist(), abs=5.1e-4)
    for layer, guess in enumerate(found["guesses"]):
        token = data["lens"]["tokens"][layer][5]
        mark = " ✓" if token == data["ids"][6] else ""
        p = percent(data["lens"]["probs"][layer][5])
        assert guess == f"{data['names'][token]}{mark} {p}"
    row = [text for text in found["next"] if "✓" in text]
    assert len(row) == 1 and row[0].startswith(names[6])
    assert percent(torch.tensor(data["log_probs"][5]).exp().item()) in row[0]


@needs_chromium
def test_a_bigram_has_a_page_without_attention(explore, tmp_path):
    page, _ = explore("bigram")
    assert browse(page, 'return find("attention").hidden', tmp_path)
