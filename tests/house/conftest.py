"""A real bank, started by the command line, for the tests of what talks to one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from regrad_vllm.base_model import base_digest
from regrad_vllm.default_model import ensure_default_model
from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig
from regrad_vllm.local.pair import start_bank
from regrad_vllm.local.processes import Services
from tests.house.served import House, opened

RANK = 4


@pytest.fixture(scope="session")
def small_learner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learner of the default model's last two layers, untrained: its gradients are real, and quick to compute."""
    model = ensure_default_model()
    config = json.loads((model / "config.json").read_text("utf-8"))
    hidden, inner, top = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    modules = [
        (f"model.layers.{layer}.mlp.{name}", *sizes)
        for layer in range(top - 2, top)
        for name, sizes in (
            ("gate_proj", (hidden, inner)),
            ("up_proj", (hidden, inner)),
            ("down_proj", (inner, hidden)),
        )
    ]
    layout = Layout.build(RANK, modules)
    rng = np.random.default_rng(0)
    learner = Learner(
        LearnerConfig(base_digest(model), lora_alpha=8.0, step_size_kind="tie", max_document_tokens=64),
        layout,
        rng.normal(0, 0.02, layout.num_values).astype(np.float32),
        np.full(len(layout.tensors), 0.1, np.float32),
    )
    folder = tmp_path_factory.mktemp("learner")
    learner.save(folder)
    return folder


@pytest.fixture(scope="package")
def bank(small_learner: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a bank; tests keep apart by namespace."""
    folder = tmp_path_factory.mktemp("bank")
    with Services(folder) as services:
        yield start_bank(services, ensure_default_model(), small_learner, folder / "data")[1]


@pytest.fixture(scope="package")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The README's bank and server, with the default model and the learner that ships."""
    with opened(tmp_path_factory.mktemp("house")) as running:
        yield running
