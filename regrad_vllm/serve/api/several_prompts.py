"""A request with several prompts: each has documents and an adapter of its own, and vLLM joins the answers."""

from __future__ import annotations

import asyncio

from regrad_vllm.serve.api.engine import Engine
from regrad_vllm.serve.api.plan import Plan, Planner, PromptPlans
from regrad_vllm.serve.api.preparer import PreparedRequest, Preparer
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.api.request_holds import RequestHolds
from regrad_vllm.serve.api.used import Used, UsedByPrompts
from regrad_vllm.serve.seams.server_seams import ServedCall, make_served_call


class SeveralPrompts:
    """The prompts of one request, all prepared. ``release`` or ``let_go`` must follow ``prepare``."""

    def __init__(self, plans: PromptPlans, engine: Engine, releases: set[asyncio.Task[None]]) -> None:
        self._plans = plans
        self._engine = engine
        self._releases = releases
        self._prompts: dict[int, PreparedRequest | Used] = {}  # Used: the base model answers

    @property
    def used(self) -> UsedByPrompts:
        """The documents of each prompt."""
        prompts = tuple(prompt if isinstance(prompt, Used) else prompt.used for prompt in self._in_order())
        return UsedByPrompts(self._plans.request_id, prompts, self._plans.num_choices)

    async def prepare(self, planner: Planner, preparer: Preparer, wanted_rank: int | None) -> SeveralPrompts:
        """Prepares all prompts. After a RequestError nothing is held."""

        async def one(number: int, plan: Plan | Used) -> None:
            try:
                self._prompts[number] = plan if isinstance(plan, Used) else await preparer.prepare(plan, wanted_rank)
            except RequestError as error:
                assert isinstance(plan, Plan)
                if plan.by_name:
                    raise
                self._prompts[number] = planner.without_documents(plan.request_id, error)

        preparing = [asyncio.ensure_future(one(number, plan)) for number, plan in enumerate(self._plans.plans)]
        try:
            await asyncio.gather(*preparing)
        except BaseException:
            for task in preparing:
                task.cancel()
            await asyncio.wait(preparing)
            self.let_go()
            raise
        return self

    def texts(self, number: int) -> tuple[tuple[str, str], ...]:
        """(title, text) of each text for a prompt, see ``Found``."""
        prompt = self._prompts[number]
        return () if isinstance(prompt, Used) else prompt.found.texts

    def has_adapter(self, number: int) -> bool:
        """Whether a prompt runs with documents."""
        prompt = self._prompts[number]
        return isinstance(prompt, PreparedRequest) and prompt.placement is not None

    def call(self, model_name: str) -> ServedCall:
        """The call for vLLM's handler, with the calls of all prompts."""
        return ServedCall(None, model_name, prompt_calls=tuple(_call(one, model_name) for one in self._in_order()))

    def release(self, *, clean: bool) -> None:
        """Ends the holds of all prompts when the engine no longer needs them."""
        for holds in self._holds():
            holds.release(clean=clean)

    def let_go(self) -> None:
        """Ends the holds of all prompts at once. The engine must never have got the request."""
        for holds in self._holds():
            holds.let_go()

    def _in_order(self) -> list[PreparedRequest | Used]:
        return [self._prompts[number] for number in range(len(self._plans.plans))]

    def _holds(self) -> list[RequestHolds]:
        return [
            RequestHolds(prompt, self._engine, self._releases)
            for prompt in self._prompts.values()
            if isinstance(prompt, PreparedRequest)
        ]


def _call(prompt: PreparedRequest | Used, model_name: str) -> ServedCall:
    if isinstance(prompt, Used) or prompt.placement is None:
        return ServedCall(None, model_name)
    return make_served_call(prompt.placement.recipe, model_name, prompt.placement.data_parallel_rank)
