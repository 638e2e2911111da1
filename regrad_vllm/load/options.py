"""The options of `regrad bench load`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from regrad_vllm.arguments import server_url, whole
from regrad_vllm.load.comparison import CONTENDERS
from regrad_vllm.load.schedule import CONDITIONS, GrowthPoint
from regrad_vllm.load.traffic import zipf_exponent

_GROWTH = ("1x64", "3x150", "2x512")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="regrad bench load",
        description="ReGrad and its rivals with the same questions and hits under load. Defaults: a small run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="contenders:\n"
        + "".join(f"  {contender.name:16}{contender.label}\n" for contender in CONTENDERS.values())
        + "\nZipf's exponent is fitted so that the most popular fifth of the documents takes\n74% of the "
        f"references, as on a published RAG trace: {zipf_exponent(1000):.2f} for 1,000 documents.\n"
        "\nregrad bench report FOLDER makes the report of an earlier run anew, even of an interrupted one.",
    )
    _where(made)
    _what(made)
    _how(made)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, metavar="FOLDER", help="lines and report (a new temporary folder)")
    return made


def _where(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("servers, started here unless given")
    group.add_argument("--model", help="base model, a Hugging Face folder (the default model)")
    group.add_argument("--learner", type=Path, help="learner folder (the one that ships for the default model)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of all (bfloat16 where the CPU is fast at it)")
    group.add_argument("--max-model-len", type=whole(64), default=8192)
    group.add_argument("--server-flags", default="", metavar="FLAGS", help="more for both servers, in one word")
    group.add_argument(
        "--server", type=server_url, metavar="URL", help="a running server with ReGrad and φ* as the adapter phi-star"
    )
    group.add_argument("--bank", metavar="HOST:PORT", help="its bank")
    group.add_argument(
        "--stock-server", type=server_url, metavar="URL", help="a running stock vLLM that loads adapters at run time"
    )
    group.add_argument(
        "--keep-documents", action="store_true", help="leave the documents in --bank (deleted again at the end)"
    )
    group.add_argument("--model-name", default="base", help="the base model's name at --server")


def _what(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("questions and documents")
    group.add_argument("--data", type=Path, metavar="FOLDER", help="see regrad_vllm/data/questions.py (a sample)")
    group.add_argument("--split", choices=("validation", "test"), default="test")
    group.add_argument("--sets", nargs="+", default=["squad", "nq"], help="of the data (squad nq)")
    group.add_argument("--num-questions", type=whole(1), default=20, help="of each set (%(default)s)")
    group.add_argument("--num-distractors", type=whole(0), default=10, help="of the sets, besides (%(default)s)")
    group.add_argument("--haystack", type=whole(0), default=0, help="of the data's haystack, besides (%(default)s)")
    group.add_argument("--top-k", type=whole(1), default=3, help="documents a request (%(default)s)")
    group.add_argument(
        "--growth", nargs="*", type=GrowthPoint.parse, default=[GrowthPoint.parse(text) for text in _GROWTH],
        metavar="KxTOKENS", help=f"documents a request × tokens of each ({' '.join(_GROWTH)})",
    )  # fmt: skip
    group.add_argument("--growth-documents", type=whole(1), default=4, help="of each length, at least (%(default)s)")


def _how(made: argparse.ArgumentParser) -> None:
    names = list(CONTENDERS)
    group = made.add_argument_group("load")
    some: dict[str, Any] = {"nargs": "+", "choices": names, "metavar": "CONTENDER"}
    group.add_argument("--contenders", **some, help="see below (all that can be asked)")
    group.add_argument(
        "--conditions", nargs="+", choices=list(CONDITIONS), metavar="CONDITION", default=list(CONDITIONS)[:3],
        help=f"popularity and prefix caching, the first with all contenders: of {' '.join(CONDITIONS)} (the first 3)",
    )  # fmt: skip
    group.add_argument("--concurrency", type=whole(1), default=4, help="requests at a time (%(default)s)")
    group.add_argument("--requests", type=whole(1), default=8, help="of a cell (%(default)s)")
    group.add_argument(
        "--alone-requests", type=whole(1), default=2, help="of a cell of the published way, of the same (%(default)s)"
    )
    group.add_argument("--output-tokens", type=whole(2), default=32, help="of each, for cost (%(default)s)")
    group.add_argument("--repeats", type=whole(1), default=3, help="of each cell of the comparisons (%(default)s)")
    group.add_argument("--curve-repeats", type=whole(1), default=2, help="of curves and growth (%(default)s)")
    group.add_argument("--curve", nargs="*", type=whole(1), default=[1, 8], help="requests at a time (1 8)")
    group.add_argument("--rates", nargs="*", type=above_zero, default=[1.0], help="requests/s, Poisson (1)")
    group.add_argument("--trace", type=Path, metavar="FILE", help='JSON Lines {"at_s": seconds, "question": text}')
    group.add_argument("--trace-speed", type=above_zero, default=1.0, help="times as fast as recorded")
    two = "(regrad and rag_learner; rag where that isn't asked)"
    group.add_argument("--condition-contenders", **some, help=f"under the conditions after the first {two}")
    group.add_argument("--curve-contenders", **some, help=f"at other arrivals {two}")
    group.add_argument("--growth-contenders", **some, help=f"as k and documents grow {two}")
    group.add_argument("--quality-questions", type=whole(0), default=16, help="answered at free length (%(default)s)")
    group.add_argument("--slo-ttft-ms", type=above_zero, default=2000.0, help="for goodput (%(default)s)")
    group.add_argument("--slo-tpot-ms", type=above_zero, default=200.0, help="for goodput (%(default)s)")
    group.add_argument("--cell-seconds", type=above_zero, default=120.0, help="then a cell is stopped (%(default)s)")


def above_zero(text: str) -> float:
    """An argument's type: a number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value
