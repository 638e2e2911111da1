"""Meta-training tasks: which documents and questions make up step n.

A step's batch is a pure function of (config seed, step), so a resumed run sees what an unbroken one would have.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from regrad_vllm.learn.synthetic import synthetic_documents


@dataclass(frozen=True, slots=True)
class Task:
    """A document and questions that it answers."""

    title: str
    text: str
    questions: tuple[tuple[str, str], ...]  # (question, answer)


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Tasks of one origin. retrievable: its questions make sense without their document in sight."""

    name: str
    tasks: tuple[Task, ...]
    groups: tuple[tuple[int, ...], ...]  # indices of tasks that are about one subject, for hard distractors
    retrievable: bool = True


def load_question_sets(folder: Path, split: str, names: Sequence[str]) -> list[TaskSet]:
    """Task sets from ``<split>.documents.jsonl.gz`` and ``<split>.questions.jsonl.gz``.

    Raises FileNotFoundError, or ValueError naming a set without tasks.
    """
    documents = {entry["id"]: entry for entry in _read_lines(folder / f"{split}.documents.jsonl.gz")}
    questions: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for entry in _read_lines(folder / f"{split}.questions.jsonl.gz"):
        answer = min((text.strip() for text in entry["answers"] if text.strip()), key=len, default="")
        if answer:
            questions[entry["gold"][0]].append((entry["question"].strip(), answer.rstrip(".")))
    sets = []
    for name in names:
        tasks: list[Task] = []
        groups: dict[str, list[int]] = defaultdict(list)
        for key, entry in documents.items():
            if entry["set"] == name and questions[key]:
                title = "" if name.startswith("shifts_") else entry["title"].strip()
                groups[title].append(len(tasks))
                tasks.append(Task(title, entry["text"], tuple(questions[key])))
        if not tasks:
            known = sorted({entry["set"] for entry in documents.values()})
            raise ValueError(f"set {name!r} has no tasks in {folder} ({split}); it has {known}")
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
    questions: tuple[tuple[tuple[str, str], ...], ...]  # per task, equally many
    mix: tuple[tuple[float, ...], ...]  # (tasks, tasks): weight of document j in the adapter of task i
    icl: bool  # the retrieved documents also stand in the prompt
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

    def plan(self, step: int) -> StepPlan:
        rng = random.Random(f"regrad.tasks.{self.seed}.{step}")
        task_set = rng.choices(self.sets, self.set_weights)[0]
        icl = rng.random() < self.icl_share
        tasks = self._draw_tasks(task_set, rng)
        questions = [self._draw_questions(task, rng, 2 if icl else self.questions_per_task) for task in tasks]
        mix = [[0.0] * len(tasks) for _ in tasks]
        for row in range(len(tasks)):
            mix[row][row] = 1.0
            others = [other for other in range(len(tasks)) if other != row]
            k = rng.choices(range(1, len(self.top_k_weights) + 1), self.top_k_weights)[0]
            for other in rng.sample(others, min(k - 1, len(others))) if task_set.retrievable else []:
                mix[row][other] = 1.0
        return StepPlan(tuple(tasks), tuple(questions), tuple(map(tuple, mix)), icl, task_set.name)

    def _draw_tasks(self, task_set: TaskSet, rng: random.Random) -> list[Task]:
        candidates: list[int] = []
        if task_set.groups and rng.random() < 0.5:
            group = rng.choice(task_set.groups)
            candidates = rng.sample(group, min(len(group), self.max_tasks))
        more = rng.sample(range(len(task_set.tasks)), min(len(task_set.tasks), 2 * self.max_tasks))
        candidates += [index for index in more if index not in candidates]
        chosen: list[Task] = []
        longest = 0
        for index in candidates:
            task = task_set.tasks[index]
            words = min(len(task.text.split()) + len(task.title.split()), self.max_words)
            longest = max(longest, words)
            if chosen and (len(chosen) + 1) * longest * 1.35 > self.tokens_per_step:
                break
            chosen.append(task)
            if len(chosen) == self.max_tasks:
                break
        return chosen

    @staticmethod
    def _draw_questions(task: Task, rng: random.Random, num_questions: int) -> tuple[tuple[str, str], ...]:
        if len(task.questions) >= num_questions:
            return tuple(rng.sample(task.questions, num_questions))
        return tuple(task.questions) + tuple(rng.choices(task.questions, k=num_questions - len(task.questions)))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
