"""The evaluation without server and bank: one process, generation by Hugging Face, exact search.

It is the reference for the served figures, and it runs on machines without vLLM. It is slow, because every batch waits
for its longest answer. A prompt that was answered before under the same adapter isn't generated again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bank_service.values.embedder import Embedder, default_embedder, embedded_text
from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient
from regrad_vllm.base_model import load_base_model
from regrad_vllm.compose import compose
from regrad_vllm.data.questions import EvalData, SourceDocument
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.gradient_encoder import GradientEncoder, check_base
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.evaluate.answers import Record, record_of, shown
from regrad_vllm.evaluate.methods import MAX_ANSWER_TOKENS, Method
from regrad_vllm.evaluate.retrieve import FoundDocument, Retrieved, check_controls, with_controls
from regrad_vllm.evaluate.rivals import RivalSettings
from regrad_vllm.learn.continual import pretrain
from regrad_vllm.learn.cues import Cues
from regrad_vllm.learn.per_document import fit_each
from regrad_vllm.learn.training_hits import embed_all
from regrad_vllm.learner import Learner

_BATCH = 16  # questions
_ENCODED_AT_ONCE = 128  # documents; their float32 gradients are in memory together
_Key = tuple[tuple[int, ...], bytes]  # tokens of the prompt, digest of the adapter


class InProcess:
    """One learner on one base model. Gradients pass through the bank's default codec, as they do when served."""

    def __init__(
        self,
        model_folder: Path,
        learner: Learner,
        own: Mapping[str, NDArray[np.float32]],
        settings: RivalSettings | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """LearnerError if the learner belongs to another base model.

        own: method → its plain adapter in the learner's layout, float32 (num_values,). dtype: the base model's.
        """
        check_base(learner, model_folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._base, self._tokenizer = load_base_model(model_folder, dtype=dtype, device=device)
        self._model = AdaptedModel(self._base, learner.layout, learner.scaling)
        self.builder = PromptBuilder(self._tokenizer, learner.config.prompts)
        self.encoder = GradientEncoder(self._model, self.builder, learner)
        self._learner = learner
        self._own = own
        self._settings = settings or RivalSettings()
        self._model_folder = model_folder
        self._answers: dict[_Key, str] = {}
        self._texts: dict[str, tuple[str, str]] = {}
        self._deltas: dict[str, bytes] = {}  # document or method → encoded δ, as in a bank
        self._fitted: dict[str, bytes] = {}

    def ask_all(
        self, data: EvalData, methods: Sequence[Method], top_k: int, seed: int, out: Path, cue_sentences: int = 0
    ) -> list[Record]:
        """Asks every question under every method. Each answer is appended to ``out`` as a line."""
        from tqdm import tqdm

        self.read(data.documents)
        questions = ExactSearch(default_embedder()).search(data, top_k, seed, cue_sentences)
        check_controls(questions, methods)
        if any(method.per_document for method in methods):
            documents = [(document.title, document.text) for document in data.documents]
            rate = self._settings.prag_learning_rate
            fitted = fit_each(self._model, self.builder, self._learner, documents, learning_rate=rate)
            self._fitted = {data.documents[index].id: self._record(delta) for index, delta in fitted}
        records: list[Record] = []
        bar = tqdm(total=len(questions) * len(methods), unit="answer", desc="eval in process")
        with out.open("a", encoding="utf-8") as file:
            for method in methods:
                found = self.ask(questions, method)
                records += found
                file.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in found)
                file.flush()
                bar.update(len(found))
        bar.close()
        return records

    def pretrain(self, documents: Sequence[SourceDocument], *, go_on: bool = False) -> None:
        """Trains the adapter of "cpt" on these documents, from φ* or, with ``go_on``, from its present state."""
        start = self._own["cpt"] if go_on else self._learner.phi
        texts = [(document.title, document.text) for document in documents]
        rate, epochs = self._settings.cpt_learning_rate, self._settings.cpt_epochs
        adapter = pretrain(self._learner, self._model_folder, texts, start=start, learning_rate=rate, epochs=epochs)
        self._own = {**self._own, "cpt": adapter}

    def read(self, documents: Sequence[SourceDocument]) -> None:
        """Adds documents or replaces their texts. A gradient is computed when it is first needed."""
        for document in documents:
            text = (document.title, document.text)
            if self._texts.get(document.id, text) != text:
                self._deltas.pop(document.id, None)
            self._texts[document.id] = text

    def ask(self, questions: Sequence[Retrieved], method: Method, gamma: float | None = None) -> list[Record]:
        """The records of these questions under one method, in their order. ``gamma`` None: the learner's own."""
        prompts = [
            self.builder.question(asked.question.question, shown(asked, method, self.builder.prompts))
            for asked in questions
        ]
        self._encode(questions, method)
        keys: dict[int, _Key] = {}
        waiting: dict[_Key, tuple[list[int], NDArray[np.float32] | None]] = {}
        for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):  # little padding
            adapter = None if method.adapter == "none" else self._adapter(questions[index], method, gamma)
            digest = b"" if adapter is None else hashlib.sha256(adapter.tobytes()).digest()
            keys[index] = (tuple(prompts[index]), digest)
            if keys[index] not in self._answers:
                waiting[keys[index]] = (prompts[index], adapter)
            if len(waiting) == _BATCH:
                self._answer(waiting)
        self._answer(waiting)
        return [record_of(asked, method, self._answers[keys[index]]) for index, asked in enumerate(questions)]

    def _answer(self, waiting: dict[_Key, tuple[list[int], NDArray[np.float32] | None]]) -> None:
        """Generates all waiting answers and empties ``waiting``. Either all have an adapter, or no one has."""
        if waiting:
            prompts = [prompt for prompt, _ in waiting.values()]
            adapters = [adapter for _, adapter in waiting.values() if adapter is not None]
            self._answers.update(zip(waiting, self.generate(prompts, adapters or None), strict=True))
            waiting.clear()

    def _adapter(self, asked: Retrieved, method: Method, gamma: float | None) -> NDArray[np.float32]:
        if method.adapter == "learner":
            return self._learner.phi
        if method.adapter == "own":
            return self._own[method.own_adapter]
        found = _documents(asked, method)
        known = self._fitted if method.per_document else self._deltas
        deltas = [decode_gradient(known[key], self._learner.spec) for key, _ in found]
        config = self._learner.config
        weights = config.weights([score for _, score in found])
        return compose(self._learner.phi, deltas, weights, config.gamma if gamma is None else gamma)

    def _encode(self, questions: Sequence[Retrieved], method: Method) -> None:
        """Makes the missing gradients."""
        if method.per_document:
            return
        keys = dict.fromkeys(key for asked in questions for key, _ in _documents(asked, method))
        missing = [key for key in keys if key not in self._deltas]
        for start in range(0, len(missing), _ENCODED_AT_ONCE):
            some = missing[start : start + _ENCODED_AT_ONCE]
            for key, encoded in zip(some, self.encoder.encode([self._texts[key] for key in some]), strict=True):
                self._deltas[key] = self._record(encoded.values)

    def _record(self, delta: NDArray[np.float32]) -> bytes:
        return encode_gradient(delta, self._learner.spec, DEFAULT_CODEC)

    @torch.no_grad()
    def expectations(
        self, prompts: Sequence[list[int]], answers: Sequence[str], adapters: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """Log probabilities of every token of the vocabulary at each position of a given answer.

        Each question has its own adapter. Each array is (tokens of the answer, vocabulary).
        """
        rows = [
            (prompt + self.builder.answer(answer), len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        batch = TokenBatch.pad(rows, self._model.device)
        parts = self._model.split(torch.tensor(np.stack(adapters), device=self._model.device))
        final = self._model.upper(self._model.lower(batch), parts, batch)
        counted = batch.targets != -100
        return [
            self._model.logits(own[places]).log_softmax(-1).cpu().numpy()
            for own, places in zip(final, counted, strict=True)
        ]

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[NDArray[np.float32]] | None) -> list[str]:
        """Greedy answers to token prompts, each under its own adapter. ``adapters`` None: the base model alone."""
        device = self._model.device
        width = max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(prompts):
            ids[row, width - len(tokens) :] = torch.as_tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        injected: Any = nullcontext()
        if adapters is not None:
            injected = self._model.injected(self._model.split(torch.tensor(np.stack(adapters), device=device)))
        with injected:
            generate: Any = self._base.generate  # untyped
            found = generate(
                input_ids=ids.to(device), attention_mask=mask.to(device),
                max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False,
                pad_token_id=self._tokenizer.eos_token_id, eos_token_id=self._tokenizer.eos_token_id,
            )  # fmt: skip
        texts = self._tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]


def _documents(asked: Retrieved, method: Method) -> list[tuple[str, float]]:
    """(id, score) of the documents that the method composes into the adapter."""
    if method.adapter in ("none", "learner", "own"):
        return []
    if method.adapter in ("gold", "random"):
        return [((asked.question.documents[0] if method.adapter == "gold" else asked.random_id) or "", 1.0)]
    return [(hit.id, hit.score) for hit in (asked.hits if method.adapter == "retrieved" else asked.wrong_hits)]


class ExactSearch:
    """Retrieval without a bank: the bank's embedder and texts, with exact search. Each text is embedded once."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: dict[str, NDArray[np.float32]] = {}

    def search(self, data: EvalData, top_k: int, seed: int, cue_sentences: int = 0) -> list[Retrieved]:
        """The hits of every question among all documents with their cue, and the documents for the controls."""
        documents = self._embed([embedded_text(document.title, document.text) for document in data.documents])
        hits = []
        for cosines in self._embed([question.question for question in data.questions]) @ documents.T:
            best = np.argsort(-cosines, kind="stable")[:top_k]
            chosen = [(data.documents[index], float(cosines[index])) for index in best]
            hits.append(
                tuple(FoundDocument(document.id, score, document.title, document.text) for document, score in chosen)
            )
        return with_controls(
            data, hits, random.Random(f"regrad.evaluate.controls.{seed}"), self._cues(data, hits, cue_sentences)
        )

    def _cues(
        self, data: EvalData, hits: Sequence[tuple[FoundDocument, ...]], number: int
    ) -> list[tuple[tuple[str, str], ...]]:
        if not number:
            return []
        cues = Cues(self._embedder, number)
        return [
            cues.nearest(question.question, [(hit.title, hit.text) for hit in found])
            for question, found in zip(data.questions, hits, strict=True)
        ]

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known.update(zip(missing, embed_all(missing, self._embedder), strict=True))
        return np.stack([self._known[text] for text in texts])
