"""Samples the memory and the files of a bank, and computes their growth."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bank.child_bank import BankProcess, folder_bytes
from benchmarks.bank_soak.ledger import Log, Space

Sample = dict[str, float]


async def sample_until_over(
    process: BankProcess, snapshots: Path, spaces: Sequence[Space], log: Log, every: float
) -> list[Sample]:
    """A sample each ``every`` seconds."""
    samples: list[Sample] = []
    while not log.is_over:
        samples.append(await asyncio.to_thread(_sample, process, snapshots, spaces, log))
        await asyncio.sleep(every)
    return samples


def _sample(process: BankProcess, snapshots: Path, spaces: Sequence[Space], log: Log) -> Sample:
    memory = process.memory_mib()
    parts = {name: value / 1e6 for name, value in folder_bytes(process.data_dir).items()}
    return {
        "seconds": log.elapsed,
        "bank_mib": memory["bank"],
        "redis_mib": memory["redis"],
        "files": process.handle.num_fds(),
        "threads": process.handle.num_threads(),
        "catalog_mb": parts["catalog"],
        "wal_mb": parts["wal"],
        "blobs_mb": parts["blobs"],
        "index_mb": parts["index"],
        "all_files_mb": parts["catalog"] + parts["wal"] + parts["blobs"] + parts["index"],
        "snapshots_mb": sum(path.stat().st_size for path in snapshots.rglob("*") if path.is_file()) / 1e6,
        "documents": sum(len(space.documents) for space in spaces),
        "operations": log.num_operations,
    }


def growth(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """The change per hour by least squares over the samples after the first third, and the means of two thirds.

    The 95% interval assumes independent samples, so it is too narrow. The means are of the first and the last third.
    """
    settled = [sample for sample in samples if sample["seconds"] > seconds / 3]
    thirds = [[s for s in samples if low <= 3 * s["seconds"] / seconds < low + 1] for low in (0, 2)]
    found: dict[str, Any] = {}
    for name in samples[0]:
        if name in ("seconds", "operations"):
            continue
        slope, error = _line([s["seconds"] / 3600 for s in settled], [s[name] for s in settled])
        found[name] = {
            "per_hour": round(slope, 3),
            "interval": [round(slope - 1.96 * error, 3), round(slope + 1.96 * error, 3)],
            "first_third": round(float(np.mean([s[name] for s in thirds[0]])), 2),
            "last_third": round(float(np.mean([s[name] for s in thirds[1]])), 2),
            "greatest": round(max(s[name] for s in samples), 2),
        }
    return found


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The slope and its standard error."""
    x, y = np.asarray(xs), np.asarray(ys)
    x = x - x.mean()
    square = float(x @ x)
    slope = float(x @ y) / square
    residuals = y - y.mean() - slope * x
    return slope, float(np.sqrt(residuals @ residuals / max(1, len(x) - 2) / square))
