"""A request with several prompts: each has documents and an adapter of its own, and vLLM joins the answers.

All documents are found before vLLM gets the request. A prompt's adapter is composed when vLLM starts the prompt. So no
prompt waits for a slot while it keeps another's, and large requests can't block each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from regrad_vllm.serve.engine import Engine
from regrad_vllm.serve.plan import Plan, Planner, PromptPlans
from regrad_vllm.serve.preparer import Found, Preparer
from regrad_vllm.serve.request_errors import RequestError
from regrad_vllm.serve.request_holds import RequestHolds
from regrad_vllm.serve.used import Used, UsedByPrompts
from regrad_vllm.serve.vllm_server_seams import ServedCall, make_served_call


class SeveralPrompts:
    """The prompts of one request. ``release`` must follow ``find``."""

    def __init__(
        self,
        plans: PromptPlans,
        planner: Planner,
        preparer: Preparer,
        engine: Engine,
        releases: set[asyncio.Task[None]],
        wanted_rank: int | None,
    ) -> None:
        self._plans = plans
        self._planner = planner
        self._preparer = preparer
        self._engine = engine
        self._releases = releases
        self._wanted_rank = wanted_rank
        self._found: dict[int, Found] = {}  # prompts that vLLM hasn't started
        self._used: dict[int, Used] = {}

    @property
    def used(self) -> UsedByPrompts:
        """The documents of each prompt, after ``find``."""
        prompts = tuple(self._used[number] for number in range(len(self._plans.plans)))
        return UsedByPrompts(self._plans.request_id, prompts, self._plans.num_choices)

    async def find(self) -> SeveralPrompts:
        """Finds the documents of all prompts and holds their gradients. After a RequestError nothing is held."""
        finding = [asyncio.ensure_future(self._find(number, plan)) for number, plan in enumerate(self._plans.plans)]
        try:
            await asyncio.gather(*finding)
        except BaseException:
            for task in finding:
                task.cancel()
            await asyncio.wait(finding)
            self.let_go()
            raise
        return self

    def texts(self, number: int) -> tuple[tuple[str, str], ...]:
        """(title, text) of the documents that go into a prompt, in mode icl. Empty after the prompt's start."""
        found = self._found.get(number)
        return found.texts if found is not None else ()

    def call(self, model_name: str) -> ServedCall:
        """The call for vLLM's handler. It asks for each prompt's adapter by the prompt's number."""
        return ServedCall(None, model_name, prompt_call=partial(self._prompt_call, model_name))

    def release(self, *, clean: bool) -> None:
        """Ends the holds of prompts that vLLM hasn't started. Each other prompt ends its own."""
        self.let_go()

    def let_go(self) -> None:
        """Ends the holds of prompts that vLLM hasn't started."""
        for found in self._found.values():
            found.gradients.release()
        self._found.clear()

    @asynccontextmanager
    async def _prompt_call(self, model_name: str, number: int) -> AsyncIterator[ServedCall]:
        """The call for a prompt that vLLM starts, with its adapter held. RequestError."""
        if self._used[number].adapter is None:
            yield ServedCall(None, model_name)
            return
        found = self._found.pop(number, None)
        if found is None:
            raise RequestError(503, f"prompt[{number}] must start once, while its request runs")
        prepared = await self._preparer.compose(found, self._wanted_rank)
        holds = RequestHolds(prepared, self._engine, self._releases)
        clean = False
        try:
            placement = prepared.placement
            assert placement is not None  # the prompt has an adapter
            yield make_served_call(placement.recipe, model_name, placement.data_parallel_rank)
            clean = True
        finally:
            holds.release(clean=clean)

    async def _find(self, number: int, plan: Plan | Used) -> None:
        if isinstance(plan, Used):
            self._used[number] = plan
            return
        try:
            self._found[number] = await self._preparer.find(plan)
            self._used[number] = self._found[number].used
        except RequestError as error:
            if plan.by_name:
                raise
            self._used[number] = self._planner.without_documents(plan.request_id, error)
