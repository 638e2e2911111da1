"""The bank's hits for the training questions, so that training sees the same kind of hits as serving."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bank_service.values.embedder import Embedder, embedded_text
from regrad_vllm.learn.tasks import TaskSet, TaskVectors

NUM_HITS = 10
_BLOCK = 1024  # questions searched for at a time


def with_retrieval(task_set: TaskSet, embedder: Embedder, cache: Path) -> TaskSet:
    """The set with the embeddings of its documents and of each task's first question, and the question's hits.

    cache: the folder that keeps them for the next run with the same texts and the same embedder.
    """
    documents = [embedded_text(task.title, task.text) for task in task_set.tasks]
    questions = [task.questions[0][0] for task in task_set.tasks]
    state = hashlib.sha256(embedder.name.encode())
    for text in (*documents, *questions):
        state.update(hashlib.sha256(text.encode()).digest())
    path = cache / f"vectors-{task_set.name}-{state.hexdigest()[:16]}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, questions=embed_all(questions, embedder), documents=embed_all(documents, embedder))
        partial.replace(path)
    saved = np.load(path, allow_pickle=False)
    vectors = saved["questions"], saved["documents"]
    return replace(task_set, retrieval=TaskVectors(*vectors, _search(*vectors)))


def _search(questions: NDArray[np.float32], documents: NDArray[np.float32]) -> NDArray[np.int32]:
    """Indices of the best documents, (rows, at most NUM_HITS), best first. Ties are ordered by index."""
    count = min(NUM_HITS, len(documents))
    blocks = []
    for start in range(0, len(questions), _BLOCK):
        cosines = questions[start : start + _BLOCK] @ documents.T
        blocks.append(np.argsort(-cosines, axis=1, kind="stable")[:, :count].astype(np.int32))
    return np.concatenate(blocks)


def embed_all(texts: Sequence[str], embedder: Embedder) -> NDArray[np.float32]:
    """Embeddings, float32 (texts, dimension), L2 norm 1. It uses all cores and shows a progress bar."""
    from tqdm import tqdm

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(embedder.embed, texts), total=len(texts), desc="embedding", unit="text"))
    return np.stack(rows).astype(np.float32)
