"""Whether an answer is right: exact match and token F1, as for SQuAD (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from regrad_vllm.data.questions import Kind

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction is one of the answers, else 0.0. An empty prediction is wrong."""
    predicted = normalise(prediction)
    return float(bool(predicted) and any(predicted == normalise(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the tokens that prediction and answer share; the best over the answers. An empty prediction has 0."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def score(prediction: str, answers: Sequence[str], kind: Kind) -> float:
    """F1 for "span". The other kinds have 1.0 for a right choice, or for text that begins with the right yes or no."""
    if kind == "span":
        return token_f1(prediction, answers)
    said = _plain_words(prediction)
    expected = [_plain_words(answer) for answer in answers]
    if kind == "choice":
        return float(said in expected)
    return float(any(said[: len(answer)] == answer for answer in expected))


def _plain_words(text: str) -> list[str]:
    """Lower case, without punctuation. Articles stay, because "A" may be a choice."""
    return text.lower().translate(_PUNCTUATION).split()


def _f1(predicted: list[str], expected: list[str]) -> float:
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)
