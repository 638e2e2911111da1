"""Tables from which the CUDA kernels learn about a step. They lie on the device, at addresses that never change.

Captured CUDA graphs hold the addresses of the tables. A step that is replayed reads what was written before it. One
copy writes a step's tables, on the stream of the step. It comes from a ring of pinned buffers, because the host
prepares the next step while the device computes this one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from regrad_vllm.serve.kernels.batch import MAX_FORMS, BatchDocuments, Forms
from regrad_vllm.serve.kernels.triton_factors import FORM_FIELDS

DOCUMENT_BYTES = 16  # address int64, coefficient float32, form int32
_NUM_BUFFERS = 4  # vLLM's host is at most two steps ahead
_NO_DOCUMENTS = np.array((0, -1), np.int32)  # of a row that isn't ReGrad's


class DeviceTables:
    """The tables of one worker. Only the thread that runs the steps writes them.

    - rows: int32 (max_rows, 2), the first document of a row and their number; −1 for a row that isn't ReGrad's.
    - tiles: int32 (tiles, 2), the first row of a tile in prefill and their number; 0 for no tile.
    - documents: (max_documents, DOCUMENT_BYTES) bytes.
    - forms: int64 (1 + forms, tensors, FORM_FIELDS). Form f has row f + 1: ``FactorForm.table``, and behind it the bits
      of a code. Row 0 has the largest value of all forms.
    """

    def __init__(
        self, forms: Forms, max_rows: int, max_requests: int, max_documents: int, tile_rows: int, device: torch.device
    ) -> None:
        """max_rows, max_requests, max_documents: the most of a step. tile_rows: the rows of a tile in prefill."""
        self.max_rows, self.max_requests, self.tile_rows = max_rows, max_requests, tile_rows
        self.num_tensors = forms.tables.shape[1]
        self._forms, self._device, self._num_forms, self._max_documents = forms, device, 0, max_documents
        self._num_tiles = -(-max_rows // tile_rows) + max_requests
        self._starts = np.cumsum([0, 8 * max_rows, 8 * self._num_tiles])
        self._starts[2] = -(-self._starts[2] // DOCUMENT_BYTES) * DOCUMENT_BYTES
        size = int(self._starts[2]) + DOCUMENT_BYTES * max_documents
        is_pinned = device.type == "cuda"
        self._buffers = [torch.zeros(size, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(_NUM_BUFFERS)]
        self._copied: list[torch.cuda.Event | None] = [None] * _NUM_BUFFERS
        self._turn = 0
        self._table = torch.zeros(size, dtype=torch.uint8, device=device)
        parts = [self._table[first:last] for first, last in zip(self._starts, (*self._starts[1:], size), strict=True)]
        self.rows, self.tiles, self.documents = parts[0].view(torch.int32), parts[1].view(torch.int32), parts[2]
        self.forms = torch.zeros(1 + MAX_FORMS, self.num_tensors, FORM_FIELDS, dtype=torch.int64, device=device)
        self.write(None)

    def write(self, batch: BatchDocuments | None) -> None:
        """Writes the tables of a step on the current stream; None: no row is ReGrad's.

        ValueError if the batch has more rows, requests or documents than the tables.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # a graph that is being captured computes nothing, and would repeat the copy
        self._write_forms()
        turn = self._turn = (self._turn + 1) % _NUM_BUFFERS
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()
        buffer = self._buffers[turn]
        host = buffer.numpy()
        rows, tiles, documents = (
            host[first:last] for first, last in zip(self._starts, (*self._starts[1:], len(host)), strict=True)
        )
        rows.view(np.int32).reshape(-1, 2)[:] = _NO_DOCUMENTS
        tiles[:] = 0
        num_documents = 0
        if batch is not None and len(batch.rows):
            num_documents = self._fill(batch, rows.view(np.int32).reshape(-1, 2), tiles, documents)
        used = int(self._starts[2]) + DOCUMENT_BYTES * num_documents
        self._table[:used].copy_(buffer[:used], non_blocking=True)
        if self._device.type == "cuda":
            self._copied[turn] = torch.cuda.current_stream(self._device).record_event()

    def num_tiles(self, num_rows: int) -> int:
        """The most tiles in prefill that ``num_rows`` rows can have."""
        return min(self._num_tiles, num_rows // self.tile_rows + min(num_rows, self.max_requests))

    def _fill(
        self, batch: BatchDocuments, rows: NDArray[np.int32], tiles: NDArray[np.uint8], documents: NDArray[np.uint8]
    ) -> int:
        """Fills host tables and returns the number of documents. Successive rows of equal documents share them."""
        counts = np.diff(batch.first)
        starts = batch.run_starts
        lengths = np.diff(starts, append=len(counts))
        first = np.cumsum(counts[starts]) - counts[starts]  # of each run, in the device's table
        num_documents = int(counts[starts].sum())
        num_tiles = -(-lengths // self.tile_rows)
        if num_documents > self._max_documents or batch.num_rows > len(rows) or num_tiles.sum() > self._num_tiles:
            raise ValueError(
                f"a step must have {self._max_documents} documents, {len(rows)} rows and {self._num_tiles} tiles at "
                f"most, got {num_documents}, {batch.num_rows} and {num_tiles.sum()}"
            )
        rows[batch.rows, 0] = np.repeat(first, lengths)
        rows[batch.rows, 1] = counts
        run = np.repeat(np.arange(len(starts)), num_tiles)
        begin = self.tile_rows * (np.arange(len(run)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles))
        table = tiles[: 8 * (len(tiles) // 8)].view(np.int32).reshape(-1, 2)
        table[: len(run), 0] = batch.rows[starts[run]] + begin
        table[: len(run), 1] = np.minimum(self.tile_rows, lengths[run] - begin)
        chosen = np.repeat(batch.first[:-1][starts] - first, counts[starts]) + np.arange(num_documents)
        entries = documents.view(np.int64).reshape(-1, 2)
        entries[:num_documents, 0] = batch.addresses[chosen]
        halves = documents.view(np.int32).reshape(-1, 4)
        halves[:num_documents, 2] = batch.coefficients[chosen].view(np.int32)
        halves[:num_documents, 3] = batch.forms[chosen]
        return num_documents

    def _write_forms(self) -> None:
        tables, bits = self._forms.tables, self._forms.bits
        number = min(len(tables), len(bits))
        if number == self._num_forms:
            return
        of_bits = np.broadcast_to(bits[:number, None, None], (number, self.num_tensors, 1))
        whole = np.concatenate([tables[:number], of_bits], 2)
        self.forms[: 1 + number].copy_(torch.from_numpy(np.concatenate([whole.max(0, keepdims=True), whole])))
        self._num_forms = number
