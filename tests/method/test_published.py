"""The published code names its parameters by PEFT's names inside a wrapper module; files of that form are made here."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regrad_vllm.base_model import base_digest, build_layout
from regrad_vllm.cli import main
from regrad_vllm.learn.published import load_published
from regrad_vllm.learner import Learner, LearnerError
from tests.method.conftest import tiny_model
from tests.method.reference import peft_model


def write_checkpoint(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The output of the published training script: trainable parameters of {base_model: PEFT model, alpha…}."""
    base = tiny_model("Llama")
    layout = build_layout(base, rank=4, layers=(1, 2), projections=("gate_proj", "down_proj"))
    torch.manual_seed(4)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in peft_model(base, layout, 2.0).named_parameters():
        if parameter.requires_grad:
            state[f"base_model.{name}"] = torch.randn_like(parameter)
            if kind in ("tie", "full"):
                step = torch.rand(()) if kind == "tie" else torch.rand_like(parameter)
                state["alpha_" + name.replace(".", "-")] = step
    if kind == "same":
        state["alpha"] = torch.tensor(0.25)
    torch.save(state, folder / "meta_state_dict.pth")
    peft = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(layout.modules)}
    (folder / "peft_config.json").write_text(json.dumps(peft))
    (folder / "learner_config.json").write_text(json.dumps({"alpha_mode": kind, "init_alpha": 0.125}))
    return state


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("Llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}, "merges": []}}))
    return folder


@pytest.mark.parametrize("kind", ["tie", "same", "full", "fix"])
def test_a_published_checkpoint_becomes_a_learner(kind: str, tmp_path: Path, model_folder: Path) -> None:
    state = write_checkpoint(tmp_path, kind)
    learner = load_published(tmp_path, model_folder)
    assert learner.config.base_digest == base_digest(model_folder)
    assert learner.config.step_size_kind == kind and learner.scaling == 2.0
    (flat,) = learner.expand_step_sizes()
    for tensor, view in learner.layout.views(learner.phi):
        name = f"base_model.model.{tensor.module}.lora_{tensor.part}.default.weight"
        assert np.array_equal(view, state[f"base_model.{name}"].numpy())
        steps = flat[tensor.slice].reshape(tensor.shape)
        expected: Any = {"same": 0.25, "fix": 0.125}.get(kind)
        if expected is None:
            expected = state["alpha_" + name.replace(".", "-")].numpy()
        assert np.all(steps == expected)
    out = tmp_path / "learner"
    assert main(["import", str(tmp_path), str(out), "--model", str(model_folder)]) == 0
    assert Learner.load(out).fingerprint == learner.fingerprint


def test_settings_that_would_change_the_scaling_are_refused(tmp_path: Path, model_folder: Path) -> None:
    write_checkpoint(tmp_path, "tie")
    path = tmp_path / "peft_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "use_rslora": True}))
    with pytest.raises(LearnerError, match="use_rslora"):
        load_published(tmp_path, model_folder)
    del settings["lora_alpha"]
    path.write_text(json.dumps(settings))
    with pytest.raises(LearnerError, match="lora_alpha must be a number"):
        load_published(tmp_path, model_folder)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path, model_folder: Path) -> None:
    write_checkpoint(tmp_path, "tie")
    (tmp_path / "meta_state_dict.pth").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(LearnerError, match="can't be read as plain weights"):
        load_published(tmp_path, model_folder)


def test_a_checkpoint_with_a_parameter_too_few_or_too_many_is_refused(tmp_path: Path, model_folder: Path) -> None:
    state = write_checkpoint(tmp_path, "tie")
    torch.save({**state, "surplus": torch.zeros(1)}, tmp_path / "meta_state_dict.pth")
    with pytest.raises(LearnerError, match="surplus"):
        load_published(tmp_path, model_folder)
    missing = next(name for name in state if name.startswith("alpha_"))
    del state[missing]
    torch.save(state, tmp_path / "meta_state_dict.pth")
    with pytest.raises(LearnerError, match=missing):
        load_published(tmp_path, model_folder)


def test_the_base_digest_sees_weights_and_not_sharding(tmp_path: Path, model_folder: Path) -> None:
    sharded, changed = tmp_path / "sharded", tmp_path / "changed"
    model = tiny_model("Llama")
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("model*.safetensors"))) > 1
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6 + abs(model.model.layers[1].mlp.up_proj.weight[0, 0])
    model.save_pretrained(changed)
    for folder in (sharded, changed):
        (folder / "tokenizer.json").write_text((model_folder / "tokenizer.json").read_text())
    assert base_digest(sharded) == base_digest(model_folder) != base_digest(changed)


def test_the_base_digest_sees_rotary_scaling_multipliers_and_the_tokenizers_steps(
    tmp_path: Path, model_folder: Path
) -> None:
    def variant(name: str, **files: dict[str, Any]) -> str:
        folder = tmp_path / name
        shutil.copytree(model_folder, folder)
        for file, change in files.items():
            path = folder / f"{file}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        return base_digest(folder)

    plain = base_digest(model_folder)
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    assert variant("scaled", config={"rope_parameters": scaled}) != plain
    assert variant("windowed", config={"layer_types": ["sliding_attention"] * 4}) != plain
    for name in ("logits_scaling", "query_pre_attn_scalar"):
        assert variant(name, config={name: 8.0}) != plain
    assert variant("activated", config={"hidden_activation": "gelu"}) != plain
    assert variant("split", tokenizer={"pre_tokenizer": {"type": "Whitespace"}}) != plain
    assert variant("added", tokenizer={"added_tokens": [{"id": 1, "content": "<x>", "special": True}]}) != plain
    # The same model as another library version spells it.
    assert variant("older", config={"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}) == plain
    assert variant("nulls", tokenizer={"normalizer": None, "added_tokens": []}) == plain
