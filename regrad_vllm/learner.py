"""The learner: φ*, its step sizes, its layout, its prompts, and its base model.

On disk it is an adapter folder that Hugging Face PEFT can load. ``adapter_config.json`` and
``adapter_model.safetensors`` hold φ*. ``regrad.json`` and ``step_sizes.safetensors`` hold the rest. This module needs
only numpy, so a server process reads a learner without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from bank_service.wire.record import GradientSpec
from regrad_vllm.layout import Layout
from regrad_vllm.naming import digest_json, learner_fingerprint
from regrad_vllm.prompts import Prompts

FORMAT = "regrad.learner.v1"
StepSizeKind = Literal["tie", "same", "full", "fix"]
STEP_SIZE_KINDS: tuple[StepSizeKind, ...] = ("tie", "same", "full", "fix")
_HEAD_FILE = "inner_loss.safetensors"
_PEFT_PREFIX = "base_model.model."


class LearnerError(ValueError):
    """A learner folder or its values can't be used. The message gives the reason."""


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    """A learner's properties, without its tensors."""

    base_digest: str  # SHA-256 of the base model's weights, config and tokenizer, 64 hex digits
    lora_alpha: float
    step_size_kind: StepSizeKind
    prompts: Prompts = field(default_factory=Prompts)
    max_document_tokens: int = 512  # longer documents are cut here, in training and in the bank
    top_k: int = 3
    gamma: float = 1.0
    inner_steps: int = 1  # gradient steps per document; the paper takes one
    length_exponent: float = 1.0  # the exponent of the inner loss, see encode/inner_loss.py
    score_temperature: float = 0.0  # τ of the weights w_k = exp((s_k − s_1) / τ); 0: w_k = 1
    training: Mapping[str, object] = field(default_factory=dict)  # the origin; not part of the fingerprint

    def __post_init__(self) -> None:
        if self.step_size_kind not in STEP_SIZE_KINDS:
            raise LearnerError(f"step_size_kind must be one of {STEP_SIZE_KINDS}, got {self.step_size_kind!r}")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise LearnerError(f"lora_alpha must be a positive number, got {self.lora_alpha}")
        if self.max_document_tokens < 2:
            raise LearnerError(f"max_document_tokens must be at least 2, got {self.max_document_tokens}")
        if self.top_k < 1:
            raise LearnerError(f"top_k must be at least 1, got {self.top_k}")
        if not math.isfinite(self.gamma):
            raise LearnerError(f"gamma must be finite, got {self.gamma}")
        if self.inner_steps < 1:
            raise LearnerError(f"inner_steps must be at least 1, got {self.inner_steps}")
        if not 0 <= self.length_exponent <= 1:
            raise LearnerError(f"length_exponent must lie in 0 … 1, got {self.length_exponent}")
        if not (math.isfinite(self.score_temperature) and self.score_temperature >= 0):
            raise LearnerError(f"score_temperature must be at least 0, got {self.score_temperature}")

    def weights(self, scores: Sequence[float]) -> tuple[float, ...]:
        """The weights w_k for documents with these retrieval scores, best first."""
        if not self.score_temperature:
            return (1.0,) * len(scores)
        return tuple(math.exp(min(0.0, score - scores[0]) / self.score_temperature) for score in scores)


