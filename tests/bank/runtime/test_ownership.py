"""The suite of every kind of ownership, run on each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bank_service.errors import BankInUseError
from bank_service.runtime.data_dir import DataDir
from bank_service.runtime.ownership import Ownership

Opened = Callable[[], Ownership]
KINDS: dict[str, Callable[[Path], Ownership]] = {"data_dir": DataDir}
# Takes what the test names, says so, and keeps it until it is killed.
OTHER_PROCESS = """
import sys, pathlib
from tests.bank.runtime.test_ownership import KINDS
owner = KINDS[sys.argv[1]](pathlib.Path(sys.argv[2]))
owner.take()
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(kind: str, data_dir: Path) -> Opened:
    return lambda: KINDS[kind](data_dir)


def test_what_nobody_owns_is_free_and_looking_changes_nothing(opened: Opened, data_dir: Path) -> None:
    opened().check_free()
    assert not data_dir.exists()
    owner = opened()
    owner.take()
    owner.release()


def test_there_is_one_owner_until_he_releases_it(opened: Opened) -> None:
    owner, other = opened(), opened()
    owner.take()
    for refused in (other.take, other.check_free):
        with pytest.raises(BankInUseError, match="must belong to one bank"):
            refused()
    other.release()  # which it has not
    with pytest.raises(BankInUseError):
        other.take()
    owner.release()
    other.check_free()
    other.take()
    with pytest.raises(BankInUseError):
        owner.take()
    other.release()


def test_ownership_ends_with_its_process_however_that_ends(kind: str, opened: Opened, data_dir: Path) -> None:
    command = [sys.executable, "-c", OTHER_PROCESS, kind, str(data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "taken\n"
            with pytest.raises(BankInUseError, match=rf"pid {process.pid}"):
                opened().take()
        finally:
            process.kill()
    owner = opened()
    owner.take()
    owner.release()


def test_a_place_that_can_not_be_owned_is_an_error_that_names_it(opened: Opened, data_dir: Path) -> None:
    data_dir.write_text("not a folder")
    with pytest.raises(OSError, match="must be a folder that this user can write"):
        opened().take()
