from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bank_service.values.config import BankConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": -1}, r"port must be in 0\.\.65535, got -1"),
        ({"port": 65536}, "port must be"),
        ({"metrics_port": 65536}, "metrics_port must be"),
        ({"port": 50061, "metrics_port": 50061}, "metrics_port must be another than port, got 50061 for both"),
        ({"host": ""}, "host must not be empty"),
        ({"host": "[]"}, "host must not be empty"),
        ({"codec": "zip"}, "codec must be factors-P-Q-BITS .*, got 'zip'"),
        ({"catalog": "sqlite:///x"}, "catalog must start with postgresql://, got sqlite://…"),
        ({"catalog": "postgresql://bank:s3cret@host"}, "catalog must be like postgresql://USER@HOST:5432/DATABASE"),
        ({"catalog": "postgresql://bank:s3/cret@host/bank"}, "catalog must be like postgresql://"),
        ({"catalog": "postgresql://u@a:5432,b:0/bank"}, "catalog must be like postgresql://"),
        ({"catalog": "postgresql://u@a,b:5433/bank"}, "catalog must have the option target_session_attrs"),
        ({"catalog": "postgresql:///bank?host=/a,/b"}, "catalog must have the option target_session_attrs"),
        ({"catalog_read": "postgresql://replica/bank"}, "catalog_read must come with catalog"),
        ({"catalog": "postgresql://host/bank?user=u&password=s3cret"}, "catalog must be without the option password"),
        ({"redis_url": "localhost:6379"}, "redis_url must start with redis://"),
        ({"redis_url": "redis://:6379/0"}, "redis_url must be like redis://"),
        ({"redis_url": "rediss://:s3cret@"}, "redis_url must be like redis://"),
        ({"cache_bytes": 0}, "cache_bytes must be in 1048576"),
        ({"encode_wait_ms": float("nan")}, "encode_wait_ms must be in 0..1000, got nan"),
        ({"encode_batch_size": 0}, "encode_batch_size must be"),
        ({"exact_below": 100_001}, r"exact_below must be in 0\.\.100000"),
        ({"history_seconds": -1}, r"history_seconds must be in 0\.\."),
        ({"drain_seconds": -1}, "drain_seconds must be"),
        ({"ingest_idle_seconds": 0}, r"ingest_idle_seconds must be in 0\.1\.\.86400, got 0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BankConfig(data_dir=tmp_path, **fields)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("[::1]", True),
        ("[::]", False),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("bank.internal", False),
    ],
)
def test_loopback_is_told_from_networks(tmp_path: Path, host: str, loopback: bool) -> None:
    assert BankConfig(data_dir=tmp_path, host=host).is_loopback is loopback


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="redis_uri"):
        BankConfig(data_dir=tmp_path, redis_uri="redis://x")  # type: ignore[call-arg]


def test_a_relative_folder_becomes_absolute() -> None:
    assert BankConfig(data_dir=Path("some/folder")).data_dir == Path.cwd() / "some/folder"


@pytest.mark.parametrize("endpoint", ["", "localhost:9000"])
def test_an_endpoint_that_is_no_url_is_refused_by_name(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ValueError, match="AWS_ENDPOINT_URL must begin with http"):
        BankConfig(data_dir=tmp_path, objects="s3://bucket/prefix")
