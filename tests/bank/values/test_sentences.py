from __future__ import annotations

import random

import pytest

from bank_service.values.sentences import (
    MAX_SENTENCE_CHARS,
    MAX_SENTENCES,
    choose_cue,
    sentence_places,
    split_lines,
    split_sentences,
)

TEXTS = [
    "One. Two!  “Three?” he said.\n\n four \n",
    " a.b c.\tD",
    "大桥很长。它很老！",
    "no end",
    "x．１ y．z",
    "🦉 flies. 🦉 sleeps.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_places_are_those_of_the_sentences_of_each_line(text: str) -> None:
    expected = [sentence for line in text.splitlines() for sentence in split_sentences(line.strip())]
    assert expected and [text[start:end] for start, end in sentence_places(text)] == split_lines(text) == expected


@pytest.mark.parametrize("text", ["", " ", "\n \t\n"])
def test_a_blank_text_has_no_sentence(text: str) -> None:
    assert sentence_places(text) == []


def test_a_text_without_an_end_is_cut_between_words_and_else_anywhere() -> None:
    words = "word " * 600
    parts = [words[start:end] for start, end in sentence_places(words)]
    assert len(parts) == 3 and " ".join(parts) == words.strip()
    letters = "x" * (2 * MAX_SENTENCE_CHARS + 1)
    assert [end - start for start, end in sentence_places(letters)] == [MAX_SENTENCE_CHARS, MAX_SENTENCE_CHARS, 1]


def test_a_long_text_has_its_first_sentences() -> None:
    text = "So it is. " * (2 * MAX_SENTENCES)
    places = sentence_places(text)
    assert len(places) == MAX_SENTENCES and places[-1] == (10 * (MAX_SENTENCES - 1), 10 * MAX_SENTENCES - 1)


def test_the_nearest_sentences_of_all_documents_together_are_chosen() -> None:
    sentences = [["a", "b"], ["c", "d", "e"], []]
    cosines = [[0.1, 0.2], [0.5, 0.9, 0.8], []]
    assert choose_cue(sentences, cosines, 1) == [(1, 1)]
    assert choose_cue(sentences, cosines, 2) == [(1, 1), (1, 2)]
    assert choose_cue(sentences, cosines, 4) == [(1, 1), (1, 2), (1, 0), (0, 1)]
    assert choose_cue(sentences, cosines, 9) == [(1, 1), (1, 2), (1, 0), (0, 1), (0, 0)]
    assert choose_cue(sentences, cosines, 0) == choose_cue([], [], 4) == []


def test_a_sentence_of_several_documents_is_given_once() -> None:
    assert choose_cue([["same", "x"], ["same", "y"]], [[0.9, 0.1], [0.9, 0.2]], 2) == [(0, 0), (1, 1)]
    assert choose_cue([["same"], ["same"]], [[0.9], [0.9]], 4) == [(0, 0)]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_one_that_the_rule_spells_out(seed: int) -> None:
    draw = random.Random(seed)
    shape = [draw.randrange(4) for _ in range(draw.randrange(1, 5))]
    sentences = [[f"{document}.{place}" for place in range(size)] for document, size in enumerate(shape)]
    cosines = [[draw.choice((0.1, 0.2, 0.3)) for _ in range(size)] for size in shape]
    left = [(document, place) for document, size in enumerate(shape) for place in range(size)]
    number, chosen = draw.randrange(1, 6), []
    while left and len(chosen) < number:
        chosen.append(max(left, key=lambda at: (cosines[at[0]][at[1]], -at[0], -at[1])))
        left.remove(chosen[-1])
    assert choose_cue(sentences, cosines, number) == chosen
