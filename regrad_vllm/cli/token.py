"""`regrad token`: a new token for a bank's --tokens-file. The file gets the digest, and the user gets the secret."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from regrad_vllm.console import CommandError, note, say

_SCOPES = ("read", "write", "admin")


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("token", help="a new token for a bank", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="the bearer's name, shown when the token is refused")
    parser.add_argument(
        "--scope", action="append", choices=_SCOPES, required=True, help="an allowed scope; repeat for several"
    )
    parser.add_argument(
        "--namespace", action="append", required=True, help="an allowed namespace; '*' for all; repeat for several"
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="new file for the token, which is then not shown",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bank_service.service.tokens_file import new_token

    secret, line = new_token(args.name, args.scope, args.namespace)
    if args.token_file is None:
        note("the token, which is not shown again; keep it in a file that only its bearer reads:")
        say(secret)
    else:
        try:
            with open(os.open(args.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secret + "\n")
        except OSError as error:
            raise CommandError(f"--token-file must be a new file, got {args.token_file}: {error.strerror}") from error
    note("a line for the bank's --tokens-file:")
    say(line)
    return 0
