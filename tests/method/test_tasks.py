from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from bank_service.values.embedder import default_embedder
from bank_service.wire.record import FloatArray
from regrad_vllm.data.questions import DataSplit, Question, SourceDocument
from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.evaluate.scoring import exact_match, token_f1
from regrad_vllm.learn.cues import Cues
from regrad_vllm.learn.synthetic import synthetic_documents
from regrad_vllm.learn.tasks import Sampler, TaskSet, question_sets, synthetic_set
from regrad_vllm.learn.training_hits import with_retrieval
from regrad_vllm.reporting.intervals import bootstrap_interval


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
    embedder = default_embedder()
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


def two_hop_set() -> TaskSet:
    documents = {f"{pair}{side}": SourceDocument(f"{pair}{side}", "", f"House {pair} side {side}. It is old.", "hops")
                 for pair in range(8) for side in "ab"}  # fmt: skip
    questions = [
        Question(f"{pair}-{number}", f"Which side {number} of {pair}?", ("side b",), (f"{pair}a", f"{pair}b"), "hops")
        for pair in range(8) for number in range(2)
    ]  # fmt: skip
    questions.append(Question("one", "Which side alone?", ("side a",), ("0a",), "hops"))
    (found,) = question_sets(DataSplit(documents, tuple(questions)), ["hops"])
    return found


def test_all_documents_that_a_question_needs_are_in_its_adapter() -> None:
    found = two_hop_set()
    assert len(found.tasks) == 17, "a task for each document of each pair, and one for the question that needs one"
    drawn = replace(sampler(0), sets=(found,), max_tasks=7, top_k_weights=(0.7, 0.3))
    sizes = set()
    for step in range(30):
        plan = drawn.plan(step)
        assert len(plan.tasks) <= 7
        for task, pairs, weights, answering in zip(plan.tasks, plan.questions, plan.mix, plan.answering, strict=True):
            mixed = {plan.tasks[at].passage for at, weight in enumerate(weights) if weight}
            assert set(answering) <= mixed and answering[0] == task.passage
            assert len(answering) == (1 if pairs[0][0] == "Which side alone?" else 2)
            sizes.add(len(mixed) - len(answering))
    assert sizes == {0, 1}, "k − 1 others besides"


def test_the_prompt_shows_nothing_a_sentence_or_the_adapters_documents_by_their_shares() -> None:
    cues = Cues(default_embedder())
    drawn = replace(
        sampler(0),
        sets=(two_hop_set(),),
        icl_share=0.3,
        cue_share=0.4,
        wrong_cue_share=0.5,
        gradient_dropout=0.5,
        cues=cues,
    )
    plans = [drawn.plan(step) for step in range(120)]
    shares = {text: sum(plan.text == text for plan in plans) / len(plans) for text in ("icl", "cue", "blind")}
    assert shares["icl"] == pytest.approx(0.3, abs=0.1) and shares["cue"] == pytest.approx(0.4, abs=0.1)
    assert all(plan.gradients for plan in plans if plan.text == "blind")
    dropped = [not plan.gradients for plan in plans if plan.text != "blind"]
    assert 0.3 < sum(dropped) / len(dropped) < 0.7
    nearest = []
    for plan in plans:
        for weights, pairs, shown in zip(plan.mix, plan.questions, plan.shown, strict=True):
            mixed = {plan.tasks[at].passage for at, weight in enumerate(weights) if weight}
            for (question, _), passages in zip(pairs, shown, strict=True):
                if plan.text == "cue":
                    nearest.append(passages == cues.nearest(question, sorted(mixed)))
                else:
                    assert set(passages) == (mixed if plan.text == "icl" else set())
    assert 0.5 < sum(nearest) / len(nearest) < 0.95, "half of them, and what chance adds"


class NoEmbedder:
    """Has a name and embeds nothing."""

    dimension = 384

    def __init__(self, name: str) -> None:
        self.name = name

    def embed(self, text: str) -> FloatArray:
        raise AssertionError("embedded again")

    def reads_all(self, text: str) -> bool:
        return True


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
