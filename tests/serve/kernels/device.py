"""Layers, records and batches for the tests of the kernels on GPUs; without a GPU for Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from bank_service.wire.record import HEADER_BYTES, decode_gradient, encode_gradient
from regrad_vllm.compose import compose
from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.layer_slice import LayerSlice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALING = 2.0
Request = tuple[int, Sequence[int]] | None  # rows of a request and its documents; None: one row of the base model


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """``device_layers``, with its kernels for Triton's interpreter where there is no GPU."""
    with interpreted() as module:
        yield module


class interpreted:  # noqa: N801  # a context manager
    """The kernels, defined again: Triton decides at a definition whether it interprets, for its own functions too."""

    def __enter__(self) -> Any:
        self._patch = pytest.MonkeyPatch()
        layers = importlib.import_module("regrad_vllm.serve.kernels.device_layers")
        if DEVICE.type == "cpu":
            self._patch.setattr(layers, "_PROGRAMS", 4)  # the interpreter runs one after the other
            self._patch.setenv("TRITON_INTERPRET", "1")
            standard = importlib.reload(importlib.import_module("triton.language.standard"))
            for name, value in list(vars(triton.language).items()):
                if isinstance(value, triton.JITFunction) and hasattr(standard, name):
                    self._patch.setattr(triton.language, name, getattr(standard, name))
            self._reload()
        return layers

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
        if DEVICE.type == "cpu":
            importlib.reload(importlib.import_module("triton.language.standard"))
            self._reload()

    def _reload(self) -> None:
        for name in ("triton_factors", "triton_documents"):
            importlib.reload(importlib.import_module(f"regrad_vllm.serve.kernels.{name}"))


