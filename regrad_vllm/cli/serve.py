"""`regrad serve MODEL …`: vLLM's OpenAI server with ReGrad enabled."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("serve", help="vLLM's OpenAI server with ReGrad", add_help=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from regrad_vllm.serve.launch import main

    return int(main(args.rest) or 0)
