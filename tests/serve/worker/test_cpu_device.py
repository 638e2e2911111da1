"""Documents on a CPU: mapped where they lie, checked once, turned into factors where they have none."""

from __future__ import annotations

import os
import resource
from ctypes import c_char
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bank_service.wire.record import (
    DEFAULT_CODEC,
    HEADER_BYTES,
    GradientFormatError,
    GradientSpec,
    WrongLearnerError,
    codec_named,
    decode_gradient,
    encode_gradient,
    record_digest,
)
from regrad_vllm.learner import Learner
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.arena.record_files import ArenaCorrupt, ArenaMissing, read_record
from regrad_vllm.serve.worker import cpu_device
from regrad_vllm.serve.worker.cpu_device import CpuDevice
from regrad_vllm.serve.worker.device import NoMemory, Resident, _warn_once, as_factors
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


def test_half_of_a_process_mappings_are_for_documents(
    device: CpuDevice, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 1000 < device.max_documents == int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    monkeypatch.setattr(cpu_device, "_MAX_MAP_COUNT", tmp_path / "none")
    assert Worker(learner).device.max_documents == 65530 // 2, "in a sandbox whose /proc has no such file"


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_record_without_factors_gets_all_that_it_has_and_the_log_says_so_once(
    device: CpuDevice, learner: Learner, arena: Arena, codec: str, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    right = DrawingEncoder(learner).encode([("", "one")])[0].values
    record = encode_gradient(right, learner.spec, codec) if codec == "fp32" else old_record(right, learner.spec, codec)
    arena.hold().put(record_digest(record), record)
    for _ in range(2):
        resident = device.load(str(arena.folder), record_digest(record))
    assert caplog.text.count("run `regrad recode factors-4-1-8` on the bank") == 1
    found = np.empty(learner.layout.num_values, np.float32)
    rank = learner.layout.rank
    codec_named(f"factors-{rank}-{rank}-8").decode(memoryview(payload(resident)), learner.spec, found)
    assert float(np.linalg.norm(found - right) / np.linalg.norm(right)) < 0.02
    other = device.load(str(arena.folder), stored_recipe(arena, learner, ["one"]).digests[0])
    assert resident.form != other.form


@pytest.mark.parametrize("rank", [1, 40])
def test_factors_are_as_many_as_the_rank(rank: int) -> None:
    spec = GradientSpec("1" * 64, "2" * 16, ((rank, 150), (50, rank)))
    right = np.random.default_rng(rank).standard_normal(spec.num_values, np.float32)
    made, codec = as_factors(encode_gradient(right, spec, "fp32"), spec)
    assert codec == f"factors-{rank}-{rank}-8"
    assert float(np.linalg.norm(decode_gradient(made, spec) - right) / np.linalg.norm(right)) < 0.02


def test_a_rank_without_so_many_factors_is_refused() -> None:
    spec = GradientSpec("1" * 64, "2" * 16, ((100, 150), (150, 100)))
    record = encode_gradient(np.ones(spec.num_values, np.float32), spec, "fp32")
    with pytest.raises(GradientFormatError, match="must have rank 99 at most, got 100; run `regrad recode"):
        as_factors(record, spec)


def test_a_record_without_room_in_the_address_space_is_a_lack_of_memory(
    device: CpuDevice, learner: Learner, arena: Arena
) -> None:
    digest = stored_recipe(arena, learner, ["one"]).digests[0]
    (arena.folder / digest).chmod(0o600)
    os.truncate(arena.folder / digest, 2**36)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, hard))
    try:
        with pytest.raises(NoMemory, match="another mapping.* raise vm.max_map_count or lower --regrad-worker"):
            device.load(str(arena.folder), digest)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_damaged_record_or_anothers_or_none_is_refused(device: CpuDevice, learner: Learner, arena: Arena) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    path = arena.folder / recipe.digests[0]
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    of_another = read_record(arena.folder, stored_recipe(arena, learner, ["two"]).digests[0])
    for damaged in (content, content[:-5], b"", of_another):
        path.write_bytes(damaged)
        with pytest.raises(ArenaCorrupt, match="must have that SHA-256"):
            device.load(str(arena.folder), recipe.digests[0])
    with pytest.raises(ArenaMissing, match="must hold gradient 0000"):
        device.load(str(arena.folder), "0" * 64)
    other = replace(learner.spec, fingerprint="e" * 64)
    record = encode_gradient(DrawingEncoder(learner).encode([("", "one")])[0].values, other, DEFAULT_CODEC)
    arena.hold().put(record_digest(record), record)
    with pytest.raises(WrongLearnerError):
        device.load(str(arena.folder), record_digest(record))
