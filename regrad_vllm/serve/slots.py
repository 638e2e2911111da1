"""Which adapter holds which LoRA slot: those that vLLM runs, those composed ahead, those that nobody needs any more.

vLLM's manager hands out ``max_loras`` slots inside the engine's step and keeps finished adapters in them. Here another
thread gives an adapter its slot and composes it, before its request is scheduled. Activating it then only writes its id
into the manager's list. There are a few more slots than ``max_loras``, for adapters that wait while all others run.

The slot of an adapter may be given away once its requests are over. vLLM's manager learns of it when it looks for the
adapter in its list.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

SlotIds = Callable[[], list[int | None]]  # the manager's own list, slot → id of the adapter that vLLM has in it

_LOOK_AGAIN_SECONDS = 1.0  # vLLM may empty slots without a word


@dataclass(slots=True)
class _SlotHold:
    slot: int
    ready: bool = False
    for_step: bool = False  # nobody waits for it, but the step that is being set up


class Slots:
    """Books over all slots of a worker. The engine's step takes slots, another thread holds them. Thread-safe.

    There is always a slot for the step. There are more slots than adapters that vLLM runs at a time, and a waiting
    adapter can be composed again later.
    """

    def __init__(self, slot_ids: SlotIds) -> None:
        """``slot_ids()`` has a place for every slot."""
        self._slot_ids = slot_ids
        self._holds: dict[int, _SlotHold] = {}  # by adapter id, oldest first
        self._idle: dict[int, None] = {}  # adapters of vLLM's that nobody needs, longest so first
        self._in_step: frozenset[int] = frozenset()  # adapters in the batch that runs, or ran last
        self._is_set_up = True  # the step has all its adapters
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    @property
    def num_waiting(self) -> int:
        return len(self._holds)

    def begin_step(self, adapter_ids: frozenset[int]) -> None:
        """A step of the engine begins. Until the next one does, its adapters keep their slots, needed or not.

        A request that is over for its client, at a stop word say, runs in the engine until the abort arrives there.
        """
        with self._lock:
            self._in_step = adapter_ids
            self._is_set_up = False
            self._changed.notify_all()

    def step_is_set_up(self) -> None:
        """All adapters of the step have been activated: what was put back for it alone and not taken is free."""
        with self._lock:
            self._is_set_up = True
            self._holds = {id: entry for id, entry in self._holds.items() if not entry.for_step}
            self._changed.notify_all()

    def in_step(self) -> list[int]:
        """The slots of the adapters in the batch that runs, or ran last."""
        with self._lock:
            return [slot for slot, adapter_id in enumerate(self._slot_ids()) if adapter_id in self._in_step]

    def is_there(self, adapter_id: int) -> bool:
        """Whether the adapter is in a slot, as a whole."""
        with self._lock:
            return self._is_there(adapter_id)

    def keep(self, adapter_id: int) -> bool:
        """The adapter is needed again. Whether it is still in a slot, which it then doesn't lose."""
        with self._lock:
            self._idle.pop(adapter_id, None)
            return self._is_there(adapter_id)

    def hold(self, adapter_id: int, wanted: Callable[[], bool]) -> int | None:
        """Holds a slot for an adapter, as soon as there is one that nobody needs.

        None if the adapter is no longer ``wanted``, which is asked again whenever something here changes.
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
        """Frees the slot held for an adapter. Nobody may be writing it any more."""
        with self._lock:
            self._holds.pop(adapter_id, None)
            self._changed.notify_all()

    def leave(self, adapter_id: int) -> None:
        """Nobody needs the adapter: its slot may be given away, but not before it is composed as a whole."""
        with self._lock:
            hold = self._holds.get(adapter_id)
            if hold is not None and hold.ready:
                del self._holds[adapter_id]
            there = set(self._slot_ids())
            self._idle = {id: None for id in (*self._idle, adapter_id) if id in there}
            self._changed.notify_all()

    def take(self, adapter_id: int) -> tuple[int, bool]:
        """A slot for the step to activate an adapter in, and whether the adapter is in it already.

        Waits for a composition that has begun: it is nearly done.
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
        """vLLM gives an adapter's slot away. Where it is ``needed`` again it waits there, before all others.

        So does one that only the step needs that is being set up. vLLM makes room by putting out adapters of the same
        batch whose turn comes later.
        """
        with self._lock:
            if adapter_id not in self._slot_ids():  # it was idle, and another has it since vLLM looked
                return
            slot = self._slot_ids().index(adapter_id)
            self._empty(slot)
            for_step = not needed and not self._is_set_up and adapter_id in self._in_step
            if needed or for_step:
                self._holds = {adapter_id: _SlotHold(slot, True, for_step), **self._holds}
            self._changed.notify_all()

    def lose(self, adapter_id: int) -> None:
        """The adapter of a taken slot couldn't be composed."""
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
        """An empty slot, else the one that nobody has needed for longest and that no step is using."""
        ids = self._slot_ids()
        taken = {entry.slot for entry in self._holds.values()}
        for slot, adapter_id in enumerate(ids):
            if adapter_id is None and slot not in taken:
                return slot
        idle = (adapter_id for adapter_id in self._idle if adapter_id in ids and adapter_id not in self._in_step)
        return next((ids.index(adapter_id) for adapter_id in idle), None)

    def _last_ready(self) -> int | None:
        """The adapter that has waited shortest."""
        return next((id for id in reversed(self._holds) if self._holds[id].ready), None)

    def _empty(self, slot: int) -> None:
        adapter_id = self._slot_ids()[slot]
        if adapter_id is not None:
            self._idle.pop(adapter_id, None)
            self._slot_ids()[slot] = None
