"""Gradients that wait for their removal in the memory of a bank that has its object store alone."""

from __future__ import annotations

import asyncio

import pytest

from bank_service.records.grace import OwnGrace


@pytest.mark.asyncio
async def test_a_gradient_that_is_dropped_again_while_it_is_removed_goes_on_waiting() -> None:
    grace = OwnGrace(0.01)
    await grace.add(["a", "b"])
    await asyncio.sleep(0.02)
    due = await grace.due()
    assert set(due) == {"a", "b"}
    await grace.add(["a"])
    await grace.forget(due)
    again = await grace.all()
    assert set(again) == {"a"}
    await grace.forget(again)
    assert not await grace.all()
