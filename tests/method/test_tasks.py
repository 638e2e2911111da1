from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from bank_service.values.embedder import MiniLmEmbedder
from bank_service.wire.codec import FloatArray
from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.evaluate.metrics import bootstrap_interval, exact_match, token_f1
from regrad_vllm.learn.retrieval import with_retrieval
from regrad_vllm.learn.synthetic import synthetic_documents
from regrad_vllm.learn.tasks import Sampler, synthetic_set


def sampler(seed: int) -> Sampler:
    return Sampler(
        sets=(synthetic_set("train", 0, 200),), set_weights=(1.0,), seed=seed, tokens_per_step=400, max_tasks=8,
        questions_per_task=3, max_words=150, top_k_weights=(0.4, 0.3, 0.3), icl_share=0.2,
        neighbour_share=0.5,
    )  # fmt: skip


def test_invented_names_belong_to_one_split_whatever_the_seed() -> None:
    names = {
        split: {made.title for seed in range(3) for made in islice(synthetic_documents(split, seed), 300)}
        for split in ("train", "validation", "test")
    }
    assert min(map(len, names.values())) > 250
    assert not names["train"] & names["test"]
    assert not names["train"] & names["validation"]
    assert not names["validation"] & names["test"]


def test_every_answer_stands_in_its_document() -> None:
    for made in islice(synthetic_documents("test", 1), 200):
        assert len(made.questions) >= 3
        assert all(answer in made.text for _, answer in made.questions)
        assert all(made.title in question for question, _ in made.questions)


def test_a_step_is_a_function_of_seed_and_number_alone() -> None:
    one, two, other = sampler(1), sampler(1), sampler(2)
    assert [one.plan(step) for step in (5, 0, 5)] == [two.plan(step) for step in (5, 0, 5)]
    assert one.plan(3) != other.plan(3)


def test_plans_mix_each_tasks_own_document_with_others_up_to_k() -> None:
    sizes = set()
    for step in range(40):
        plan = sampler(0).plan(step)
        mix = np.array(plan.mix)
        assert np.all(np.diag(mix) == 1.0)
        assert all(1 <= len(questions) <= 3 for questions in plan.questions)
        sizes |= set(mix.sum(axis=1))
    assert sizes == {1.0, 2.0, 3.0}


def test_a_question_meets_its_own_hits_with_their_scores(tmp_path: Path) -> None:
    embedder = MiniLmEmbedder.installed()
    found = with_retrieval(synthetic_set("train", 0, 40), embedder, tmp_path)
    again = with_retrieval(synthetic_set("train", 0, 40), NoEmbedder(embedder.name), tmp_path)
    assert found.retrieval is not None and again.retrieval is not None, "from the cache"
    assert np.array_equal(found.retrieval.hits, again.retrieval.hits)
    own = found.retrieval.hits[:, 0] == np.arange(40)
    assert own.mean() > 0.9, "a question finds its document"
    drawn = replace(sampler(0), sets=(found,), neighbour_share=1.0, top_k_weights=(0.0, 1.0))
    num_hits = num_mixed = 0
    for step in range(20):
        plan = drawn.plan(step)
        indices = [found.tasks.index(task) for task in plan.tasks]
        for row, index in enumerate(indices):
            assert plan.questions[row][0] == found.tasks[index].questions[0]
            vector = embedder.embed(found.tasks[index].questions[0][0])
            cosines = [float(vector @ found.retrieval.documents[other]) for other in indices]
            assert plan.scores[row] == pytest.approx(cosines, abs=1e-5)
            (other,) = [at for at, weight in enumerate(plan.mix[row]) if weight and at != row]
            assert cosines[other] == max(score for at, score in enumerate(cosines) if at != row)
            num_mixed += 1
            num_hits += indices[other] in found.retrieval.hits[index]
    assert num_hits > 0.6 * num_mixed, "neighbours come together"


class NoEmbedder:
    """Has a name and embeds nothing."""

    dimension = 384

    def __init__(self, name: str) -> None:
        self.name = name

    def embed(self, text: str) -> FloatArray:
        raise AssertionError("embedded again")


def test_fresh_facts_are_the_same_for_the_same_seed_and_ask_about_their_document() -> None:
    data = fresh_facts(20, 3)
    assert data == fresh_facts(20, 3) != fresh_facts(20, 4)
    texts = {document.id: document.text for document in data.documents}
    assert all(question.answers[0] in texts[question.documents[0]] for question in data.questions)


def test_metrics_follow_squads_rules() -> None:
    assert exact_match("The  Eiffel tower!", ["eiffel Tower"]) == 1.0
    assert exact_match("", ["", "x"]) == 0.0
    assert token_f1("in the year 1999", ["1999"]) == pytest.approx(0.5)
    assert token_f1("nothing", ["1999"]) == 0.0
    assert token_f1("a b b", ["b b c"]) == pytest.approx(2 * (1 * 2 / 3) / (1 + 2 / 3))


def test_the_bootstrap_interval_holds_the_mean_and_narrows_with_more_questions() -> None:
    few, many = bootstrap_interval([0.0, 1.0] * 10), bootstrap_interval([0.0, 1.0] * 500)
    assert few.low < few.mean == 0.5 < few.high
    assert many.high - many.low < few.high - few.low
    with pytest.raises(ValueError, match="empty"):
        bootstrap_interval([])
