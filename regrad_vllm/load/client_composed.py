"""Two alternatives to our server: an adapter folder per request on stock vLLM, and the published code's method."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bank_service.wire.record import decode_gradient
from regrad_vllm.client import AsyncBank, Hit
from regrad_vllm.compose import compose
from regrad_vllm.data.questions import Question
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.evaluate.methods import MAX_ANSWER_TOKENS
from regrad_vllm.learner import Learner, save_adapter
from regrad_vllm.load.askers import Attempt, Passages, chat_body
from regrad_vllm.load.comparison import Contender, LoadCondition
from regrad_vllm.load.streaming import AnswerError, stream_chat

if TYPE_CHECKING:
    import httpx
    from torch import Tensor


class Gradients:
    """Fetches gradients from the bank and composes them in the client."""

    def __init__(self, bank: AsyncBank, learner: Learner, passages: Passages) -> None:
        self._bank = bank
        self._learner = learner
        self._passages = passages

    async def adapter(self, question: Question, condition: LoadCondition, attempt: Attempt) -> NDArray[np.float32]:
        """φ_q, (num_values,). BankError."""
        hits = await self._passages.retrieve(question, condition, attempt)
        start = time.perf_counter()
        records = {key: record async for key, record in self._bank.fetch([hit.gradient_digest for hit in hits])}
        attempt.moved_bytes += sum(map(len, records.values()))
        found = await asyncio.to_thread(self._compose, hits, records)
        attempt.prepare_ms += (time.perf_counter() - start) * 1000
        return found

    def _compose(self, hits: Sequence[Hit], records: dict[str, bytes]) -> NDArray[np.float32]:
        learner = self._learner
        deltas = [decode_gradient(records[hit.gradient_digest], learner.spec) for hit in hits]
        weights = learner.config.weights([hit.cosine for hit in hits])
        return compose(learner.phi, deltas, weights, learner.config.gamma)


class PeftFolders:
    """Stock vLLM: each request's adapter is written as a PEFT folder, loaded by name, used, unloaded and deleted."""

    def __init__(self, client: httpx.AsyncClient, learner: Learner, gradients: Gradients, folder: Path) -> None:
        """folder: for the adapters, on a file system in memory if the machine has one."""
        self._client = client
        self._learner = learner
        self._gradients = gradients
        self._folder = folder

    async def ask(self, question: Question, contender: Contender, condition: LoadCondition, attempt: Attempt) -> None:
        adapter = await self._gradients.adapter(question, condition, attempt)
        start = time.perf_counter()
        name = uuid.uuid4().hex
        folder = self._folder / name
        try:
            await asyncio.to_thread(save_adapter, folder, self._learner, adapter)
            attempt.moved_bytes += sum(path.stat().st_size for path in folder.iterdir())
            await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            attempt.prepare_ms += (time.perf_counter() - start) * 1000
            content = self._learner.config.prompts.render_blind(question.question)
            body = chat_body(name, self._learner.config.prompts, content, condition)
            try:
                await stream_chat(self._client, body, attempt.stream)
            finally:
                await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _post(self, path: str, body: dict[str, str]) -> None:
        response = await self._client.post(path, json=body)
        if response.status_code != 200:
            raise AnswerError(f"{path}: {response.status_code}: {response.text[:300]}")


class SwappedWeights:
    """The published code's method: one process, one request at a time. It overwrites and restores the base weights."""

    def __init__(self, model_folder: Path, learner: Learner, gradients: Gradients, dtype: str) -> None:
        import torch

        from regrad_vllm.base_model import load_base_model

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load_base_model(model_folder, dtype=getattr(torch, dtype), device=device)
        self._model: Any = model
        self._builder = PromptBuilder(tokenizer, learner.config.prompts)
        self._tokenizer = tokenizer
        self._learner = learner
        self._gradients = gradients

    async def ask(self, question: Question, contender: Contender, condition: LoadCondition, attempt: Attempt) -> None:
        adapter = await self._gradients.adapter(question, condition, attempt)
        stop = threading.Event()
        generating = asyncio.ensure_future(
            asyncio.to_thread(self._generate, question, adapter, condition, attempt, stop)
        )
        try:
            await asyncio.shield(generating)
        except asyncio.CancelledError:
            stop.set()  # a thread can't be cancelled, and the next request needs the restored weights
            await generating
            raise

    def _generate(
        self, question: Question, adapter: NDArray[np.float32], condition: LoadCondition, attempt: Attempt,
        stop: threading.Event,
    ) -> None:  # fmt: skip
        import torch

        start = time.perf_counter()
        kept = self._swap_in(adapter)
        attempt.prepare_ms += (time.perf_counter() - start) * 1000
        prompt = torch.tensor([self._builder.question(question.question)], device=self._model.device)
        fixed = condition.output_tokens
        times = _Times(attempt)

        def stopped(ids: Tensor, scores: object) -> Tensor:
            return torch.full((len(ids),), stop.is_set(), device=ids.device)

        with torch.no_grad():
            try:
                tokens = self._model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=False, streamer=times,
                    stopping_criteria=[stopped],
                    max_new_tokens=fixed or MAX_ANSWER_TOKENS, min_new_tokens=fixed or None,
                    pad_token_id=self._tokenizer.eos_token_id,
                )  # fmt: skip
                attempt.stream.ended = time.perf_counter()
            finally:
                for weight, own in kept:
                    weight.copy_(own)
        attempt.stream.prompt_tokens = prompt.shape[1]
        attempt.stream.output_tokens = tokens.shape[1] - prompt.shape[1]
        attempt.stream.text = str(self._tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True))

    def _swap_in(self, adapter: NDArray[np.float32]) -> list[tuple[Tensor, Tensor]]:
        """W += scaling · B A in every module of the learner. Returns (W, its former value) for each."""
        import torch

        kept = []
        views: dict[str, dict[str, Any]] = {}
        for tensor, view in self._learner.layout.views(adapter):
            views.setdefault(tensor.module, {})[tensor.part] = torch.tensor(view)
        with torch.no_grad():
            for module, parts in views.items():
                weight = self._model.get_submodule(module).weight
                kept.append((weight, weight.clone()))
                change = self._learner.scaling * (parts["B"] @ parts["A"])
                weight += change.to(weight.device, weight.dtype)
        return kept


class _Times:
    """Notes the time of each token. ``generate`` calls it with the prompt, then with each token."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._started = False

    def put(self, _: object) -> None:
        if self._started:
            self._attempt.stream.event_times.append(time.perf_counter())
        self._started = True

    def end(self) -> None:
        """``generate`` calls it at the end. There is nothing to do."""
