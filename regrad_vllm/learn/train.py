"""Meta-training: a config in, a learner folder out. Resumable at any step."""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from regrad_vllm.base_model import base_digest, build_layout, fast_dtype, load_base_model
from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.gradient_encoder import check_base
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learn.batches import make_batch, make_reading
from regrad_vllm.learn.material import data_digests, load_data, make_sampler, validation_batches
from regrad_vllm.learn.meta_step import MetaBatch, meta_loss
from regrad_vllm.learn.picture import draw
from regrad_vllm.learn.probe import probe
from regrad_vllm.learn.state import MetaState
from regrad_vllm.learn.tasks import Sampler
from regrad_vllm.learn.teacher import expectations, teacher_phi
from regrad_vllm.learn.train_config import LEARNERS, ConfigError, TrainConfig
from regrad_vllm.learner import Learner
from regrad_vllm.naming import digest_json

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"  # files in the folder <output>.run
_LOG = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    *,
    model_folder: Path,
    resume: bool = False,
    minutes: float = math.inf,
) -> Path | None:
    """Runs meta-training and returns the learner's folder. If ``minutes`` end first: None, and there is a checkpoint.

    ``resume`` continues from the last checkpoint in <output>.run, or starts at step 0 without one. Without ``resume``
    an existing checkpoint is a ConfigError, so that hours of work aren't overwritten.
    """
    deadline = time.monotonic() + 60 * minutes
    run = Path(config.output + ".run")
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise ConfigError(f"{checkpoint} exists; give --resume to go on, or delete {run} to start again")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.compute_dtype)
    if dtype == torch.bfloat16 != fast_dtype(device.type) and not checkpoint.exists():
        _LOG.warning("compute_dtype should be float32 on this CPU, which may take many times as long for bfloat16")
    base, tokenizer = load_base_model(model_folder, dtype=dtype, device=str(device), attention="eager")
    layers = range(config.first_layer, base.config.num_hidden_layers)
    layout = build_layout(base, rank=config.rank, layers=layers, projections=config.projections)
    model = AdaptedModel(base, layout, config.lora_alpha / config.rank)
    builder = PromptBuilder(tokenizer, config.prompts)
    state = MetaState(config, layout, base.config.hidden_size, device)
    learners = _begin(config, state, model_folder)
    digest = base_digest(model_folder)
    files = data_digests(config)
    fingerprints = {key: learner.fingerprint for key, learner in learners.items()}
    state.origin = digest_json({"base": digest, "data": files, "start": None, **fingerprints})
    if checkpoint.exists():
        state.load(checkpoint)
    data = load_data(config)
    sampler = make_sampler(config, "train", data.train, run)
    validation = validation_batches(config, data.validation, builder, device, run)
    teacher = teacher_phi(model, learners["teacher"]) if config.teacher else None
    _run_steps(config, model, state, sampler, validation, builder, run, deadline, teacher)
    if state.step < config.num_steps:
        return None
    learner = state.to_learner(digest, _provenance(config, state, learners, files, data.left_out))
    learner.save(config.output)
    shutil.copyfile(run / LOG, Path(config.output) / "training_log.jsonl")
    draw(run / LOG, Path(config.output) / "training.svg")
    return Path(config.output)


def _begin(config: TrainConfig, state: MetaState, model_folder: Path) -> dict[str, Learner]:
    """Initialises the state from the config's learners, and returns these by key. LearnerError, ConfigError."""
    learners = {key: Learner.load(getattr(config, key)) for key in LEARNERS if getattr(config, key)}
    for learner in learners.values():
        check_base(learner, model_folder)
    if "start" in learners:
        state.start_from(learners["start"])
    if "start_phi" in learners:
        state.take_phi(learners["start_phi"])
    return learners


def _run_steps(
    config: TrainConfig, model: AdaptedModel, state: MetaState, sampler: Sampler,
    validation: dict[str, list[MetaBatch]], builder: PromptBuilder, run: Path, deadline: float,
    teacher: torch.Tensor | None,
) -> None:  # fmt: skip
    from tqdm import tqdm

    log = JsonLog(run / LOG, state.step)
    progress = tqdm(total=config.num_steps, initial=state.step, desc="meta-training", unit="step")
    smoothed = float("nan")
    machine = _machine()
    while state.step < config.num_steps:
        begun = time.monotonic()
        plan = sampler.plan(state.step)
        batch = make_batch(plan, builder, config.max_document_tokens, model.device)
        if teacher is not None:
            reading = make_reading(plan, builder, model.device)
            batch = replace(batch, expected=expectations(model, teacher, reading))
        parameters = state.parameters()
        if not plan.gradients:
            parameters = replace(parameters, gamma=0.0)
        loss = meta_loss(model, parameters, batch, config.teacher_weight)
        figures = state.update(loss)
        seconds = time.monotonic() - begun
        state.seconds[machine] = state.seconds.get(machine, 0.0) + seconds
        value = float(loss.detach())
        smoothed = value if smoothed != smoothed else 0.95 * smoothed + 0.05 * value
        log(
            step=state.step,
            set=plan.set_name,
            text=plan.text,
            gradients=plan.gradients,
            num_tasks=len(plan.tasks),
            loss=value,
            seconds=seconds,
            step_size=float(state.step_sizes.detach().mean()),
            **figures,
        )
        progress.set_postfix(loss=f"{smoothed:.3f}", refresh=False)
        progress.update()
        if state.step % config.validate_every == 0 or state.step == config.num_steps:
            for name, batches in validation.items():
                found = probe(model, state.parameters().detach(), batches)
                log(step=state.step, validation=name, **found)
                progress.write(f"step {state.step} {name}: {found}")
        over = time.monotonic() > deadline
        if over or state.step % config.checkpoint_every == 0 or state.step == config.num_steps:
            state.save(run / CHECKPOINT)
        if over:
            break
    progress.close()


class JsonLog:
    """A log with one JSON object per line. Each line is flushed, so that a killed run keeps its log."""

    def __init__(self, path: Path, step: int) -> None:
        """Continues after ``step``. Later lines of an interrupted run are removed, because those steps run again."""
        self._path = path
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # the run was killed while it wrote this line
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), "utf-8")

    def __call__(self, **entry: object) -> None:
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in entry.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")


def _provenance(
    config: TrainConfig, state: MetaState, learners: dict[str, Learner], files: dict[str, str], left_out: Sequence[str]
) -> dict[str, object]:
    return {
        "config": config.decisive,
        "data": files,
        "left_out": list(left_out),  # also evaluation data
        "start": None,
        **{
            key: {"fingerprint": learner.fingerprint, "training": dict(learner.config.training)}
            for key, learner in learners.items()
        },
        "num_steps": state.step,
        "hours": round(sum(state.seconds.values()) / 3600, 3),
        "hours_on": {machine: round(seconds / 3600, 3) for machine, seconds in state.seconds.items()},
    }


def _machine() -> str:
    """The device and the library versions, which a step's result depends on."""
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    python, torch_version = platform.python_version(), torch.__version__
    return f"{device}; python {python}, torch {torch_version}, transformers {transformers.__version__}"
