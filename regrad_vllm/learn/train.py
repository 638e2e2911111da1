"""Meta-training: a config in, a learner folder out. Resumable at any step."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from regrad_vllm.base_model import base_digest, build_layout, load_base_model
from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learn.batches import make_batch
from regrad_vllm.learn.config import ConfigError, TrainConfig
from regrad_vllm.learn.meta_step import MetaBatch, meta_loss
from regrad_vllm.learn.probe import probe
from regrad_vllm.learn.state import MetaState
from regrad_vllm.learn.tasks import Sampler, TaskSet, load_question_sets, synthetic_set

_LOG = logging.getLogger(__name__)


def train(config: TrainConfig, *, model_folder: Path, resume: bool = False) -> Path:
    """Runs meta-training and returns the learner's folder.

    resume continues from the last checkpoint in <output>.run, and starts at 0 where there is none. Without it a
    run that left a checkpoint is a ConfigError, so that hours of work aren't overwritten.
    """
    run = Path(config.output + ".run")
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise ConfigError(f"{checkpoint} exists; give --resume to go on, or delete {run} to start again")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_base_model(
        model_folder, dtype=getattr(torch, config.compute_dtype), device=str(device), attention="eager"
    )
    layers = range(config.first_layer, base.config.num_hidden_layers)
    layout = build_layout(base, rank=config.rank, layers=layers, projections=config.projections)
    model = AdaptedModel(base, layout, config.lora_alpha / config.rank)
    builder = PromptBuilder(tokenizer, config.prompts)
    state = MetaState(config, layout, device)
    if checkpoint.exists():
        state.load(checkpoint)
    sampler = make_sampler(config, "train")
    validation = _validation_batches(config, builder, device)
    _run_steps(config, model, state, sampler, validation, builder, run)
    learner = state.to_learner(base_digest(model_folder), _provenance(config, state))
    learner.save(config.output)
    return Path(config.output)


def make_sampler(config: TrainConfig, split: str) -> Sampler:
    real = [name for name in config.sets if name != "synthetic"]
    sets: list[TaskSet] = load_question_sets(Path(config.data_folder), split, real) if real else []
    if "synthetic" in config.sets:
        sets.append(synthetic_set(split, config.seed, config.num_synthetic))
    return Sampler(
        sets=tuple(sets),
        set_weights=tuple(config.sets[task_set.name] for task_set in sets),
        seed=config.seed,
        tokens_per_step=config.tokens_per_step,
        max_tasks=config.max_tasks,
        questions_per_task=config.questions_per_task,
        max_words=int(config.max_document_tokens / 1.35),
        top_k_weights=config.top_k_weights,
        icl_share=config.icl_share,
    )


def _run_steps(
    config: TrainConfig, model: AdaptedModel, state: MetaState, sampler: Sampler,
    validation: dict[str, list[MetaBatch]], builder: PromptBuilder, run: Path,
) -> None:  # fmt: skip
    from tqdm import tqdm

    log = _JsonLog(run / "log.jsonl", state.step)
    progress = tqdm(total=config.num_steps, initial=state.step, desc="meta-training", unit="step")
    smoothed = float("nan")
    while state.step < config.num_steps:
        begun = time.monotonic()
        plan = sampler.plan(state.step)
        batch = make_batch(plan, builder, config.max_document_tokens, model.device)
        loss = meta_loss(model, state.phi, state.step_size_tensors(), batch, config.gamma)
        figures = state.update(loss)
        seconds = time.monotonic() - begun
        state.seconds += seconds
        value = float(loss.detach())
        smoothed = value if smoothed != smoothed else 0.95 * smoothed + 0.05 * value
        log(
            step=state.step,
            set=plan.set_name,
            icl=plan.icl,
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
                steps = [step.detach() for step in state.step_size_tensors()]
                found = probe(model, state.phi.detach(), steps, batches, config.gamma)
                log(step=state.step, validation=name, **found)
                progress.write(f"step {state.step} {name}: {found}")
        if state.step % config.checkpoint_every == 0 or state.step == config.num_steps:
            state.save(run / "checkpoint.pt")
    progress.close()


def _validation_batches(
    config: TrainConfig, builder: PromptBuilder, device: torch.device
) -> dict[str, list[MetaBatch]]:
    """Two fixed batches from each set that has a validation part."""
    batches: dict[str, list[MetaBatch]] = {}
    for name in config.sets:
        single = replace(config, sets={name: 1.0}, icl_share=0.0, num_synthetic=400)
        try:
            sampler = make_sampler(single, "validation")
        except ValueError:  # the data has no validation part for this set
            _LOG.info("set %s has no validation tasks", name)
            continue
        batches[name] = [
            make_batch(sampler.plan(step), builder, config.max_document_tokens, device) for step in range(2)
        ]
    return batches


class _JsonLog:
    """One JSON object a line, flushed, so that a killed run keeps its log."""

    def __init__(self, path: Path, step: int) -> None:
        """Goes on after ``step``: what an interrupted run logged beyond its checkpoint is done, and logged, again."""
        self._path = path
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), "utf-8")

    def __call__(self, **entry: object) -> None:
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in entry.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")


def _provenance(config: TrainConfig, state: MetaState) -> dict[str, object]:
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    files = sorted(Path(config.data_folder).glob("train.*.jsonl.gz")) if config.data_folder else []
    return {
        "config": config.decisive,
        "data": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "num_steps": state.step,
        "hours": round(state.seconds / 3600, 3),
        "versions": versions,
        "device": device,
    }


def main(
    config_path: str, *, resume: bool, model_folder: Callable[[str], Path], data: str = "", output: str = ""
) -> Path:
    """Entry for the command line. ``model_folder`` turns the config's base_model into a local folder.

    data and output replace the config's data_folder and output where given.
    """
    overrides = {"data_folder": data and str(Path(data).resolve()), "output": output and str(Path(output).resolve())}
    config = TrainConfig.load(config_path, {key: value for key, value in overrides.items() if value})
    return train(config, model_folder=model_folder(config.base_model), resume=resume)
