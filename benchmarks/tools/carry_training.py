"""Carries a training run to a machine without network that takes small files and is available only for minutes.

    python -m benchmarks.tools.carry_training pack my.toml --data my-data --output my-learner packed
    python -m benchmarks.tools.carry_training take my.toml --output my-learner OUT
    regrad train my.toml --data my-data --output my-learner --resume

``pack`` writes a folder: pieces that fit one transfer each, ``run.sh``, and ``state/`` with the run's checkpoint and
log. Carry ``run.sh``, ``parts.sha256``, ``state`` and at least one piece at a time, and call ``run.sh`` there.
It trains one slice (run_carried.sh says how) and leaves checkpoint and log in $OUT. ``take`` puts them into the run
here. Copied into ``state/`` they serve the next slice. The machine needs Python with torch, transformers, safetensors,
tqdm, numpy, onnxruntime and tokenizers.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, cast

from bank_service.values.embedder import installed_files
from regrad_vllm.data.questions import SPLITS
from regrad_vllm.default_model import resolve_model
from regrad_vllm.learn.material import fill_caches
from regrad_vllm.learn.train import CHECKPOINT, LOG
from regrad_vllm.learn.train_config import LEARNERS, ConfigError, TrainConfig

_CODE = Path(__file__).resolve().parents[2]
_SCRIPT = Path(__file__).with_name("run_carried.sh")
_PACKAGES = ("regrad_vllm", "bank_service", "benchmarks/tools")
_NOT_NEEDED = ("__pycache__", "learners", "sample")  # inside the packages
_CHECKPOINT_PIECE_BYTES = 15 * 2**20


def pack(config: TrainConfig, out: Path, *, model_folder: Path, piece_bytes: int) -> list[Path]:
    """Writes everything that ``config`` needs into the new folder ``out``; returns the pieces.

    The embedder's part of the work is done here. The run's checkpoint comes along if there is one. ConfigError if
    ``out`` isn't empty.
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
        leave(run, out / "state")
    return pieces.paths


def _files(config: TrainConfig, run: Path, model_folder: Path) -> Iterator[tuple[str, Path]]:
    """(name in the archive, file here)."""
    for package in _PACKAGES:
        for path in sorted((_CODE / package).rglob("*")):
            if path.is_file() and not set(path.relative_to(_CODE).parts) & set(_NOT_NEEDED):
                yield f"code/{path.relative_to(_CODE)}", path
    yield "code/benchmarks/__init__.py", _CODE / "benchmarks" / "__init__.py"
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
    """The config as TOML. JSON's numbers, arrays and strings of the basic plane are valid TOML."""
    plain = {key: value for key, value in asdict(config).items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for table in ("prompts", "sets"):
        lines += ["", f"[{table}]"]
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in asdict(config)[table].items()]
    return "\n".join(lines) + "\n"


def leave(run: Path, out: Path) -> None:
    """Copies checkpoint and log of the folder ``run`` into ``out``, and removes an earlier checkpoint there."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{CHECKPOINT}.*"):
        old.unlink()
    checkpoint = (run / CHECKPOINT).read_bytes()
    for number, start in enumerate(range(0, len(checkpoint), _CHECKPOINT_PIECE_BYTES)):
        (out / f"{CHECKPOINT}.{number:02d}").write_bytes(checkpoint[start : start + _CHECKPOINT_PIECE_BYTES])
    (out / LOG).write_bytes((run / LOG).read_bytes())


def take(config: TrainConfig, folder: Path) -> bool:
    """Puts the checkpoint and log that ``leave`` wrote into the run of ``config``, if the run isn't further by itself.

    Returns whether it did. ConfigError for a folder without them, and for a checkpoint of another config.
    """
    pieces = sorted(folder.glob(f"{CHECKPOINT}.*"))
    if not pieces or not (folder / LOG).is_file():
        raise ConfigError(f"{folder} must hold {CHECKPOINT}.00 … and {LOG} of a carried run's slice; give its $OUT")
    brought = b"".join(piece.read_bytes() for piece in pieces)
    saved = _load(io.BytesIO(brought))
    if saved.get("config") != config.digest:
        raise ConfigError(f"the checkpoint in {folder} must be of this config, it is of another")
    run = Path(config.output + ".run")
    own = run / CHECKPOINT
    if own.exists() and _load(own)["step"] > saved["step"]:
        return False
    run.mkdir(parents=True, exist_ok=True)
    own.write_bytes(brought)
    shutil.copyfile(folder / LOG, run / LOG)
    return True


def _load(checkpoint: Path | IO[bytes]) -> dict[str, Any]:
    import torch

    saved: dict[str, Any] = torch.load(checkpoint, weights_only=True, map_location="cpu")
    return saved


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


def main() -> int:
    """Runs one command. Returns 0."""
    args = _parser().parse_args()
    if args.command == "leave":
        leave(args.run, args.folder)
        return 0
    given = {"data_folder": args.data, "output": args.output}
    config = TrainConfig.load(args.config, {key: str(path.resolve()) for key, path in given.items() if path})
    if args.command == "pack":
        model_folder = resolve_model(config.base_model)
        pieces = pack(config, args.folder, model_folder=model_folder, piece_bytes=args.piece_mib * 2**20)
        sys.stdout.write(f"{args.folder}: {len(pieces)} pieces\n")
    elif not take(config, args.folder):
        sys.stdout.write(f"{args.folder} is behind {config.output}.run, which stays as it is\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pack", "take"):
        command = commands.add_parser(name)
        command.add_argument("config", type=Path, help="the TOML file of `regrad train`")
        command.add_argument("folder", type=Path, help="what is written, or what a slice left in $OUT")
        command.add_argument("--data", type=Path, help="for the config's data_folder")
        command.add_argument("--output", type=Path, help="for the config's output")
        command.add_argument("--piece-mib", type=int, default=35, help="largest piece (%(default)s)")
    command = commands.add_parser("leave")
    command.add_argument("run", type=Path, help="<output>.run")
    command.add_argument("folder", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
