"""README.md: what it names is there, and what it says of the scripts is so."""

import re
import shlex

import pytest
import tiktoken
from conftest import ROOT, needs_gpt2_tokenizer, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "" for line in block.splitlines()]
COMMANDS = [line for line in LINES if re.match(r"python \w+\.py", line)]


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("script", ["bigram.py", "char_gpt.py", "bpe_gpt.py", "sample.py"])
def test_every_command_has_flags_that_its_script_knows(script):
    known = run(ROOT / script, "--help", cwd=ROOT)[0]
    mine = [shlex.split(line, comments=True) for line in COMMANDS if f" {script}" in line]
    assert mine
    for command in mine:
        for flag in [word for word in command if word.startswith("--")]:
            assert re.search(rf"^    {flag[2:].replace('no-', '')}: ", known, re.M), flag


def test_set_up_takes_one_command_for_a_run_and_one_for_the_tests():
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    commands = [line.removeprefix(start) for line in LINES if line.startswith(start)]
    assert commands == ["python char_gpt.py", "python -m pytest"]
    assert (ROOT / "requirements.txt").exists()


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, re.M)
    places = ["#" + heading.lower().replace(" ", "-") for heading in headings]
    for link in re.findall(r"\]\(([^):]+)\)", README):
        assert link in places or (ROOT / link.split("#")[0]).exists(), link


@needs_gpt2_tokenizer
def test_gpt2s_vocabulary_is_found_under_the_names_that_the_readme_gives(tmp_path, monkeypatch):
    """The names are tiktoken's: hashes of the addresses. What it has cached is renamed and back."""
    row = re.search(r"`vocab.bpe` and `encoder.json` into .*?`(\w{40})` and `(\w{40})`", README)
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    names = ("vocab.bpe", "encoder.json")
    files = [tiktoken.load.read_file_cached(url + name) for name in names]
    for name, content in zip(row.groups(), files):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", None)  # no network
    assert [tiktoken.load.read_file_cached(url + name) for name in names] == files
