"""The data of a training run: splits without leaks, samplers of tasks, and their embeddings."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bank_service.values.embedder import default_embedder
from regrad_vllm.data.leaks import evaluation_without_leaks, without_leaks
from regrad_vllm.data.questions import SPLITS, DataSplit, load_split
from regrad_vllm.data.token_counts import TOKENS_PER_WORD
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learn.batches import make_batch
from regrad_vllm.learn.cues import Cues
from regrad_vllm.learn.meta_step import MetaBatch
from regrad_vllm.learn.synthetic import Split
from regrad_vllm.learn.tasks import Sampler, TaskSet, question_sets, synthetic_set
from regrad_vllm.learn.train_config import TrainConfig
from regrad_vllm.learn.training_hits import with_retrieval

VALIDATION_TOP_KS = (1, 3)
EMPTY = DataSplit({}, ())
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingData:
    train: DataSplit
    validation: DataSplit
    left_out: tuple[str, ...]  # ids of training documents and questions that are also evaluation data


def load_data(config: TrainConfig) -> TrainingData:
    """The training split without leaks into other splits; the validation split without those into the test split."""
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
    """The sampler of a split. cache: the folder for retrieved hits."""
    real = [name for name in config.sets if name != "synthetic"]
    sets: list[TaskSet] = question_sets(data, real) if real else []
    if "synthetic" in config.sets:
        sets.append(synthetic_set(split, config.seed, config.num_synthetic))
    retrieved = [_is_retrieved(config, task_set) for task_set in sets]
    embedder = default_embedder() if config.cue_share or any(retrieved) else None
    if embedder is not None:
        sets = [
            with_retrieval(task_set, embedder, cache) if needed else task_set
            for task_set, needed in zip(sets, retrieved, strict=True)
        ]
    return Sampler(
        sets=tuple(sets),
        set_weights=tuple(config.sets[task_set.name] for task_set in sets),
        seed=config.seed,
        tokens_per_step=config.tokens_per_step,
        max_tasks=config.max_tasks,
        questions_per_task=config.questions_per_task,
        max_words=int(config.max_document_tokens / TOKENS_PER_WORD),
        top_k_weights=config.top_k_weights,
        icl_share=config.icl_share,
        neighbour_share=config.neighbour_share,
        cue_share=config.cue_share,
        wrong_cue_share=config.wrong_cue_share,
        gradient_dropout=config.gradient_dropout,
        cues=Cues(embedder, config.cue_sentences) if embedder is not None else None,
    )


def _is_retrieved(config: TrainConfig, task_set: TaskSet) -> bool:
    """Whether the set needs retrieval: it draws hits, or weights several documents by their scores."""
    several = max(config.top_k_weights[1:], default=0.0) > 0 or any(task.partners for task in task_set.tasks)
    return task_set.retrievable and bool(config.neighbour_share or (config.score_temperature_init and several))


def fill_caches(config: TrainConfig, cache: Path) -> None:
    """Computes all embeddings of a run, so that it can continue on a machine without the embedder."""
    data = load_data(config)
    make_sampler(config, "train", data.train, cache)
    for _ in _validation_samplers(config, data.validation, cache):
        pass


def _validation_samplers(config: TrainConfig, data: DataSplit, cache: Path) -> Iterator[tuple[str, Sampler]]:
    """A sampler for each set with validation data, with 1 and with 3 documents per adapter.

    The prompt has a cue if cues are trained. With γ = 0 it has text as in training.
    """
    if config.gamma:
        config = replace(config, icl_share=0.0, cue_share=float(config.cue_share > 0))
    for name in config.sets:
        for k in VALIDATION_TOP_KS:
            single = replace(
                config, sets={name: 1.0}, num_synthetic=min(400, config.num_synthetic),
                wrong_cue_share=0.0, gradient_dropout=0.0,
                top_k_weights=tuple(float(number == k) for number in range(1, k + 1)),
            )  # fmt: skip
            try:
                yield f"{name}, k={k}", make_sampler(single, "validation", data, cache)
            except ValueError:  # the data has no validation part for this set
                _LOG.info("set %s has no validation tasks", name)
                break


def validation_batches(
    config: TrainConfig, data: DataSplit, builder: PromptBuilder, device: torch.device, cache: Path
) -> dict[str, list[MetaBatch]]:
    """Sampler → its fixed batches for validation."""
    return {
        name: [
            make_batch(sampler.plan(step), builder, config.max_document_tokens, device)
            for step in range(config.validation_batches)
        ]
        for name, sampler in _validation_samplers(config, data, cache)
    }


def data_digests(config: TrainConfig) -> dict[str, str]:
    """File name → SHA-256, for each data file that the training depends on. Other splits count, because of leaks."""
    if set(config.sets) == {"synthetic"}:
        return {}
    files = sorted(path for split in SPLITS for path in Path(config.data_folder).glob(f"{split}.*.jsonl*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
