"""Keeps the books on LoRA slots: adapters that vLLM runs, adapters composed ahead, and adapters no longer needed.

vLLM's manager gives out ``max_loras`` slots inside the engine's step and leaves finished adapters in them. Here another
thread gives an adapter its slot and composes it, before its request is scheduled. Its activation then only writes its
id into the manager's list. There are a few more slots than ``max_loras``, for adapters that wait while others run.

The slot of an adapter may be given away once its requests are over. vLLM's manager notices when it next looks for the
adapter in its list.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

SlotIds = Callable[[], list[int | None]]  # the manager's list: slot → id of the adapter in it

_LOOK_AGAIN_SECONDS = 1.0  # vLLM may empty slots without a notice


@dataclass(slots=True)
class _SlotHold:
    slot: int
    ready: bool = False
    for_step: bool = False  # only the step being set up needs it


class Slots:
    """The slots of one worker. The engine's step takes slots, and another thread holds slots. Thread-safe.

    The step always finds a slot, because there are more slots than adapters that vLLM runs at a time. A waiting adapter
    can lose its slot and be composed again later.
    """

    def __init__(self, slot_ids: SlotIds) -> None:
        """slot_ids: returns the manager's list, with an entry for every slot."""
        self._slot_ids = slot_ids
        self._holds: dict[int, _SlotHold] = {}  # by adapter id, oldest first
        self._idle: dict[int, None] = {}  # adapters in vLLM's list that no request needs, oldest first
        self._in_step: frozenset[int] = frozenset()  # adapters of the running batch, or of the last one
        self._is_set_up = True  # the step has all its adapters
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    @property
    def num_waiting(self) -> int:
        return len(self._holds)

    def begin_step(self, adapter_ids: frozenset[int]) -> None:
        """A step of the engine begins. Its adapters keep their slots until the next step begins, needed or not.

        A request may be over for its client, for example at a stop word, and still run until the engine gets the abort.
        """
        with self._lock:
            self._in_step = adapter_ids
            self._is_set_up = False
            self._changed.notify_all()

    def step_is_set_up(self) -> None:
        """All adapters of the step are active. Frees the slots that were put back for this step and not taken."""
        with self._lock:
            self._is_set_up = True
            self._holds = {id: entry for id, entry in self._holds.items() if not entry.for_step}
            self._changed.notify_all()

    def in_step(self) -> list[int]:
        """The slots of the adapters in the running batch, or in the last one."""
        with self._lock:
            return [slot for slot, adapter_id in enumerate(self._slot_ids()) if adapter_id in self._in_step]

    def is_there(self, adapter_id: int) -> bool:
        """Whether the adapter is in a slot and complete."""
        with self._lock:
            return self._is_there(adapter_id)

    def keep(self, adapter_id: int) -> bool:
        """The adapter is needed again. Returns whether it is still in a slot; then it keeps the slot."""
        with self._lock:
            self._idle.pop(adapter_id, None)
            return self._is_there(adapter_id)

    def hold(self, adapter_id: int, wanted: Callable[[], bool]) -> int | None:
        """Holds a slot for an adapter, as soon as one is free. Blocks until then.

        None if the adapter is no longer ``wanted``. This is asked again after each change here.
        """
        with self._lock:
            self._wait(lambda: self._free() is not None or not wanted())
            slot = self._free()
            if slot is None or not wanted():
                return None
            self._empty(slot)
            self._holds[adapter_id] = _SlotHold(slot)
            return slot

    def ready(self, adapter_id: int) -> None:
        """The adapter is composed in the slot held for it."""
        with self._lock:
            self._holds[adapter_id].ready = True
            self._changed.notify_all()

    def let_go(self, adapter_id: int) -> None:
        """Frees the slot held for an adapter. No composition may still write into it."""
        with self._lock:
            self._holds.pop(adapter_id, None)
            self._changed.notify_all()

    def leave(self, adapter_id: int) -> None:
        """No request needs the adapter. Its slot may be given away when its composition is complete."""
        with self._lock:
            hold = self._holds.get(adapter_id)
            if hold is not None and hold.ready:
                del self._holds[adapter_id]
            there = set(self._slot_ids())
            self._idle = {id: None for id in (*self._idle, adapter_id) if id in there}
            self._changed.notify_all()

    def take(self, adapter_id: int) -> tuple[int, bool]:
        """A slot in which the step activates an adapter, and whether the adapter is in it already.

        It waits for a composition that has begun, which takes only milliseconds.
        """
        with self._lock:
            self._wait(lambda: adapter_id not in self._holds or self._holds[adapter_id].ready)
            hold = self._holds.pop(adapter_id, None)
            if hold is not None:
                slot = hold.slot
            else:
                self._wait(lambda: self._free() is not None or self._last_ready() is not None)
                found = self._free()
                slot = self._holds.pop(self._last_ready()).slot if found is None else found  # type: ignore[arg-type]
            self._empty(slot)
            self._slot_ids()[slot] = adapter_id
            self._changed.notify_all()
            return slot, hold is not None

    def put_back(self, adapter_id: int, *, needed: bool) -> None:
        """vLLM gives an adapter's slot away. A ``needed`` adapter keeps the slot and waits there, first in line.

        An adapter of the step being set up does the same. To make room, vLLM sometimes removes adapters of the batch
        that it is about to activate.
        """
        with self._lock:
            if adapter_id not in self._slot_ids():  # it was idle, and another adapter got its slot in the meantime
                return
            slot = self._slot_ids().index(adapter_id)
            self._empty(slot)
            for_step = not needed and not self._is_set_up and adapter_id in self._in_step
            if needed or for_step:
                self._holds = {adapter_id: _SlotHold(slot, True, for_step), **self._holds}
            self._changed.notify_all()

    def lose(self, adapter_id: int) -> None:
        """Frees a taken slot whose adapter couldn't be composed."""
        with self._lock:
            self._slot_ids()[self._slot_ids().index(adapter_id)] = None
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.wait(_LOOK_AGAIN_SECONDS)

    def _is_there(self, adapter_id: int) -> bool:
        hold = self._holds.get(adapter_id)
        return adapter_id in self._slot_ids() or (hold is not None and hold.ready)

    def _free(self) -> int | None:
        """An empty slot, or the slot of the adapter that has been idle for longest and isn't in the step."""
        ids = self._slot_ids()
        taken = {entry.slot for entry in self._holds.values()}
        for slot, adapter_id in enumerate(ids):
            if adapter_id is None and slot not in taken:
                return slot
        idle = (adapter_id for adapter_id in self._idle if adapter_id in ids and adapter_id not in self._in_step)
        return next((ids.index(adapter_id) for adapter_id in idle), None)

    def _last_ready(self) -> int | None:
        """The composed adapter that has waited for the shortest time."""
        return next((id for id in reversed(self._holds) if self._holds[id].ready), None)

    def _empty(self, slot: int) -> None:
        adapter_id = self._slot_ids()[slot]
        if adapter_id is not None:
            self._idle.pop(adapter_id, None)
            self._slot_ids()[slot] = None
