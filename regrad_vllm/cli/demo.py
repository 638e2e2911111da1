"""`regrad demo`: the whole way on one machine, from documents to changed answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("demo", help="documents in, a changed answer out", description=__doc__)
    parser.add_argument("--model", help="base model, a Hugging Face folder (the default model)")
    parser.add_argument("--learner", type=Path, help="learner folder (the one that ships for the default model)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from regrad_vllm.demo.story import run_demo

    return run_demo(model=args.model, learner=args.learner)
