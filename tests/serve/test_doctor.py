"""`regrad doctor` and a real server."""

from __future__ import annotations

import pytest

from regrad_vllm.default_model import shipped_learner
from regrad_vllm.doctor.services import check_server
from regrad_vllm.learner import Learner
from tests.serve.support import API_KEY, VllmServer


def test_a_server_is_asked_for_its_learner_its_bank_and_its_workers(
    server: VllmServer, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    (refused,) = check_server(server.url, learner)
    assert refused.state == "wrong" and refused.remedy == "set OPENAI_API_KEY to its --api-key"
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    found = {finding.name: finding for finding in check_server(server.url, learner)}
    assert [*found] == ["server", "server's learner", "server's bank", "server's workers"]
    assert {finding.state for finding in found.values()} == {"ok"}, found
    others = {finding.name: finding for finding in check_server(server.url, Learner.load(shipped_learner()))}
    assert others["server's learner"].state == "wrong" and others["server"].state == "ok"
