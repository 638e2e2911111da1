"""The rules that the words of the documentation keep: short, plain, and without dead ends."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest

from regrad_vllm.cli.reference import command_parsers
from tests.house.markdown import Page, num_words
from tests.house.pages import README, ROOT, pages

MAX_README_LINES = 150
MAX_WORDS = 25
LEARNER = ROOT / "regrad_vllm" / "learners" / "smollm2-135m"
CARDS = (LEARNER / "README.md", LEARNER / "EARLIER.md")
PAGES = (*pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *CARDS)
# A path in the text starts with one of these folders.
_PATH = re.compile(r"(?:regrad_vllm|bank_service|proto|tests|benchmarks|docs)/[\w./-]*")
# A sentence that starts so and is no question uses a clause as a noun.
_CLAUSE = re.compile(r"(?:What|Who|Whoever|Whatever|Whose)\b.*[^?]$")

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= MAX_README_LINES


@each_page
def test_a_sentence_has_at_most_25_words(path: Path) -> None:
    long = [f"{num_words(sentence)}: {sentence}" for sentence in Page.read(path).sentences()]
    assert not [line for line in long if int(line.split(":")[0]) > MAX_WORDS]


@each_page
def test_no_sentence_starts_with_a_clause_as_its_subject(path: Path) -> None:
    assert not [sentence for sentence in Page.read(path).sentences() if _CLAUSE.match(sentence)]


@each_page
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    page, dead = Page.read(path), []
    for target in page.links():
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in Page.read(file).anchors()):
            dead.append(target)
    assert not dead


@each_page
def test_every_file_named_exists(path: Path) -> None:
    named = {found for code in Page.read(path).code() for found in _PATH.findall(code)}
    assert not [name for name in sorted(named) if not (ROOT / name.rstrip(".")).exists()]


@each_page
def test_every_make_target_named_exists(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {match[1] for code in Page.read(path).code() if (match := re.match(r"make ([a-z][\w-]*)", code))}
    assert named <= targets


@each_page
def test_every_command_named_exists_and_knows_its_flags(path: Path) -> None:
    parsers = command_parsers()
    wrong = [code for code in Page.read(path).code() if code.startswith("regrad ") and not _is_known(code, parsers)]
    assert not wrong


def test_the_index_of_docs_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    assert {path.name for path in index.parent.glob("*.md")} - {"README.md"} <= set(Page.read(index).links())


def _is_known(code: str, parsers: dict[str, ArgumentParser]) -> bool:
    words = shlex.split(code.replace("…", ""))[1:]
    if not words or words[0].startswith("-"):
        return all(word in ("--help", "--version", "--debug", "COMMAND") for word in words)
    if words[0] not in parsers:
        return words[0] == "COMMAND"
    known = {flag for action in parsers[words[0]]._actions for flag in action.option_strings} | {"--help"}
    given = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
    if words[0] == "serve":  # which passes vLLM's flags on
        given = {flag for flag in given if flag.startswith("--regrad-")}
    return given <= known
