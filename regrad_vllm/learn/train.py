"""Meta-training: a config in, a learner folder out. Resumable at any step."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bank_service.values.embedder import MiniLmEmbedder
from regrad_vllm.base_model import base_digest, build_layout, fast_dtype, load_base_model
from regrad_vllm.data.leaks import evaluation_without_leaks, without_leaks
from regrad_vllm.data.questions import SPLITS, DataSplit, load_split
from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.encoder import check_base
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learn.batches import make_batch
from regrad_vllm.learn.carried import CHECKPOINT, LOG, carried_state
from regrad_vllm.learn.config import ConfigError, TrainConfig
from regrad_vllm.learn.meta_step import MetaBatch, meta_loss
from regrad_vllm.learn.picture import draw
from regrad_vllm.learn.probe import probe
from regrad_vllm.learn.retrieval import with_retrieval
from regrad_vllm.learn.state import MetaState
from regrad_vllm.learn.synthetic import Split
from regrad_vllm.learn.tasks import Sampler, TaskSet, question_sets, synthetic_set
from regrad_vllm.learner import Learner
from regrad_vllm.naming import digest_json

VALIDATION_TOP_KS = (1, 3)
EMPTY = DataSplit({}, ())
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingData:
    train: DataSplit
    validation: DataSplit
    left_out: tuple[str, ...]  # ids of training documents and questions that stand in evaluation data too


def train(
    config: TrainConfig,
    *,
    model_folder: Path,
    resume: bool = False,
    minutes: float = math.inf,
    carried: Path | None = None,
) -> Path | None:
    """Runs meta-training and returns the learner's folder; None where ``minutes`` were over first: then it left a
    checkpoint to resume from.

    resume continues from the last checkpoint in <output>.run, and starts at 0 where there is none. Without it a
    run that left a checkpoint is a ConfigError, so that hours of work aren't overwritten. ``carried``: a folder with
    what a slice on another machine left (carried.py); the run goes on from it where that is further.
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
    start = Learner.load(config.start) if config.start else None
    if start is not None:
        check_base(start, model_folder)
        state.start_from(start)
    digest = base_digest(model_folder)
    files = _data_digests(config)
    state.origin = digest_json({"base": digest, "data": files, "start": start.fingerprint if start else None})
    if checkpoint.exists():
        state.load(checkpoint)
    if carried is not None:
        _take_over(state, carried, run)
    data = load_data(config)
    sampler = make_sampler(config, "train", data.train, run)
    validation = _validation_batches(config, data.validation, builder, device, run)
    _run_steps(config, model, state, sampler, validation, builder, run, deadline)
    if state.step < config.num_steps:
        return None
    learner = state.to_learner(digest, _provenance(config, state, start, files, data.left_out))
    learner.save(config.output)
    shutil.copyfile(run / LOG, Path(config.output) / "training_log.jsonl")
    draw(run / LOG, Path(config.output) / "training.svg")
    return Path(config.output)


def _take_over(state: MetaState, carried: Path, run: Path) -> None:
    """Goes on from a carried checkpoint, unless it is of another run (ConfigError) or the run is further by itself."""
    checkpoint, log = carried_state(carried)
    step = state.step
    state.load(checkpoint)
    if state.step < step:
        _LOG.warning("%s is at step %d and this run at %d; it goes on from its own", carried, state.step, step)
        state.load(run / CHECKPOINT)
        return
    (run / LOG).write_text(log, "utf-8")
    state.save(run / CHECKPOINT)


def load_data(config: TrainConfig) -> TrainingData:
    """The training split without what stands in the folder's other splits too, and the validation split without what
    stands in the test split, so that nothing is chosen by it."""
    if set(config.sets) == {"synthetic"}:
        return TrainingData(EMPTY, EMPTY, ())
    evaluations = {}
    for split in ("validation", "test"):
        with suppress(FileNotFoundError):
            evaluations[split] = load_split(config.data_folder, split)
    train, left_out = without_leaks(load_split(config.data_folder, "train"), evaluations.values())
    if left_out:
        _LOG.warning("%d training documents and questions stand in evaluation data too and are left out", len(left_out))
    validation = evaluations.get("validation", EMPTY)
    if "test" in evaluations:
        validation, _ = evaluation_without_leaks(validation, evaluations["test"])
    return TrainingData(train, validation, left_out)


