"""Random documents in blocks. Equal seeds give equal documents.

- Vectors: unit vectors of the embedder's dimension around NUM_CENTRES centres. The i-th axis has a standard
  deviation of i^-0.35. So they have about as many important directions as embeddings of texts. The participation ratio
  of 583 of them is 96, and of as many paragraphs by MiniLM 105. The cosine of a document and its centre is about 0.78,
  of a question and its document about 0.82.
- Texts: about 30 words of a vocabulary of 50,000 by Zipf's law. So the commonest words are in most documents, as in a
  language. A vector has nothing to do with its text.
- Gradients: a few random values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bank_service.testing.client import upload_of
from bank_service.values.vectors import unit
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, FloatArray, GradientSpec, encode_gradient

BLOCK = 500  # documents made, and uploaded by one stream, at a time
NUM_CENTRES = 3_000
VOCABULARY = 50_000
SELECTIVITIES = {"shelf": 10, "topic": 1_000, "author": 100_000}  # metadata: one in so many documents has the value
QUESTIONS_PER_BLOCK = 20
DOCUMENT_NOISE, QUESTION_NOISE = 0.8, 0.7
_SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvwz" for vowel in "aeiou"]
ENGLISH = (
    "what when where which who why how the a of in on for with was is are did does that which city river year first "
    "last people built found called name between after before during house king paper film music school war team "
    "player record company island bridge station church book author scientist theory number large small old new"
)


@dataclass(frozen=True, slots=True)
class DrawnQuestion:
    """A question near one of the bank's documents."""

    number: int  # of that document
    vector: FloatArray  # (dimension,)
    words: str  # eight of the document's own, common ones among them
    english: str  # 20 common words of a language, for the embedder
    metadata: dict[str, str]  # the document's


class DrawnCorpus:
    """``num_documents`` documents."""

    def __init__(self, num_documents: int, dimension: int, spec: GradientSpec, seed: int = 0) -> None:
        self.num_documents = num_documents
        self.dimension = dimension
        self.spec = spec
        self.seed = seed
        self._spectrum = (np.arange(1, dimension + 1) ** -0.35).astype(np.float32)
        self._spectrum /= np.linalg.norm(self._spectrum)
        self._centres = unit(self._noise(np.random.default_rng([seed, 7]), NUM_CENTRES))

    @property
    def num_blocks(self) -> int:
        return -(-self.num_documents // BLOCK)

    def block_size(self, block: int) -> int:
        return min(BLOCK, self.num_documents - block * BLOCK)

    def vectors(self, block: int) -> FloatArray:
        """(block_size, dimension) of the block's documents."""
        generator = self._generator(block, 0)
        size = self.block_size(block)
        centres = self._centres[generator.integers(0, NUM_CENTRES, size)]
        return unit(centres + DOCUMENT_NOISE * self._noise(generator, size))

    def rows(self, block: int) -> Iterator[tuple[str, dict[str, str], FloatArray]]:
        """Text, metadata and vector of each of the block's documents."""
        return zip(self._texts(block), self._metadata(block), self.vectors(block), strict=True)

    def uploads(self, block: int, note: str = "") -> list[pb.IngestGradientsRequest]:
        """The messages that store the block's documents. A ``note`` becomes one more pair of their metadata."""
        generator = self._generator(block, 2)
        vectors, texts, pairs = self.vectors(block), self._texts(block), self._metadata(block)
        parts: list[pb.IngestGradientsRequest] = []
        for place, text in enumerate(texts):
            values = generator.standard_normal(self.spec.num_values, np.float32)
            record = encode_gradient(values, self.spec, DEFAULT_CODEC)
            metadata = {**pairs[place], "note": note} if note else pairs[place]
            document = pb.Document(id=id_of(block * BLOCK + place), text=text, metadata=metadata)
            parts += upload_of(document, record, embedding=vectors[place].tolist(), chunk_bytes=2**20)
        return parts

    def questions(self, count: int) -> list[DrawnQuestion]:
        """Questions near documents of blocks all over the corpus."""
        generator = np.random.default_rng([self.seed, 8])
        num_blocks = min(self.num_blocks, -(-count // QUESTIONS_PER_BLOCK))
        blocks = generator.choice(self.num_blocks, num_blocks, replace=False)
        questions: list[DrawnQuestion] = []
        for number, block in enumerate(map(int, blocks)):
            wanted = (count - len(questions)) // (num_blocks - number)
            vectors, texts, pairs = self.vectors(block), self._texts(block), self._metadata(block)
            for place in map(int, generator.integers(0, len(texts), wanted)):
                vector = unit(vectors[place] + QUESTION_NOISE * self._noise(generator, 1)[0])
                words = " ".join(generator.choice(texts[place].split(), 8))
                english = " ".join(generator.choice(ENGLISH.split(), 20))
                questions.append(DrawnQuestion(block * BLOCK + place, vector, words, english, pairs[place]))
        return questions

    def nearest(self, questions: list[DrawnQuestion], count: int, same: str | None = None) -> np.ndarray:
        """(len(questions), count) numbers of the nearest documents, by comparing with each in float32.

        same: only documents with the question's value of this metadata; -1 where there are too few of them."""
        wanted = np.stack([question.vector for question in questions])
        best = np.full((len(questions), count), -2.0, np.float32)
        numbers = np.full((len(questions), count), -1, np.int64)
        for block in range(self.num_blocks):
            found = wanted @ self.vectors(block).T
            if same is not None:
                values = np.array([pairs[same] for pairs in self._metadata(block)])
                found[np.array([question.metadata[same] for question in questions])[:, None] != values] = -3
            scores = np.concatenate([best, found], axis=1)
            own = np.arange(block * BLOCK, block * BLOCK + self.block_size(block))
            candidates = np.concatenate([numbers, np.broadcast_to(own, (len(questions), len(own)))], axis=1)
            order = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            best, numbers = np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
        return numbers

    def _texts(self, block: int) -> list[str]:
        generator = self._generator(block, 1)
        lengths = generator.integers(20, 41, self.block_size(block))
        ranks = np.searchsorted(self._cumulated, generator.random(int(lengths.sum())))
        words = [word_of(int(rank)) for rank in ranks]
        ends = np.cumsum(lengths)
        return [" ".join(words[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    def _metadata(self, block: int) -> list[dict[str, str]]:
        generator = self._generator(block, 3)
        size = self.block_size(block)
        columns = {name: generator.integers(0, one_in, size).tolist() for name, one_in in SELECTIVITIES.items()}
        return [{name: str(values[place]) for name, values in columns.items()} for place in range(size)]

    def _noise(self, generator: np.random.Generator, count: int) -> FloatArray:
        noise: FloatArray = generator.standard_normal((count, self.dimension), np.float32) * self._spectrum
        return noise

    def _generator(self, block: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, block, what])

    @cached_property
    def _cumulated(self) -> np.ndarray:
        weights = 1 / (np.arange(VOCABULARY) + 2.7)
        return np.cumsum(weights / weights.sum())[:-1]


def id_of(number: int) -> str:
    return f"d{number:08d}"


def number_of(id: str) -> int:
    return int(id[1:])


def word_of(rank: int) -> str:
    """The word of a rank. The commonest words have one syllable, the rarest three."""
    syllables = _SYLLABLES[rank % len(_SYLLABLES)]
    while rank := rank // len(_SYLLABLES):
        syllables += _SYLLABLES[rank % len(_SYLLABLES)]
    return syllables
