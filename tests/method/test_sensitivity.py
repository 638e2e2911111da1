"""A learner's sensitivity is the Fisher information of its answers, and lies in its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bank_service.wire.codecs.sensitivity import Sensitivity
from regrad_vllm.data.questions import EvalData
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.learn.measured_sensitivity import SensitivitySums, measure_sensitivity
from regrad_vllm.learner import Learner, LearnerError
from regrad_vllm.sensitivity_file import FILE, write_sensitivity
from tests.method.test_learner import make_learner


def some_sensitivity(learner: Learner, seed: int = 0) -> Sensitivity:
    rng = np.random.default_rng(seed)
    short, long = [], []
    for shape in learner.layout.shapes:
        factor = rng.standard_normal((min(shape), min(shape)))
        short.append((factor @ factor.T).astype(np.float32))
        long.append(rng.random(max(shape)).astype(np.float32))
    return Sensitivity(tuple(short), tuple(long))


def test_it_is_the_fisher_information_over_all_answers_by_their_probability(llama: Any) -> None:
    learner = make_learner()
    model = AdaptedModel(llama, learner.layout, learner.scaling)
    row = ([5, 9, 33, 71, 12], 4)  # one token is answered
    exact = [np.zeros(shape) for shape in learner.layout.shapes]
    batch = TokenBatch.pad([row])
    leaves = [part.detach().requires_grad_() for part in model.split(torch.tensor(learner.phi)[None])]
    log_p = model.logits(model.upper(model.lower(batch), leaves, batch)[batch.targets != -100]).log_softmax(-1)[0]
    short = [np.zeros((min(shape),) * 2) for shape in learner.layout.shapes]
    for token in range(len(log_p)):
        gradients = torch.autograd.grad(log_p[token], leaves, retain_graph=True)
        chance = float(log_p[token].detach().exp())
        for index, gradient in enumerate(gradients):
            own = gradient[0].double().numpy()
            side = own if own.shape[1] >= own.shape[0] else own.T
            short[index] += chance * side @ side.T
            exact[index] += chance * own * own
    sums = SensitivitySums(learner)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        sums.add(model, TokenBatch.pad([row] * 8), np.stack([learner.phi] * 8), generator)
    found = sums.sensitivity()
    found.check(learner.layout.shapes)
    for index, shape in enumerate(learner.layout.shapes):
        assert np.linalg.norm(found.short[index] * max(shape) - short[index]) < 0.1 * np.linalg.norm(short[index])
        along = exact[index].sum(axis=0 if shape[1] >= shape[0] else 1)
        assert np.linalg.norm(found.long[index] - along / along.mean()) < 0.1 * np.linalg.norm(along / along.mean())


def test_rows_of_a_batch_are_told_apart(llama: Any) -> None:
    """Squares are summed, not the sum squared: as if each had been alone."""
    learner = make_learner()
    model = AdaptedModel(llama, learner.layout, learner.scaling)
    rows = [([5, 9, 33, 71, 12], 4), ([6, 2, 40, 8, 15, 3, 3], 3)]
    adapters = np.stack([learner.phi, -learner.phi])
    together, apart = SensitivitySums(learner), SensitivitySums(learner)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(5):
        together.add(model, TokenBatch.pad(rows), adapters, generators[0])
        for row, adapter in zip(rows, adapters, strict=True):
            apart.add(model, TokenBatch.pad([row]), adapter[None], generators[1])
    for one, two in zip(together.sensitivity().short, apart.sensitivity().short, strict=True):
        assert np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(two)


def test_it_lies_in_the_learners_folder_and_goes_with_its_spec(tmp_path: Path) -> None:
    plain = make_learner()
    learner = replace(plain, sensitivity=some_sensitivity(plain))
    assert learner.fingerprint == plain.fingerprint and learner.spec == plain.spec
    learner.save(tmp_path)
    loaded = Learner.load(tmp_path).spec.sensitivity
    assert loaded is not None and learner.sensitivity is not None
    for one, two in zip(loaded.short + loaded.long, learner.sensitivity.short + learner.sensitivity.long, strict=True):
        assert np.array_equal(one, two)
    plain.save(tmp_path)
    assert Learner.load(tmp_path).spec.sensitivity is None, "nothing of an earlier learner stays in the folder"


def test_another_learners_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    learner = make_learner()
    learner.save(tmp_path)
    write_sensitivity(tmp_path, learner.layout, "f" * 64, some_sensitivity(learner))
    with pytest.raises(LearnerError, match=f"must be of learner {learner.fingerprint}, got one of {'f' * 64}; remove"):
        Learner.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(LearnerError, match="not a safetensors file"):
        Learner.load(tmp_path)
    whole = some_sensitivity(learner)
    mixed = replace(whole, long=(whole.short[0], *whole.long[1:]))
    with pytest.raises(ValueError, match="tensor 0 of a sensitivity must have sides"):
        write_sensitivity(tmp_path, learner.layout, learner.fingerprint, mixed)
    assert (tmp_path / FILE).read_bytes() == b"no tensors", "nothing is written of one that can't be used"
    broken = replace(whole, short=tuple(-each for each in whole.short))
    with pytest.raises(ValueError, match="short side of tensor 0 of a sensitivity must be symmetric, not negative"):
        broken.check(learner.layout.shapes)
    one = replace(whole, short=whole.short[:1], long=whole.long[:1])
    with pytest.raises(LearnerError, match="must hold"):
        write_some(tmp_path, learner, one)
        Learner.load(tmp_path)


def write_some(folder: Path, learner: Learner, sensitivity: Sensitivity) -> None:
    """As ``write_sensitivity``, of some of the tensors."""
    from safetensors.numpy import save_file

    tensor = learner.layout.tensors[0]
    name = f"{tensor.module}.lora_{tensor.part}"
    parts = {f"{name}.short": sensitivity.short[0], f"{name}.long": sensitivity.long[0]}
    save_file(parts, folder / FILE, metadata={"learner": learner.fingerprint})


def test_there_must_be_a_question(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there must be a question"):
        measure_sensitivity(make_learner(), tmp_path, EvalData((), ()), 0)


def test_the_command_measures_the_learner_that_ships(tmp_path: Path) -> None:
    """On two invented facts; the file that ships was made on more."""
    import shutil

    from regrad_vllm.cli import main
    from regrad_vllm.default_model import shipped_learner

    folder = tmp_path / "learner"
    shutil.copytree(shipped_learner(), folder, ignore=shutil.ignore_patterns("evaluation", "ft_rag"))
    (folder / FILE).unlink(missing_ok=True)
    assert main(["sensitivity", str(folder), "--fresh", "2"]) == 0
    learner = Learner.load(folder)
    assert learner.sensitivity is not None and learner.spec.sensitivity is not None
    shipped = Learner.load(shipped_learner())
    assert shipped.sensitivity is not None
    for layer in (0, -1):  # of a like shape; less of it, as invented facts are answered with certainty
        mine, theirs = learner.sensitivity.short[layer], shipped.sensitivity.short[layer]
        assert 0 < np.trace(mine) < np.trace(theirs)
        assert np.vdot(mine, theirs) > 0.2 * np.linalg.norm(mine) * np.linalg.norm(theirs)
    assert len(load_file(folder / FILE)) == 2 * len(learner.layout.tensors)
    assert len(fresh_facts(2, 0, "train").questions) == 2
