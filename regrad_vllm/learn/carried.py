"""What a slice of a carried run changes: its checkpoint in pieces that fit small transfers, and its log."""

from __future__ import annotations

import io
from pathlib import Path

from regrad_vllm.learn.config import ConfigError

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"  # in <output>.run
_PIECE_BYTES = 15 * 2**20


def leave_state(run: Path, out: Path) -> None:
    """Copies checkpoint and log of ``run`` into the folder ``out``; what an earlier slice left there goes."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{CHECKPOINT}.*"):
        old.unlink()
    checkpoint = (run / CHECKPOINT).read_bytes()
    for number, start in enumerate(range(0, len(checkpoint), _PIECE_BYTES)):
        (out / f"{CHECKPOINT}.{number:02d}").write_bytes(checkpoint[start : start + _PIECE_BYTES])
    (out / LOG).write_bytes((run / LOG).read_bytes())


def carried_state(folder: Path) -> tuple[io.BytesIO, str]:
    """Checkpoint and log that a slice left in ``folder``. ConfigError where they aren't there."""
    pieces = sorted(folder.glob(f"{CHECKPOINT}.*"))
    if not pieces or not (folder / LOG).is_file():
        raise ConfigError(f"{folder} must hold {CHECKPOINT}.00 … and {LOG} of a carried run's slice; give its $OUT")
    return io.BytesIO(b"".join(piece.read_bytes() for piece in pieces)), (folder / LOG).read_text("utf-8")
