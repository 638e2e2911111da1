"""Meta-training tasks: which documents and questions make up step n.

A step's batch is a pure function of (config seed, step), so a resumed run sees what an unbroken one would have.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrad_vllm.data.questions import DataSplit, in_passages
from regrad_vllm.learn.synthetic import synthetic_documents


@dataclass(frozen=True, slots=True)
class Task:
    """A document and questions that it answers."""

    title: str
    text: str
    questions: tuple[tuple[str, str], ...]  # (question, answer)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What the bank's embedder makes of a set, see retrieval.py. Vectors are float32 (tasks, dimension), L2 norm 1."""

    questions: NDArray[np.float32]  # of each task's first question
    documents: NDArray[np.float32]
    hits: NDArray[np.int32]  # (tasks, hits): what is found for each task's first question, best first


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Tasks of one origin. retrievable: its questions make sense without their document in sight."""

    name: str
    tasks: tuple[Task, ...]
    groups: tuple[tuple[int, ...], ...]  # indices of tasks that are about one subject, for hard distractors
    retrievable: bool = True
    retrieval: Retrieval | None = None


def question_sets(data: DataSplit, names: Sequence[str]) -> list[TaskSet]:
    """A task per passage that answers questions. ValueError names a set without tasks."""
    data = in_passages(data)
    questions: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for entry in data.questions:
        for key in entry.documents if entry.answers else ():
            questions[key].append((entry.question, min(entry.answers, key=len).rstrip(".")))
    sets = []
    for name in names:
        tasks: list[Task] = []
        groups: dict[str, list[int]] = defaultdict(list)
        for key, document in data.documents.items():
            if document.set_name == name and questions[key]:
                title = "" if name.startswith("shifts_") else document.title
                groups[title].append(len(tasks))
                random.Random(f"regrad.first.{key}").shuffle(questions[key])
                tasks.append(Task(title, document.text, tuple(questions[key])))
        if not tasks:
            known = sorted({document.set_name for document in data.documents.values()})
            raise ValueError(f"set {name!r} has no tasks, the data has {known}")
        kept = tuple(tuple(group) for title, group in groups.items() if title and len(group) > 1)
        sets.append(TaskSet(name, tuple(tasks), kept, not name.startswith("shifts_")))
    return sets


def synthetic_set(split: Any, seed: int, num_tasks: int) -> TaskSet:
    """Documents of invented facts; a group is a kind of thing (person, company, …)."""
    made = list(islice(synthetic_documents(split, seed), num_tasks))
    groups: dict[str, list[int]] = defaultdict(list)
    for index, document in enumerate(made):
        groups[document.kind].append(index)
    tasks = tuple(Task(document.title, document.text, document.questions) for document in made)
    return TaskSet("synthetic", tasks, tuple(map(tuple, groups.values())))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one meta-step trains on."""

    tasks: tuple[Task, ...]
    questions: tuple[tuple[tuple[str, str], ...], ...]  # per task
    mix: tuple[tuple[float, ...], ...]  # (tasks, tasks): 1 where document j is in the adapter of task i
    # (tasks, tasks): cosine of document j and the first question of task i; 0 without retrieval
    scores: tuple[tuple[float, ...], ...]
    icl: bool  # the mixed documents also stand in the prompt
    set_name: str


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws step plans."""

    sets: tuple[TaskSet, ...]
    set_weights: tuple[float, ...]
    seed: int
    tokens_per_step: int  # document tokens, estimated at 1.35 a word
    max_tasks: int
    questions_per_task: int
    max_words: int
    top_k_weights: tuple[float, ...]  # chance of k = 1, 2, …
    icl_share: float
    neighbour_share: float

    def plan(self, step: int) -> StepPlan:
        rng = random.Random(f"regrad.tasks.{self.seed}.{step}")
        task_set = rng.choices(self.sets, self.set_weights)[0]
        icl = rng.random() < self.icl_share
        indices = self._draw_tasks(task_set, rng)
        tasks = [task_set.tasks[index] for index in indices]
        questions = [self._draw_questions(task, rng) for task in tasks]
        rows = [self._mix(task_set, indices, row, rng) for row in range(len(indices))]
        mix, scores = (tuple(part) for part in zip(*rows, strict=True))
        return StepPlan(tuple(tasks), tuple(questions), mix, scores, icl, task_set.name)

    def _mix(
        self, task_set: TaskSet, indices: list[int], row: int, rng: random.Random
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The documents in the adapter of task ``row``, and the scores of all: its own and k − 1 others of the step.

        The others are those that retrieval scores best; where there is none, any.
        """
        scores = [0.0] * len(indices)
        others = [other for other in range(len(indices)) if other != row]
        rng.shuffle(others)
        if task_set.retrieval is not None:
            found = task_set.retrieval.documents[indices] @ task_set.retrieval.questions[indices[row]]
            scores = [float(score) for score in found]
            others.sort(key=lambda other: -scores[other])
        k = rng.choices(range(1, len(self.top_k_weights) + 1), self.top_k_weights)[0]
        chosen = {row, *(others[: k - 1] if task_set.retrievable else ())}
        return tuple(float(other in chosen) for other in range(len(indices))), tuple(scores)

    def _draw_tasks(self, task_set: TaskSet, rng: random.Random) -> list[int]:
        """Indices: in some steps documents that are hits of each other's questions, else any, within the budget."""
        neighbours = rng.random() < self.neighbour_share
        start = rng.randrange(len(task_set.tasks))
        candidates = [start]
        if neighbours and task_set.retrieval is not None:
            for index in candidates:  # grows as it is walked
                candidates += [int(hit) for hit in task_set.retrieval.hits[index] if hit not in candidates]
                if len(candidates) >= 2 * self.max_tasks:
                    break
        elif neighbours and task_set.groups:
            group = rng.choice(task_set.groups)
            candidates = rng.sample(group, min(len(group), self.max_tasks))
        more = rng.sample(range(len(task_set.tasks)), min(len(task_set.tasks), 2 * self.max_tasks))
        candidates += [index for index in more if index not in candidates]
        chosen: list[int] = []
        longest = 0
        for index in candidates:
            task = task_set.tasks[index]
            words = min(len(task.text.split()) + len(task.title.split()), self.max_words)
            longest = max(longest, words)
            if chosen and (len(chosen) + 1) * longest * 1.35 > self.tokens_per_step:
                break
            chosen.append(index)
            if len(chosen) == self.max_tasks:
                break
        return chosen

    def _draw_questions(self, task: Task, rng: random.Random) -> tuple[tuple[str, str], ...]:
        """The first question, whose hits the mix was made of, and others."""
        first, *rest = task.questions
        return (first, *rng.sample(rest, min(len(rest), self.questions_per_task - 1)))
