"""`regrad train`, `import`, `eval` and `growth`: the commands that make and measure learners."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from regrad_vllm.console import UsageError, say

UNFINISHED = 75  # EX_TEMPFAIL: run the command again


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    train = commands.add_parser("train", help="meta-train a learner")
    train.add_argument("config", metavar="CONFIG", help="TOML file, see regrad_vllm/learn/train_config.py")
    train.add_argument("--resume", action="store_true", help="go on where the last run stopped")
    train.add_argument(
        "--data", default="", metavar="FOLDER", help="questions and documents, for the config's data_folder"
    )
    train.add_argument("--output", default="", metavar="FOLDER", help="where the learner goes, for the config's output")
    train.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so long, with a checkpoint and exit status 75"
    )
    train.set_defaults(run=run_train)

    published = commands.add_parser("import", help="a checkpoint of the paper's published code as a learner")
    published.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with meta_state_dict.pth")
    published.add_argument("out", type=Path, metavar="OUT", help="learner folder to write")
    published.add_argument("--model", required=True, help="the base model that it was trained on, a folder")
    published.add_argument(
        "--prompts", type=Path, metavar="TOML", help="system, document, blind, icl … as it was trained (ours)"
    )
    published.set_defaults(run=run_import)

    evaluate = commands.add_parser("eval", help="exact match and F1 of ReGrad, base model and RAG", add_help=False)
    evaluate.set_defaults(run=run_eval)

    growth = commands.add_parser("growth", help="curves over documents, k, γ, length, corpus", add_help=False)
    growth.set_defaults(run=run_growth)


def run_train(args: argparse.Namespace) -> int:
    from regrad_vllm.learn.process import keep_freed_memory, share_cores

    share_cores()
    keep_freed_memory()
    from regrad_vllm.default_model import resolve_model
    from regrad_vllm.learn.train import train
    from regrad_vllm.learn.train_config import TrainConfig
    from regrad_vllm.observe import configure_logging

    configure_logging()
    given = {"data_folder": args.data and str(Path(args.data).resolve())}
    given |= {"output": args.output and str(Path(args.output).resolve())}
    config = TrainConfig.load(args.config, {key: value for key, value in given.items() if value})
    model_folder = resolve_model(config.base_model)
    folder = train(config, model_folder=model_folder, resume=args.resume, minutes=args.minutes)
    if folder is None:
        say("not done yet; the same command with --resume goes on")
        return UNFINISHED
    say(str(folder))
    return 0


def run_import(args: argparse.Namespace) -> int:
    import tomllib

    from regrad_vllm.default_model import resolve_model
    from regrad_vllm.learn.published import load_published
    from regrad_vllm.learner import LearnerError
    from regrad_vllm.prompts import Prompts

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UsageError(f"{args.out} must be absent or an empty folder; choose another")
    try:
        prompts = Prompts(**tomllib.loads(args.prompts.read_text("utf-8"))) if args.prompts else None
    except (OSError, TypeError, ValueError) as error:
        raise LearnerError(f"{args.prompts} must be TOML with the keys of Prompts: {error}") from error
    learner = load_published(args.checkpoint, resolve_model(args.model), prompts)
    learner.save(args.out)
    say(f"{args.out}: learner {learner.fingerprint}, rank {learner.layout.rank}, {len(learner.layout.modules)} modules")
    return 0


def run_eval(args: argparse.Namespace) -> int:
    from regrad_vllm.evaluate.eval_command import main
    from regrad_vllm.observe import configure_logging

    configure_logging()
    return int(main(args.rest) or 0)


def run_growth(args: argparse.Namespace) -> int:
    from regrad_vllm.evaluate.growth_command import main
    from regrad_vllm.observe import configure_logging

    configure_logging()
    return main(args.rest)
