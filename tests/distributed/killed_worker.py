"""A bank, and two runs of `regrad encode` with two workers. In the first run one worker is killed.

``python -m tests.distributed.killed_worker MODEL LEARNER CORPUS FOLDER`` writes what happened into report.json of the
folder. It needs a network and process numbers of its own, because Ray listens on many ports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from regrad_vllm.client import Bank
from regrad_vllm.learner import Learner
from regrad_vllm.local.pair import start_bank
from regrad_vllm.local.processes import Services


def _regrad(command: str, corpus: str, bank: str, namespace: str, *flags: str) -> subprocess.Popen[str]:
    words = [command, corpus, "--bank", bank, "--namespace", namespace, *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "regrad_vllm.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _ended(process: subprocess.Popen[str]) -> dict[str, object]:
    output, errors = process.communicate(timeout=400)
    return {"status": process.returncode, "output": output, "errors": errors}


def _workers(encode: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(encode.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::MapWorker") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _kill_a_worker(encode: subprocess.Popen[str], client: Bank) -> dict[str, object]:
    """Kills one of the actors as soon as the bank has documents, and waits for the actor that replaces it."""
    num_stored = 0
    first: set[int] = set()  # the processes of the actors when one was killed
    while encode.poll() is None:
        workers = _workers(encode)
        if not first:
            num_stored = client.stats().namespaces.get("ray", 0)
            if num_stored and len(workers) == 2:
                first = {worker.pid for worker in workers}
                workers[0].kill()
        elif {worker.pid for worker in workers} - first:
            return {"num_stored": num_stored, "was_replaced": True}
        time.sleep(0.02)
    return {"num_stored": num_stored, "was_replaced": False}


def _documents(client: Bank, namespace: str, folder: Path) -> list[dict[str, object]]:
    """Every document of the namespace. The record of each twentieth one is written into the folder."""
    listed = list(client.list(namespace=namespace))
    for entry in listed[::20]:
        for digest, record in client.fetch([entry.gradient_digest]):
            (folder / digest).write_bytes(record)
    return [{"id": entry.id, "version": entry.version, "digest": entry.gradient_digest} for entry in listed]


def main(model: str, learner: str, corpus: str, folder: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    report: dict[str, object] = {}
    with Services(folder) as services:
        _, bank = start_bank(services, Path(model), Path(learner), folder / "data")
        flags = ("--model", model, "--learner", learner, "--ray", "--workers", "2")
        with Bank(bank, spec=Learner.load(learner).spec) as client:
            encode = _regrad("encode", corpus, bank, "ray", *flags)
            report["killed"] = _kill_a_worker(encode, client)
            report["first"] = _ended(encode)
            report["ray"] = _documents(client, "ray", folder)
            report["second"] = _ended(_regrad("encode", corpus, bank, "ray", *flags))
            report["again"] = _documents(client, "ray", folder)
            report["ingest"] = _ended(_regrad("ingest", corpus, bank, "own"))
            report["own"] = _documents(client, "own", folder)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
