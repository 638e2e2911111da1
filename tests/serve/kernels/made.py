"""A layer of a learner with documents, and the slow obvious way to apply them: dense δ, the formula, float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bank_service.wire.codecs.base import GradientSpec
from bank_service.wire.codecs.factors import BLOCK, FactorsCodec, factor_form
from regrad_vllm.compose import compose
from regrad_vllm.layout import Layout
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.layer import DocumentsLayer
from regrad_vllm.serve.kernels.layer_slice import LayerSlice

SCALING = 1.5
Uses = list[list[tuple[int, float]]]  # of each row: its documents and their c


def bf16(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def drawn_payload(codec: str, layout: Layout, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A payload with every code, scale and short value drawn. What lies after its end would be noise."""
    form = factor_form(codec, layout.shapes)
    memory = np.full(form.payload_bytes + 64, 255, np.uint8)
    start = -memory.ctypes.data % 16
    payload = memory[start : start + form.payload_bytes]
    payload[:] = 0
    for row in form.table:
        count, long, short, scales, shorts, codes, stride = row.tolist()
        blocks = -(-long // BLOCK)
        payload[scales : scales + 2 * count * blocks] = bf16(rng.uniform(0.2, 2, count * blocks) / 2 ** (form.bits - 1))
        payload[shorts : shorts + 2 * count * short] = bf16(rng.normal(size=count * short))
        if form.bits == 8:
            drawn = rng.integers(-127, 128, count * long).astype(np.int8).view(np.uint8)
        else:
            own = rng.integers(-7, 8, (count, blocks * BLOCK))
            own[:, long:] = 0
            halves = (own + 8).astype(np.uint8).reshape(count, blocks, 2, BLOCK // 2)
            drawn = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(-1)
        payload[codes : codes + count * stride] = drawn
    return payload


@dataclass(frozen=True)
class Case:
    """One layer of merged slices with φ* and drawn documents. The layout begins with another module."""

    rank: int
    inputs: int
    outputs: tuple[int, ...]
    codecs: tuple[str, ...]  # of each document
    seed: int = 0
    payloads: list[NDArray[np.uint8]] = field(default_factory=list)
    deltas: list[NDArray[np.float32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        for codec in self.codecs:
            payload = drawn_payload(codec, self.layout, rng)
            delta = np.empty(self.layout.num_values, np.float32)
            coder = FactorsCodec(codec)
            coder.check(memoryview(payload), self.spec)
            coder.decode(memoryview(payload), self.spec, delta)
            self.payloads.append(payload)
            self.deltas.append(delta)

    @property
    def layout(self) -> Layout:
        names = [("other", 20, 30), *((f"m{i}", self.inputs, out) for i, out in enumerate(self.outputs))]
        return Layout.build(self.rank, names)

    @property
    def spec(self) -> GradientSpec:
        return GradientSpec("0" * 64, "0" * 16, self.layout.shapes)

    @property
    def phi(self) -> NDArray[np.float32]:
        return np.random.default_rng(self.seed + 1).normal(size=self.layout.num_values).astype(np.float32)

    def tensors(self, flat: NDArray[np.float32], number: int) -> tuple[Tensor, Tensor]:
        """A and B of one of the slices."""
        views = [torch.from_numpy(view) for _, view in self.layout.views(flat)]  # type: ignore[arg-type]
        return views[2 * number + 2], views[2 * number + 3]

    def layer(
        self, forms: Forms, ins: range | None = None, outs: range | None = None, *, with_a: bool = True,
        with_b: bool = True, dtype: torch.dtype = torch.float32,
    ) -> DocumentsLayer:  # fmt: skip
        """A worker's shard of the layer: some inputs, and of each slice some outputs."""
        ins, slices = ins or range(self.inputs), []
        for number, outputs in enumerate(self.outputs):
            own = outs or range(outputs)
            a, b = self.tensors(self.phi, number)
            slices.append(
                LayerSlice(
                    len(own),
                    a[:, ins.start : ins.stop].to(dtype),
                    b[own.start : own.stop].to(dtype),
                    2 * number + 2 if with_a else -1,
                    2 * number + 3 if with_b else -1,
                    ins.start,
                    own.start,
                )  # fmt: skip
            )
        return DocumentsLayer(slices, SCALING, forms)

    def batch(
        self, forms: Forms, rows: list[int], uses: list[list[tuple[int, float]]], num_rows: int
    ) -> BatchDocuments:
        flat = [use for row in uses for use in row]
        return BatchDocuments(
            num_rows,
            np.array(rows, np.int64),
            np.cumsum([0] + [len(row) for row in uses], dtype=np.int64),
            np.array([self.payloads[document].ctypes.data for document, _ in flat], np.int64),
            np.array([c for _, c in flat], np.float32),
            np.array([forms.index(self.codecs[document]) for document, _ in flat], np.int32),
        )

    def expected(
        self, y: Tensor, x: Tensor, rows: list[int], uses: Uses, ins: range | None = None,
        outs: range | None = None, *, with_a: bool = True, with_b: bool = True,
    ) -> Tensor:  # fmt: skip
        """y with each row's adapter of its own, composed whole, float64."""
        result = y.double()
        ins = ins or range(self.inputs)
        for row, own in zip(rows, uses, strict=True):
            deltas = []
            for document, _ in own:
                delta = self.deltas[document].copy()
                for tensor, view in self.layout.views(delta):
                    if not (with_a if tensor.part == "A" else with_b):
                        view[:] = 0  # type: ignore[index]
                deltas.append(delta)
            adapter = compose(self.phi, deltas, [-c for _, c in own], 1.0)
            parts = []
            for number, outputs in enumerate(self.outputs):
                a, b = (tensor.double() for tensor in self.tensors(adapter, number))
                here = outs or range(outputs)
                parts.append(b[here.start : here.stop] @ (a[:, ins.start : ins.stop] @ x[row].double()))
            result[row] += SCALING * torch.cat(parts)
        return result
