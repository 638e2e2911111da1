"""Bank processes for a crash test to kill: ``python -m benchmarks.crash.nursery``.

This process imports everything and starts nothing. For each line of JSON on its standard input it forks one bank and
prints the bank's pid. So a bank starts in a fraction of the time that its imports take. The line is
``{"data_dir", "catalog", "objects", "log", "fault", "plant"}``. ``catalog`` and ``objects`` are the URLs of a database
and of an object store. ``fault`` has the fields of a Fault, which SIGUSR1 arms. ``plant`` is one of BUGS. These four
may be null.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from bank_service.blobs import shared_holds
from bank_service.catalog.postgres import postgres_nodes
from bank_service.service.server import serve
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from benchmarks.crash.faults import Fault, plant

# Short, so that gradients leave the object store under load, also those that a killed node was removing.
GRACE_SECONDS, OVER_SECONDS = 1, 5.0


def run(order: dict[str, Any]) -> None:
    """Serves as ordered, until a signal."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    if order.get("fault"):
        fault = Fault(**order["fault"])
        signal.signal(signal.SIGUSR1, lambda *_: fault.arm())
    encoder = HashEncoder()
    if order.get("plant"):
        plant(order["plant"], encoder)
    postgres_nodes.OVER_SECONDS, shared_holds.REMOVAL_SECONDS = OVER_SECONDS, OVER_SECONDS / 2
    # Small numbers, so that a short test meets snapshots and full batches, and the index that they are of.
    config = BankConfig(
        data_dir=Path(order["data_dir"]), catalog=order.get("catalog"), snapshot_every=40, exact_below=0,
        drain_seconds=5, history_seconds=10, objects=order.get("objects"), objects_grace_seconds=GRACE_SECONDS,
    )  # fmt: skip
    asyncio.run(serve(config, encoder, embedder=HashEmbedder()))


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the banks; the kernel reaps them
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            run(order)
            return
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