@dataclass(frozen=True)
class Learner:
    """φ* and its step sizes in one layout.

    phi: float32 (num_values,). step_sizes: float32, the inner steps one after another. The size of a step depends on
    the kind: "tie" (num_tensors,), "same" and "fix" (1,), "full" (num_values,). Neither array is written in place.
    """

    config: LearnerConfig
    layout: Layout
    phi: NDArray[np.float32]
    step_sizes: NDArray[np.float32]
    token_head: NDArray[np.float32] | None = None  # float32 (hidden + 1,), see encode/inner_loss.py

    def __post_init__(self) -> None:
        if self.phi.shape != (self.layout.num_values,) or self.phi.dtype != np.float32:
            raise LearnerError(
                f"phi must be float32 ({self.layout.num_values},), got {self.phi.dtype} {self.phi.shape}"
            )
        expected = self.config.inner_steps * num_step_sizes(self.config.step_size_kind, self.layout)
        if self.step_sizes.shape != (expected,) or self.step_sizes.dtype != np.float32:
            raise LearnerError(
                f"step_sizes of kind {self.config.step_size_kind!r} must be float32 ({expected},), "
                f"got {self.step_sizes.dtype} {self.step_sizes.shape}"
            )
        if self.token_head is not None and (self.token_head.ndim != 1 or self.token_head.dtype != np.float32):
            raise LearnerError(
                f"token_head must be float32 (hidden + 1,), got {self.token_head.dtype} {self.token_head.shape}"
            )
        for name, values in (("phi", self.phi), ("step_sizes", self.step_sizes), ("token_head", self.token_head)):
            if values is None:
                continue
            if not np.isfinite(values).all():
                raise LearnerError(f"{name} must be finite; the learner's files are damaged or training diverged")
            values.setflags(write=False)

    @property
    def scaling(self) -> float:
        """s = lora_alpha / r."""
        return self.config.lora_alpha / self.layout.rank

    @cached_property
    def spec(self) -> GradientSpec:
        """The shape and identity of every gradient of this learner."""
        return GradientSpec(self.fingerprint, self.layout.id, self.layout.shapes)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of base model, φ*, step sizes, layout, scaling, prompts and inner loss, 64 hex digits."""
        prompts = asdict(self.config.prompts)
        inner_loss: dict[str, object] = {}  # empty for the paper's inner loss, as in learners of older versions
        if self.config.inner_steps != 1:
            inner_loss["inner_steps"] = self.config.inner_steps
        if self.config.length_exponent != 1.0:
            inner_loss["length_exponent"] = float(self.config.length_exponent)
        if self.token_head is not None:
            inner_loss["token_head"] = _digest_array(self.token_head)
        return learner_fingerprint(
            {
                **inner_loss,
                "base": self.config.base_digest,
                "layout": self.layout.id,
                "lora_alpha": float(self.config.lora_alpha),
                "step_size_kind": self.config.step_size_kind,
                "max_document_tokens": self.config.max_document_tokens,
                "prompts": digest_json(prompts),
                "phi": _digest_array(self.phi),
                "step_sizes": _digest_array(self.step_sizes),
            }
        )

    def expand_step_sizes(self) -> NDArray[np.float32]:
        """One step size per inner step and value, float32 (inner_steps, num_values)."""
        by_step = self.step_sizes.reshape(self.config.inner_steps, -1)
        if self.config.step_size_kind == "tie":
            return np.repeat(by_step, [tensor.num_values for tensor in self.layout.tensors], axis=1)
        return np.ascontiguousarray(np.broadcast_to(by_step, (len(by_step), self.layout.num_values)))

    @classmethod
    def load(cls, folder: str | Path) -> Learner:
        """Reads a learner folder. LearnerError if a file is missing, is damaged or contradicts another."""
        folder = Path(folder)
        document = _read_json(folder / "regrad.json")
        if document.get("format") != FORMAT:
            raise LearnerError(f"{folder / 'regrad.json'}: format must be {FORMAT!r}, got {document.get('format')!r}")
        try:
            raw = dict(cast("Mapping[str, object]", document["config"]))
            raw["prompts"] = Prompts(**cast("dict[str, str]", raw["prompts"]))
            config = LearnerConfig(**raw)  # type: ignore[arg-type]  # an unknown key is a TypeError, caught below
            layout_json = cast("Mapping[str, object]", document["layout"])
            modules = cast("list[tuple[str, int, int]]", layout_json["modules"])
            layout = Layout.build(cast(int, layout_json["rank"]), [(str(m), int(i), int(o)) for m, i, o in modules])
        except (KeyError, TypeError, ValueError) as error:
            raise LearnerError(f"{folder / 'regrad.json'} is not a learner's description: {error}") from error
        phi = read_adapter(folder, layout)
        steps = _read_tensors(folder / "step_sizes.safetensors").get("step_sizes")
        if steps is None:
            raise LearnerError(f"{folder / 'step_sizes.safetensors'} must hold a tensor named 'step_sizes'")
        head = _read_tensors(folder / _HEAD_FILE).get("token_head") if (folder / _HEAD_FILE).exists() else None
        learner = cls(config, layout, phi, steps.astype(np.float32, copy=False), head)
        stated = document.get("fingerprint")
        if stated != learner.fingerprint:
            raise LearnerError(
                f"{folder}: regrad.json states fingerprint {stated}, its files give {learner.fingerprint}; "
                "a file was changed or belongs to another learner: restore the folder as a whole"
            )
        return learner

    def save(self, folder: str | Path) -> None:
        """Writes the learner folder. It replaces existing files of the same names."""
        folder = Path(folder)
        save_adapter(folder, self, self.phi)
        _save({"step_sizes": self.step_sizes}, folder / "step_sizes.safetensors")
        if self.token_head is not None:
            _save({"token_head": self.token_head}, folder / _HEAD_FILE)
        else:
            (folder / _HEAD_FILE).unlink(missing_ok=True)
        document = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "config": asdict(self.config),
            "layout": {
                "id": self.layout.id,
                "rank": self.layout.rank,
                "modules": [
                    [a.module, a.shape[1], b.shape[0]]
                    for a, b in zip(self.layout.tensors[::2], self.layout.tensors[1::2], strict=True)
                ],
            },
        }
        (folder / "regrad.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


def save_adapter(folder: Path, learner: Learner, adapter: NDArray[np.float32], base_model: str = "") -> None:
    """Writes ``adapter``, float32 (num_values,), as a plain PEFT LoRA folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PEFT_PREFIX}{tensor.module}.lora_{tensor.part}.weight": np.ascontiguousarray(view)
        for tensor, view in learner.layout.views(adapter)
    }
    _save(tensors, folder / "adapter_model.safetensors")
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": learner.layout.rank,
        "lora_alpha": learner.config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(learner.layout.modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(peft_config, indent=1) + "\n", "utf-8")


