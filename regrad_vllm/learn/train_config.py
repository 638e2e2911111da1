"""The config of a meta-training run, read from one TOML file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from regrad_vllm.learner import STEP_SIZE_KINDS, StepSizeKind
from regrad_vllm.naming import digest_json
from regrad_vllm.prompts import Prompts

_AT_LEAST_ONE = (
    "rank", "max_document_tokens", "top_k", "num_steps", "tokens_per_step", "max_tasks", "questions_per_task",
    "validate_every", "checkpoint_every", "num_synthetic", "validation_batches", "inner_steps", "cue_sentences",
)  # fmt: skip
LEARNERS = ("start", "start_phi", "teacher")  # the keys that name a learner folder
_TINY, _HUGE = 1e-12, 1e12  # limits for a number that must be above 0 and finite
_RANGES = {
    "learning_rate": (_TINY, _HUGE),
    "step_size_learning_rate": (_TINY, _HUGE),
    "clip_norm": (_TINY, _HUGE),
    "lora_alpha": (_TINY, _HUGE),
    "step_size_init": (_TINY, _HUGE),
    "gamma": (0.0, _HUGE),
    "score_temperature_init": (0.0, _HUGE),
    "length_exponent": (0.0, 1.0),
    "neighbour_share": (0.0, 1.0),
    "icl_share": (0.0, 1.0),
    "cue_share": (0.0, 1.0),
    "wrong_cue_share": (0.0, 1.0),
    "gradient_dropout": (0.0, 1.0),
    "teacher_weight": (0.0, _HUGE),
    "warmup_share": (0.0, 1.0),
}


class ConfigError(ValueError):
    """A training config can't be used. The message names the key."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The config of a meta-training run. Relative paths start at the config file's folder."""

    base_model: str  # folder or hub id; "default" builds the default model
    output: str  # learner folder to write at the end; the run's files are in <output>.run
    first_layer: int  # this layer and all above it are adapted
    start: str = ""  # learner folder to start from: same modules, at most this rank; empty: LoRA's usual initialisation
    start_phi: str = ""  # learner folder whose φ* replaces that of start
    teacher: str = ""  # learner folder whose φ* reads the right documents; its answers are imitated
    teacher_weight: float = 1.0  # weight of the imitation, beside the answer loss
    data_folder: str = ""  # folder with train.documents.jsonl.gz and so on; empty: only synthetic documents
    sets: Mapping[str, float] = field(default_factory=lambda: {"synthetic": 1.0})  # set name → share of the steps
    rank: int = 16
    lora_alpha: float = 32.0
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    step_size_kind: StepSizeKind = "tie"
    step_size_init: float = 0.5
    inner_steps: int = 1  # gradient steps per document, each with separate step sizes; the paper takes one
    prompts: Prompts = field(default_factory=Prompts)
    max_document_tokens: int = 256
    top_k: int = 3  # the learner's default when it serves
    gamma: float = 1.0
    length_exponent: float = 1.0  # exponent of the inner loss, see encode/inner_loss.py; 1 is the paper's mean
    token_weights: bool = False  # learn the weight of each token in a document's inner loss
    score_temperature_init: float = 0.0  # learn w_k = exp((s_k − s_1) / τ) from here; 0: w_k = 1
    neighbour_share: float = 0.5  # share of the steps whose documents are hits of each other's questions
    top_k_weights: tuple[float, ...] = (0.5, 0.2, 0.3)  # in training: chance of k = 1, 2, …
    icl_share: float = 0.1  # share of the steps with the adapter's documents in the prompt
    cue_share: float = 0.0  # share of the steps with the documents' sentences nearest to the question in the prompt
    cue_sentences: int = 1  # of each cue, of all its documents together
    wrong_cue_share: float = 0.15  # share of cues that are random sentences of the same or another document
    gradient_dropout: float = 0.0  # share of the steps with text in the prompt in which φ* alone answers
    num_steps: int = 1000
    tokens_per_step: int = 800
    max_tasks: int = 16
    questions_per_task: int = 4
    num_synthetic: int = 20000
    learning_rate: float = 1e-3
    # With Adam a tied scalar moves by at most the learning rate per step, and its way is long.
    step_size_learning_rate: float = 1e-2
    warmup_share: float = 0.1
    clip_norm: float = 0.5
    weight_decay: float = 0.0
    compute_dtype: str = "bfloat16"  # the base model's type; φ*, step sizes and the optimiser are float32
    seed: int = 0
    validate_every: int = 100
    validation_batches: int = 4  # for each set and each k
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ConfigError(f"{name} must lie in {low} … {high}, got {value}")
        self._check_choices()

    def _check_choices(self) -> None:
        if self.step_size_kind not in STEP_SIZE_KINDS:
            raise ConfigError(f"step_size_kind must be one of {STEP_SIZE_KINDS}, got {self.step_size_kind!r}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"compute_dtype must be 'float32' or 'bfloat16', got {self.compute_dtype!r}")
        weights = self.top_k_weights
        if not (all(math.isfinite(weight) and weight >= 0 for weight in weights) and sum(weights) > 0):
            raise ConfigError(f"top_k_weights must be numbers of at least 0, one above it, got {list(weights)}")
        if self.icl_share + self.cue_share > 1:
            raise ConfigError(f"icl_share + cue_share must be at most 1, got {self.icl_share} + {self.cue_share}")
        if not self.sets or any(weight <= 0 for weight in self.sets.values()):
            raise ConfigError(f"sets must give each set a positive share, got {dict(self.sets)}")
        if set(self.sets) != {"synthetic"} and not self.data_folder:
            raise ConfigError(f"data_folder must be set for the sets {sorted(set(self.sets) - {'synthetic'})}")

    @property
    def decisive(self) -> dict[str, Any]:
        """All settings that a run's results depend on, as plain data. Paths are left out."""
        files = ("base_model", "output", "data_folder", *LEARNERS)
        return {key: value for key, value in asdict(self).items() if key not in files}

    @property
    def digest(self) -> str:
        """SHA-256 of the decisive settings, 64 hex digits."""
        return digest_json(self.decisive)

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, str] | None = None) -> TrainConfig:
        """Reads a TOML file. ``overrides`` replace its values. ConfigError for an unknown key or a bad value."""
        path = Path(path)
        try:
            raw: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"config {path} does not exist") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"config {path} is not TOML: {error}") from error
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(raw) - known)
        if unknown:
            raise ConfigError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        for key, kind in (("projections", tuple), ("top_k_weights", tuple)):
            if key in raw:
                raw[key] = kind(raw[key])
        for key in ("output", "data_folder", *LEARNERS):
            if raw.get(key):
                raw[key] = str((path.parent / raw[key]).resolve())
        raw.update(overrides or {})
        _check_complete(raw, path)
        try:
            if "prompts" in raw:
                raw["prompts"] = Prompts(**raw["prompts"])
            return cls(**raw)
        except TypeError as error:
            raise ConfigError(f"{path}: {error}") from error


def _check_complete(raw: Mapping[str, Any], path: Path) -> None:
    missing = [entry.name for entry in fields(TrainConfig) if _is_required(entry) and entry.name not in raw]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} must be given; {TrainConfig.__module__} says what it is")
    if raw.get("data_folder") and "sets" not in raw:
        raise ConfigError(
            f"{path}: sets must name the sets of {raw['data_folder']} to train on with their shares of the steps: "
            "[sets] and below it lines such as my-set = 0.9, by the questions' own 'set' ('questions' for those "
            "without one); 'synthetic' is for invented facts"
        )


def _is_required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING
