"""All checks, in the order of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from regrad_vllm.default_model import shipped_learner
from regrad_vllm.doctor import machine_checks, model, packages, services
from regrad_vllm.doctor.finding import Finding


def findings(
    environment: Mapping[str, str], *, bank: str | None, server: str | None, learner: Path | None, base: str
) -> Iterator[Finding]:
    """Makes all checks. They import neither torch nor vLLM, and take a few seconds.

    bank: host:port. server: its URL. None: whatever is at the default ports. learner: None: the one that ships.
    base: the base model's folder, or "default".
    """
    folder = learner or shipped_learner()
    settings_finding, settings = machine_checks.check_settings(environment, folder)
    learner_finding, loaded = model.check_learner(folder)
    yield machine_checks.check_python()
    yield machine_checks.check_cores()
    yield machine_checks.check_compute(torch=packages.installed("torch") or "")
    yield machine_checks.check_memory()
    yield machine_checks.check_shared_memory(settings)
    yield machine_checks.check_mappings()
    yield packages.check_vllm()
    yield packages.check_package("torch")
    yield packages.check_package("transformers")
    yield packages.check_torchvision()
    yield settings_finding
    yield learner_finding
    yield model.check_base(base, loaded)
    yield from services.check_bank(bank, loaded)
    yield from services.check_server(server, loaded)