def _save(tensors: Mapping[str, NDArray[np.float32]], path: Path) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes it private, unlike the other files


def num_step_sizes(kind: StepSizeKind, layout: Layout) -> int:
    return {"tie": len(layout.tensors), "same": 1, "fix": 1, "full": layout.num_values}[kind]


def _digest_array(values: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise LearnerError(f"{path} does not exist; a learner folder is made by `regrad train`") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LearnerError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise LearnerError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document


def _read_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise LearnerError(f"{path} does not exist; a learner folder is made by `regrad train`") from error
    except Exception as error:  # safetensors raises its own Rust error types
        raise LearnerError(f"{path} is not a safetensors file: {error}") from error


def read_adapter(folder: Path, layout: Layout) -> NDArray[np.float32]:
    """The adapter of a PEFT folder as float32 (num_values,). LearnerError if it has another layout."""
    path = folder / "adapter_model.safetensors"
    tensors = _read_tensors(path)
    phi = np.empty(layout.num_values, np.float32)
    for tensor, view in layout.views(phi):
        name = f"{_PEFT_PREFIX}{tensor.module}.lora_{tensor.part}.weight"
        if name not in tensors:
            raise LearnerError(f"{path} must hold {name}; the layout has {len(layout.tensors)} tensors")
        if tensors[name].shape != tensor.shape:
            raise LearnerError(f"{path}: {name} must have shape {tensor.shape}, got {tensors[name].shape}")
        view[...] = tensors.pop(name)
    if tensors:
        raise LearnerError(f"{path} holds tensors that the layout does not know: {sorted(tensors)[:3]}")
    return phi
