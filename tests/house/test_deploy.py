"""Dashboard and alerts in deploy/, by themselves. tests/serve compares their metrics with those of a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.house.markdown import Page

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(
    PROMTOOL is None and not os.environ.get("CI"),
    reason="promtool is not on the PATH; .ci/programs installs it (Debian: apt-get install prometheus)",
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", "regrad.rules.yml"],
        ["test", "rules", "regrad.rules.test.yml"],
        ["check", "config", "prometheus.yml"],
    ],
)
def test_the_alerts_are_what_prometheus_takes_and_fire_when_they_must(arguments: list[str]) -> None:
    assert PROMTOOL is not None, "CI must have promtool"
    ran = subprocess.run([PROMTOOL, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_each_alert_names_a_section_of_the_page_and_what_is_wrong() -> None:
    groups = yaml.safe_load((PROMETHEUS / "regrad.rules.yml").read_text("utf-8"))["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    assert len(alerts) >= 8
    for alert in alerts:
        page, _, section = alert["annotations"]["runbook"].partition("#")
        assert section in Page.read(ROOT / page).anchors(), alert["alert"]
        assert alert["annotations"]["summary"] and alert["labels"]["severity"] in ("warning", "critical")


def test_each_panel_of_the_dashboard_says_what_it_shows_and_none_covers_another() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "regrad.json").read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert 8 <= len(panels) <= 16
    for panel in panels:
        assert panel["title"] and panel["description"].endswith(".") and panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}" and target["legendFormat"]
            assert not re.search(r"\[\d", target["expr"]), "a rate's window follows the time range"
    places = {(x, y) for x, y in ((panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"])}
    assert len(places) == len(dashboard["panels"])
