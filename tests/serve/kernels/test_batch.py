"""The documents of a step, and the forms that a worker has met."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bank_service.wire.codecs.base import GradientFormatError
from bank_service.wire.codecs.factors import factor_form
from regrad_vllm.serve.kernels.batch import GROUP_ROWS, BatchDocuments, Forms

SHAPES = ((4, 300), (200, 4))


def batch(**changes: object) -> BatchDocuments:
    right = BatchDocuments(
        num_rows=5, rows=np.array([1, 3]), first=np.array([0, 2, 3]), addresses=np.array([64, 128, 64]),
        coefficients=np.zeros(3, np.float32), forms=np.zeros(3, np.int32),
    )  # fmt: skip
    return dataclasses.replace(right, **changes)


def test_forms_keep_their_index_while_others_are_added() -> None:
    forms = Forms(SHAPES)
    names = ["factors-4-1-8", "factors-4-1-4", "factors-2-0-8"]
    assert [forms.index(name) for name in names] == [0, 1, 2]
    before = forms.tables
    assert [forms.index(name) for name in reversed(names)] == [2, 1, 0]
    assert forms.tables is before
    for name, table, bits in zip(names, forms.tables, forms.bits, strict=True):
        assert np.array_equal(table, factor_form(name, SHAPES).table)
        assert bits == factor_form(name, SHAPES).bits


def test_a_codec_without_factors_has_no_form() -> None:
    forms = Forms(SHAPES)
    with pytest.raises(GradientFormatError, match="must be factors-P-Q-BITS"):
        forms.index("int8")
    assert forms.tables.shape == (0, 2, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.array([3, 1])}, "rows must ascend"),
        ({"rows": np.array([1, 5])}, "below the batch's 5"),
        ({"rows": np.array([-1, 3])}, "rows must ascend"),
        ({"rows": np.array([1, 3], np.int32)}, "rows must be 2 contiguous values of int64"),
        ({"first": np.array([0, 3])}, "first must be 3"),
        ({"first": np.array([0, 2, 4])}, "first must ascend from 0 to the 3 documents"),
        ({"first": np.array([1, 2, 3])}, "first must ascend from 0"),
        ({"first": np.array([0, 4, 3])}, "first must ascend"),
        ({"addresses": np.arange(6)[::2]}, "addresses must be 3 contiguous"),
        ({"coefficients": np.zeros(3)}, "coefficients must be 3 contiguous values of float32"),
        ({"forms": np.zeros(2, np.int32)}, "forms must be 3"),
    ],
)
def test_arrays_that_the_loops_could_not_read_are_refused(changes: dict[str, object], message: str) -> None:
    batch()
    with pytest.raises(ValueError, match=message):
        batch(**changes)


def test_rows_with_the_same_documents_and_steps_are_grouped_where_they_are_many() -> None:
    rng = np.random.default_rng(0)
    kinds = [[(64, 0.5, 0)], [(64, 0.5, 1)], [(64, 0.25, 0)], [(64, 0.5, 0), (128, 0.5, 0)], [], [(128, 0.5, 0)]]
    for _ in range(20):
        chosen = np.repeat(rng.integers(len(kinds), size=12), rng.integers(1, 2 * GROUP_ROWS, size=12))
        uses = [kinds[kind] for kind in chosen]
        flat = [use for own in uses for use in own]
        made = BatchDocuments(
            len(uses), np.arange(len(uses)), np.cumsum([0] + [len(own) for own in uses]),
            np.array([use[0] for use in flat]), np.array([use[1] for use in flat], np.float32),
            np.array([use[2] for use in flat], np.int32),
        )  # fmt: skip
        groups, others = made.grouped
        right = {kind: np.flatnonzero(chosen == kind).tolist() for kind in set(chosen.tolist())}
        many = sorted(rows for rows in right.values() if len(rows) >= GROUP_ROWS)
        assert sorted(group.tolist() for group in groups) == many
        assert others.tolist() == sorted(row for rows in right.values() if len(rows) < GROUP_ROWS for row in rows)
