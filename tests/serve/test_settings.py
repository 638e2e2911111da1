"""Settings from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from bank_service.wire.credentials import BankCredentials
from regrad_vllm.serve.launch import command_line
from regrad_vllm.serve.settings import Settings, SettingsError

LEARNER = {"REGRAD_LEARNER": "/some/folder"}


def test_without_a_learner_the_plugin_is_off() -> None:
    assert Settings.from_environment({}) is None
    assert Settings.from_environment({"REGRAD_LEARNER": "", "REGRAD_TYPO": "1"}) is None


def test_all_that_is_given_is_used() -> None:
    settings = Settings.from_environment(
        {**LEARNER, "REGRAD_BANK": "bank:1", "REGRAD_TOP_K": "5", "REGRAD_GAMMA": "0.5", "REGRAD_DEFAULT": "on",
         "REGRAD_ON_ERROR": "fail_closed", "REGRAD_SYSTEM_PROMPT": "off", "REGRAD_MIN_SCORE": "", "PATH": "x",
         "REGRAD_MODE": "cue", "REGRAD_CUE_SENTENCES": "3"}
    )  # fmt: skip
    assert settings == Settings(
        learner=Path("/some/folder"), bank="bank:1", top_k=5, gamma=0.5, default=True, on_error="fail_closed",
        system_prompt=False, mode="cue", cue_sentences=3,
    )  # fmt: skip


def test_settings_survive_the_way_through_the_environment() -> None:
    settings = Settings(learner=Path("/l"), bank="h:2", min_score=-0.25, default=True, retrieval="hybrid")
    assert Settings.from_environment(settings.environment()) == settings


def test_what_the_bank_asks_for_is_named_by_files_whose_content_no_setting_shows(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("regrad_secret")
    given = {"REGRAD_BANK_TOKEN_FILE": str(token), "REGRAD_BANK_CA": "/ca", "REGRAD_BANK_CERT": "/c",
             "REGRAD_BANK_KEY": "/k"}  # fmt: skip
    settings = Settings.from_environment({**LEARNER, **given})
    assert settings is not None and settings.bank_credentials == BankCredentials.from_environment(given)
    assert settings.bank_credentials.read_token() == "regrad_secret"
    shown = command_line(settings.environment(), ["vllm", "serve"])
    assert str(token) in shown and "regrad_secret" not in shown + repr(settings) + repr(settings.bank_credentials)


@pytest.mark.parametrize("alone", ["CERT", "KEY"])
def test_half_a_client_certificate_is_refused(alone: str) -> None:
    settings = Settings.from_environment({**LEARNER, "REGRAD_BANK_CA": "/ca", f"REGRAD_BANK_{alone}": "/x"})
    assert settings is not None
    with pytest.raises(SettingsError, match="must be given together.*REGRAD_BANK_KEY"):
        _ = settings.bank_credentials


def test_top_k_must_not_be_more_than_a_request_may_have() -> None:
    with pytest.raises(SettingsError, match=r"REGRAD_TOP_K must be in 1\.\.4, got 5; REGRAD_MAX_DOCUMENTS"):
        Settings.from_environment({**LEARNER, "REGRAD_TOP_K": "5", "REGRAD_MAX_DOCUMENTS": "4"})


def test_an_unknown_key_is_told_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="REGRAD_TOPK must be one of .*REGRAD_TOP_K"):
        Settings.from_environment({**LEARNER, "REGRAD_TOPK": "3"})


def test_the_secret_of_regrad_mcp_is_no_setting() -> None:
    given = {**LEARNER, "REGRAD_MCP_TOKEN": "secret"}
    assert Settings.from_environment(given) == Settings(learner=Path("/some/folder"))


@pytest.mark.parametrize("service", ["REGRAD_BANK", "REGRAD_EU_1", "REGRAD"])
def test_what_kubernetes_sets_for_a_service_is_no_setting(service: str) -> None:
    port = "tcp://10.0.0.7:50061"
    links = {
        "SERVICE_HOST": "10.0.0.7", "SERVICE_PORT": "50061", "SERVICE_PORT_GRPC": "50061", "PORT": port,
        "PORT_50061_TCP": port, "PORT_50061_TCP_PROTO": "tcp", "PORT_50061_TCP_PORT": "50061",
        "PORT_50061_TCP_ADDR": "10.0.0.7",
    }  # fmt: skip
    given = {**LEARNER, **{f"{service}_{name}": text for name, text in links.items()}}
    assert Settings.from_environment(given) == Settings(learner=Path("/some/folder"))
    for name, text in (("PORT", "50061"), ("TOPK", "3"), ("PORT_50061", "1"), ("SERVICE_HOSTS", "x")):
        with pytest.raises(SettingsError, match=f"{service}_{name} must be one of"):
            Settings.from_environment({**given, f"{service}_{name}": text})
    del given[f"{service}_SERVICE_HOST"]
    with pytest.raises(SettingsError, match=f"{service}_SERVICE_PORT must be one of"):
        Settings.from_environment(given)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("BANK", "a:1,b:2"), ("BANK", "nowhere"), ("BANK", "host:0"), ("BANK", "host:99999"), ("TOP_K", "0"),
        ("TOP_K", "65"), ("TOP_K", "many"), ("GAMMA", "nan"), ("GAMMA", "17"), ("MIN_SCORE", "2"), ("DEFAULT", "maybe"),
        ("MAX_DOCUMENTS", "65"), ("ON_ERROR", "fail"), ("ARENA_BYTES", "0"),
        ("BANK_TIMEOUT_MS", "-1"), ("RETRIEVAL", "bm25"), ("BANK_CONCURRENCY", "0"),
        ("MODE", "both"), ("CUE_SENTENCES", "0"), ("CUE_SENTENCES", "5"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_key(key: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"REGRAD_{key} must be"):
        Settings.from_environment({**LEARNER, f"REGRAD_{key}": value})
