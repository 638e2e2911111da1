"""What several nodes note together beside the gradients of one catalog."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bank_service.blobs import claim
from bank_service.blobs.blob_store import objects_in
from bank_service.blobs.claim import SEQUENCE, Claim
from bank_service.blobs.objects import Objects


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "KEEP_SECONDS", 0.0)


def noted(objects: Objects) -> int:
    return int(json.loads(objects.read(SEQUENCE))["sequence"])


def node_at(objects: Objects, sequence: int) -> Claim:
    """A node that has read this sequence from the catalog."""
    made = Claim(objects, "the folder", "a" * 32, lambda: sequence, lambda: True, lambda: "nodes")
    made.take("nodes")
    return made


def test_a_late_node_does_not_put_the_noted_sequence_back(tmp_path: Path) -> None:
    objects = objects_in(tmp_path)
    late, other = node_at(objects, 5), node_at(objects, 9)
    other.keep()
    late.keep()
    assert noted(objects) == 9


def test_a_sequence_that_went_back_is_noted_again_though_the_catalog_stands_still(tmp_path: Path) -> None:
    objects = objects_in(tmp_path)
    node = node_at(objects, 9)
    node.keep()
    objects.put(SEQUENCE, json.dumps({"sequence": 5}).encode())  # of a node that read the object before
    node.keep()
    assert noted(objects) == 9
