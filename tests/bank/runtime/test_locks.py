"""Locks and wake-ups."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bank_service.runtime.locks import FairLock, KeyedLocks
from bank_service.runtime.wakeup import WakeUp


@pytest.mark.asyncio
async def test_one_key_has_one_user_at_a_time_in_order_of_arrival_and_keys_do_not_wait_for_each_other() -> None:
    locks = KeyedLocks()
    order: list[str] = []

    async def use(key: str, name: str) -> None:
        async with locks.lock(key):
            order.append(f"{name} in")
            await asyncio.sleep(0)
            order.append(f"{name} out")

    async with locks.lock("a"):
        waiting = [asyncio.create_task(use("a", name)) for name in ("first", "second", "third")]
        await asyncio.sleep(0)
        await asyncio.wait_for(use("b", "other"), 10)
        assert order == ["other in", "other out"]
        order.clear()
        waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == ["first in", "first out", "third in", "third out"]
    assert not locks._locks, "nothing is kept of keys that nobody uses"


@pytest.mark.asyncio
async def test_a_wake_up_that_came_before_is_not_lost_and_counts_once() -> None:
    wake_up = WakeUp()
    wake_up.wake()
    wake_up.wake()
    await asyncio.wait_for(wake_up.sleep(), 10)
    sleeping = asyncio.create_task(wake_up.sleep())
    await asyncio.sleep(0.01)
    assert not sleeping.done()
    wake_up.wake()
    await asyncio.wait_for(sleeping, 10)


def test_nobody_is_inside_with_another() -> None:
    lock, inside = FairLock(), []

    def use(name: int) -> bool:
        with lock:
            inside.append(name)
            time.sleep(0.0002)
            return inside.pop() == name and not inside

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(200)))


def test_a_thread_that_waits_comes_before_one_that_takes_the_lock_again() -> None:
    for _ in range(20):  # a plain lock fails nearly every time
        lock, order = FairLock(), []

        def wait(lock: FairLock = lock, order: list[str] = order) -> None:
            with lock:
                order.append("waited")

        waiting = threading.Thread(target=wait)
        with lock:
            waiting.start()
            time.sleep(0.01)
        with lock:
            order.append("again")
        waiting.join()
        assert order == ["waited", "again"]
