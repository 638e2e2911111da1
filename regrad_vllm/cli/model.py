"""`regrad model`: the default model's folder, built once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from regrad_vllm.console import note, say


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("model", help="build the default model, print its folder", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to (the user's cache)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from regrad_vllm.default_model import default_folder, ensure_default_model

    target = args.folder or default_folder()
    if not target.exists():
        note(f"building the default model in {target} (once, about 20 s)")
    say(str(ensure_default_model(target)))
    return 0
