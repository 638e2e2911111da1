"""`regrad train` and `regrad eval`: making learners and measuring them."""

from __future__ import annotations

import argparse
from typing import Any

from regrad_vllm.cli.console import say


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    train = commands.add_parser("train", help="meta-train a learner")
    train.add_argument("config", metavar="CONFIG", help="TOML file, see regrad_vllm/learn/config.py")
    train.add_argument("--resume", action="store_true", help="go on where the last run stopped")
    train.add_argument(
        "--data", default="", metavar="FOLDER", help="questions and documents, for the config's data_folder"
    )
    train.add_argument("--output", default="", metavar="FOLDER", help="where the learner goes, for the config's output")
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser("eval", help="exact match and F1 of ReGrad, base model and RAG", add_help=False)
    evaluate.set_defaults(run=run_eval)


def run_train(args: argparse.Namespace) -> int:
    from regrad_vllm.default_model import resolve_model
    from regrad_vllm.learn.train import main
    from regrad_vllm.observe import configure_logging

    configure_logging()
    folder = main(args.config, resume=args.resume, model_folder=resolve_model, data=args.data, output=args.output)
    say(str(folder))
    return 0


def run_eval(args: argparse.Namespace) -> int:
    from regrad_vllm.evaluate import main
    from regrad_vllm.observe import configure_logging

    configure_logging()
    return int(main(args.rest) or 0)
