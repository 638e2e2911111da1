"""The same evaluation without server and bank: one process, Hugging Face's own generation, exact search.

The reference that the served figures are held against, and the way to measure a learner where no engine runs. Slow:
every batch waits for its longest answer.
"""

from __future__ import annotations

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

from bank_service.embedder import Embedder, MiniLmEmbedder, embedded_text
from regrad_vllm.adapt.compose import compose
from regrad_vllm.base_model import load_base_model
from regrad_vllm.data.questions import SourceDocument
from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.encoder import GradientEncoder, check_base
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.evaluate.asking import Record, record_of, shown
from regrad_vllm.evaluate.datasets import EvalData
from regrad_vllm.evaluate.methods import MAX_TOKENS, Method
from regrad_vllm.evaluate.retrieve import Found, Retrieved, check_controls, with_controls
from regrad_vllm.evaluate.rivals import RivalSettings
from regrad_vllm.learn.continual import pretrain
from regrad_vllm.learn.per_document import fit_each
from regrad_vllm.learn.retrieval import embed_all
from regrad_vllm.learner import Learner


class InProcess:
    """One learner on one base model. float32 on a CPU, bfloat16 on a GPU."""

    def __init__(
        self,
        model_folder: Path,
        learner: Learner,
        own: Mapping[str, NDArray[np.float32]],
        settings: RivalSettings | None = None,
    ) -> None:
        """``own``: method → its plain adapter in the learner's layout. LearnerError for another base model."""
        check_base(learner, model_folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._base, self._tokenizer = load_base_model(model_folder, dtype=dtype, device=device)
        self._model = AdaptedModel(self._base, learner.layout, learner.scaling)
        self._builder = PromptBuilder(self._tokenizer, learner.config.prompts)
        self._encoder = GradientEncoder(self._model, self._builder, learner)
        self._learner = learner
        self._own = own
        self._settings = settings or RivalSettings()
        self._model_folder = model_folder
        self._texts: dict[str, tuple[str, str]] = {}
        self._deltas: dict[str, NDArray[np.float16]] = {}
        self._fitted: dict[str, NDArray[np.float16]] = {}

    def ask_all(
        self, data: EvalData, methods: Sequence[Method], top_k: int, seed: int, out: Path, batch_size: int = 16
    ) -> list[Record]:
        """Every question under every method; each answer a line added to ``out``."""
        from tqdm import tqdm

        self.read(data.documents)
        questions = Searcher(MiniLmEmbedder.installed()).search(data, top_k, seed)
        check_controls(questions, methods)
        if any(method.per_document for method in methods):
            documents = [(document.title, document.text) for document in data.documents]
            rate = self._settings.prag_learning_rate
            fitted = fit_each(self._model, self._builder, self._learner, documents, learning_rate=rate)
            self._fitted = {data.documents[index].id: delta.astype(np.float16) for index, delta in fitted}
        records: list[Record] = []
        bar = tqdm(total=len(questions) * len(methods), unit="answer", desc="eval in process")
        with out.open("a", encoding="utf-8") as file:
            for method in methods:
                for start in range(0, len(questions), batch_size):
                    found = self.ask(questions[start : start + batch_size], method)
                    records += found
                    file.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in found)
                    bar.update(len(found))
        bar.close()
        return records

    def pretrain(self, documents: Sequence[SourceDocument], *, go_on: bool = False) -> None:
        """Makes the adapter of "cpt": φ*, or with ``go_on`` the one that there is, that has read these documents."""
        start = self._own["cpt"] if go_on else self._learner.phi
        texts = [(document.title, document.text) for document in documents]
        rate = self._settings.cpt_learning_rate
        adapter = pretrain(self._learner, self._model_folder, texts, start=start, learning_rate=rate)
        self._own = {**self._own, "cpt": adapter}

    def read(self, documents: Sequence[SourceDocument]) -> None:
        """Makes documents known, or their new texts; a gradient is computed when first needed."""
        for document in documents:
            text = (document.title, document.text)
            if self._texts.get(document.id, text) != text:
                self._deltas.pop(document.id, None)
            self._texts[document.id] = text

    def ask(self, batch: Sequence[Retrieved], method: Method, gamma: float | None = None) -> list[Record]:
        """One batch of questions under one method. ``gamma``: the learner's where None."""
        prompts = [
            self._builder.question(asked.question.question, shown(asked, method, self._builder.prompts))
            for asked in batch
        ]
        adapters = None if method.adapter == "none" else [self._adapter(asked, method, gamma) for asked in batch]
        answers = self.generate(prompts, adapters)
        return [record_of(asked, method, answer) for asked, answer in zip(batch, answers, strict=True)]

    def _adapter(self, asked: Retrieved, method: Method, gamma: float | None) -> NDArray[np.float32]:
        if method.adapter == "learner":
            return self._learner.phi
        if method.adapter == "own":
            return self._own[method.name]
        found: Sequence[tuple[str, float]]
        if method.adapter == "retrieved":
            found = [(hit.id, hit.score) for hit in asked.hits]
        elif method.adapter == "wrong":
            found = [(hit.id, hit.score) for hit in asked.wrong_hits]
        else:
            chosen = asked.question.documents[0] if method.adapter == "gold" else asked.random_id
            found = [(chosen or "", 1.0)]
        known = self._fitted if method.per_document else self._deltas
        missing = [key for key, _ in found if key not in known]
        if missing:
            for key, encoded in zip(missing, self._encoder.encode([self._texts[key] for key in missing]), strict=True):
                known[key] = encoded.values.astype(np.float16)
        deltas = [known[key].astype(np.float32) for key, _ in found]
        config = self._learner.config
        weights = config.weights([score for _, score in found])
        return compose(self._learner.phi, deltas, weights, config.gamma if gamma is None else gamma)

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[NDArray[np.float32]] | None) -> list[str]:
        """Greedy answers to token prompts, each under its own adapter (None: the base model)."""
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
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=MAX_TOKENS, do_sample=False,
                pad_token_id=self._tokenizer.eos_token_id, eos_token_id=self._tokenizer.eos_token_id,
            )  # fmt: skip
        texts = self._tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]


class Searcher:
    """What a bank would find: the same embedder on the same texts, exact search. Embeds a text once."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: dict[str, NDArray[np.float32]] = {}

    def search(self, data: EvalData, top_k: int, seed: int) -> list[Retrieved]:
        """The hits of every question among all documents, and what the controls are given."""
        documents = self._embed([embedded_text(document.title, document.text) for document in data.documents])
        hits = []
        for cosines in self._embed([question.question for question in data.questions]) @ documents.T:
            best = np.argsort(-cosines, kind="stable")[:top_k]
            chosen = [(data.documents[index], float(cosines[index])) for index in best]
            hits.append(tuple(Found(document.id, score, document.title, document.text) for document, score in chosen))
        return with_controls(data, hits, random.Random(f"regrad.evaluate.controls.{seed}"))

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known.update(zip(missing, embed_all(missing, self._embedder), strict=True))
        return np.stack([self._known[text] for text in texts])
