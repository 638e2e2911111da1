"""Evaluation documents into a bank, the way that users bring theirs: by `regrad ingest`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from regrad_vllm.evaluate.datasets import EvalDocument


def ingest(documents: Sequence[EvalDocument], bank: str, namespace: str, folder: Path) -> None:
    """Writes ``folder``/documents.jsonl and ingests it. CalledProcessError where the bank refuses it."""
    corpus = folder / "documents.jsonl"
    lines = (json.dumps({"id": d.id, "title": d.title, "text": d.text}, ensure_ascii=False) for d in documents)
    corpus.write_text("\n".join(lines) + "\n", "utf-8")
    command = ["-m", "regrad_vllm.cli", "ingest", str(corpus), "--bank", bank, "--namespace", namespace]
    subprocess.run([sys.executable, *command], check=True)