def make_sampler(config: TrainConfig, split: Split, data: DataSplit, cache: Path) -> Sampler:
    """``cache``: where what retrieval finds is kept."""
    real = [name for name in config.sets if name != "synthetic"]
    sets: list[TaskSet] = question_sets(data, real) if real else []
    if "synthetic" in config.sets:
        sets.append(synthetic_set(split, config.seed, config.num_synthetic))
    if config.neighbour_share or config.score_temperature_init:
        embedder = MiniLmEmbedder.installed()
        sets = [with_retrieval(task_set, embedder, cache) if task_set.retrievable else task_set for task_set in sets]
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
        neighbour_share=config.neighbour_share,
    )


def _run_steps(
    config: TrainConfig, model: AdaptedModel, state: MetaState, sampler: Sampler,
    validation: dict[str, list[MetaBatch]], builder: PromptBuilder, run: Path, deadline: float,
) -> None:  # fmt: skip
    from tqdm import tqdm

    log = _JsonLog(run / LOG, state.step)
    progress = tqdm(total=config.num_steps, initial=state.step, desc="meta-training", unit="step")
    smoothed = float("nan")
    machine = _machine()
    while state.step < config.num_steps:
        begun = time.monotonic()
        plan = sampler.plan(state.step)
        batch = make_batch(plan, builder, config.max_document_tokens, model.device)
        loss = meta_loss(model, state.parameters(), batch)
        figures = state.update(loss)
        seconds = time.monotonic() - begun
        state.seconds[machine] = state.seconds.get(machine, 0.0) + seconds
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
                found = probe(model, state.parameters().detach(), batches)
                log(step=state.step, validation=name, **found)
                progress.write(f"step {state.step} {name}: {found}")
        over = time.monotonic() > deadline
        if over or state.step % config.checkpoint_every == 0 or state.step == config.num_steps:
            state.save(run / CHECKPOINT)
        if over:
            break
    progress.close()


def fill_caches(config: TrainConfig, cache: Path) -> None:
    """Embeds what a run needs embedded, so that it can go on where there is no embedder."""
    data = load_data(config)
    make_sampler(config, "train", data.train, cache)
    for _ in _validation_samplers(config, data.validation, cache):
        pass


def _validation_samplers(config: TrainConfig, data: DataSplit, cache: Path) -> Iterator[tuple[str, Sampler]]:
    """A sampler for each set that has a validation part, with 1 and with 3 documents an adapter."""
    for name in config.sets:
        for k in VALIDATION_TOP_KS:
            single = replace(
                config, sets={name: 1.0}, num_synthetic=min(400, config.num_synthetic),
                icl_share=config.icl_share if config.gamma == 0 else 0.0,  # without an adapter the prompt has all
                top_k_weights=tuple(float(number == k) for number in range(1, k + 1)),
            )  # fmt: skip
            try:
                yield f"{name}, k={k}", make_sampler(single, "validation", data, cache)
            except ValueError:  # the data has no validation part for this set
                _LOG.info("set %s has no validation tasks", name)
                break


def _validation_batches(
    config: TrainConfig, data: DataSplit, builder: PromptBuilder, device: torch.device, cache: Path
) -> dict[str, list[MetaBatch]]:
    """Fixed batches of each validation sampler."""
    return {
        name: [
            make_batch(sampler.plan(step), builder, config.max_document_tokens, device)
            for step in range(config.validation_batches)
        ]
        for name, sampler in _validation_samplers(config, data, cache)
    }


class _JsonLog:
    """One JSON object a line, flushed, so that a killed run keeps its log."""

    def __init__(self, path: Path, step: int) -> None:
        """Goes on after ``step``: what an interrupted run logged beyond its checkpoint is done, and logged, again."""
        self._path = path
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # killed while writing it
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), "utf-8")

    def __call__(self, **entry: object) -> None:
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in entry.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")


def _data_digests(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of the data files that decide what is trained on, by name: what stands in the others too is left out."""
    if set(config.sets) == {"synthetic"}:
        return {}
    files = sorted(path for split in SPLITS for path in Path(config.data_folder).glob(f"{split}.*.jsonl*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _provenance(
    config: TrainConfig, state: MetaState, start: Learner | None, files: dict[str, str], left_out: tuple[str, ...]
) -> dict[str, object]:
    return {
        "config": config.decisive,
        "data": files,
        "left_out": list(left_out),  # they stand in evaluation data too
        "start": {"fingerprint": start.fingerprint, "training": dict(start.config.training)} if start else None,
        "num_steps": state.step,
        "hours": round(sum(state.seconds.values()) / 3600, 3),
        "hours_on": {machine: round(seconds / 3600, 3) for machine, seconds in state.seconds.items()},
    }


def _machine() -> str:
    """The device and the versions that make a step what it is."""
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    python, torch_version = platform.python_version(), torch.__version__
    return f"{device}; python {python}, torch {torch_version}, transformers {transformers.__version__}"
