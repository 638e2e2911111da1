"""A training run for a machine that can't be reached but by carrying files: no network, no installation, short visits.

``pack`` writes a folder: pieces small enough for one transfer each, ``run.sh``, and ``state/`` with what changes. There
it needs Python with torch, transformers, safetensors, tqdm, numpy, onnxruntime and tokenizers. What a slice leaves in
$OUT comes back by ``regrad train --carried`` (carried.py), and into ``state/`` for the next slice.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, cast

from bank_service.values.embedder import installed_files
from regrad_vllm.data.questions import SPLITS
from regrad_vllm.learn.carried import CHECKPOINT, leave_state
from regrad_vllm.learn.config import LEARNERS, ConfigError, TrainConfig
from regrad_vllm.learn.material import fill_caches

_CODE = Path(__file__).resolve().parents[2]
_SCRIPT = Path(__file__).with_name("run_carried.sh")
_NOT_NEEDED = ("__pycache__", "learners", "sample")  # inside the packages


def pack(config: TrainConfig, out: Path, *, model_folder: Path, piece_bytes: int) -> list[Path]:
    """Writes everything that ``config`` needs into the new folder ``out``; returns the pieces.

    Does here what needs the embedder. Takes the run's checkpoint along where there is one. ConfigError where ``out``
    isn't empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} must be absent or an empty folder; choose another")
    run = Path(config.output + ".run")
    run.mkdir(parents=True, exist_ok=True)
    fill_caches(config, run)
    (out / "state").mkdir(parents=True)
    pieces = _Pieces(out, piece_bytes)
    learners: dict[str, Any] = {key: key for key in _learners(config)}
    there = replace(config, base_model="model", output="learner", data_folder="data", **learners)
    with (
        lzma.open(cast(IO[bytes], pieces), "wb", preset=1) as packed,
        tarfile.open(fileobj=packed, mode="w|", dereference=True) as tar,
    ):
        text = _toml(there).encode()
        entry = tarfile.TarInfo("config.toml")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
        for name, path in _files(config, run, model_folder):
            tar.add(path, name)
    pieces.close()
    (out / "parts.sha256").write_text(
        "".join(f"{hashlib.sha256(piece.read_bytes()).hexdigest()}  {piece.name}\n" for piece in pieces.paths), "utf-8"
    )
    shutil.copyfile(_SCRIPT, out / "run.sh")
    if (run / CHECKPOINT).exists():
        leave_state(run, out / "state")
    return pieces.paths


def _files(config: TrainConfig, run: Path, model_folder: Path) -> Iterator[tuple[str, Path]]:
    """(name in the archive, file here)."""
    for package in ("regrad_vllm", "bank_service"):
        for path in sorted((_CODE / package).rglob("*")):
            if path.is_file() and not set(path.relative_to(_CODE).parts) & set(_NOT_NEEDED):
                yield f"code/{path.relative_to(_CODE)}", path
    for name, path in installed_files().items():
        yield f"code/{name}", path
    for path in sorted(run.glob("vectors-*.npz")):
        yield f"vectors/{path.name}", path
    for split in SPLITS if config.data_folder else ():  # the leak check reads all of them
        for path in sorted(Path(config.data_folder).glob(f"{split}.*.jsonl*")):
            yield f"data/{path.name}", path
    yield from ((f"model/{path.name}", path) for path in sorted(model_folder.iterdir()) if path.is_file())
    for key, folder in _learners(config).items():
        yield from ((f"{key}/{path.name}", path) for path in sorted(Path(folder).iterdir()) if path.is_file())


def _learners(config: TrainConfig) -> dict[str, str]:
    """The learner folders that the run needs, by key."""
    return {key: getattr(config, key) for key in LEARNERS if getattr(config, key)}


def _toml(config: TrainConfig) -> str:
    """JSON's numbers, arrays and strings of the basic plane are TOML's too."""
    plain = {key: value for key, value in asdict(config).items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for table in ("prompts", "sets"):
        lines += ["", f"[{table}]"]
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in asdict(config)[table].items()]
    return "\n".join(lines) + "\n"


class _Pieces(io.RawIOBase):
    """A stream in files of at most so many bytes."""

    def __init__(self, folder: Path, piece_bytes: int) -> None:
        self.paths: list[Path] = []
        self._folder, self._piece_bytes = folder, piece_bytes
        self._file: io.BufferedWriter | None = None
        self._left = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view = memoryview(data)
        while view:
            if not self._left:
                self._next()
            assert self._file is not None
            written = self._file.write(view[: self._left])
            self._left -= written
            view = view[written:]
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _next(self) -> None:
        if self._file is not None:
            self._file.close()
        path = self._folder / f"part-{len(self.paths):03d}"
        self._file, self._left = path.open("wb"), self._piece_bytes
        self.paths.append(path)
