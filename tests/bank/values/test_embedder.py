from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bank_service.values.embedder import MiniLmEmbedder


def test_texts_of_one_meaning_lie_nearer_than_others(embedder: MiniLmEmbedder) -> None:
    cat, kitten, tax = (
        embedder.embed(text) for text in ("A cat sleeps.", "A kitten is napping.", "The income tax form is due in May.")
    )
    assert cat @ kitten > 0.5 > 0.3 > cat @ tax


@pytest.mark.parametrize("text", ["a", "word " * 5000, "x" * 100_000, "🦉", "\n", "中文"])
def test_any_text_has_a_vector_of_length_1(embedder: MiniLmEmbedder, text: str) -> None:
    vector = embedder.embed(text)
    assert vector.dtype == np.float32 and vector.shape == (embedder.dimension,) == (384,)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_a_vector_does_not_depend_on_what_else_is_embedded_at_the_time(embedder: MiniLmEmbedder) -> None:
    texts = [f"sentence number {n} " * (n % 5 + 1) for n in range(12)]
    alone = [embedder.embed(text) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(embedder.embed, texts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
