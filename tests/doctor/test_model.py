"""Learners and base models that don't fit, in their real formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from regrad_vllm.default_model import shipped_learner
from regrad_vllm.doctor.finding import Finding
from regrad_vllm.doctor.model import check_base, check_learner
from regrad_vllm.learner import Learner

SHIPPED = Learner.load(shipped_learner())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that has all the parts of a model, and is none that a learner was trained on."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text(json.dumps({"model_type": "llama"}))
    save_file({"w": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return folder


def test_the_learner_that_ships_is_ok_and_a_folder_without_one_is_wrong(tmp_path: Path) -> None:
    finding, learner = check_learner(shipped_learner())
    assert finding.state == "ok" and learner is not None and finding.found.startswith(learner.fingerprint[:12])
    finding, learner = check_learner(tmp_path)
    assert learner is None and finding.state == "wrong" and "does not exist" in finding.found


def test_another_base_model_than_the_learners_is_wrong(base: Path) -> None:
    other = check_base(str(base), SHIPPED)
    assert other.state == "wrong" and f"trained on {SHIPPED.config.base_digest[:12]}" in other.found
    digest = other.found.split("digest ")[1][:12]
    assert digest not in SHIPPED.config.base_digest
    (base / "model.safetensors").write_bytes(b"x" * 20)
    assert check_base(str(base), SHIPPED).state == "wrong", "damaged"


def test_a_base_model_that_is_not_there_is_named_with_the_way_to_get_it(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unbuilt = check_base("default", SHIPPED)
    assert unbuilt.state == "odd" and unbuilt.remedy.startswith("`regrad model` builds it")
    assert check_base(str(tmp_path), SHIPPED) == Finding(
        "base model", "wrong", f"{tmp_path} has no model*.safetensors", "name the model's folder with --model"
    )
    assert check_base(str(base), None).found == f"{base}, not compared"


def test_the_learners_own_base_is_ok(base: Path) -> None:
    from regrad_vllm.base_model import base_digest

    learner = replace(SHIPPED, config=replace(SHIPPED.config, base_digest=base_digest(base)))
    assert check_base(str(base), learner).state == "ok"
