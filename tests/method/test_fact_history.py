from __future__ import annotations

import random

import pytest

from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.evaluate.fact_history import history
from regrad_vllm.evaluate.growth import NUM_ROUNDS
from regrad_vllm.evaluate.growth_command import NUM_HISTORY
from regrad_vllm.learn.synthetic import another_value


def test_a_history_changes_facts_and_takes_documents_away_and_says_what_was_true_before() -> None:
    data = fresh_facts(NUM_HISTORY, 1)
    rounds = list(history(data, NUM_ROUNDS, seed=1))
    assert rounds == list(history(data, NUM_ROUNDS, seed=1))
    assert rounds[0].data == data and not rounds[0].stale
    counts = [entry.num_changes for entry in rounds]
    assert counts == sorted(set(counts)) and counts[-1] > 150
    for before, entry in zip(rounds, rounds[1:], strict=False):
        texts = {document.id: document.text for document in entry.data.documents}
        old = {question.documents[0]: question for question in before.data.questions}
        assert set(texts) == {question.documents[0] for question in entry.data.questions}
        assert all(question.answers[0] in texts[question.documents[0]] for question in entry.data.questions)
        for document in entry.changed:
            assert old[document.id].answers[0] not in document.text
        assert len(entry.changed) == round(0.3 * len(texts)), "the last round changes as much as the first"
        assert {q.documents[0] for q in entry.deleted}.isdisjoint(texts)
        assert len(entry.deleted) == len(before.deleted) + round(0.05 * len(before.data.documents))
        today = {question.documents[0]: question.answers for question in entry.data.questions}
        assert all(question.answers != today[question.documents[0]] for question in entry.stale)


def test_values_come_from_the_facts_own_pool() -> None:
    value = another_value("Orla Venn", "What colour is the logo of Orla Venn?", "red", random.Random(0))
    assert value != "red" and not value.isdigit()
    assert another_value("Orla Venn", "When was Orla Venn founded?", "", random.Random(0)).isdigit()
    with pytest.raises(ValueError, match="invented fact"):
        another_value("Orla Venn", "Who won the cup?", "", random.Random(0))