@dataclass
class Case:
    """A layer with one slice for each of ``outputs``, its documents, and a batch."""

    rank: int
    inputs: int
    outputs: tuple[int, ...]
    codecs: Sequence[str]  # of document 0, 1, …
    dtype: torch.dtype = torch.float32
    weights: Sequence[float] = ()
    max_rows: int = 600
    max_requests: int = 20  # a layer with more rows computes them as prompts
    max_documents: int = 200
    shard: tuple[slice, tuple[slice, ...]] | None = None  # inputs and outputs of this worker
    without: Sequence[int] = ()  # slices that the learner doesn't adapt
    phi_only: Sequence[int] = ()  # slices in which documents have no part
    records: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.rank + self.inputs + len(self.codecs))
        layout = Layout.build(self.rank, [(f"m{i}", self.inputs, width) for i, width in enumerate(self.outputs)])
        config = LearnerConfig(base_digest="0" * 64, lora_alpha=SCALING * self.rank, step_size_kind="tie")
        phi = torch.from_numpy(self._normal(layout.num_values) * np.float32(0.2)).to(self.dtype)
        self.learner = Learner(config, layout, phi.float().numpy(), np.ones(len(layout.tensors), np.float32))
        self.weights = self.weights or [0.5 + 0.25 * k for k in range(len(self.codecs))]
        made = [encode_gradient(self._delta(), self.learner.spec, codec) for codec in self.codecs]
        self.deltas = [decode_gradient(record, self.learner.spec) for record in made]
        self.records = [_aligned(record[HEADER_BYTES:]) for record in made]
        self.forms = Forms(layout.shapes)
        self.form_of = [self.forms.index(codec) for codec in self.codecs]

    def _normal(self, *shape: int) -> NDArray[np.float32]:
        return self.random.standard_normal(shape, np.float32)

    def _delta(self) -> NDArray[np.float32]:
        """Of falling energy, like gradients."""
        parts = []
        for rows, columns in self.learner.layout.shapes:
            rank = min(rows, columns)
            left, right = self._normal(rows, rank), self._normal(rank, columns)
            parts.append((left * (0.1 * 0.7 ** np.arange(rank, dtype=np.float32)) @ right).reshape(-1))
        return np.concatenate(parts)

    def tables(self, kernels: Any) -> Any:
        tables = importlib.import_module("regrad_vllm.serve.kernels.device_tables")
        return tables.DeviceTables(
            self.forms, self.max_rows, self.max_requests, self.max_documents, kernels.tile_rows(self.rank), DEVICE
        )

    def layer(self, kernels: Any, tables: Any) -> Any:
        views = [torch.from_numpy(view.copy()) for _, view in self.learner.layout.views(self.learner.phi)]
        columns, rows = self.shard or (slice(0, self.inputs), tuple(slice(0, width) for width in self.outputs))
        slices = []
        for i, own in enumerate(rows):
            if i in self.without:
                slices.append(LayerSlice(own.stop - own.start))
                continue
            slices.append(
                LayerSlice(
                    own.stop - own.start,
                    views[2 * i][:, columns],
                    views[2 * i + 1][own],
                    *((-1, -1) if i in self.phi_only else (2 * i, 2 * i + 1)),
                    columns.start,
                    own.start,
                    (self.inputs, self.outputs[i]),
                )
            )
        return kernels.DeviceLayer(slices, SCALING, tables, self.dtype)

    def batch(self, requests: Sequence[Request]) -> BatchDocuments:
        rows, first, documents, row = list[int](), [0], list[int](), 0
        for request in requests:
            if request is None:
                row += 1
                continue
            for _ in range(request[0]):
                rows.append(row)
                documents += request[1]
                first.append(len(documents))
                row += 1
        return BatchDocuments(
            num_rows=row, rows=np.array(rows, np.int64), first=np.array(first, np.int64),
            addresses=np.array([self.records[d].data_ptr() for d in documents], np.int64),
            coefficients=np.array([-self.weights[d] for d in documents], np.float32),
            forms=np.array([self.form_of[d] for d in documents], np.int32),
        )  # fmt: skip

    def inputs_of(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """(x, y)."""
        columns, rows = self.shard or (slice(0, self.inputs), tuple(slice(0, width) for width in self.outputs))
        width = sum(own.stop - own.start for own in rows)
        x = torch.from_numpy(self._normal(num_rows, columns.stop - columns.start)).to(self.dtype)
        return x, torch.from_numpy(self._normal(num_rows, width)).to(self.dtype)

    def expected(self, x: Tensor, y: Tensor, requests: Sequence[Request]) -> Tensor:
        """y + s B (A x) of each row's composed adapter, float64; y for a row of the base model."""
        columns, outputs = self.shard or (slice(0, self.inputs), tuple(slice(0, width) for width in self.outputs))
        after, row = y.double(), 0
        for request in requests:
            if request is None:
                row += 1
                continue
            count, documents = request
            whole = compose(
                self.learner.phi, [self.deltas[d] for d in documents], [self.weights[d] for d in documents], 1.0
            )
            composed = [torch.from_numpy(view).double() for _, view in self.learner.layout.views(whole)]
            plain = [torch.from_numpy(view.copy()).double() for _, view in self.learner.layout.views(self.learner.phi)]
            parts = []
            for i, own in enumerate(outputs):
                a, b = (plain if i in self.phi_only else composed)[2 * i : 2 * i + 2]
                added = SCALING * (x[row : row + count].double() @ a[:, columns].T) @ b[own].T
                parts.append(added * 0 if i in self.without else added)
            after[row : row + count] += torch.cat(parts, 1)
            row += count
        return after

    def run(self, kernels: Any, requests: Sequence[Request], padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(y before, y after, what it must be) with ``padding`` rows behind the batch's."""
        tables = self.tables(kernels)
        batch = self.batch(requests)
        x, y = self.inputs_of(batch.num_rows + padding)
        layer = self.layer(kernels, tables)
        tables.write(batch)
        there = y.clone().to(DEVICE)
        layer.add(there, x.to(DEVICE))
        return y, there.cpu(), self.expected(x, y, requests)


def _aligned(payload: bytes) -> Tensor:
    """A payload on the device, at a multiple of 16 bytes."""
    return torch.from_numpy(np.frombuffer(payload, np.uint8).copy()).to(DEVICE).clone()
