"""The plan of one request, decided from its body and the settings alone, without I/O."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from regrad_vllm.client import Query
from regrad_vllm.learner import Learner
from regrad_vllm.naming import MODEL_SUFFIX
from regrad_vllm.serve.api.kept_answer import unfit
from regrad_vllm.serve.api.request import MAX_QUERY_BYTES, RegradOptions
from regrad_vllm.serve.api.request_errors import RequestError, shown
from regrad_vllm.serve.api.routes import Body, ChatPrompt, CompletionPrompt, PromptShape, split_prompts
from regrad_vllm.serve.api.used import Used
from regrad_vllm.serve.settings import Mode, Settings

MAX_PROMPTS = 64  # of one request, if each has documents of its own
SWITCHED_OFF = "regrad.enabled is false"
_MAX_REQUEST_ID_CHARS = 512
_WITH_CUE = ("cue", "auto")  # modes with sentences in the prompt
_MAX_CHOICES = 16384  # of each prompt, vLLM's default limit
_LOGGER = logging.getLogger("regrad")


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan for one request, with all defaults filled in."""

    request_id: str
    query: Query
    gamma: float
    mode: Mode
    by_name: bool  # the request itself asked for ReGrad, so that an outage is an error
    keeps_mode: bool  # the request names the mode, or on_error is fail_closed: an older bank without cues is an error
    reason: str | None = None  # why the mode is not the server's
    min_confidence: float = 0.0  # in mode auto: an answer with less is asked for again


