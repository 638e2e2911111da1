"""Repeats a sync whenever its folder changes, for `regrad sync --watch`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from bank_service.errors import BankError, DeadlineExceededError, OverloadedError, UnavailableError
from regrad_vllm.client.upload import UploadError

_RESCAN_S = 300.0  # network drives tell of no changes, and a full queue of the system drops some
_RETRY_S = (1, 2, 4, 8, 16, 30)  # the waits between tries; the last one again and again
_PASSING = (UnavailableError, DeadlineExceededError, OverloadedError)


def watch_folder(
    folder: Path,
    sync: Callable[[], bool],
    *,
    settle_s: float,
    away: Callable[[BankError], object],
    back: Callable[[], object],
) -> None:
    """Calls ``sync`` at the start, after changes in the folder, and now and then. It ends by an error only.

    sync: returns whether some files were still being written; then it is called again soon. While the bank is away, it
    is called again after 1 to 30 seconds.
    away: called once when the bank is away. back: called when it is there again.
    OSError if the folder is gone or on another drive, UploadError, BankError.
    """
    from watchfiles import watch

    tick_ms = max(50, int(settle_s * 1000))
    failures = 0
    due = 0.0  # in time.monotonic()
    while True:
        watched = _found(folder)
        changes = watch(
            folder,
            watch_filter=None,
            step=tick_ms,
            debounce=10 * tick_ms,
            rust_timeout=tick_ms,
            yield_on_timeout=True,
            ignore_permission_denied=True,
        )
        for changed in changes:
            if _is_replaced(folder, watched):
                due = 0.0
                break
            if changed and not failures:
                due = 0.0
            if time.monotonic() < due:
                continue
            try:
                has_unsettled = sync()
            except (UploadError, *_PASSING) as error:
                reason = error.error if isinstance(error, UploadError) else error
                if not isinstance(reason, _PASSING):
                    raise
                if not failures:
                    away(reason)
                failures += 1
                due = time.monotonic() + _RETRY_S[min(failures, len(_RETRY_S)) - 1]
                continue
            if failures:
                back()
            failures = 0
            due = time.monotonic() + (settle_s if has_unsettled else _RESCAN_S)


def _is_replaced(folder: Path, watched: os.stat_result) -> bool:
    """Whether another folder of the drive has its name now. NotADirectoryError if it is gone or on another drive."""
    now = _found(folder)
    if now.st_dev != watched.st_dev:
        raise NotADirectoryError(f"FOLDER must stay on one drive, {folder} is on another now; start again")
    return now.st_ino != watched.st_ino


def _found(folder: Path) -> os.stat_result:
    try:
        return os.stat(folder)
    except OSError as error:
        raise NotADirectoryError(f"FOLDER must be there, {folder} is gone; start again when it is back") from error
