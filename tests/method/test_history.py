from __future__ import annotations

from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.evaluate.history import history


def test_a_history_changes_facts_and_takes_documents_away_and_says_what_was_true_before() -> None:
    data = fresh_facts(200, 1)
    rounds = list(history(data, 4, seed=1))
    assert rounds == list(history(data, 4, seed=1))
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
        assert len(entry.changed) > 20
        assert {q.documents[0] for q in entry.deleted}.isdisjoint(texts)
        assert len(entry.deleted) == len(before.deleted) + round(0.05 * len(before.data.documents))
        today = {question.documents[0]: question.answers for question in entry.data.questions}
        assert all(question.answers != today[question.documents[0]] for question in entry.stale)
