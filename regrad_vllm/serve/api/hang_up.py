"""Work that ends when its client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from regrad_vllm.serve.api.http_request import Receive
from regrad_vllm.serve.api.request_errors import RequestError

T = TypeVar("T")


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive, drop: Callable[[T], None]) -> T | None:
    """The result of ``work``. If the client hangs up first, ``work`` is cancelled, and the result is None.

    ``work`` may wait long for the bank, and a request without a client must not keep its place. ``drop`` takes a result
    that comes too late.
    """
    doing = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(receive())  # after the body only the disconnect can come
    try:
        await asyncio.wait({doing, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done() and hanging_up.result()["type"] == "http.disconnect":
            await _called_off(doing, drop)
            return None
        return await asyncio.shield(doing)
    except BaseException:  # cancelled, or ``receive`` or the work itself failed
        await _called_off(doing, drop)
        raise
    finally:
        hanging_up.cancel()


async def _called_off(doing: asyncio.Future[T], drop: Callable[[T], None]) -> None:
    doing.cancel()
    with suppress(asyncio.CancelledError, RequestError):
        drop(await doing)  # the work may have ended at the same moment
