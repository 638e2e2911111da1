from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regrad_vllm.base_model import build_layout
from regrad_vllm.compose import compose
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig, LearnerError, num_step_sizes, save_adapter
from regrad_vllm.prompts import Prompts
from tests.method.conftest import tiny_model

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def make_learner(kind: Any = "tie") -> Learner:
    layout = build_layout(tiny_model("Llama"), rank=4, layers=(2, 3), projections=PROJECTIONS)
    rng = np.random.default_rng(7)
    phi = rng.normal(0, 0.3, layout.num_values).astype(np.float32)
    steps = rng.uniform(0.1, 0.9, num_step_sizes(kind, layout)).astype(np.float32)
    return Learner(LearnerConfig("0" * 64, 8.0, kind), layout, phi, steps)


@pytest.mark.parametrize("kind", ["tie", "same", "full", "fix"])
def test_a_saved_learner_loads_as_itself(kind: str, tmp_path: Path) -> None:
    learner = make_learner(kind)
    learner.save(tmp_path / "learner")
    loaded = Learner.load(tmp_path / "learner")
    assert loaded.fingerprint == learner.fingerprint
    assert loaded.config == learner.config
    assert np.array_equal(loaded.phi, learner.phi) and np.array_equal(loaded.step_sizes, learner.step_sizes)
    (flat,) = loaded.expand_step_sizes()
    assert flat.shape == loaded.phi.shape
    if kind == "tie":
        for index, (_, view) in enumerate(loaded.layout.views(flat)):
            assert np.all(view == learner.step_sizes[index])


def test_the_inner_loss_is_part_of_the_learner_and_of_its_fingerprint(tmp_path: Path) -> None:
    plain = make_learner()
    head = np.random.default_rng(0).normal(size=33).astype(np.float32)
    longer = replace(plain, config=replace(plain.config, length_exponent=0.5))
    learner = replace(longer, token_head=head, config=replace(longer.config, score_temperature=0.1))
    assert len({plain.fingerprint, longer.fingerprint, learner.fingerprint}) == 3
    learner.save(tmp_path)
    loaded = Learner.load(tmp_path)
    assert loaded.fingerprint == learner.fingerprint and np.array_equal(loaded.token_head, head)
    assert loaded.config.weights([0.9, 0.8, 0.95]) == pytest.approx((1.0, np.exp(-1), 1.0))
    assert plain.config.weights([0.9, 0.8]) == (1.0, 1.0)
    plain.save(tmp_path)
    assert Learner.load(tmp_path).token_head is None, "no head of an earlier learner stays in the folder"


def test_peft_loads_the_learner_folder_as_it_is_and_computes_the_same(tmp_path: Path) -> None:
    from peft import PeftModel

    learner = make_learner()
    learner.save(tmp_path)
    base = tiny_model("Llama")
    batch = TokenBatch.pad([(range(3, 23), 1)])
    ids = batch.ids
    plain = base(ids).logits
    adapted = AdaptedModel(base, learner.layout, learner.scaling)
    final = adapted.upper(adapted.lower(batch), adapted.split(torch.tensor(learner.phi)[None]), batch)
    mine = base.lm_head(final)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()(ids).logits
    assert torch.allclose(mine, theirs, atol=1e-4)
    assert (theirs - plain).abs().max() > 0.1


def test_a_composed_adapter_exports_to_a_folder_that_peft_computes_the_same_with(tmp_path: Path) -> None:
    from peft import PeftModel

    learner = make_learner()
    rng = np.random.default_rng(1)
    deltas = [rng.normal(0, 0.2, learner.phi.shape).astype(np.float32) for _ in range(2)]
    adapter = compose(learner.phi, deltas, [1.0, 0.5], 0.8)
    save_adapter(tmp_path, learner, adapter)
    base = tiny_model("Llama")
    batch = TokenBatch.pad([(range(3, 23), 1)])
    ids = batch.ids
    adapted = AdaptedModel(base, learner.layout, learner.scaling)
    mine = base.lm_head(adapted.upper(adapted.lower(batch), adapted.split(torch.tensor(adapter)[None]), batch))
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()(ids).logits
    assert torch.allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda learner: replace(learner, config=replace(learner.config, base_digest="1" * 64)),
        lambda learner: replace(learner, config=replace(learner.config, lora_alpha=9.0)),
        lambda learner: replace(learner, config=replace(learner.config, max_document_tokens=77)),
        lambda learner: replace(learner, config=replace(learner.config, prompts=Prompts(system="Other."))),
        lambda learner: replace(learner, phi=np.nextafter(learner.phi, np.float32(9))),
        lambda learner: replace(learner, step_sizes=np.nextafter(learner.step_sizes, np.float32(9))),
    ],
)
def test_whatever_changes_a_gradients_meaning_changes_the_fingerprint(change: Callable[[Learner], Learner]) -> None:
    learner = make_learner()
    assert change(learner).fingerprint != learner.fingerprint


def test_provenance_and_serving_defaults_leave_the_fingerprint_alone() -> None:
    learner = make_learner()
    other = replace(learner, config=replace(learner.config, top_k=1, gamma=0.5, training={"hours": 3}))
    assert other.fingerprint == learner.fingerprint


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "regrad.json").unlink(), "regrad.json does not exist"),
        (lambda f: (f / "regrad.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "step_sizes.safetensors").unlink(), "step_sizes.safetensors does not exist"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"xx"), "not a safetensors file"),
        (lambda f: edit_json(f / "regrad.json", lambda d: d["config"].update(lora_alpha=1.0)), "states fingerprint"),
        (lambda f: edit_json(f / "regrad.json", lambda d: d["config"].update(color=1)), "color"),
        (lambda f: edit_json(f / "regrad.json", lambda d: d["config"].update(step_size_kind="x")), "step_size_kind"),
        (lambda f: edit_json(f / "regrad.json", lambda d: d["layout"]["modules"].pop()), "does not know"),
    ],
)
def test_a_damaged_folder_is_an_error_that_says_what(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make_learner().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(LearnerError, match=message):
        Learner.load(tmp_path)


def test_values_that_are_not_finite_are_refused() -> None:
    learner = make_learner()
    phi = learner.phi.copy()
    phi[3] = np.nan
    with pytest.raises(LearnerError, match="phi must be finite"):
        replace(learner, phi=phi)


def test_composition_is_the_formula_and_repeats_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    phi, one, two = (rng.normal(size=1000).astype(np.float32) for _ in range(3))
    actual = compose(phi, [one, two], [1.0, 0.25], 0.7)
    expected = phi.astype(np.float64) - 0.7 * (one.astype(np.float64) + 0.25 * two.astype(np.float64))
    assert np.allclose(actual, expected, atol=1e-6) and not np.allclose(actual, phi, atol=0.1)
    assert np.array_equal(actual, compose(phi, [one, two], [1.0, 0.25], 0.7))
    assert np.array_equal(compose(phi, [], [], 0.7), phi)
    with pytest.raises(ValueError, match="shape"):
        compose(phi, [one[:5]], [1.0], 1.0)


def test_a_layout_refuses_what_would_break_the_flat_order() -> None:
    layout = make_learner().layout
    with pytest.raises(ValueError, match="breaks the order"):
        Layout(layout.rank, layout.tensors[1:] + layout.tensors[:1])
    assert sum(tensor.num_values for tensor in layout.tensors) == layout.num_values
