"""What the bank's retrieval finds for the training questions, so that the learner sees the hits that it will serve."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bank_service.embedder import Embedder, embedded_text
from regrad_vllm.learn.tasks import TaskSet

NUM_HITS = 10


def with_hits(task_set: TaskSet, embedder: Embedder, cache: Path) -> TaskSet:
    """The set with the hits of each task's first question among the set's documents, exact search.

    ``cache``: a folder, where they are kept for the next run on the same texts with the same embedder.
    """
    documents = [embedded_text(task.title, task.text) for task in task_set.tasks]
    questions = [task.questions[0][0] for task in task_set.tasks]
    state = hashlib.sha256(embedder.name.encode())
    for text in (*documents, *questions):
        state.update(hashlib.sha256(text.encode()).digest())
    path = cache / f"hits-{task_set.name}-{state.hexdigest()[:16]}.npz"
    if path.exists():
        saved = np.load(path, allow_pickle=False)
        indices, scores = saved["indices"], saved["scores"]
    else:
        indices, scores = _search(_embed(questions, embedder), _embed(documents, embedder))
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, indices=indices, scores=scores)
        partial.replace(path)
    hits = tuple(
        tuple((int(index), float(score)) for index, score in zip(*row, strict=True))
        for row in zip(indices, scores, strict=True)
    )
    return replace(task_set, hits=hits)


def _search(
    questions: NDArray[np.float32], documents: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(rows, NUM_HITS) indices of the best documents and their cosines, best first."""
    count = min(NUM_HITS, len(documents))
    cosines = questions @ documents.T
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :count].astype(np.int32)
    return best, np.take_along_axis(cosines, best, axis=1)


def _embed(texts: Sequence[str], embedder: Embedder) -> NDArray[np.float32]:
    from tqdm import tqdm

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(embedder.embed, texts), total=len(texts), desc="embedding", unit="text"))
    return np.stack(rows).astype(np.float32)
