"""`regrad bank`: a bank with its encoder, its embedded Redis-compatible server and its index, in one process."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from bank_service.runtime.data_dir import BankAddress
from bank_service.values.config import BankConfig
from bank_service.wire.ports import DEFAULT_PORT
from regrad_vllm.console import CommandError, note, say
from regrad_vllm.flags import add_flags, given
from regrad_vllm.naming import BANK_READY
from regrad_vllm.user_folders import user_folder

DATA_DIR = "~/.local/share/regrad/bank"  # the default where XDG_DATA_HOME is unset
SHOWN_DEFAULTS = {"data_dir": DATA_DIR, "port": DEFAULT_PORT}  # the command line's own


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("bank", help="start a gradient bank", description=__doc__)
    parser.add_argument("--model", help="base model: a Hugging Face folder or hub id (the default model)")
    parser.add_argument("--learner", type=Path, help="learner folder (the one that ships for the default model)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="say what folder, PostgreSQL, object store and Redis lack, and end; the exit status is 1 if the bank "
        "could not start on them",
    )
    add_flags(parser, BankConfig, SHOWN_DEFAULTS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings: dict[str, Any] = {"port": DEFAULT_PORT} | given(args, BankConfig)
    if "data_dir" not in settings:
        settings["data_dir"] = default_data_dir()
    config = BankConfig(**settings)
    if args.check:
        return _check(config)

    from bank_service.errors import BankInUseError, CatalogDamagedError, CollectionMismatchError
    from bank_service.service.preflight import check_startable

    try:
        check_startable(config)

        from bank_service.service.server import run_bank
        from regrad_vllm.default_model import resolve_model, shipped_learner
        from regrad_vllm.encode.gradient_encoder import GradientEncoder
        from regrad_vllm.observe import configure_logging

        configure_logging()
        model = resolve_model(args.model)
        learner = args.learner or shipped_learner()
        note(f"bank: model {model}, learner {learner}, data {config.data_dir}")
        encoder = GradientEncoder.load(model, learner)
        run_bank(config, encoder, ready=_say_ready)
    except (BankInUseError, CatalogDamagedError, CollectionMismatchError) as error:
        raise CommandError(str(error)) from error
    return 0


def _check(config: BankConfig) -> int:
    from bank_service.service.engine_checks import engine_states
    from regrad_vllm.cli.engine_table import say_table

    states = asyncio.run(engine_states(config))
    say_table(states)
    return int(any(lack.stops for state in states for lack in state.lacks))


def _say_ready(address: BankAddress) -> None:
    if address.metrics_port is not None:
        note(f"metrics at http://{BankAddress(address.host, address.metrics_port, None).target}/metrics")
    say(BANK_READY + address.target)


def default_data_dir() -> Path:
    """A folder in the user's data (XDG_DATA_HOME). NoHomeError."""
    return user_folder("XDG_DATA_HOME", ".local/share") / "regrad" / "bank"
