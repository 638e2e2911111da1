"""LoRA in a batch of our requests, operators' own adapters and base rows, on CPUs. vLLM's own bookkeeping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping

from bank_service.wire.record import DEFAULT_CODEC, HEADER_BYTES, decode_gradient, encode_gradient
from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.layer import DocumentsLayer
from regrad_vllm.serve.kernels.layer_slice import LayerSlice
from regrad_vllm.serve.recipe import ADAPTER_ID
from regrad_vllm.serve.seams.cpu_wrapper import DocumentsPunicaWrapper
from tests.serve.support import gradient_noise

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
INPUTS, OUTPUTS, RANK, SLOTS = 48, 40, 4, 3
OURS, BASE = 9, -1  # kinds of rows; others are an operator's slot


def wrapper(kinds: list[int], layer: tuple[Tensor, DocumentsLayer] | None = None) -> DocumentsPunicaWrapper:
    """vLLM's wrapper after it was told the rows' adapters. φ* is in slot 1, an operator's adapter n in slot n."""
    made = DocumentsPunicaWrapper(512, 64, "cpu")
    ids = tuple({OURS: ADAPTER_ID, BASE: 0}.get(kind, kind + 100) for kind in kinds)
    made.update_metadata(LoRAMapping(ids, ids[:1], is_prefill=True), [100, ADAPTER_ID, 102], SLOTS + 1, 1000)
    if layer is not None:
        made.layers = {layer[0].data_ptr(): layer[1]}
    return made


def stacks(outputs: list[int], dtype: torch.dtype) -> tuple[Any, Any]:
    """A and B of each slice as vLLM lays them, drawn."""
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS).to(dtype) for _ in outputs)
    b = tuple(torch.randn(SLOTS, 1, out, RANK).to(dtype) / RANK for out in outputs)
    return a, b


@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize(
    "kinds", [[0], [BASE], [2, 2, 2], [0, BASE, 2, 0], [OURS], [2] * 300 + [BASE] * 5 + [0] * 4 + [OURS, 2, OURS]]
)
def test_each_operators_row_gets_its_adapter_and_every_other_row_nothing(
    values: torch.dtype, weights: torch.dtype, kinds: list[int]
) -> None:
    torch.manual_seed(len(kinds))
    outputs = [OUTPUTS, 300]
    a, b = stacks(outputs, weights)
    x, y = torch.randn(len(kinds), INPUTS).to(values), torch.randn(len(kinds), sum(outputs)).to(values)
    before = y.clone()
    wrapper(kinds).add_lora_linear(y, x, a, b, 1.0, tuple(outputs))
    right = before.double()
    for row, slot in enumerate(kinds):
        if slot not in (OURS, BASE):
            wide = x[row].double()
            pairs = zip(a, b, strict=True)
            parts = [of_b[slot, 0].double() @ (of_a[slot, 0].double() @ wide) for of_a, of_b in pairs]
            right[row] += torch.cat(parts)
    assert float((y.double() - right).abs().max()) / max(1.0, float(right.abs().max())) < TOLERANCE[values]
    without = [row for row, kind in enumerate(kinds) if kind in (OURS, BASE)]
    assert torch.equal(y[without], before[without]), "bit for bit"


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [4, 64, 500])
def test_a_rows_answer_does_not_depend_on_how_many_rows_its_prompts_piece_has(
    values: torch.dtype, num_rows: int
) -> None:
    """Rows together against the same rows one by one: float32 sums in another order, each rounded once."""
    torch.manual_seed(num_rows)
    a, b = stacks([200], values)
    x, y = torch.randn(num_rows, INPUTS).to(values), torch.randn(num_rows, 200).to(values)
    together, alone = y.clone(), y.clone()
    wrapper([2] * num_rows).add_lora_linear(together, x, a, b, 1.0, (200,))
    for row in range(num_rows):
        wrapper([2]).add_lora_linear(alone[row : row + 1], x[row : row + 1], a, b, 1.0, (200,))
    assert not torch.equal(together, y)
    assert float((together != alone).float().mean()) < 0.01, "only where the sum is halfway between two values"


def document(layout: Layout, learner: Learner, seed: int) -> tuple[np.ndarray[Any, Any], Tensor, Tensor]:
    """(record, ΔA, ΔB) of a document in a layout of one module."""
    spec = learner.spec
    record = np.frombuffer(encode_gradient(gradient_noise(layout, seed, 0.3), spec, DEFAULT_CODEC), np.uint8).copy()
    (_, a), (_, b) = layout.views(decode_gradient(record.data, spec))
    return record, torch.tensor(a).double(), torch.tensor(b).double()


def test_rows_of_all_kinds_in_one_batch(learner: Learner) -> None:
    layout = Layout.build(RANK, [("m", INPUTS, OUTPUTS)])
    phi = gradient_noise(layout, 1, 0.3)
    own = Learner(learner.config, layout, phi, np.full(2, 0.1, np.float32))
    forms = Forms(own.spec.shapes)
    (_, phi_a), (_, phi_b) = layout.views(torch.tensor(phi))
    layer = DocumentsLayer([LayerSlice(OUTPUTS, phi_a, phi_b, 0, 1, 0, 0)], own.scaling, forms)
    documents = [document(layout, own, seed) for seed in (2, 3)]
    torch.manual_seed(0)
    a, b = stacks([OUTPUTS], torch.float32)
    kinds = [OURS, 0, BASE, OURS, 2, OURS]
    x, y = torch.randn(len(kinds), INPUTS), torch.randn(len(kinds), OUTPUTS)
    before, made = y.clone(), wrapper(kinds, (a[0], layer))
    form = forms.index(DEFAULT_CODEC)
    coefficients = [-0.5, 0.25, -1.0]
    made.batch = BatchDocuments(
        len(kinds), np.array([0, 3, 5]), np.array([0, 1, 3, 3]),
        np.array([documents[n][0].ctypes.data + HEADER_BYTES for n in (0, 0, 1)]),
        np.array(coefficients, np.float32), np.full(3, form, np.int32),
    )  # fmt: skip
    made.add_lora_linear(y, x, a, b, 1.0, (OUTPUTS,))
    right = before.double()
    for row, used in ((0, [(0, coefficients[0])]), (3, [(0, coefficients[1]), (1, coefficients[2])]), (5, [])):
        whole_a, whole_b = phi_a.double(), phi_b.double()
        for number, c in used:
            whole_a, whole_b = whole_a + c * documents[number][1], whole_b + c * documents[number][2]
        right[row] += own.scaling * whole_b @ (whole_a @ x[row].double())
    for row, slot in ((1, 0), (4, 2)):
        right[row] += b[0][slot, 0].double() @ (a[0][slot, 0].double() @ x[row].double())
    assert torch.allclose(y.double(), right, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[2], before[2])
    made.batch = None
    y = before.clone()
    made.add_lora_linear(y, x, a, b, 1.0, (OUTPUTS,))
    assert torch.equal(y[[0, 2, 3, 5]], before[[0, 2, 3, 5]]), "a dummy run"


def test_a_batch_of_another_size_than_the_mapping_is_an_error() -> None:
    a, b = stacks([8], torch.float32)
    with pytest.raises(ValueError, match="must be the batch's 2, got 3"):
        wrapper([0, 2]).add_lora_linear(torch.zeros(3, 8), torch.zeros(3, INPUTS), a, b, 1.0, (8,))
