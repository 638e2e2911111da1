"""The folder that a run writes its lines and reports into."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path


def new_run_folder(out: Path | None, prefix: str) -> Path:
    """``out``, made here, or a new temporary folder. ValueError if ``out`` holds anything."""
    folder = out or Path(tempfile.mkdtemp(prefix=prefix))
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out must be absent or an empty folder, {folder} is not; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, value: object, *, ascii: bool = False) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=ascii) + "\n", "utf-8")
