"""Slots on a GPU, on vLLM-shaped tensors; without one in Triton's interpreter, on tensors in the CPU's memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from bank_service.wire.codecs import lowrank
from bank_service.wire.record import decode_gradient, encode_gradient, record_digest
from regrad_vllm.adapt import stored_gradient
from regrad_vllm.adapt.arena import Arena, read_record
from regrad_vllm.adapt.compose import compose
from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig, Prompts
from regrad_vllm.serve import vllm_seams
from tests.serve.test_cpu_kernels import merged, row_parallel
from tests.serve.test_expand import payloads

INPUTS, INNER, RANK, SLOTS = 72, 136, 4, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu_slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with its kernel for Triton's interpreter where there is no GPU."""
    if DEVICE == "cuda":
        yield importlib.import_module("regrad_vllm.serve.gpu_slots")
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from regrad_vllm.adapt import triton_compose
    from regrad_vllm.serve import gpu_slots

    importlib.reload(triton_compose)
    yield importlib.reload(gpu_slots)
    monkeypatch.delenv("TRITON_INTERPRET")
    importlib.reload(triton_compose)
    importlib.reload(gpu_slots)


def small_learner(projections: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Learner:
    modules = [
        (f"model.layers.{layer}.mlp.{name}", *sizes)
        for layer in (1, 2)
        for name, sizes in (
            ("gate_proj", (INPUTS, INNER)),
            ("up_proj", (INPUTS, INNER)),
            ("down_proj", (INNER, INPUTS)),
        )
        if name in projections
    ]
    layout = Layout.build(RANK, modules)
    config = LearnerConfig(
        base_digest="0" * 64, lora_alpha=3.0 * RANK, step_size_kind="tie", prompts=Prompts(system=""), top_k=2,
        score_temperature=0.2,
    )  # fmt: skip
    phi = np.random.default_rng(3).standard_normal(layout.num_values, dtype=np.float32)
    return Learner(config, layout, phi, np.full(len(layout.tensors), 0.1, np.float32))


class Layer(SimpleNamespace):
    """What ``linear_modules`` gives of a LoRA layer of vLLM's."""


Layers = list[tuple[list[str], Layer]]


def zeros(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(SLOTS, 1, rows, columns, dtype=dtype, device=DEVICE)


def layers(dtype: torch.dtype, *, rank: int = RANK, tp_rank: int = 0, tp_size: int = 1) -> Layers:
    """The learner's modules as a worker of ``tp_size`` has them, and one more."""
    found = []
    local = INNER // tp_size
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp"
        gate_up = merged(tp_rank, tp_size, [INNER, INNER])
        down = row_parallel(tp_rank, tp_size, INNER)
        for module, names, inputs, outputs in (
            (gate_up, ["gate_proj", "up_proj"], INPUTS, local),
            (down, ["down_proj"], local, INPUTS),
        ):
            fields = vars(module) | {
                "lora_a_stacked": tuple(torch.zeros(SLOTS, 1, rank, inputs, dtype=dtype, device=DEVICE) for _ in names),
                "lora_b_stacked": tuple(
                    torch.zeros(SLOTS, 1, outputs, rank, dtype=dtype, device=DEVICE) for _ in names
                ),
            }
            found.append(([f"{name}.{leaf}" for leaf in names], Layer(**fields)))
    other = {
        "tp_size": 1, "n_slices": 1, "lora_a_stacked": (zeros(rank, 8, dtype),),
        "lora_b_stacked": (zeros(8, rank, dtype),),
    }  # fmt: skip
    return [*found, (["model.layers.0.self_attn.o_proj"], Layer(**other))]


def manager_of(modules: Layers, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(vllm_seams, "linear_modules", lambda manager: modules)
    stack = modules[0][1].lora_a_stacked[0]
    config = SimpleNamespace(max_lora_rank=stack.shape[2], lora_dtype=stack.dtype)
    return SimpleNamespace(device=DEVICE, lora_config=config, lora_index_to_id=[None] * SLOTS)


def values_of(modules: Layers, module: str, part: str, slot: int) -> torch.Tensor:
    for names, layer in modules:
        if module in names:
            stack: torch.Tensor = (layer.lora_a_stacked if part == "A" else layer.lora_b_stacked)[names.index(module)]
            return stack[slot, 0].cpu()
    raise AssertionError(module)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena.open(tmp_path, 2**24)
    yield made
    made.close()


def stored(arena: Arena, learner: Learner, codecs: list[str]) -> list[str]:
    random = np.random.default_rng(5)
    digests = []
    for codec in codecs:
        values = random.standard_normal(learner.layout.num_values, dtype=np.float32)
        record = encode_gradient(values, learner.spec, codec)
        arena.hold().put(record_digest(record), record)
        digests.append(record_digest(record))
    return digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codecs", [[], ["int8", "bf16", "int8"], ["lowrank64", "fp32", "int4", "lowrank64"]])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("rank", [RANK, 8])
def test_every_worker_has_the_formulas_bits_in_its_shard(
    gpu_slots: Any, arena: Arena, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, codecs: list[str], tp_size: int,
    rank: int,
) -> None:  # fmt: skip
    learner = small_learner()
    digests = stored(arena, learner, codecs)
    steps = [0.7 / (number + 1) for number in range(len(codecs))]
    deltas = [decode_gradient(read_record(arena.folder, digest), learner.spec) for digest in digests]
    flat = compose(learner.phi, deltas, steps, 1.0)
    local = INNER // tp_size
    for tp_rank in range(tp_size):
        modules = layers(dtype, rank=rank, tp_rank=tp_rank, tp_size=tp_size)
        slots = gpu_slots.GpuSlots(manager_of(modules, monkeypatch), learner)
        gradients = [slots.load(str(arena.folder), digest)[0] for digest in digests]
        assert slots.compose(1, gradients, steps)
        mine = slice(tp_rank * local, (tp_rank + 1) * local)
        for tensor, view in learner.layout.views(flat):
            right = torch.from_numpy(np.array(view * np.float32(learner.scaling) if tensor.part == "B" else view))
            if tensor.module.endswith("down_proj"):
                right = right[:, mine] if tensor.part == "A" else right
            elif tensor.part == "B":
                right = right[mine]
            found = values_of(modules, tensor.module, tensor.part, 1)
            assert torch.equal(found[: right.shape[0], : right.shape[1]], right.to(dtype)), tensor
            assert not found[right.shape[0] :].any() and not found[:, right.shape[1] :].any(), "above the rank"
        for _, layer in modules:
            for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                assert not stack[0].any() and not stack[2].any(), "no other slot was touched"


def test_a_codec_that_the_kernel_does_not_read_is_decoded(
    gpu_slots: Any, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = small_learner()
    modules = layers(torch.float32)
    slots = gpu_slots.GpuSlots(manager_of(modules, monkeypatch), learner)
    (digest,) = stored(arena, learner, ["int8"])
    delta = decode_gradient(read_record(arena.folder, digest), learner.spec)
    payload = stored_gradient.Payload(stored_gradient.FLOAT32, delta)
    monkeypatch.setattr(gpu_slots, "read_payload", lambda *args: payload)
    gradient, num_bytes = slots.load("", "")
    assert num_bytes == delta.nbytes
    slots.compose(0, [gradient], [0.5])
    first = learner.layout.tensors[0]
    right = compose(learner.phi, [delta], [1.0], 0.5)[first.slice].reshape(first.shape)
    assert np.array_equal(values_of(modules, first.module, "A", 0).numpy(), right)


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_several_components_of_every_tensor_are_summed_up(
    gpu_slots: Any, monkeypatch: pytest.MonkeyPatch, tp_rank: int
) -> None:
    learner = small_learner()
    factors, decoded = payloads(learner.layout, seed=4)
    assert factors.table is not None and (factors.table[:, lowrank.RANK] > 1).all()
    found = []
    for payload in (factors, decoded):
        modules = layers(torch.float32, tp_rank=tp_rank, tp_size=2)
        slots = gpu_slots.GpuSlots(manager_of(modules, monkeypatch), learner)
        monkeypatch.setattr(gpu_slots, "read_payload", lambda *args, own=payload: own)
        assert slots.compose(1, [slots.load("", "")[0]], [0.5])
        found.append([stack for _, layer in modules for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter computes with numpy
def test_what_is_not_finite_in_the_slots_type_is_seen(
    gpu_slots: Any, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = small_learner()
    (digest,) = stored(arena, learner, ["int8"])
    for dtype, step, finite in (
        (torch.float16, 1.0, True), (torch.float16, 3e5, False), (torch.float32, 3e5, True),
        (torch.float32, float("nan"), False), (torch.bfloat16, 3e38, False),
    ):  # fmt: skip
        slots = gpu_slots.GpuSlots(manager_of(layers(dtype), monkeypatch), learner)
        gradient, _ = slots.load(str(arena.folder), digest)
        assert slots.compose(2, [gradient], [step]) is finite, (dtype, step)


def test_what_another_adapter_left_in_a_slot_goes_first(gpu_slots: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = small_learner()
    modules = layers(torch.float32, rank=8)
    slots = gpu_slots.GpuSlots(manager_of(modules, monkeypatch), learner)
    for _, layer in modules:
        for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked):
            stack[:2] = 7.0
    slots.step_reads([0, 1])
    slots.step_begins()
    slots.is_foreign(0)
    slots.compose(0, [], [])
    o_proj = modules[-1][1]
    assert not o_proj.lora_a_stacked[0][0].any() and o_proj.lora_a_stacked[0][1].all()
    assert not values_of(modules, "model.layers.1.mlp.gate_proj", "A", 0)[RANK:].any()


class Stream:
    """Stands for a CUDA stream: an event is the number of things that it had been given."""

    def __init__(self, name: str) -> None:
        self.name, self.given, self.waits = name, 0, list[object]()

    def record_event(self) -> tuple[str, int]:
        return self.name, self.given

    def wait_event(self, event: tuple[str, int]) -> None:
        self.waits.append(event)

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((other.name, other.given))


def test_a_composition_waits_for_the_last_step_that_read_its_slot_and_for_no_later_one(
    gpu_slots: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = gpu_slots.GpuSlots(manager_of(layers(torch.float32), monkeypatch), small_learner())
    own, engine = Stream("own"), Stream("engine")
    monkeypatch.setattr(slots, "_own_stream", own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: engine)

    def step(read: list[int]) -> None:
        slots.step_begins()
        slots.step_reads(read)
        engine.given += 1

    def waited(slot: int) -> list[object]:
        own.waits.clear()
        slots._wait_for_readers(slot)
        return list(own.waits)

    assert waited(0) == []
    step([0, 1])
    assert waited(0) == [("engine", 1)], "put out after the step was given to the stream"
    step([0])
    step([2])
    step([2])
    assert waited(1) == [("engine", 1)] and waited(1) == [], "the own stream has waited: what it does next comes after"
    assert waited(0) == [("engine", 2)]
    slots.is_foreign(1)
    engine.given += 1
    assert waited(1) == [("engine", 5)] and waited(1) == []


@pytest.mark.parametrize("projections", [("up_proj", "down_proj"), ("gate_proj",)])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_merged_layer_that_is_the_learners_in_part_is_composed_in_that_part(
    gpu_slots: Any, arena: Arena, monkeypatch: pytest.MonkeyPatch, projections: tuple[str, ...], tp_size: int
) -> None:
    learner = small_learner(projections)
    (digest,) = stored(arena, learner, ["int8"])
    delta = decode_gradient(read_record(arena.folder, digest), learner.spec)
    modules = layers(torch.float32, tp_rank=tp_size - 1, tp_size=tp_size)
    slots = gpu_slots.GpuSlots(manager_of(modules, monkeypatch), learner)
    assert slots.compose(1, [slots.load(str(arena.folder), digest)[0]], [0.5])
    right = {(t.module, t.part): view for t, view in learner.layout.views(compose(learner.phi, [delta], [1.0], 0.5))}
    local = slice(INNER - INNER // tp_size, INNER)
    for names, _ in modules[:-1]:
        for name in names:
            a, b = (values_of(modules, name, part, 1).numpy() for part in ("A", "B"))
            if name.rpartition(".")[2] not in projections:
                assert not a.any() and not b.any(), name
                continue
            row_parallel = name.endswith("down_proj")
            assert np.array_equal(a, right[name, "A"][:, local] if row_parallel else right[name, "A"])
            whole = right[name, "B"] * np.float32(learner.scaling)
            assert np.array_equal(b, whole if row_parallel else whole[local])


def test_what_was_copied_stays_when_the_staging_buffer_is_used_again_or_grows(gpu_slots: Any) -> None:
    staging = gpu_slots.Staging(torch.device(DEVICE))
    random = np.random.default_rng(1)
    arrays = [random.integers(-127, 127, size, np.int8) for size in (1, 17, 5, 100_000, 64)]
    copies = [staging.copied(array, array[::-1].astype(np.float32)) for array in arrays]
    for array, (codes, floats) in zip(arrays, copies, strict=True):
        assert np.array_equal(codes.view(torch.int8).cpu().numpy(), array)
        assert np.array_equal(floats.view(torch.float32).cpu().numpy(), array[::-1].astype(np.float32))
        assert floats.data_ptr() % 16 == codes.data_ptr() % 16
    assert [copy.numel() for copy in staging.copied(np.empty((0, 3), np.int64), np.ones(1, np.float32))] == [0, 4]


def test_one_compilation_does_for_every_slot_and_number_of_gradients() -> None:
    """What Triton keys its compiled kernels by, for a GPU that needn't be here."""
    triton_compose = importlib.import_module("regrad_vllm.adapt.triton_compose")
    kernel = triton_compose._compose
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    pointer = SimpleNamespace(dtype=torch.int64, data_ptr=lambda: 256)
    constants = {param.name: 1 for param in kernel.params if param.is_constexpr}
    keys = {
        str(bind(pointer, pointer, slot, *[pointer] * 3, num_sources, pointer, **constants, debug=False)[1])
        for slot in (0, 1, 2, 16, 33)
        for num_sources in (0, 1, 3, 16)
    }
    assert len(keys) == 1, keys
