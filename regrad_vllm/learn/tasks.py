"""Meta-training tasks: the documents and questions of each step.

A step's batch is a pure function of (config seed, step). So a resumed run sees the same batches as an unbroken one.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regrad_vllm.data.questions import DataSplit, in_passages
from regrad_vllm.data.token_counts import TOKENS_PER_WORD
from regrad_vllm.learn.cues import Cues
from regrad_vllm.learn.synthetic import synthetic_documents

Text = Literal["blind", "cue", "icl"]  # the text in the prompt: none, a sentence, whole documents
Passage = tuple[str, str]  # (title, text)


@dataclass(frozen=True, slots=True)
class Task:
    """A document and questions that it answers."""

    title: str
    text: str
    questions: tuple[tuple[str, str], ...]  # (question, answer)
    partners: tuple[int, ...] = ()  # tasks of the set whose documents the questions need as well

    @property
    def passage(self) -> Passage:
        return self.title, self.text


@dataclass(frozen=True, slots=True)
class TaskVectors:
    """The embeddings of a set by the bank's embedder (training_hits.py), float32 (tasks, dimension), L2 norm 1."""

    questions: NDArray[np.float32]  # of each task's first question
    documents: NDArray[np.float32]
    hits: NDArray[np.int32]  # (tasks, hits): the documents found for each task's first question, best first


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Tasks of one origin. retrievable: the questions are clear without their documents."""

    name: str
    tasks: tuple[Task, ...]
    groups: tuple[tuple[int, ...], ...]  # indices of similar tasks, which are hard distractors for each other
    retrievable: bool = True
    retrieval: TaskVectors | None = None


def question_sets(data: DataSplit, names: Sequence[str]) -> list[TaskSet]:
    """A task for each passage that answers questions, alone or with the same others. ValueError for an empty set."""
    together = {entry.id for entry in data.questions if len(entry.documents) > 1}
    data = in_passages(data)
    questions: dict[str, dict[tuple[str, ...], list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for entry in data.questions:
        for key in entry.documents if entry.answers else ():
            needed = entry.documents if entry.id in together else (key,)
            questions[key][needed].append((entry.question, min(entry.answers, key=len).rstrip(".")))
    sets = []
    for name in names:
        tasks: list[Task] = []
        groups: dict[str, list[int]] = defaultdict(list)
        places: dict[tuple[str, tuple[str, ...]], int] = {}
        for key, document in data.documents.items():
            for needed, pairs in questions[key].items() if document.set_name == name else ():
                title = "" if name.startswith("shifts_") else document.title
                groups[title].append(len(tasks))
                places[key, needed] = len(tasks)
                random.Random(f"regrad.first.{key}").shuffle(pairs)
                tasks.append(Task(title, document.text, tuple(pairs)))
        if not tasks:
            known = sorted({document.set_name for document in data.documents.values()})
            raise ValueError(f"set {name!r} has no tasks, the data has {known}")
        for (key, needed), place in places.items():
            partners = tuple(places[other, needed] for other in needed if other != key and (other, needed) in places)
            tasks[place] = replace(tasks[place], partners=partners)
        kept = tuple(tuple(group) for title, group in groups.items() if title and len(group) > 1)
        sets.append(TaskSet(name, tuple(tasks), kept, not name.startswith("shifts_")))
    return sets


def synthetic_set(split: Any, seed: int, num_tasks: int) -> TaskSet:
    """Tasks about invented facts. A group is a kind of subject (person, company, …)."""
    made = list(islice(synthetic_documents(split, seed), num_tasks))
    groups: dict[str, list[int]] = defaultdict(list)
    for index, document in enumerate(made):
        groups[document.kind].append(index)
    tasks = tuple(Task(document.title, document.text, document.questions) for document in made)
    return TaskSet("synthetic", tasks, tuple(map(tuple, groups.values())))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The tasks of one meta-step."""

    tasks: tuple[Task, ...]
    questions: tuple[tuple[tuple[str, str], ...], ...]  # per task
    mix: tuple[tuple[float, ...], ...]  # (tasks, tasks): 1 where document j is in the adapter of task i
    # (tasks, tasks): cosine of document j and the first question of task i; 0 without retrieval
    scores: tuple[tuple[float, ...], ...]
    text: Text
    shown: tuple[tuple[tuple[Passage, ...], ...], ...]  # per task and question: the texts in the prompt
    answering: tuple[tuple[Passage, ...], ...]  # per task: the documents that its questions need
    gradients: bool  # False: φ* alone answers, from the text in the prompt
    set_name: str


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws step plans."""

    sets: tuple[TaskSet, ...]
    set_weights: tuple[float, ...]
    seed: int
    tokens_per_step: int  # document tokens, estimated by TOKENS_PER_WORD
    max_tasks: int
    questions_per_task: int
    max_words: int
    top_k_weights: tuple[float, ...]  # chance of k = 1, 2, …
    icl_share: float
    neighbour_share: float
    cue_share: float = 0.0
    wrong_cue_share: float = 0.0  # share of cues that are random sentences, half of them from another document
    gradient_dropout: float = 0.0  # share of the steps with text in the prompt that are answered without gradients
    cues: Cues | None = None  # needed if cue_share isn't 0

    def plan(self, step: int) -> StepPlan:
        rng = random.Random(f"regrad.tasks.{self.seed}.{step}")
        task_set = rng.choices(self.sets, self.set_weights)[0]
        kind = rng.random()
        text: Text = "icl" if kind < self.icl_share else "cue" if kind < self.icl_share + self.cue_share else "blind"
        indices = self._draw_tasks(task_set, rng)
        tasks = [task_set.tasks[index] for index in indices]
        questions = [self._draw_questions(task, rng) for task in tasks]
        rows = [self._mix(task_set, indices, row, rng) for row in range(len(indices))]
        mix, scores = (tuple(part) for part in zip(*rows, strict=True))
        shown = [
            tuple(self._shown(text, question, tasks, mix[row], scores[row], rng) for question, _ in pairs)
            for row, pairs in enumerate(questions)
        ]
        answering = [(task.passage, *(task_set.tasks[index].passage for index in task.partners)) for task in tasks]
        gradients = text == "blind" or rng.random() >= self.gradient_dropout
        return StepPlan(
            tuple(tasks), tuple(questions), mix, scores, text, tuple(shown), tuple(answering), gradients, task_set.name
        )

    def _shown(
        self, text: Text, question: str, tasks: Sequence[Task], mix: Sequence[float], scores: Sequence[float],
        rng: random.Random,
    ) -> tuple[Passage, ...]:  # fmt: skip
        """The texts in the prompt: none, the adapter's documents in a server's order, or a cue."""
        best_first = sorted((at for at, weight in enumerate(mix) if weight), key=lambda at: -scores[at])
        passages = tuple(tasks[at].passage for at in best_first)
        if text != "cue":
            return passages if text == "icl" else ()
        assert self.cues is not None
        if rng.random() < self.wrong_cue_share:
            return (self.cues.any(rng.choice((passages, [task.passage for task in tasks])), rng),)
        return self.cues.nearest(question, passages)

    def _mix(
        self, task_set: TaskSet, indices: list[int], row: int, rng: random.Random
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The documents in the adapter of task ``row`` (1 or 0 for each), and the scores of all documents.

        They are the documents that its questions need, and k − 1 others of the step. With retrieval these have the best
        scores. Without it they are random.
        """
        scores = [0.0] * len(indices)
        needed = {row, *(indices.index(partner) for partner in task_set.tasks[indices[row]].partners)}
        others = [other for other in range(len(indices)) if other not in needed]
        rng.shuffle(others)
        if task_set.retrieval is not None:
            found = task_set.retrieval.documents[indices] @ task_set.retrieval.questions[indices[row]]
            scores = [float(score) for score in found]
            others.sort(key=lambda other: -scores[other])
        k = rng.choices(range(1, len(self.top_k_weights) + 1), self.top_k_weights)[0]
        chosen = needed | set(others[: k - 1] if task_set.retrievable else ())
        return tuple(float(other in chosen) for other in range(len(indices))), tuple(scores)

    def _draw_tasks(self, task_set: TaskSet, rng: random.Random) -> list[int]:
        """The indices of a step's tasks, within the budget of tokens. A task's partners come with it.

        In some steps the documents are hits of each other's questions. In others they are random.
        """
        neighbours = rng.random() < self.neighbour_share
        start = rng.randrange(len(task_set.tasks))
        candidates = [start]
        if neighbours and task_set.retrieval is not None:
            for index in candidates:  # the loop itself appends to the list
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
            if index in chosen:
                continue
            new = [index, *(partner for partner in task_set.tasks[index].partners if partner not in chosen)]
            longest = max(longest, *(self._num_words(task_set.tasks[member]) for member in new))
            count = len(chosen) + len(new)
            if chosen and (count > self.max_tasks or count * longest * TOKENS_PER_WORD > self.tokens_per_step):
                break
            chosen += new
        return chosen

    def _num_words(self, task: Task) -> int:
        return min(len(task.text.split()) + len(task.title.split()), self.max_words)

    def _draw_questions(self, task: Task, rng: random.Random) -> tuple[tuple[str, str], ...]:
        """The first question, which the mix depends on, and random others."""
        first, *rest = task.questions
        return (first, *rng.sample(rest, min(len(rest), self.questions_per_task - 1)))
