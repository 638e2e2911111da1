"""Holds: what somebody holds stays, and what nobody wants goes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bank_service.runtime.holds import Holds


def wanted_none(_: list[str]) -> set[str]:
    return set()


def test_what_is_neither_held_nor_wanted_may_go() -> None:
    holds = Holds()
    with holds.hold("held"), holds.removing(["held", "wanted", "orphan"], lambda _: {"wanted"}) as removal:
        assert removal.going == removal.unwanted == {"orphan"} and not removal.spared
    with holds.removing(["held"], wanted_none) as removal:
        assert removal.going == {"held"}, "its hold has ended"


def test_a_hold_counts_as_often_as_it_is_taken() -> None:
    holds = Holds()
    with holds.hold("a"):
        with holds.hold("a"):
            pass
        with holds.removing(["a"], wanted_none) as removal:
            assert not removal.unwanted


def test_what_was_held_during_the_look_stays_also_where_the_hold_has_ended() -> None:
    holds = Holds()

    def outdated(_: list[str]) -> set[str]:
        with holds.hold("a"):
            return set()

    with holds.removing(["a"], outdated) as removal:
        assert not removal.unwanted


def test_a_look_that_fails_removes_nothing_and_leaves_nothing_behind() -> None:
    holds = Holds()

    def failing(_: list[str]) -> set[str]:
        raise OSError("the catalog can't be read")

    with pytest.raises(OSError, match="catalog"), holds.removing(["a"], failing):
        raise AssertionError("no look, no removal")
    holds.wait_removed("a")
    with holds.removing(["a"], wanted_none) as removal:
        assert removal.going == {"a"}


def test_who_holds_all_spares_what_would_have_gone_and_is_told_once() -> None:
    holds = Holds()
    with holds.hold_all(), holds.hold_all():
        assert holds.is_holding_all
        with holds.removing(["a", "wanted"], lambda _: {"wanted"}) as removal:
            assert removal.spared == removal.unwanted == {"a"} and not removal.going
    assert not holds.is_holding_all
    assert holds.take_spared() == {"a"} and holds.take_spared() == set()


def test_a_removal_under_way_is_waited_for_and_a_hold_is_not() -> None:
    holds, gone = Holds(), threading.Event()

    def put() -> bool:
        with holds.hold("a"):
            holds.wait_removed("a")
            return gone.is_set()

    with ThreadPoolExecutor(1) as pool:
        with holds.removing(["a"], wanted_none) as removal:
            assert removal.going == {"a"}
            with holds.hold("a"):
                pass
            putting = pool.submit(put)
            with pytest.raises(TimeoutError):
                putting.result(0.1)
            gone.set()
        assert putting.result(30)
