from __future__ import annotations

import random

import pytest

from regrad_vllm.data.questions import Question
from regrad_vllm.load.traffic import Popular, in_own_words, reuse, zipf_exponent


def _questions(num: int) -> list[Question]:
    return [Question(f"q{n}", f"question {n}?", ("a",), (f"d{n // 2}",), "set") for n in range(num)]


@pytest.mark.parametrize("num", [5, 50, 1000])
@pytest.mark.parametrize("share", [0.3, 0.74])
def test_the_first_fifth_of_a_fitted_zipf_has_its_share(num: int, share: float) -> None:
    weights = [rank ** -zipf_exponent(num, share) for rank in range(1, num + 1)]
    assert sum(weights[: num // 5]) / sum(weights) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("share", [0.19, 1.0])
def test_a_share_that_no_zipf_has_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"share must be .* got {share}"):
        zipf_exponent(10, share)


def test_drawn_questions_are_as_popular_as_their_documents() -> None:
    questions = _questions(400)
    for popularity, expected in (("zipf", 0.74), ("uniform", 0.2)):
        drawn = Popular(questions, popularity, seed=1).draw(20_000, random.Random(2))  # type: ignore[arg-type]
        counts = sorted((sum(q.documents[0] == f"d{n}" for q in drawn) for n in range(200)), reverse=True)
        assert sum(counts[:40]) / 20_000 == pytest.approx(expected, abs=0.04)
        assert len({question.id for question in drawn if question.documents[0] == drawn[0].documents[0]}) == 2


def test_hardly_anyone_asks_in_anothers_words() -> None:
    asked = in_own_words(_questions(2) * 100, random.Random(3))
    assert len({question.question for question in asked}) > 195
    assert [question.id for question in asked[:3]] == ["q0", "q1", "q0"] and asked[0].question.startswith(
        "question 0? ("
    )


def test_the_same_seed_gives_the_same_ranks_and_another_gives_others() -> None:
    def first(seed: int) -> list[str]:
        return [q.id for q in Popular(_questions(100), "zipf", seed).draw(30, random.Random(0))]

    assert first(1) == first(1) != first(2)


def test_reuse_counts_sets_that_came_before_in_any_order() -> None:
    found = reuse([("a", "b"), ("b", "a"), ("a", "c"), ("d", "e"), ("a", "b")])
    assert found.repeated_sets == pytest.approx(2 / 5)
    assert found.top_fifth_share == pytest.approx(4 / 10), "of five documents the most popular one"
    with pytest.raises(ValueError, match="at least one request"):
        reuse([])
