from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from regrad_vllm.data.questions import EvalData, Question, SourceDocument
from regrad_vllm.load.comparison import CONTENDERS
from regrad_vllm.load.corpora import natural, of_length
from regrad_vllm.load.options import parser
from regrad_vllm.load.schedule import GrowthPoint, Schedule

SENTENCE = "The harbour of town {} has {} cranes and a lighthouse that burns at night. "
DOCUMENTS = tuple(
    SourceDocument(f"doc#{n}", f"Town {n}", SENTENCE.format(n, 100 + n) + "It was built long ago. " * 6, "towns")
    for n in range(12)
)
QUESTIONS = tuple(
    Question(f"q{n}", f"How many cranes has town {n}?", (str(100 + n),), (f"doc#{n}",), "towns") for n in range(8)
)
BASE = natural(EvalData(DOCUMENTS, QUESTIONS))


def test_every_document_is_asked_about() -> None:
    assert [query.documents[0] for query in BASE.queries] == [f"doc#{n}" for n in range(12)]
    assert BASE.queries[3] == QUESTIONS[3]
    assert BASE.queries[11].question == SENTENCE.format(11, 111).strip(), "a sentence of it where nobody asks"


def test_a_corpus_is_named_by_its_content() -> None:
    changed = (*DOCUMENTS[:-1], replace(DOCUMENTS[-1], text="Another text."))
    assert natural(EvalData(DOCUMENTS, QUESTIONS)).name == BASE.name != natural(EvalData(changed, QUESTIONS)).name


@pytest.mark.parametrize("num_tokens", [40, 600])
def test_documents_of_a_length_are_passages_of_one_document_each(num_tokens: int) -> None:
    corpus = of_length(BASE, num_tokens, 5, DOCUMENTS, seed=1)
    assert corpus.parts is not None and len(corpus.parts) == 5
    assert set(corpus.parts) <= {f"doc#{n}" for n in range(8)}
    assert sorted(part for own in corpus.parts.values() for part in own) == sorted(d.id for d in corpus.data.documents)
    assert (len(corpus.data.documents) > 5) == (num_tokens == 600)
    assert corpus.mean_tokens == pytest.approx(num_tokens, rel=0.4)
    assert len(corpus.queries) == 5


def plan(*words: str) -> tuple[Schedule, argparse.Namespace]:
    args = parser().parse_args(["--growth", "2x40", *words])
    corpora = [BASE, of_length(BASE, 40, 5, DOCUMENTS, seed=1)]
    return Schedule(args, list(CONTENDERS), corpora, []), args


def test_the_main_comparison_has_everybody_and_the_others_those_named() -> None:
    made, args = plan("--requests", "9")
    main, *others = made.costs()
    assert list(main[1]) == list(CONTENDERS) and main[0].prefix_cache and main[0].popularity == "zipf"
    assert all(list(names) == ["rag_learner", "regrad"] for _, names in others)
    assert {condition.num_requests for condition, _ in made.costs()} == {9}
    keys = [condition.key for phase in (made.costs(), made.curves(), made.growths(), made.qualities())
            for condition, _ in phase]  # fmt: skip
    assert len(set(keys)) == len(keys) == 3 + len(args.curve) + len(args.rates) + 1 + 1


def test_with_and_without_prefix_caching_the_same_is_asked_and_each_repeat_something_else() -> None:
    made, args = plan()
    cached, uncached, uniform = (condition for condition, _ in made.costs())
    regrad, published = CONTENDERS["regrad"], CONTENDERS["published"]
    first = made.questions(cached, regrad, 0)
    assert first == made.questions(cached, CONTENDERS["rag"], 0)
    assert [q.id for q in first] == [q.id for q in made.questions(uncached, regrad, 0)]
    assert [q.id for q in first] != [q.id for q in made.questions(uniform, regrad, 0)]
    assert not {q.question for q in first} & {q.question for q in made.questions(uncached, regrad, 0)}
    assert first != made.questions(cached, regrad, 1)
    assert made.questions(cached, published, 0) == first[: args.alone_requests], "one at a time takes long"


def test_quality_asks_each_question_once() -> None:
    made, _ = plan("--quality-questions", "99")
    ((condition, names),) = made.qualities()
    assert sorted(question.id for question in made.questions(condition, CONTENDERS["published"], 0)) == sorted(
        q.id for q in QUESTIONS
    )
    assert condition.output_tokens == 0 and list(names) == list(CONTENDERS)
    assert plan("--quality-questions", "0")[0].qualities() == []


def test_growth_is_without_prefix_caching() -> None:
    ((condition, names),) = plan()[0].growths()
    assert (condition.top_k, condition.passage_tokens, condition.prefix_cache) == (2, 40, False)
    assert list(names) == ["rag_learner", "regrad"]


@pytest.mark.parametrize("text", ["3", "0x5", "3x0", "x", "3x5x7", "-1x5"])
def test_a_growth_point_is_k_and_tokens(text: str) -> None:
    assert GrowthPoint.parse("3x150") == GrowthPoint(3, 150)
    with pytest.raises(argparse.ArgumentTypeError, match="must be K x TOKENS"):
        GrowthPoint.parse(text)
