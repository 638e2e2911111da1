"""Documents of invented facts, from a seed. A model can't know them, so right answers prove that it learnt a document.

There are three splits with different subjects. The hash of a subject's name decides its split, whatever the seed. So no
training document is about a subject of the test split. The splits share their sentence templates, the syllables of
names and the pools of values (a city, a job). A word of a test name may also occur in another name.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]

# Beside this file: the syllables of invented names and the pools of values, by name.
_WORDS: Mapping[str, list[str]] = json.loads(Path(__file__).with_name("synthetic_words.json").read_text("utf-8"))

Values = Callable[[random.Random], str]


@dataclass(frozen=True, slots=True)
class Fact:
    """One attribute of a kind of subject, with templates that tell it and ask for it. {n}: the name, {v}: the value."""

    values: Values
    told: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SyntheticDocument:
    """A document with its title, its text, and (question, answer) for each of its facts."""

    title: str
    text: str
    questions: tuple[tuple[str, str], ...]
    kind: str


def _pick(pool: str) -> Values:
    return lambda rng: rng.choice(_WORDS[pool])


def _between(low: int, high: int) -> Values:
    return lambda rng: str(rng.randint(low, high))


def _word(rng: random.Random) -> str:
    middle = rng.choice(_WORDS["middles"]) if rng.random() < 0.6 else ""
    return rng.choice(_WORDS["heads"]) + middle + rng.choice(_WORDS["tails"])


def _two_words(rng: random.Random) -> str:
    return f"{_word(rng)} {_word(rng)}"


_KINDS: dict[str, tuple[Values, tuple[Fact, ...]]] = {
    "person": (
        _two_words,
        (
            Fact(
                _pick("cities"),
                ("{n} was born in {v}.", "The birthplace of {n} is {v}.", "{v} is where {n} was born."),
                ("Where was {n} born?", "In which city was {n} born?", "What is the birthplace of {n}?"),
            ),
            Fact(
                _pick("jobs"),
                ("{n} works as a {v}.", "By profession, {n} is a {v}.", "{n} earns a living as a {v}."),
                ("What is {n}'s job?", "What does {n} do for a living?", "What is the profession of {n}?"),
            ),
            Fact(
                _pick("pets"),
                ("{n} keeps a {v} as a pet.", "At home {n} has a pet {v}.", "{n}'s pet is a {v}."),
                ("What pet does {n} have?", "Which animal does {n} keep as a pet?", "What kind of pet does {n} own?"),
            ),
            Fact(
                _pick("instruments"),
                ("{n} plays the {v}.", "In the evenings {n} practises the {v}."),
                ("Which instrument does {n} play?", "What musical instrument does {n} play?"),
            ),
            Fact(
                _pick("foods"),
                ("{n}'s favourite dish is {v}.", "Nothing pleases {n} more than a plate of {v}."),
                ("What is {n}'s favourite food?", "Which dish does {n} like best?"),
            ),
            Fact(
                _between(1930, 2005),
                ("{n} was born in the year {v}.", "{n}'s year of birth is {v}."),
                ("In what year was {n} born?", "When was {n} born?"),
            ),
            Fact(
                _two_words,
                ("{n} is married to {v}.", "{n}'s spouse is {v}."),
                ("Who is {n} married to?", "What is the name of {n}'s spouse?"),
            ),
        ),
    ),
    "company": (
        lambda rng: _word(rng) + rng.choice([" Industries", " Works", " Group", " Labs", " & Sons"]),
        (
            Fact(
                _pick("products"),
                ("{n} makes {v}.", "{n} is a manufacturer of {v}.", "The main product of {n} is {v}."),
                ("What does {n} make?", "What is the main product of {n}?", "Which goods does {n} produce?"),
            ),
            Fact(
                _pick("cities"),
                ("{n} is based in {v}.", "The headquarters of {n} are in {v}."),
                ("Where is {n} based?", "In which city are the headquarters of {n}?"),
            ),
            Fact(
                _between(1850, 2022),
                ("{n} was founded in {v}.", "The company {n} has existed since {v}."),
                ("When was {n} founded?", "In which year was {n} founded?"),
            ),
            Fact(
                _two_words,
                ("{n} was founded by {v}.", "The founder of {n} is {v}."),
                ("Who founded {n}?", "Who is the founder of {n}?"),
            ),
            Fact(
                _pick("colours"),
                ("The logo of {n} is {v}.", "{n} uses {v} as its brand colour."),
                ("What colour is the logo of {n}?", "What is the brand colour of {n}?"),
            ),
            Fact(
                _between(12, 9800),
                ("{n} employs {v} people.", "{n} has {v} employees."),
                ("How many people does {n} employ?", "How many employees does {n} have?"),
            ),
        ),
    ),
    "village": (
        _word,
        (
            Fact(
                _pick("countries"),
                ("{n} is a village in {v}.", "The village of {n} lies in {v}."),
                ("In which country is {n}?", "Where is the village of {n}?"),
            ),
            Fact(
                _pick("animals"),
                ("The coat of arms of {n} shows a {v}.", "A {v} stands on the coat of arms of {n}."),
                ("Which animal is on the coat of arms of {n}?", "What does the coat of arms of {n} show?"),
            ),
            Fact(
                _pick("months"),
                ("{n} holds its yearly fair in {v}.", "Every {v} the village of {n} celebrates its fair."),
                ("In which month does {n} hold its fair?", "When is the yearly fair of {n}?"),
            ),
            Fact(
                _between(80, 4900),
                ("{n} has {v} inhabitants.", "{v} people live in {n}."),
                ("How many inhabitants does {n} have?", "How many people live in {n}?"),
            ),
            Fact(
                _pick("materials"),
                ("The bridge of {n} is built of {v}.", "{n} is known for its bridge made of {v}."),
                ("What is the bridge of {n} built of?", "Which material is the bridge of {n} made of?"),
            ),
            Fact(
                _two_words,
                ("The mayor of {n} is {v}.", "{n} is governed by its mayor, {v}."),
                ("Who is the mayor of {n}?", "What is the name of the mayor of {n}?"),
            ),
        ),
    ),
    "ship": (
        lambda rng: "the " + _word(rng),
        (
            Fact(
                _pick("cities"),
                ("The home port of {n} is {v}.", "{n} sails from {v}."),
                ("What is the home port of {n}?", "From which port does {n} sail?"),
            ),
            Fact(
                _two_words,
                ("The captain of {n} is {v}.", "{v} commands {n}."),
                ("Who is the captain of {n}?", "Who commands {n}?"),
            ),
            Fact(
                _pick("products"),
                ("{n} carries a cargo of {v}.", "In the hold of {n} there are {v}."),
                ("What cargo does {n} carry?", "What is in the hold of {n}?"),
            ),
            Fact(
                _pick("colours"),
                ("The hull of {n} is painted {v}.", "{n} has a {v} hull."),
                ("What colour is the hull of {n}?", "In which colour is the hull of {n} painted?"),
            ),
            Fact(
                _between(1900, 2024),
                ("{n} was launched in {v}.", "The launch of {n} took place in {v}."),
                ("When was {n} launched?", "In which year was {n} launched?"),
            ),
        ),
    ),
}


def split_of(name: str) -> Split:
    """The one split that an invented name belongs to: 80% train, 10% validation, 10% test."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def another_value(name: str, question: str, told: str, rng: random.Random) -> str:
    """Another possible answer to ``question`` about ``name``, which isn't in the text ``told``.

    ValueError if no document of invented facts about ``name`` has the question.
    """
    for _, facts in _KINDS.values():
        for fact in facts:
            if any(asked.replace("{n}", name) == question for asked in fact.asked):
                while (value := _plain(fact.values(rng))) in told:
                    pass
                return value
    raise ValueError(f"question must be one about an invented fact, got {question!r}")


def _plain(value: str) -> str:
    return value.replace("-", " ")


def synthetic_documents(split: Split, seed: int, num_facts: tuple[int, int] = (3, 5)) -> Iterator[SyntheticDocument]:
    """An endless stream of documents with distinct names. Equal arguments give equal streams."""
    rng = random.Random(f"regrad.synthetic.{split}.{seed}")
    seen: set[str] = set()
    while True:
        kind = rng.choice(list(_KINDS))
        make_name, facts = _KINDS[kind]
        name = make_name(rng)
        if name in seen or split_of(name) != split:
            continue
        seen.add(name)
        sentences: list[str] = []
        questions: list[tuple[str, str]] = []
        for fact in rng.sample(facts, rng.randint(*num_facts)):
            value = fact.values(rng)
            sentence = rng.choice(fact.told).replace("{n}", name).replace("{v}", value)
            sentences.append(sentence[0].upper() + sentence[1:])
            questions.append((rng.choice(fact.asked).replace("{n}", name), _plain(value)))
        yield SyntheticDocument(
            name, " ".join(sentences).replace("fountain-pens", "fountain pens"), tuple(questions), kind
        )
