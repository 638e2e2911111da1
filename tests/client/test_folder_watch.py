"""`regrad sync --watch` in a process of its own: it follows a folder, waits for a bank, and ends by Ctrl-C."""

from __future__ import annotations

import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bank_service.wire.limits import DEFAULT_NAMESPACE
from regrad_vllm.client import Bank
from tests.client.conftest import bank_process

SECONDS = 60  # for each line, on a busy machine
SETTLE = 0.3


class _Watch:
    """A running `regrad sync --watch` and its lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip())

    def wait_for(self, beginning: str) -> list[str]:
        """The lines up to the first one that begins so."""
        lines: list[str] = []
        while not lines or not lines[-1].startswith(beginning):
            try:
                lines.append(self._lines.get(timeout=SECONDS))
            except queue.Empty:
                raise AssertionError(f"no line begins with {beginning!r}, got {lines}") from None
        return lines

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(SECONDS) == 0


@contextmanager
def _watching(folder: Path, bank: str, *flags: str) -> Iterator[_Watch]:
    command = [sys.executable, "-m", "regrad_vllm.cli", "sync", str(folder), "--watch", "--settle", str(SETTLE)]
    command += ["--bank", bank, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield _Watch(process)
        finally:
            process.kill()


def _versions(bank: str, namespace: str = DEFAULT_NAMESPACE) -> dict[str, int]:
    with Bank(bank) as client:
        return {entry.id: entry.version for entry in client.list(namespace=namespace)}


def test_changes_are_followed_and_a_file_that_is_being_written_waits(address: str, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("A.")
    with _watching(folder, address, "--delete", "--namespace", "watch.changes") as watch:
        assert "created a.txt" in watch.wait_for("watching")
        with (folder / "big.txt").open("w") as big:
            for number in range(12):
                big.write(f"Sentence {number}. ")
                big.flush()
                time.sleep(SETTLE / 3)
        watch.wait_for("created big.txt")
        (folder / "a.txt").rename(folder / "b.txt")
        assert "deleted a.txt" in watch.wait_for("1 created, 0 updated, 1 unchanged, 1 deleted")
        (folder / "c.pdf").write_bytes(b"%PDF broken")
        watch.wait_for(f"skipped {folder}/c.pdf: must be a sound PDF file")
        shutil.move(folder, tmp_path / "before")
        folder.mkdir()
        (folder / "b.txt").write_text("Another folder of that name.")
        assert "updated b.txt" in watch.wait_for("deleted big.txt")
        watch.end()
    assert _versions(address, "watch.changes") == {"b.txt": 2}
    with Bank(address) as client:
        assert client.get("b.txt", namespace="watch.changes").document.text == "Another folder of that name."


def test_a_folder_that_is_on_another_drive_now_ends_the_watch_and_deletes_nothing(address: str, tmp_path: Path) -> None:
    """As one whose drive was unmounted. A link makes it so without the rights to mount."""
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "a.txt").write_text("A.")
    folder = tmp_path / "docs"
    folder.symlink_to("drive")
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as other,
        _watching(folder, address, "--delete", "--namespace", "watch.drive") as watch,
    ):
        watch.wait_for("watching")
        Path(other, "b.txt").write_text("B.")
        (tmp_path / "new").symlink_to(other)
        (tmp_path / "new").replace(folder)
        watch.wait_for(f"regrad sync: FOLDER must stay on one drive, {folder} is on another now; start again")
        assert watch.process.wait(SECONDS) == 1
    assert _versions(address, "watch.drive") == {"a.txt": 1}


def test_a_watch_waits_for_a_bank_that_is_away_and_catches_up(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("A.")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    with _watching(folder, address) as watch:
        assert "trying again until it is" in watch.wait_for("the bank at")[-1]
        with bank_process(tmp_path / "bank", port):
            assert watch.wait_for("watching")[:2] == ["created a.txt", "1 created, 0 updated, 0 unchanged, 0 deleted"]
            watch.wait_for(f"the bank at {address} is there again")
        (folder / "b.txt").write_text("B.")
        assert "is not available" in watch.wait_for("the bank at")[-1]
        with bank_process(tmp_path / "bank", port):
            watch.wait_for("created b.txt")
            assert _versions(address) == {"a.txt": 1, "b.txt": 1}
            watch.wait_for(f"the bank at {address} is there again")
            watch.end()