@dataclass(frozen=True, slots=True)
class PromptPlans:
    """The plans for a request with several prompts, each of which has documents of its own."""

    request_id: str
    plans: tuple[Plan | Used, ...]  # in the order of the prompts; Used: the base model answers
    num_choices: int  # of each prompt


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes plans for the requests of one server."""

    settings: Settings
    learner: Learner
    model_names: tuple[str, ...]  # the names under which vLLM serves the base model

    def plan(
        self, body: Body, shape: PromptShape, header_id: str | None, adapter_names: frozenset[str]
    ) -> Plan | PromptPlans | Used | None:
        """The plan of a request. RequestError names the field at fault.

        Used is returned for a request that the base model answers, None for a request that ReGrad ignores.
        header_id: the X-Request-Id header. adapter_names: the LoRA adapters that vLLM serves by name.
        """
        model = body.get("model")
        named = isinstance(model, str) and model in self.regrad_names
        asked = body.get("regrad") is not None
        if not (asked or self.settings.default or str(model).endswith(MODEL_SUFFIX)):
            return None
        most = self.settings.max_documents
        options = RegradOptions.parse(body["regrad"], most) if asked else RegradOptions()
        if not named and model is not None and model not in self.model_names:
            self._check_other_model(model, adapter_names, wanted=asked and options.enabled)
            return None  # another adapter, or an unknown model: vLLM answers
        request_id = _request_id(body, shape, header_id)
        if not options.enabled:
            if not named:
                return None
            namespace = options.namespace or self.settings.namespace
            return Used(request_id, namespace, options.mode or self.settings.mode, 0.0, reason=SWITCHED_OFF)
        by_name = named or asked
        try:
            if body.get("background"):
                raise RequestError.bad("background", "false or absent with regrad", body["background"])
            return self._planned(options, body, shape, request_id, by_name=by_name)
        except RequestError as error:
            if by_name:
                raise
            return self.without_documents(request_id, error)

    def without_documents(self, request_id: str, error: RequestError) -> Used:
        """The fallback to the base model, for a request that has ReGrad by the server's default alone.

        With on_error fail_closed the error itself is raised.
        """
        if self.settings.on_error == "fail_closed":
            raise error
        _LOGGER.warning("request %r falls back to the base model: %s", request_id, error.message)
        return Used(request_id, self.settings.namespace, "blind", self.gamma, fallback=True, reason=error.message)

    @property
    def gamma(self) -> float:
        """The strength for requests that name none."""
        return self.learner.config.gamma if self.settings.gamma is None else self.settings.gamma

    @property
    def regrad_names(self) -> tuple[str, ...]:
        """The model names that switch ReGrad on."""
        return tuple(name + MODEL_SUFFIX for name in self.model_names)

    def _check_other_model(self, model: object, adapter_names: frozenset[str], *, wanted: bool) -> None:
        """RequestError for a model that isn't the base model, if the request wants ReGrad."""
        known = ", ".join([*self.model_names, *self.regrad_names])
        if model in adapter_names:
            if wanted:
                raise RequestError.bad("model", f"one of {known} with regrad", model)
        elif isinstance(model, str) and (wanted or model.endswith(MODEL_SUFFIX)):
            raise RequestError(404, f"model must be one of {known}, got {shown(model)}", "model")

    def base_name(self, model: object) -> str:
        """The base model's name that vLLM must see for a request to ``model``."""
        if isinstance(model, str) and model in self.regrad_names:
            return model.removesuffix(MODEL_SUFFIX)
        return model if isinstance(model, str) else self.model_names[0]

    def _planned(
        self, options: RegradOptions, body: Body, shape: PromptShape, request_id: str, *, by_name: bool
    ) -> Plan | PromptPlans:
        """Several prompts have a plan each, unless they share documents and no text goes into any."""
        parts = split_prompts(body, shape)
        mode = options.mode or self.settings.mode
        share = bool(options.query or options.document_ids)
        if len(parts) == 1 or (share and mode == "blind"):
            return self._filled(options, body, shape, request_id, by_name=by_name)
        limit = _limit_of(parts)
        if limit is None:
            return self._by_prompt(options, parts, shape, request_id, by_name=by_name)
        error, why = limit
        if not share:
            raise error
        if options.mode or options.cue_sentences:
            raise RequestError.bad("regrad.mode", f"blind with {why}, where no prompt gets text of its own", mode)
        plan = self._filled(replace(options, mode="blind"), body, shape, request_id, by_name=by_name)
        reason = f"the mode is blind and not the server's {mode}: with {why} no prompt gets text of its own"
        return replace(plan, reason=reason)

    def _by_prompt(
        self, options: RegradOptions, parts: Sequence[Body], shape: PromptShape, request_id: str, *, by_name: bool
    ) -> PromptPlans:
        num_choices = 1 if parts[0].get("n") is None else parts[0]["n"]
        if type(num_choices) is not int or not 1 <= num_choices <= _MAX_CHOICES:  # vLLM would take 2.0 and "2" for 2
            raise RequestError.bad("n", f"a whole number in 1..{_MAX_CHOICES} with several prompts", num_choices)
        plans: list[Plan | Used] = []
        for number, part in enumerate(parts):
            try:
                plans.append(self._filled(options, part, shape, request_id, by_name=by_name, several=True))
            except RequestError as error:
                if by_name:
                    raise RequestError(
                        error.status, f"{_field_of(part)}[{number}]: {error.message}", error.param
                    ) from error
                plans.append(self.without_documents(request_id, error))
        return PromptPlans(request_id, tuple(plans), num_choices)

    def _filled(
        self,
        options: RegradOptions,
        body: Body,
        shape: PromptShape,
        request_id: str,
        *,
        by_name: bool,
        several: bool = False,
    ) -> Plan:
        learner = self.learner.config
        question = shape.question(body)
        text = None if options.document_ids else options.query or question
        if text is None and not options.document_ids:
            raise RequestError(
                400,
                "regrad.query must be given where the request has no single user text to search for, got none",
                "regrad.query",
            )
        mode = self._mode(options, question)
        why = _not_twice(body, shape, several=several) if mode == "auto" else None
        if why is not None and (options.mode or options.min_confidence is not None):
            raise RequestError.bad("regrad.mode", f"blind, cue or icl with {why}", mode)
        mode = "cue" if why else mode
        least = self.settings.min_confidence if options.min_confidence is None else options.min_confidence
        return Plan(
            request_id=request_id,
            query=Query(
                namespace=options.namespace or self.settings.namespace,
                text=_searchable(text) if text else "",
                document_ids=options.document_ids or (),
                top_k=options.top_k or self.settings.top_k_for(learner.top_k),
                min_score=None if options.document_ids else _first(options.min_score, self.settings.min_score),
                with_text=mode in ("icl", "auto"),
                with_cue=(options.cue_sentences or self.settings.cue_sentences) if mode in _WITH_CUE else 0,
                cue_text=_searchable(question) if mode in _WITH_CUE and question and not text else "",
                retrieval=options.retrieval or self.settings.retrieval,
                conditions=options.filter,
                as_of=options.as_of,
            ),
            gamma=self.gamma if options.gamma is None else options.gamma,
            mode=mode,
            by_name=by_name,
            keeps_mode=bool(options.mode or options.cue_sentences or options.min_confidence is not None)
            or self.settings.on_error == "fail_closed",
            reason=f"the mode is cue and not the server's auto: with {why} nothing is asked twice" if why else None,
            min_confidence=least,
        )

    def _mode(self, options: RegradOptions, question: str | None) -> Mode:
        """The request's mode, else the server's. RequestError."""
        mode = options.mode or self.settings.mode
        if mode != "blind" and question is None:  # no text to put sentences or documents into
            if options.mode is not None:
                raise RequestError.bad("regrad.mode", "blind where the request has no user text", options.mode)
            mode = "blind"
        if mode not in _WITH_CUE and options.cue_sentences is not None:
            rule = "absent unless the mode is cue or auto"
            raise RequestError.bad("regrad.cue_sentences", rule, options.cue_sentences)
        if mode != "auto" and options.min_confidence is not None:
            raise RequestError.bad("regrad.min_confidence", "absent unless the mode is auto", options.min_confidence)
        return mode


