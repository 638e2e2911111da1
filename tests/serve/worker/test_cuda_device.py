"""Documents on a GPU: their copies, their memory and their part in vLLM's layers. Without a GPU in the CPU's memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.layers import MergedColumnParallelLinearWithLoRA

from bank_service.wire.record import (
    HEADER_BYTES,
    decode_gradient,
    encode_gradient,
    record_digest,
)
from regrad_vllm.compose import compose
from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.arena.record_files import ArenaCorrupt, ArenaMissing, read_record
from regrad_vllm.serve.kernels.batch import BatchDocuments
from regrad_vllm.serve.seams import cuda_wrapper, worker_seams
from regrad_vllm.serve.worker.cuda_device import CudaDevice, Staging
from regrad_vllm.serve.worker.device import NoMemory
from tests.serve.kernels.device import DEVICE, kernels

__all__ = ["kernels"]

HIDDEN, INNER, RANK = 64, 128, 4
CODEC = "factors-4-1-8"


@pytest.fixture
def learner() -> Learner:
    layout = Layout.build(
        RANK,
        [("m.gate_proj", HIDDEN, INNER), ("m.up_proj", HIDDEN, INNER), ("m.down_proj", INNER, HIDDEN)],
    )
    config = LearnerConfig(base_digest="0" * 64, lora_alpha=2.0 * RANK, step_size_kind="tie")
    phi = np.random.default_rng(3).standard_normal(layout.num_values, np.float32)
    return Learner(config, layout, phi, np.ones(len(layout.tensors), np.float32))


def manager(monkeypatch: pytest.MonkeyPatch, tp_rank: int = 0, tp_size: int = 1, **config: Any) -> Any:
    """vLLM's LoRA manager with the layers gate_up and down, with vLLM's own slicing."""
    own = INNER // tp_size

    def stacked(rows: int, columns: int, slices: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(2, 1, rows, columns, device=DEVICE) for _ in range(slices))

    gate_up = SimpleNamespace(
        tp_size=tp_size, n_slices=2, output_ids=(tp_rank,) * 2, output_slices=(own, own),
        lora_a_stacked=stacked(RANK, HIDDEN, 2), lora_b_stacked=stacked(own, RANK, 2),
    )  # fmt: skip
    gate_up.slice_lora_a = partial(MergedColumnParallelLinearWithLoRA.slice_lora_a, gate_up)
    gate_up.slice_lora_b = partial(MergedColumnParallelLinearWithLoRA.slice_lora_b, gate_up)
    down = SimpleNamespace(
        tp_size=tp_size, n_slices=1, slice_lora_b=lambda tensor: tensor,
        slice_lora_a=lambda tensor: tensor[:, tp_rank * own : (tp_rank + 1) * own],
        lora_a_stacked=stacked(RANK, own, 1), lora_b_stacked=stacked(HIDDEN, RANK, 1),
    )  # fmt: skip
    modules = [(["m.gate_proj", "m.up_proj"], gate_up), (["m.down_proj"], down)]
    monkeypatch.setattr(worker_seams, "linear_modules", lambda manager: modules)
    monkeypatch.setattr(cuda_wrapper, "LAYERS", {})
    settings = {"lora_dtype": torch.float32} | config
    return SimpleNamespace(
        device=DEVICE, max_num_batched_tokens=32, max_num_seqs=8, lora_config=SimpleNamespace(**settings),
        layers=(gate_up, down),
    )  # fmt: skip


def stored(arena: Arena, learner: Learner, codec: str = CODEC, seed: int = 1) -> str:
    values = np.random.default_rng(seed).standard_normal(learner.layout.num_values, np.float32)
    record = encode_gradient(values * np.float32(0.2), learner.spec, codec)
    arena.hold().put(record_digest(record), record)
    return record_digest(record)


@pytest.fixture
def arena(tmp_path: Path) -> Any:
    opened = Arena.open(tmp_path, 2**24)
    yield opened
    opened.close()


@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 1), (1, 2)])
def test_a_step_computes_with_the_documents_of_its_rows(
    kernels: Any, learner: Learner, arena: Arena, monkeypatch: pytest.MonkeyPatch, tp_rank: int, tp_size: int
) -> None:
    vllms = manager(monkeypatch, tp_rank, tp_size)
    device = CudaDevice(vllms, learner)
    assert not device.refusal
    digests = [stored(arena, learner, codec, seed) for seed, codec in enumerate((CODEC, "fp32", "factors-2-0-4"))]
    residents = [device.load(str(arena.folder), digest) for digest in digests]
    coefficients = [-0.5, -0.25, 0.125]
    device.set_batch(
        BatchDocuments(
            3, np.array([0, 2]), np.array([0, 1, 3]), np.array([residents[k].address for k in (0, 1, 2)]),
            np.array(coefficients, np.float32), np.array([residents[k].form for k in (0, 1, 2)], np.int32),
        )
    )  # fmt: skip
    deltas = [decode_gradient(read_record(arena.folder, digest), learner.spec) for digest in digests]
    own = slice(tp_rank * INNER // tp_size, (tp_rank + 1) * INNER // tp_size)
    for layer, width, names in zip(vllms.layers, (HIDDEN, INNER // tp_size), (("gate", "up"), ("down",)), strict=True):
        x = torch.randn(3, width, device=DEVICE)
        y = torch.randn(3, sum(stack.shape[2] for stack in layer.lora_b_stacked), device=DEVICE)
        after = y.clone()
        cuda_wrapper.LAYERS[layer.lora_a_stacked[0].data_ptr()].add(after, x)
        for row, used in (0, [0]), (2, [1, 2]):
            flat = compose(learner.phi, [deltas[k] for k in used], [-coefficients[k] for k in used], 1.0)
            composed = {(t.module, t.part): torch.from_numpy(view) for t, view in learner.layout.views(flat)}
            parts = []
            for name in names:
                a, b = (composed[f"m.{name}_proj", part].to(DEVICE).double() for part in "AB")
                a, b = (a[:, own], b) if name == "down" else (a, b[own])
                parts.append(learner.scaling * b @ (a @ x[row].double()))
            expected = y[row].double() + torch.cat(parts)
            # A dense record gets all factors that its tensors have, in 8 bits.
            assert float((after[row].double() - expected).norm() / expected.norm()) < (0.01 if 1 in used else 1e-5)
        assert torch.equal(after[1], y[1])


def test_a_record_that_is_missing_or_damaged_is_refused(
    learner: Learner, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice(manager(monkeypatch), learner)
    with pytest.raises(ArenaMissing, match="must hold gradient 0000"):
        device.load(str(arena.folder), "0" * 64)
    digest = stored(arena, learner)
    path = arena.folder / digest
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArenaCorrupt, match="SHA-256"):
        device.load(str(arena.folder), digest)


def test_a_payload_is_copied_whole_and_outlives_its_file(
    learner: Learner, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice(manager(monkeypatch), learner)
    digest = stored(arena, learner)
    payload = read_record(arena.folder, digest)[HEADER_BYTES:]
    resident = device.load(str(arena.folder), digest)
    (arena.folder / digest).unlink()
    assert isinstance(resident.memory, torch.Tensor) and resident.memory.cpu().numpy().tobytes() == payload
    assert (resident.address, resident.num_bytes) == (resident.memory.data_ptr(), len(payload))
    assert resident.address % 16 == 0


def test_a_type_that_a_gpu_cannot_compute_is_said(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(manager(monkeypatch, lora_dtype=torch.float8_e4m3fn), learner)
    assert "float32, bfloat16 or float16, got torch.float8" in device.refusal


def test_what_was_copied_stays_when_the_buffer_is_used_again_or_grows() -> None:
    staging = Staging(DEVICE)
    chance = np.random.default_rng(1)
    contents = [chance.integers(0, 255, size).astype(np.uint8) for size in (1, 17, 5, 100_000, 64)]
    copies = [staging.copied(content) for content in contents]
    for content, copy in zip(contents, copies, strict=True):
        assert np.array_equal(copy.cpu().numpy(), content)


def test_a_document_without_memory_for_it_says_what_to_lower() -> None:
    staging = Staging(DEVICE)
    with pytest.raises(NoMemory, match=r"must have \d+ bytes free .* lower --regrad-worker-bytes or --gpu-memory"):
        staging.copied(np.broadcast_to(np.uint8(0), (2**46,)))
    assert staging.copied(np.ones(3, np.uint8)).tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="Could not run") as other:  # no such device is there
        Staging(torch.device("fpga")).copied(np.ones(3, np.uint8))
    assert not isinstance(other.value, NoMemory)


class Stream:
    """Stands for a CUDA stream."""

    def __init__(self) -> None:
        self.waits: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waits.append(event)


def test_a_step_waits_once_for_the_copies_before_it() -> None:
    staging, stream = Staging(DEVICE), Stream()
    staging.wait_for_copies(stream)  # type: ignore[arg-type]
    assert stream.waits == []
    for copy in "first", "second":
        staging._done, staging._is_waited_for = copy, False  # type: ignore[assignment]
        staging.wait_for_copies(stream)  # type: ignore[arg-type]
        staging.wait_for_copies(stream)  # type: ignore[arg-type]
    assert stream.waits == ["first", "second"]


def test_a_forgotten_documents_memory_waits_for_the_stream_of_the_steps(
    learner: Learner, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice(manager(monkeypatch), learner)
    resident = device.load(str(arena.folder), stored(arena, learner))
    recorded: list[object] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append((self.data_ptr(), stream)))
    device.forget(resident)
    assert not recorded, "no step has been set"
    steps = Stream()
    monkeypatch.setattr(device, "_step_stream", steps)
    device.forget(resident)
    assert recorded == [(resident.address, steps)]
