"""`regrad doctor`: what is missing or odd on this machine, with the remedy."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regrad_vllm.arguments import server_url
from regrad_vllm.cli.connection import add_credential_flags
from regrad_vllm.console import say, say_json


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser(
        "doctor",
        help="what is missing or odd here, with the remedy",
        description="Checks machine, packages, learner, base model, bank and server, in a few seconds. A line says ok, "
        "odd (it works, at a cost) or wrong. The exit status is 1 if something is wrong.",
    )
    parser.add_argument("--bank", metavar="HOST:PORT", help="a bank that must run (whatever is at the default port)")
    add_credential_flags(parser)
    parser.add_argument("--server", type=server_url, metavar="URL", help="a server that must run (the same)")
    parser.add_argument("--learner", type=Path, help="learner folder (the one that ships for the default model)")
    parser.add_argument("--model", default="default", help="the learner's base model, a folder (the default model)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from regrad_vllm.doctor.checks import findings

    num_wrong = 0
    for finding in findings(os.environ, bank=args.bank, server=args.server, learner=args.learner, base=args.model):
        num_wrong += finding.state == "wrong"
        if args.json:
            say_json(asdict(finding))
        else:
            remedy = f" → {finding.remedy}" if finding.remedy else ""
            say(f"{finding.name:<16} {finding.state:<5} {finding.found}{remedy}")
    return 1 if num_wrong else 0
