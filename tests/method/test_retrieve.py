from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from bank_service.values.embedder import default_embedder
from regrad_vllm.data.questions import EvalData, Question, SourceDocument, load_split
from regrad_vllm.data.token_counts import count_tokens
from regrad_vllm.evaluate.answers import Endpoint, request_of, shown
from regrad_vllm.evaluate.datasets import SAMPLE, question_sets
from regrad_vllm.evaluate.growth import sized
from regrad_vllm.evaluate.in_process import ExactSearch
from regrad_vllm.evaluate.methods import METHODS
from regrad_vllm.evaluate.retrieve import FoundDocument, check_controls, with_controls
from regrad_vllm.learn.cues import Cues
from regrad_vllm.learn.probe import wrong_mix
from regrad_vllm.prompts import Prompts


def found(*names: str) -> tuple[FoundDocument, ...]:
    return tuple(FoundDocument(name, 0.5, "", f"text of {name}") for name in names)


def data() -> EvalData:
    documents = tuple(SourceDocument(name, "", f"text of {name}") for name in "abcd")
    asked = (("q1", "s", "a"), ("q2", "s", "b"), ("q3", "s", "c"), ("q4", "t", "d"))
    questions = (Question(key, f"{key}?", ("x",), (gold,), name) for key, name, gold in asked)
    return EvalData(documents, tuple(questions))


def test_the_controls_never_hold_the_document_that_answers() -> None:
    hits = [found("a", "b"), found("b", "a"), found("c", "d"), found("d", "c")]
    for seed in range(20):
        one, two, three, four = with_controls(data(), hits, random.Random(seed))
        # q2's hits hold a, q1's hold b: each has q3 alone.
        assert (one.wrong_query, two.wrong_query) == ("q3?", "q3?") and one.wrong_hits == hits[2]
        assert three.wrong_query in ("q1?", "q2?")
        assert four.wrong_query is None, "alone in its set"
        assert one.random_id in ("b", "c", "d") and four.random_id in ("a", "b", "c")
        assert all(asked.gold_retrieved for asked in (one, two, three, four))
        missed, *_ = with_controls(data(), [found("d"), *hits[1:]], random.Random(seed))
        assert missed.wrong_query == "q3?", "never its own, even where that finds another document"
    with pytest.raises(ValueError, match=r"don't answer 'q4\?'.*set 't'"):
        check_controls([one, four], [METHODS["regrad_wrong"]])
    check_controls([one, four], [METHODS["regrad"], METHODS["regrad_random"]])


def test_a_method_shows_nothing_or_the_cue_or_the_documents() -> None:
    cues = [((f"title {n}", f"sentence {n}."), ("", "another.")) for n in range(4)]
    asked, *_ = with_controls(data(), [found("a", "b")] * 4, random.Random(0), cues)
    prompts = Prompts()
    assert shown(asked, METHODS["regrad"], prompts) == []
    assert shown(asked, METHODS["regrad_icl"], prompts) == ["text of a", "text of b"]
    sentences = ["title 0\nsentence 0.", "another."]
    for name in ("regrad_cue", "rag_sentence", "rag_learner_sentence", "ft_rag_sentence"):
        assert shown(asked, METHODS[name], prompts) == sentences
    endpoint = Endpoint("", "", "base", "n", 3, 1.0, 1)
    body = request_of(endpoint, prompts, asked, METHODS["regrad_cue"])
    assert body["messages"][1]["content"] == prompts.render_icl("q1?", sentences) and body["regrad"]["top_k"] == 3
    assert request_of(endpoint, prompts, asked, METHODS["ft_rag_sentence"])["model"] == "ft_rag"
    assert request_of(endpoint, prompts, asked, METHODS["rag_sentence"])["regrad"] == {"enabled": False}
    assert request_of(endpoint, prompts, asked, METHODS["regrad"])["messages"][1]["content"] == "q1?"


def test_exact_search_makes_the_cues_of_training() -> None:
    embedder = default_embedder()
    (asked, *_) = ExactSearch(embedder).search(data(), 2, 0, 1)
    assert len(asked.hits) == 2
    assert asked.cue == Cues(embedder, 1).nearest("q1?", [(hit.title, hit.text) for hit in asked.hits])
    assert ExactSearch(embedder).search(data(), 2, 0)[0].cue == ()


def test_a_gold_passage_is_retrieved_where_any_of_them_is() -> None:
    question = replace(data().questions[0], documents=("a#2", "a#3"))
    (asked,) = with_controls(EvalData(data().documents, (question,)), [found("a#3")], random.Random(0))
    assert asked.gold_retrieved
    (missed,) = with_controls(EvalData(data().documents, (question,)), [found("a#1")], random.Random(0))
    assert not missed.gold_retrieved


def test_question_sets_bring_the_documents_of_their_questions_and_distractors_of_the_same_sets() -> None:
    sample = load_split(SAMPLE, "test")
    chosen = question_sets(sample, ["nq", "qamr"], 5, 7, seed=1)
    assert chosen == question_sets(sample, ["nq", "qamr"], 5, 7, seed=1)
    ids = {document.id for document in chosen.documents}
    golds = {key for question in chosen.questions for key in question.documents}
    assert len(chosen.questions) == 10 and golds <= ids and len(ids - golds) == 7
    assert all(key.split(":")[0] in ("nq", "qamr") for key in ids)
    with pytest.raises(ValueError, match="set 'law' has no questions"):
        question_sets(sample, ["law"], 5, 7, seed=1)


def test_the_wrong_mix_of_a_task_leaves_its_own_document_out() -> None:
    mix = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    assert wrong_mix(mix).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert mix[0].tolist() == [1.0, 1.0, 0.0], "a copy"
    assert wrong_mix(torch.ones(1, 1)).tolist() == [[0.0]]


def test_a_document_is_cut_or_grown_around_the_answer() -> None:
    sentences = [f"Sentence number {n} of the story tells nothing of use." for n in range(8)]
    sentences[3] = "Then the keeper Orla hid the lamp in the well."
    documents = (
        SourceDocument("story", "Story", " ".join(sentences), "s"), SourceDocument("poll", "", "Most agree.", "s"),
    )  # fmt: skip
    asked = (
        Question("q", "Where did Orla hide the lamp?", ("in the well",), ("story",), "s"),
        Question("yes", "Do they agree?", ("yes",), ("poll",), "s", kind="yesno"),
    )
    others = [SourceDocument("other", "", "The lamp was bought in the well known shop. It rained a lot.", "s")]
    data = EvalData(documents, asked)
    for length in (16, 64, 1024):
        found = sized(data, length, others, seed=0)
        (question,) = found.questions
        texts = {document.id: document.text for document in found.documents}
        assert all(sentences[3] in texts[key] for key in question.documents), "not the other lamp"
        total = sum(count_tokens(text) for text in texts.values())
        assert {16: 8, 64: 40, 1024: 1000}[length] <= total <= {16: 16, 64: 64, 1024: 1500}[length]
        assert all(count_tokens(text) <= 300 for text in texts.values())
