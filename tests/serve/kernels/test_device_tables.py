"""The tables that the kernels on a GPU read: rows, tiles, documents and forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bank_service.wire.codecs.base import GradientFormatError
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.device_tables import DOCUMENT_BYTES, DeviceTables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((4, 200), (300, 4))
Row = list[int] | None  # a row's documents; None: of the base model


def batch_of(rows: list[Row]) -> BatchDocuments:
    ours = [row for row, documents in enumerate(rows) if documents is not None]
    lists = [rows[row] or [] for row in ours]
    flat = np.array([document for documents in lists for document in documents], np.int64)
    return BatchDocuments(
        len(rows), np.array(ours, np.int64), np.cumsum([0, *map(len, lists)]).astype(np.int64), 4096 * (flat + 1),
        (flat / 4).astype(np.float32), (flat % 2).astype(np.int32),
    )  # fmt: skip


def tables(max_rows: int = 40, max_requests: int = 12, max_documents: int = 60) -> DeviceTables:
    forms = Forms(SHAPES)
    forms.index("factors-4-1-8"), forms.index("factors-2-0-4")
    return DeviceTables(forms, max_rows, max_requests, max_documents, 16, DEVICE)


def read(written: DeviceTables) -> list[Row]:
    """What a kernel finds for each row."""
    documents = written.documents.cpu().numpy()
    addresses = documents.view(np.int64).reshape(-1, 2)[:, 0]
    coefficients = documents.view(np.float32).reshape(-1, 4)[:, 2]
    forms = documents.view(np.int32).reshape(-1, 4)[:, 3]
    found: list[Row] = []
    for first, count in written.rows.view(-1, 2).tolist():
        own = [int(address) // 4096 - 1 for address in addresses[first : first + max(count, 0)]]
        assert coefficients[first : first + len(own)].tolist() == [document / 4 for document in own]
        assert [int(form) for form in forms[first : first + len(own)]] == [document % 2 for document in own]
        found.append(own if count >= 0 else None)
    return found


BATCHES: list[list[Row]] = [
    [[1, 2], None, [], [1, 2], [1, 2], [2, 1]],
    [[3]] * 20 + [[3, 3]] * 3 + [None] + [[3]] * 2,
    [None, None],
    [[]] * 17,
    [[0], [1], [0], [1]],
]


@pytest.mark.parametrize("rows", BATCHES, ids=lambda rows: f"{len(rows)} rows")
def test_each_row_finds_its_documents_and_rows_beyond_the_batch_none(rows: list[Row]) -> None:
    written = tables()
    written.write(batch_of([[5, 6, 7]] * 40))
    written.write(batch_of(rows))
    assert read(written) == rows + [None] * (40 - len(rows))


def test_no_row_has_documents_after_a_step_without_any() -> None:
    written = tables()
    assert read(written) == [None] * 40
    written.write(batch_of([[1]] * 40))
    assert read(written) != [None] * 40
    written.write(None)
    assert read(written) == [None] * 40 and not written.tiles.any()


@pytest.mark.parametrize("seed", range(30))
def test_tiles_cover_each_of_our_rows_once_with_rows_of_the_same_documents(seed: int) -> None:
    chance = np.random.default_rng(seed)
    rows: list[Row] = []
    for _ in range(chance.integers(1, 13)):
        choices: list[Row] = [None, [], [1], [1, 2], [2, 1], [int(chance.integers(9))]]
        rows += [choices[chance.integers(6)]] * int(chance.integers(1, 30))
    rows = rows[:40]
    written = tables()
    written.write(batch_of(rows))
    assert read(written) == rows + [None] * (40 - len(rows))
    listed = [(first, count) for first, count in written.tiles.view(-1, 2).tolist() if count]
    assert len(listed) <= written.num_tiles(len(rows))
    assert written.tiles.view(-1, 2)[: len(listed)].tolist() == [list(tile) for tile in listed]
    covered = [row for first, count in listed for row in range(first, first + count)]
    assert covered == [row for row, documents in enumerate(rows) if documents is not None]
    starts = written.rows.view(-1, 2)[:, 0].tolist()
    for first, count in listed:
        assert count <= 16 and len({starts[row] for row in range(first, first + count)}) == 1


def test_rows_of_one_request_share_their_documents() -> None:
    written = tables(max_documents=3)
    written.write(batch_of([[1, 2, 3]] * 40))
    assert read(written) == [[1, 2, 3]] * 40


def test_a_form_that_a_worker_meets_later_is_there_with_the_next_step() -> None:
    forms = Forms(SHAPES)
    written = DeviceTables(forms, 4, 4, 4, 16, DEVICE)
    first = forms.index("factors-4-1-8")
    written.write(None)
    second = forms.index("factors-2-0-4")
    written.write(None)
    for index, bits in (first, 8), (second, 4):
        found = written.forms[1 + index].cpu().numpy()
        assert np.array_equal(found[:, :7], forms.tables[index]) and (found[:, 7] == bits).all()
    assert written.forms[0, :, 0].tolist() == [1, 4], "the most components of both"


def test_a_codec_beyond_the_tables_is_refused_before_any_step() -> None:
    forms = Forms(SHAPES)
    written = DeviceTables(forms, 4, 4, 4, 16, DEVICE)
    codecs = [f"factors-{number}-1-8" for number in range(1, 65)]
    assert [forms.index(codec) for codec in codecs * 2] == [*range(64)] * 2
    with pytest.raises(GradientFormatError, match="64 codecs at most, got factors-65-1-8 besides; restart"):
        forms.index("factors-65-1-8")
    written.write(None)
    assert np.array_equal(written.forms[1:, :, :7].cpu().numpy(), forms.tables)


def test_a_step_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="60 documents, 40 rows and 15 tiles at most, got 61, 2 and 2"):
        tables().write(batch_of([[0] * 30, [1] * 31]))
    with pytest.raises(ValueError, match="got 0, 41 and 3"):
        tables().write(batch_of([[]] * 41))


def test_the_tables_stay_where_they_are() -> None:
    written = tables()
    places = [part.data_ptr() for part in (written.rows, written.tiles, written.documents, written.forms)]
    for rows in BATCHES * 2:
        written.write(batch_of(rows))
        assert [part.data_ptr() for part in (written.rows, written.tiles, written.documents, written.forms)] == places
    assert written.documents.data_ptr() % DOCUMENT_BYTES == 0
