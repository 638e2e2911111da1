"""Dashboard, alerts and the page about slowness name metrics and labels that server and bank really export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from bank_service.runtime.metrics import BankMetrics
from tests.serve.support import VllmServer

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\b(?:regrad_|vllm:)[a-z_]*[a-z]\b")
LABEL = re.compile(r"[{,]\s*(\w+)\s*[=!]")
GROUPED = re.compile(r"\bby \(([\w, ]+)\)")
OF_PROMETHEUS = {"instance", "job"}


@pytest.fixture(scope="module")
def exported(server: VllmServer) -> tuple[set[str], set[str]]:
    """The names of all samples, and of all labels."""
    server.complete("a", {"document_ids": ["doc-1"]}, max_tokens=2)
    server.post("/v1/completions", {"model": "base", "prompt": "x", "regrad": {"top_k": 0}})  # an error to count
    bank = BankMetrics()
    bank.called("Query", "OK", 0.1)
    bank.cache.labels("hits").set(1)
    text = server.client.get("/metrics").text + generate_latest(bank.registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name for sample in samples}, {label for sample in samples for label in sample.labels}


def expressions() -> list[str]:
    dashboard = json.loads((ROOT / "deploy/grafana/regrad.json").read_text("utf-8"))
    groups = yaml.safe_load((ROOT / "deploy/prometheus/regrad.rules.yml").read_text("utf-8"))["groups"]
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [*shown, *(rule["expr"] for group in groups for rule in group["rules"])]


def test_dashboard_and_alerts_ask_for_what_is_exported(exported: tuple[set[str], set[str]]) -> None:
    names, labels = exported
    asked = expressions()
    assert len(asked) > 25
    for expression in asked:
        assert set(NAME.findall(expression)) and set(NAME.findall(expression)) <= names, expression
        grouped = {label for group in GROUPED.findall(expression) for label in group.split(", ")}
        assert {*LABEL.findall(expression), *grouped} <= labels | OF_PROMETHEUS, expression


def test_the_page_about_slowness_names_metrics_that_there_are(exported: tuple[set[str], set[str]]) -> None:
    page = (ROOT / "docs/slow.md").read_text("utf-8")
    named = set(NAME.findall(page))
    # A histogram is named without its suffix.
    bare = {name.removesuffix(suffix) for name in exported[0] for suffix in ("_bucket", "_count", "_sum")}
    assert len(named) > 15 and named <= exported[0] | bare, named - exported[0] - bare
