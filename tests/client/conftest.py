"""A real bank in a process of its own, and both clients behind one way to call them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio

from bank_service.testing.hash_encoder import spec_of
from regrad_vllm.client import AsyncBank, Bank

ROOT = Path(__file__).parents[2]


class Call(Protocol):
    """Calls a method of a client by its name. An iterator comes as a list."""

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Awaitable[Any]: ...


@contextmanager
def bank_process(
    data_dir: Path, port: int = 0, history_seconds: int = 0
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its host:port. Port 0: a free one."""
    command = [sys.executable, "-u", "-m", "tests.bank.bank_process", str(data_dir), str(port), str(history_seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready "), f"the bank did not start: {line!r}"
        yield process, line.split()[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one bank for all tests. Each test has its own namespace."""
    with bank_process(tmp_path_factory.mktemp("bank")) as (_, address):
        yield address


@pytest_asyncio.fixture(params=["blocking", "async"])
async def call(request: pytest.FixtureRequest, address: str) -> AsyncIterator[Call]:
    """The blocking client, then the asynchronous one."""
    if request.param == "blocking":
        with Bank(address, spec=spec_of()) as bank:
            yield blocking(bank)
    else:
        async with AsyncBank(address, spec=spec_of()) as async_bank:
            yield asynchronous(async_bank)


def blocking(bank: Bank) -> Call:
    async def call(method: str, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            result = getattr(bank, method)(*args, **kwargs)
            return list(result) if isinstance(result, Iterator) else result

        return await asyncio.to_thread(run)

    return call


def asynchronous(bank: AsyncBank) -> Call:
    async def call(method: str, *args: Any, **kwargs: Any) -> Any:
        result = getattr(bank, method)(*args, **kwargs)
        return [item async for item in result] if isinstance(result, AsyncIterator) else await result

    return call
