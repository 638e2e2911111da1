"""The sizes of arena and workers, compared with the machine and the engine.

On CPUs the workers map files of the arena, also after it has dropped them. So its file system must have room for the
arenas of all API servers and for the documents of all workers.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from bank_service.wire.record import DEFAULT_CODEC, HEADER_BYTES, codec_named
from regrad_vllm.learner import Learner
from regrad_vllm.serve.arena.folders import default_root, free_bytes
from regrad_vllm.serve.settings import Settings, SettingsError

SIZES = ("arena_bytes", "worker_bytes")
_LOGGER = logging.getLogger("regrad")


def fitted(settings: Settings, defaults: Collection[str], free: int, num_servers: int, num_ranks: int) -> Settings:
    """The settings, with the sizes in ``defaults`` such that all arenas take at most a third of the ``free`` bytes.

    It is the same for the documents of all data parallel ranks.
    """
    small: dict[str, Any] = {}
    for name, number in zip(SIZES, (num_servers, num_ranks), strict=True):
        share = max(1, free // 3 // number)
        if name in defaults and getattr(settings, name) > share:
            small[name] = share
            flag = f"--regrad-{name.replace('_', '-')}"
            _LOGGER.warning(
                "%s shrinks to %d, a third of what is free in %s divided by %d; enlarge that file system (--shm-size "
                "of a container), or set the flag",
                flag, share, _root(settings), number,
            )  # fmt: skip
    return replace(settings, **small)


def check_room(settings: Settings, free: int, num_servers: int, num_ranks: int) -> None:
    """SettingsError if the arenas of the API servers and the documents of the workers don't fit the ``free`` bytes.

    num_ranks: data parallel ranks. The workers of a rank map the same files, so they count once.
    """
    wanted = num_servers * settings.arena_bytes + num_ranks * settings.worker_bytes
    if wanted > free:
        raise SettingsError(
            f"--regrad-arena-bytes for {num_servers} API servers and --regrad-worker-bytes for {num_ranks} data "
            f"parallel ranks must fit the {free} bytes that are free in {_root(settings)}, they are {wanted}; lower "
            "them, or enlarge that file system (--shm-size of a container)"
        )


def room(settings: Settings, *, sweep: bool = True) -> int:
    """The free bytes of the file system with the arena. SettingsError if it has no folder for it.

    sweep: see ``folders.free_bytes``.
    """
    try:
        return free_bytes(_root(settings), sweep=sweep)
    except OSError as error:
        raise SettingsError(f"--regrad-arena-dir must be a folder to write to: {error}") from error


def warn_of_small_budgets(settings: Settings, learner: Learner, max_num_seqs: int) -> None:
    """Warns at the start if a budget is too small for the engine's number of requests.

    Each request may have different documents. Requests beyond the budget would be refused.
    """
    top_k = settings.top_k_for(learner.config.top_k)
    record_bytes = HEADER_BYTES + codec_named(DEFAULT_CODEC).max_payload_bytes(learner.spec)
    needed = max_num_seqs * top_k * record_bytes
    for flag, size in (("arena", settings.arena_bytes), ("worker", settings.worker_bytes)):
        if size < needed:
            _LOGGER.warning(
                "--regrad-%s-bytes should be at least %d, for --max-num-seqs %d requests of %d documents in %s, it "
                "is %d; requests beyond what it holds get a 503",
                flag, needed, max_num_seqs, top_k, DEFAULT_CODEC, size,
            )  # fmt: skip


def _root(settings: Settings) -> Path:
    return settings.arena_dir or default_root()
