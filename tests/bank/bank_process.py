"""A bank as a process of its own, for tests that kill it.

``python -m tests.bank.bank_process DATA_DIR [PORT [HISTORY_SECONDS [CATALOG OBJECTS]]]``
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

from bank_service.runtime.data_dir import BankAddress, read_address
from bank_service.service.server import run_bank
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.values.config import BankConfig


def start_bank(data_dir: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Starts a bank in ``data_dir``, silently. ``environment``: more variables. The caller ends it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bank.bank_process", str(data_dir)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


async def address_of(process: subprocess.Popen[bytes], data_dir: Path) -> BankAddress:
    """The address of the bank that ``start_bank`` started, once it serves."""
    while (address := read_address(data_dir)) is None:
        assert process.poll() is None
        await asyncio.sleep(0.05)
    return address


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    # Small numbers, so that a short test meets snapshots and full batches.
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    history = int(sys.argv[3]) if len(sys.argv) > 3 else None
    catalog, objects = sys.argv[4:6] if len(sys.argv) > 5 else (None, None)
    config = BankConfig(
        data_dir=Path(sys.argv[1]), port=port, snapshot_every=40, drain_seconds=5, history_seconds=history,
        catalog=catalog, objects=objects,
    )  # fmt: skip
    run_bank(config, HashEncoder(), ready=lambda address: sys.stdout.write(f"ready {address.target}\n"))