def _not_twice(body: Body, shape: PromptShape, *, several: bool) -> str | None:
    """Why this request isn't asked twice, as mode auto may do, in a few words. None if it is."""
    if type(shape) not in (ChatPrompt, CompletionPrompt):
        return "this route"
    return "several prompts" if several else unfit(body)


def _limit_of(parts: Sequence[Body]) -> tuple[RequestError, str] | None:
    """Why these prompts can't have documents or texts of their own: the error and a few words. None if they can."""
    if len(parts) > MAX_PROMPTS:
        rule = (
            f"at most {MAX_PROMPTS} prompts, where each has documents of its own; send several requests, or name "
            "documents for all prompts in regrad.query or regrad.document_ids"
        )
        return RequestError.bad(_field_of(parts[0]), rule, len(parts)), f"more than {MAX_PROMPTS} prompts"
    for field in ("use_beam_search", "prompt_embeds"):  # with these vLLM numbers the prompts in another way
        if parts[0].get(field):
            error = RequestError.bad(field, "absent with several prompts and regrad", parts[0][field])
            return error, f"several prompts and {field}"
    return None


def _field_of(part: Body) -> str:
    """The field that has the prompts."""
    return "messages" if "messages" in part else "prompt"


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _searchable(text: str) -> str:
    """A user's text as a query: valid UTF-8 within the bank's limit. Of a longer text it has the beginning and the
    end."""
    encoded, half = text.encode("utf-8", "replace"), MAX_QUERY_BYTES // 2
    if len(encoded) > MAX_QUERY_BYTES:
        encoded = encoded[: half - 1] + b"\n" + encoded[-half:]
    return encoded.decode("utf-8", "ignore")


def _request_id(body: Body, shape: PromptShape, header_id: str | None) -> str:
    """The id of vLLM's answer, without vLLM's prefix."""
    given = body.get("request_id") if shape.id_in_body else None
    if shape.id_from_header and header_id:
        given = header_id
    if isinstance(given, str) and 0 < len(given) <= _MAX_REQUEST_ID_CHARS:
        return given
    return shape.id_prefix + uuid.uuid4().hex
