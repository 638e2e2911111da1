from __future__ import annotations

from pathlib import Path

import pytest

from regrad_vllm.learner import Learner
from tests.serve.support import random_learner, save_small_model


@pytest.fixture(scope="package")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_small_model(folder)
    return folder


@pytest.fixture(scope="package")
def learner_folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner")
    random_learner(small_model, seed=1).save(folder)
    return folder


@pytest.fixture(scope="package")
def learner(learner_folder: Path) -> Learner:
    return Learner.load(learner_folder)
