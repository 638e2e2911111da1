"""Which least cosine turns away requests that need no document, and how many questions does it cost?

    python -m benchmarks.gate --data FOLDER

It takes the best hit's cosine of each request. Validation questions have their documents in the bank, with others.
Two kinds of requests have none: general ones with the same bank, and titles of the haystack with invented facts.
The last line is one JSON object: threshold → shares that fall below it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bank_service.values.embedder import default_embedder, embedded_text
from regrad_vllm.arguments import whole
from regrad_vllm.data.questions import SourceDocument, load_documents
from regrad_vllm.evaluate.datasets import fresh_facts, load_clean, question_sets
from regrad_vllm.learn.training_hits import embed_all
from regrad_vllm.reporting.markdown import markdown_table

SETS = ("records", "squad", "qamr", "hops", "newpages_bio")
THRESHOLDS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
NUM_TITLES = 200
GENERAL = """
Write a short poem about autumn.
Translate "good morning" into French.
What is 17 times 23?
Write a Python function that reverses a string.
Give me three tips for a job interview.
Explain recursion to a ten-year-old.
Who wrote Hamlet?
Summarise the plot of Romeo and Juliet in two sentences.
What is the capital of Australia?
Rewrite this sentence in the passive voice: The cat ate the fish.
Suggest a name for a coffee shop.
How do I boil an egg?
Write an email that declines a meeting politely.
What is the difference between a list and a tuple in Python?
Tell me a joke about programmers.
Give me a recipe for pancakes.
How many days are there in a leap year?
Write a haiku about the sea.
What does HTTP status 404 mean?
Convert 5 miles to kilometres.
Plan a weekend in Rome.
List five synonyms of happy.
Write a regular expression that matches an email address.
What are the benefits of exercise?
Explain the theory of relativity simply.
Hello, how are you?
Thanks, that helped!
Can you continue?
Fix the grammar: he go to school yesterday.
Write a SQL query that counts rows by month.
What should I cook tonight?
Make a to-do list for moving house.
Who was the first person on the Moon?
What is photosynthesis?
Sort these numbers: 5, 3, 9, 1.
Write a birthday message for my sister.
How does a refrigerator work?
Give me an outline for an essay on climate change.
What is the boiling point of water?
Recommend a book about history.
""".strip().splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--num-questions", type=whole(1), default=60, help="of each set (%(default)s)")
    parser.add_argument("--num-distractors", type=whole(0), default=400, help="documents besides (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = question_sets(
        load_clean(args.data, "validation"), list(SETS), args.num_questions, args.num_distractors, args.seed
    )
    bank = _embedded([embedded_text(each.title, each.text) for each in data.documents])
    cosines = _embedded([question.question for question in data.questions]) @ bank.T
    best = cosines.max(axis=1)
    is_right = np.array(
        [
            data.documents[place].id in question.documents
            for place, question in zip(cosines.argmax(axis=1), data.questions, strict=True)
        ]
    )
    titles = [_title(each) for each in list(load_documents(args.data, "haystack").values())[:NUM_TITLES]]
    facts = _embedded([embedded_text(each.title, each.text) for each in fresh_facts(100, seed=2).documents])
    kinds = {
        "questions": best,
        "questions_right_first": best[is_right],
        **{f"questions_{name}": best[[question.set_name == name for question in data.questions]] for name in SETS},
        "general": (_embedded(GENERAL) @ bank.T).max(axis=1),
        "neutral": (_embedded(titles) @ facts.T).max(axis=1),
    }
    shares = {
        str(threshold): {name: round(float(np.mean(values < threshold)), 4) for name, values in kinds.items()}
        for threshold in THRESHOLDS
    }
    rows = [[threshold, *(f"{100 * share:.1f}" for share in found.values())] for threshold, found in shares.items()]
    sys.stdout.write(markdown_table(["below, %", *kinds], rows) + "\n")
    sys.stdout.write(json.dumps({"documents": len(data.documents), "questions": len(best), "below": shares}) + "\n")
    return 0


def _title(document: SourceDocument) -> str:
    return document.title or document.text[:100]


def _embedded(texts: Sequence[str]) -> NDArray[np.float32]:
    """float32 (texts, dimension)."""
    return np.stack(list(embed_all(list(texts), default_embedder())))


if __name__ == "__main__":
    raise SystemExit(main())
