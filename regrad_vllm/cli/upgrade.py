"""`regrad upgrade`: a running bank from one learner to another."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_vllm.cli.connection import add_bank_flags, connect
from regrad_vllm.console import CommandError, count, note, say

if TYPE_CHECKING:
    from regrad_vllm.client import UpgradeAction, UpgradeProgress

_DESCRIPTION = """Moves a running bank to another learner of the same base model, while it serves. With --learner the
bank encodes every document once more, in the background. Meanwhile it answers servers of both learners. The bank goes
on if this command is interrupted, and after a restart. Then --finish makes the new learner the bank's own. Before that,
--back takes everything back. Without these flags it prints the state."""


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("upgrade", help="a bank from one learner to another", description=_DESCRIPTION)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--learner", type=Path, help="begin: folder of the new learner, as the bank's machine has it")
    action.add_argument("--finish", action="store_true", help="the new learner becomes the bank's own")
    action.add_argument("--back", action="store_true", help="drop the new learner and its gradients")
    add_bank_flags(parser, namespace=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns 0. CommandError if the bank can't go on by itself."""
    action: UpgradeAction = "begin" if args.learner else "finish" if args.finish else "back" if args.back else "status"
    last: UpgradeProgress | None = None
    noted = ""
    with connect(args.bank) as bank:
        for last in bank.upgrade(action, "" if args.learner is None else os.path.abspath(args.learner)):
            progress = f"{last.num_done:,} of {count(last.num_versions, 'version')}"
            if action == "begin" and progress != noted:
                note(noted := progress)
    if last is not None and action == "begin" and not last.next_fingerprint:
        raise CommandError(f"the upgrade was ended from elsewhere: {_state(last)}")
    if last is None or (action == "begin" and not (last.is_level or last.problem)):
        raise CommandError("the bank ended before it was done; it goes on when it is started again")
    if last.problem:
        raise CommandError(f"{_state(last)}; {last.problem}")
    say(_state(last))
    return 0


def _state(progress: UpgradeProgress) -> str:
    if not progress.next_fingerprint:
        return f"the bank has the learner {progress.learner_fingerprint}, and no upgrade is under way"
    return (
        f"the bank has the learner {progress.learner_fingerprint}; {progress.num_done:,} of "
        f"{count(progress.num_versions, 'version')} have a gradient of {progress.next_fingerprint}"
        f"{', so servers of both are answered; start new servers, then use --finish' if progress.is_level else ''}"
    )
