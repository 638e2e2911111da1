"""The check that the served model is the one that the learner was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.endpoint import check_base
from regrad_vllm.serve.settings import SettingsError


def put_in_cache(cache: Path, commit: str, revision: str, files: list[Path]) -> Path:
    """The files as a snapshot of owner/name in a cache of the hub's."""
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in files:
        shutil.copy(file, snapshot)
    return snapshot


def test_the_files_compared_with_the_learner_are_those_that_vllm_serves(
    model: Path, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, downloads = tmp_path / "hub", tmp_path / "downloads"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    put_in_cache(hub, "a" * 40, "v1", [*model.iterdir()])
    newer = put_in_cache(hub, "b" * 40, "main", [*model.iterdir()])
    weights = load_file(newer / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, newer / "model.safetensors")
    put_in_cache(downloads, "c" * 40, "main", [*model.glob("*.safetensors")])

    def check(name: str = "owner/name", folder: str | None = None, **changed: object) -> None:
        given = {"revision": None, "hf_config_path": None, "tokenizer": name, "tokenizer_revision": None, **changed}
        served = SimpleNamespace(model=name, **given)
        check_base(SimpleNamespace(model_config=served, load_config=SimpleNamespace(download_dir=folder)), learner)

    check(revision="v1", tokenizer_revision="v1")
    check(folder=str(downloads))
    with pytest.raises(SettingsError, match="must have been trained on the served model owner/name"):
        check()
    templated = tmp_path / "templated"
    shutil.copytree(model, templated)
    (templated / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(SettingsError, match="must have been trained on the served model owner/name"):
        check(revision="v1", tokenizer=str(templated))
    with pytest.raises(SettingsError, match="must be a folder or in the hub's cache.*--regrad-check-base off"):
        check("owner/absent")
