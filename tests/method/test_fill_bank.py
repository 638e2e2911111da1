"""Storing the documents of an evaluation."""

from __future__ import annotations

import pytest

from regrad_vllm.data.questions import SourceDocument
from regrad_vllm.evaluate.fill_bank import ingest
from regrad_vllm.local.processes import free_port


def test_a_bank_that_takes_no_documents_is_named() -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    with pytest.raises(RuntimeError, match=f"the bank at {nowhere} must take the documents: "):
        ingest([SourceDocument("a", "", "A text.", "set")], nowhere, "default")
