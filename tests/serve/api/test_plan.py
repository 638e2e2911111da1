"""The plan of a request, by model name, ``regrad`` object and server default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regrad_vllm.client import Condition
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.plan import MAX_PROMPTS, Plan, Planner, PromptPlans
from regrad_vllm.serve.api.request import MAX_QUERY_BYTES
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.api.routes import SHAPES
from regrad_vllm.serve.api.used import Used
from regrad_vllm.serve.settings import Mode, Settings

SHAPE = SHAPES["/v1/completions"]


@pytest.fixture
def planner(learner: Learner) -> Planner:
    return Planner(Settings(learner=Path("/l"), mode="blind"), learner, ("base", "alias"))


def plan_of(planner: Planner, **body: Any) -> Plan | PromptPlans | Used | None:
    return planner.plan({"prompt": "p", **body}, SHAPE, None, frozenset({"tuned"}))


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    ("body", "planned", "planned_by_default", "by_name"),
    [
        ({"model": "base"}, False, True, False),
        ({}, False, True, False),
        ({"model": "alias-regrad"}, True, True, True),
        ({"model": "base", "regrad": {}}, True, True, True),
        ({"regrad": {"enabled": True}}, True, True, True),
        ({"model": "base", "regrad": {"enabled": False}}, False, False, None),
        ({"model": "base", "regrad": None}, False, True, False),
        ({"model": "base-regrad", "regrad": None}, True, True, True),
        ({"model": "base", "regrad": {"top_k": None, "enabled": None}}, True, True, True),
        ({"model": "tuned", "regrad": None}, False, False, None),
        ({"model": "tuned"}, False, False, None),
        ({"model": "nobody", "regrad": {"enabled": False}}, False, False, None),
        ({"model": "nobody"}, False, False, None),
        ({"model": 3, "regrad": {}}, False, False, None),
    ],
)
def test_who_gets_a_plan(
    planner: Planner, default: bool, body: dict[str, Any], planned: bool, planned_by_default: bool, by_name: bool | None
) -> None:
    planner = replace(planner, settings=replace(planner.settings, default=default))
    plan = plan_of(planner, **body)
    assert isinstance(plan, Plan) == (planned_by_default if default else planned)
    if isinstance(plan, Plan):
        assert plan.by_name is by_name


@pytest.mark.parametrize("body", [{"model": "nobody", "regrad": {}}, {"model": "basis-regrad"}])
def test_an_unknown_model_is_told_the_names_with_regrad(planner: Planner, body: dict[str, Any]) -> None:
    with pytest.raises(
        RequestError, match="model must be one of base, alias, base-regrad, alias-regrad, got"
    ) as caught:
        plan_of(planner, **body)
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_an_adapter_may_have_a_name_that_ends_as_ours_do(planner: Planner) -> None:
    body = {"prompt": "p", "model": "my-regrad"}
    assert planner.plan(body, SHAPE, None, frozenset({"my-regrad"})) is None


def test_of_a_text_beyond_the_banks_limit_the_beginning_and_the_end_are_searched_for(planner: Planner) -> None:
    plan = plan_of(planner, model="base-regrad", prompt="first é " + "line é\n" * 20_000 + "é last")
    assert isinstance(plan, Plan)
    assert plan.query.text.startswith("first é line") and plan.query.text.endswith("line é\né last")
    assert len(plan.query.text.encode()) <= MAX_QUERY_BYTES


def test_the_requests_values_come_before_the_servers_before_the_learners(planner: Planner, learner: Learner) -> None:
    plan = plan_of(planner, model="base-regrad")
    assert isinstance(plan, Plan)
    assert (plan.query.top_k, plan.gamma, plan.query.min_score) == (learner.config.top_k, learner.config.gamma, None)
    planner = replace(planner, settings=replace(planner.settings, top_k=5, gamma=0.0, min_score=0.0, namespace="s"))
    plan = plan_of(planner, model="base-regrad")
    assert isinstance(plan, Plan)
    assert (plan.query.top_k, plan.gamma, plan.query.min_score, plan.query.namespace) == (5, 0.0, 0.0, "s")
    plan = plan_of(planner, regrad={"top_k": 7, "gamma": 2, "min_score": -1, "namespace": "r", "query": "q"})
    assert isinstance(plan, Plan)
    assert (plan.query.top_k, plan.gamma, plan.query.min_score) == (7, 2.0, -1.0)
    assert (plan.query.namespace, plan.query.text) == ("r", "q")
    assert plan.query.retrieval == "dense"
    hybrid = replace(planner, settings=replace(planner.settings, retrieval="hybrid"))
    for regrad, retrieval in (({}, "hybrid"), ({"retrieval": "lexical"}, "lexical")):
        plan = plan_of(hybrid, regrad=regrad)
        assert isinstance(plan, Plan) and plan.query.retrieval == retrieval
    plan = plan_of(planner, regrad={"filter": [{"key": "k", "operator": "present"}]})
    assert isinstance(plan, Plan) and plan.query.conditions == (Condition("k", "present"),)
    plan = plan_of(planner, regrad={"as_of": 0})
    assert isinstance(plan, Plan) and plan.query.as_of == 0
    plan = plan_of(planner, regrad={"document_ids": ["a"]})
    assert isinstance(plan, Plan) and (plan.query.conditions, plan.query.as_of) == ((), None)
    assert (plan.query.document_ids, plan.query.text, plan.query.min_score) == (("a",), "", None)


def with_mode(planner: Planner, mode: Mode) -> Planner:
    return replace(planner, settings=replace(planner.settings, mode=mode, cue_sentences=3))


@pytest.mark.parametrize(
    ("server", "regrad", "mode", "text", "with_cue", "cue_text"),
    [
        ("blind", {}, "blind", "p", 0, ""),
        ("blind", {"mode": "cue"}, "cue", "p", 3, ""),
        ("cue", {}, "cue", "p", 3, ""),
        ("cue", {"mode": "blind"}, "blind", "p", 0, ""),
        ("cue", {"mode": "icl"}, "icl", "p", 0, ""),
        ("cue", {"cue_sentences": 1}, "cue", "p", 1, ""),
        ("cue", {"query": "q"}, "cue", "q", 3, ""),
        ("cue", {"document_ids": ["d"]}, "cue", "", 3, "p"),
        ("icl", {"document_ids": ["d"]}, "icl", "", 0, ""),
    ],
)
def test_a_prompt_gets_the_text_that_the_requests_mode_or_the_servers_names(
    planner: Planner, server: Mode, regrad: dict[str, Any], mode: str, text: str, with_cue: int, cue_text: str
) -> None:
    plan = plan_of(with_mode(planner, server), model="base-regrad", regrad=regrad)
    assert isinstance(plan, Plan) and plan.mode == mode
    assert (plan.query.text, plan.query.with_cue, plan.query.cue_text) == (text, with_cue, cue_text)
    assert plan.query.with_text == (mode == "icl")


@pytest.mark.parametrize("mode", ["cue", "icl"])
def test_a_prompt_of_token_ids_has_no_room_for_text(planner: Planner, mode: Mode) -> None:
    asked = {"prompt": [1, 2], "regrad": {"query": "q"}}
    plan = plan_of(with_mode(planner, mode), **asked)
    assert isinstance(plan, Plan) and (plan.mode, plan.query.with_cue, plan.query.with_text) == ("blind", 0, False)
    with pytest.raises(RequestError, match="regrad.mode must be blind where the request has no user text"):
        plan_of(planner, prompt=[1, 2], regrad={"query": "q", "mode": mode})


@pytest.mark.parametrize("mode", ["blind", "icl", None])
def test_a_number_of_sentences_that_no_prompt_gets_is_refused(planner: Planner, mode: Mode | None) -> None:
    with pytest.raises(RequestError, match="regrad.cue_sentences must be absent unless the mode is cue") as caught:
        plan_of(planner, regrad={"cue_sentences": 2, "mode": mode})
    assert caught.value.param == "regrad.cue_sentences"


def test_a_request_gets_no_more_documents_than_the_server_allows(planner: Planner) -> None:
    ids = [f"d{number}" for number in range(17)]
    for regrad, field, rule in (
        ({"top_k": 17}, "regrad.top_k", "a whole number in 1..16"),
        ({"top_k": 99}, "regrad.top_k", "a whole number in 1..16"),
        ({"document_ids": ids}, "regrad.document_ids", "a list of 1 to 16"),
        ({"document_ids": [*ids] * 9}, "regrad.document_ids", "a list of 1 to 16"),
    ):
        with pytest.raises(RequestError, match=f"{field} must be {rule}") as caught:
            plan_of(planner, model="base-regrad", regrad=regrad)
        assert (caught.value.status, caught.value.param) == (400, field)
    plan = plan_of(planner, regrad={"document_ids": ids[:16]})
    assert isinstance(plan, Plan) and len(plan.query.document_ids) == 16
    one = replace(planner, settings=replace(planner.settings, max_documents=1))
    plan = plan_of(one, model="base-regrad")
    assert isinstance(plan, Plan) and plan.query.top_k == 1, "the learner's own top_k gives way"


def test_each_of_several_prompts_is_searched_for(planner: Planner) -> None:
    plans = plan_of(planner, model="base-regrad", prompt=["a", "b"], n=3, regrad={"top_k": 1})
    assert isinstance(plans, PromptPlans) and plans.num_choices == 3
    assert [(plan.query.text, plan.query.top_k) for plan in plans.plans if isinstance(plan, Plan)] == [
        ("a", 1),
        ("b", 1),
    ]
    assert {plan.request_id for plan in plans.plans} == {plans.request_id}
    for regrad in ({"query": "q"}, {"document_ids": ["d"]}):
        assert isinstance(plan_of(planner, prompt=["a", "b"], regrad=regrad), Plan), "one search for all prompts"
        for mode in ("cue", "icl"):
            asked = plan_of(planner, prompt=["a", "b"], regrad={**regrad, "mode": mode})
            assert isinstance(asked, PromptPlans), "text goes into each prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"prompt": ["a", "b"], "use_beam_search": True}, "use_beam_search"),
        ({"prompt": ["a", "b"], "prompt_embeds": "x"}, "prompt_embeds"),
        ({"prompt": ["a", "b"], "n": 2.0}, "n"),
        ({"prompt": ["a", "b"], "n": "2"}, "n"),
        ({"prompt": ["a", "b"], "n": True}, "n"),
        ({"prompt": ["a", "b"], "n": 10**9}, "n"),
    ],
)
def test_several_prompts_that_can_not_have_their_own_documents_are_refused_or_the_base_models(
    planner: Planner, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        plan_of(planner, model="base-regrad", **fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    planner = replace(planner, settings=replace(planner.settings, default=True))
    used = plan_of(planner, model="base", **fields)
    assert isinstance(used, Used) and used.fallback and param in str(used.reason)


LIMITED = [
    ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "more than 64 prompts"),
    ({"prompt": ["a", "b"], "use_beam_search": True}, "several prompts and use_beam_search"),
    ({"prompt": ["a", "b"], "prompt_embeds": "x"}, "several prompts and prompt_embeds"),
]


@pytest.mark.parametrize("mode", ["cue", "icl"])
@pytest.mark.parametrize(("fields", "why"), LIMITED)
@pytest.mark.parametrize("regrad", [{"query": "q"}, {"document_ids": ["d"]}])
def test_prompts_that_share_documents_have_no_limits_unless_the_request_itself_wants_text_in_each(
    planner: Planner, regrad: dict[str, Any], fields: dict[str, Any], why: str, mode: Mode
) -> None:
    plan = plan_of(planner, **fields, regrad=regrad)
    assert isinstance(plan, Plan) and (plan.mode, plan.reason) == ("blind", None)
    plan = plan_of(with_mode(planner, mode), **fields, regrad=regrad)
    assert isinstance(plan, Plan) and (plan.mode, plan.query.with_cue, plan.query.with_text) == ("blind", 0, False)
    assert plan.reason == f"the mode is blind and not the server's {mode}: with {why} no prompt gets text of its own"
    with pytest.raises(RequestError, match=f'regrad.mode must be blind with {why}, .* got "{mode}"') as caught:
        plan_of(planner, **fields, regrad={**regrad, "mode": mode})
    assert (caught.value.status, caught.value.param) == (400, "regrad.mode")


@pytest.mark.parametrize(("fields", "why"), LIMITED)
def test_a_number_of_sentences_asks_for_text_as_a_mode_does(planner: Planner, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=f"regrad.mode must be blind with {why}"):
        plan_of(with_mode(planner, "cue"), **fields, regrad={"query": "q", "cue_sentences": 2})


def test_an_id_with_a_new_line_is_one_line_of_the_log(planner: Planner, caplog: pytest.LogCaptureFixture) -> None:
    planner = replace(planner, settings=replace(planner.settings, default=True))
    plan_of(planner, model="base", prompt="", request_id="mine\nERROR forged")
    assert "request 'mine\\nERROR forged' falls back" in caplog.messages[0]


def test_a_blank_prompt_among_several_is_named_or_the_base_models(planner: Planner) -> None:
    with pytest.raises(RequestError, match=r"^prompt\[1\]: regrad.query must"):
        plan_of(planner, model="base-regrad", prompt=["a", " "])
    planner = replace(planner, settings=replace(planner.settings, default=True))
    plans = plan_of(planner, model="base", prompt=["a", " "])
    assert isinstance(plans, PromptPlans) and isinstance(plans.plans[0], Plan)
    assert isinstance(plans.plans[1], Used) and plans.plans[1].fallback


def test_switched_off_by_our_models_name_the_base_model_answers(planner: Planner) -> None:
    off = plan_of(planner, model="base-regrad", regrad={"enabled": False})
    assert isinstance(off, Used) and off.adapter is None and not off.fallback
    assert planner.base_name("alias-regrad") == "alias" and planner.base_name(None) == "base"


def test_another_adapter_and_regrad_exclude_each_other(planner: Planner) -> None:
    with pytest.raises(RequestError) as caught:
        plan_of(planner, model="tuned", regrad={})
    assert caught.value.param == "model"


def test_a_question_that_is_too_long_or_no_utf8_is_still_searched_for(planner: Planner) -> None:
    plan = plan_of(planner, model="base-regrad", prompt="ä" * 50_000 + "\ud800")
    assert isinstance(plan, Plan)
    assert 65_000 < len(plan.query.text.encode()) <= 65_536


def test_the_requests_id_is_the_one_that_the_answer_will_carry(planner: Planner) -> None:
    def id_of(path: str, header: str | None, **body: Any) -> str:
        question = {"prompt": "p", "input": "p"}
        plan = planner.plan({"model": "base-regrad", **question, **body}, SHAPES[path], header, frozenset())
        assert isinstance(plan, Plan)
        return plan.request_id

    assert id_of("/v1/completions", "head", request_id="body") == "head"
    assert id_of("/v1/responses", "head", request_id="body") == "body"
    assert id_of("/v1/responses", "head").startswith("resp_")
    assert id_of("/v1/completions", None) != id_of("/v1/completions", None)
    assert id_of("/v1/completions", "x" * 512) == "x" * 512
    assert len(id_of("/v1/completions", "x" * 513)) < 100
