"""Documents on a CPU: mapped where they lie, checked once, turned into factors where they have none."""

from __future__ import annotations

import os
from ctypes import c_char
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bank_service.wire.record import (
    DEFAULT_CODEC,
    HEADER_BYTES,
    GradientFormatError,
    WrongLearnerError,
    codec_named,
    encode_gradient,
    record_digest,
)
from regrad_vllm.adapt.arena import Arena, ArenaError, read_record
from regrad_vllm.learner import Learner
from regrad_vllm.serve.worker.cpu_device import CpuDevice
from regrad_vllm.serve.worker.device import MADE_CODEC, Resident
from tests.bank.wire.old_records import old_record
from tests.serve.support import DrawingEncoder, Worker, stored_recipe


@pytest.fixture(scope="module")
def device(learner: Learner) -> CpuDevice:
    return Worker(learner).device


def payload(resident: Resident) -> bytes:
    """The bytes that the kernels find at the address."""
    return bytes((c_char * (resident.num_bytes - HEADER_BYTES)).from_address(resident.address))


def test_a_record_is_read_where_it_lies_and_keeps_no_file_open(
    device: CpuDevice, learner: Learner, arena: Arena
) -> None:
    recipe = stored_recipe(arena, learner, ["one", "two"])
    before = len(os.listdir("/proc/self/fd"))
    first, second = (device.load(str(arena.folder), digest) for digest in recipe.digests)
    assert len(os.listdir("/proc/self/fd")) == before
    assert payload(first) == read_record(arena.folder, recipe.digests[0])[HEADER_BYTES:]
    assert first.address % 16 == 0 and (first.form, first.num_bytes) == (second.form, second.num_bytes)
    assert str(arena.folder) in Path("/proc/self/maps").read_text(), "mapped, not copied"
    right = payload(first)
    os.unlink(arena.folder / recipe.digests[0])
    assert payload(first) == right, "the arena may drop it"


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_record_without_factors_gets_them(device: CpuDevice, learner: Learner, arena: Arena, codec: str) -> None:
    right = DrawingEncoder(learner).encode([("", "one")])[0].values
    record = encode_gradient(right, learner.spec, codec) if codec == "fp32" else old_record(right, learner.spec, codec)
    arena.hold().put(record_digest(record), record)
    resident = device.load(str(arena.folder), record_digest(record))
    found = np.empty(learner.layout.num_values, np.float32)
    codec_named(MADE_CODEC).decode(memoryview(payload(resident)), learner.spec, found)
    assert float(np.linalg.norm(found - right) / np.linalg.norm(right)) < 0.02
    other = device.load(str(arena.folder), stored_recipe(arena, learner, ["one"]).digests[0])
    assert resident.form != other.form


def test_a_damaged_record_or_anothers_or_none_is_refused(device: CpuDevice, learner: Learner, arena: Arena) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    path = arena.folder / recipe.digests[0]
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(GradientFormatError, match="checksum"):
        device.load(str(arena.folder), recipe.digests[0])
    path.write_bytes(content[:-5])
    with pytest.raises(GradientFormatError, match="bytes by its header"):
        device.load(str(arena.folder), recipe.digests[0])
    path.write_bytes(b"")
    with pytest.raises((GradientFormatError, ArenaError)):
        device.load(str(arena.folder), recipe.digests[0])
    with pytest.raises(ArenaError, match="must hold gradient 0000"):
        device.load(str(arena.folder), "0" * 64)
    other = replace(learner.spec, fingerprint="e" * 64)
    record = encode_gradient(DrawingEncoder(learner).encode([("", "one")])[0].values, other, DEFAULT_CODEC)
    arena.hold().put(record_digest(record), record)
    with pytest.raises(WrongLearnerError):
        device.load(str(arena.folder), record_digest(record))
