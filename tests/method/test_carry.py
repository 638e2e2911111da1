"""A training run that is carried to a machine without network, and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tools.carry_training import pack, take
from regrad_vllm.learn.train import train
from regrad_vllm.learn.train_config import ConfigError
from regrad_vllm.learner import Learner
from tests.method.test_train import config, model_folder

__all__ = ["model_folder"]


def write_data(folder: Path) -> None:
    folder.mkdir()
    for split in ("train", "validation", "test"):
        documents = [
            {
                "id": f"{split}{n}",
                "text": f"The {split} house number {n} has {n * n + 7} windows.",
                "set": "old häuser.1",
            }
            for n in range(9)
        ]
        questions = [
            {"id": f"{split}q{n}", "question": f"How many windows has {split} house {n}?", "answers": [str(n * n + 7)],
             "documents": [f"{split}{n}"], "set": "old häuser.1"} for n in range(9)
        ]  # fmt: skip
        for name, lines in (("documents", documents), ("questions", questions)):
            (folder / f"{split}.{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def slice_of(carried: Path, work: Path, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(work), "PYTHON": sys.executable, "WORK": str(work), "OUT": str(out),
        "MINUTES": "0",
    }  # fmt: skip
    return subprocess.run(["sh", "run.sh"], cwd=carried, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.only_test_all
def test_a_run_carried_in_pieces_gives_the_learner_that_a_run_at_home_gives(tmp_path: Path, model_folder: Path) -> None:
    write_data(tmp_path / "data")
    start = train(config(tmp_path / "start", 1), model_folder=model_folder)
    settings = replace(
        config(tmp_path / "home", 4), data_folder=str(tmp_path / "data"), sets={"old häuser.1": 0.5, "synthetic": 0.5},
        neighbour_share=0.5, start=str(start), prompts=replace(config(tmp_path, 1).prompts, system='Say "ça",\nshort.'),
    )  # fmt: skip
    train(settings, model_folder=model_folder)

    away = replace(settings, output=str(tmp_path / "away"))
    pieces = pack(away, tmp_path / "packed", model_folder=model_folder, piece_bytes=4 * 2**20)
    assert len(pieces) > 2 and all(piece.stat().st_size <= 4 * 2**20 for piece in pieces)
    with pytest.raises(ConfigError, match="empty folder"):
        pack(away, tmp_path / "packed", model_folder=model_folder, piece_bytes=4 * 2**20)

    carried, work, out = tmp_path / "carried", tmp_path / "work", tmp_path / "out"
    shutil.copytree(tmp_path / "packed", carried, ignore=shutil.ignore_patterns(pieces[1].name))
    first = slice_of(carried, work, out)
    assert first.returncode == 75 and f"still to carry: {pieces[1].name}" in first.stdout, "and the others are kept"
    for piece in carried.glob("part-*"):
        piece.unlink()
    shutil.copyfile(pieces[1], carried / pieces[1].name)
    second = slice_of(carried, work, out)
    assert second.returncode == 75, second.stderr  # one step, then time is over
    shutil.rmtree(work)  # another machine, with what came back from the first
    shutil.copytree(tmp_path / "packed", carried, dirs_exist_ok=True)
    shutil.copytree(out, carried / "state", dirs_exist_ok=True)
    third = slice_of(carried, work, out)
    assert third.returncode == 75, third.stderr
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert steps == [1, 2], "the second slice went on"

    other = replace(away, output=str(tmp_path / "other"), num_steps=5)
    with pytest.raises(ConfigError, match="must be of this config"):
        take(other, out)
    assert not Path(other.output + ".run").exists()
    assert take(away, out)
    assert train(away, model_folder=model_folder, resume=True, minutes=0) is None
    assert not take(away, out), "the run's own step 3 is further"
    assert train(away, model_folder=model_folder, resume=True) is not None
    home, brought = Learner.load(settings.output), Learner.load(away.output)
    assert np.allclose(home.phi, brought.phi, atol=1e-6) and home.config.prompts == brought.config.prompts
    steps = [
        json.loads(line)["step"] for line in Path(away.output, "training_log.jsonl").read_text("utf-8").splitlines()
    ]
    assert sorted(set(steps)) == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"must hold checkpoint\.pt\.00"):
        take(away, tmp_path / "data")
