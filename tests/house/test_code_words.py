"""The rule that docstrings and comments keep: short sentences, none with a clause as its subject."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.markdown import Page, num_words
from tests.house.pages import ROOT
from tests.house.test_words import MAX_WORDS

FOLDERS = ("bank_service", "regrad_vllm", "benchmarks")  # extend it with every folder that keeps the rule
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "generated" not in path.parts)
# A sentence that starts so and is no question uses a clause as a noun.
_CLAUSE = re.compile(r"(?:What|Who|Whoever|Whatever|Whose)\b.*[^?]$")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


@each_file
def test_a_sentence_of_the_code_has_at_most_25_words(path: Path) -> None:
    assert not [sentence for sentence in _sentences(path) if num_words(sentence) > MAX_WORDS]


@each_file
def test_no_sentence_of_the_code_starts_with_a_clause_as_its_subject(path: Path) -> None:
    assert not [sentence for sentence in _sentences(path) if _CLAUSE.match(sentence)]


def _sentences(path: Path) -> Iterator[str]:
    source = path.read_text("utf-8")
    for text in (*_docstrings(source), *_comments(source)):
        yield from Page(path, text).sentences()


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def _comments(source: str) -> Iterator[str]:
    """Lines of comments that follow each other are one text. A comment behind code is a text alone."""
    end, text = 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, words = token.start[0], token.string.lstrip("# ")
        alone = token.line.lstrip().startswith("#")
        if alone and line == end + 1:
            text += f" {words}"
        else:
            yield text
            text = words
        end = line if alone else 0
    yield text
