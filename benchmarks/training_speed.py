"""Meta-training tasks/s against the straightforward loop over tasks, on one machine in one run.

    make bench-train           (python -m benchmarks.training_speed [--repeats N] [--steps N])

The loop is the obvious form of the method. Hugging Face PEFT holds the adapter. Each task differentiates each of its
documents (second order), then answers its questions one at a time. Gradients add up over the tasks.

Ours takes the same tasks as one batch. Per-document gradients take one pass, layers below the first adapted one have no
gradient, and a task's questions are packed behind their common prompt. Both cast the adapter to the base model's dtype.

The third is our batch before its derivatives were written by hand (plain_model.py).

First the meta-gradients are compared in float32. Then all are warmed up and take turns. A repeat's ratio is loop
seconds / batch seconds over the same steps, ``over_before`` is the third's seconds / batch seconds. The last line gives
it for the paragraphs. The data are invented documents and the paragraphs of the evaluation
sample. Questions and k are those of the shipped learner's config, and the inner loss is the mean over the tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.plain_model import PlainModel
from regrad_vllm.arguments import whole
from regrad_vllm.base_model import fast_dtype, load_base_model
from regrad_vllm.data.questions import load_split
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.evaluate.datasets import SAMPLE
from regrad_vllm.learn.batches import make_batch
from regrad_vllm.learn.meta_step import MetaParameters, meta_loss
from regrad_vllm.learn.tasks import Sampler, StepPlan, question_sets, synthetic_set
from regrad_vllm.learner import Learner
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe

_MAX_DIFFERENCE = 1e-3  # of the meta-gradients in float32, relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=whole(1), default=5)
    parser.add_argument("--steps", type=whole(1), default=1, help="of each kind of document and repeat")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="by default the faster one on this machine")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype("cuda" if torch.cuda.is_available() else "cpu")
    learner = Learner.load(shipped_learner())
    report: dict[str, Any] = {
        "machine": describe("torch", "transformers", "peft"), "dtype": str(dtype).removeprefix("torch."),
        "learner": learner.fingerprint[:16],
    }  # fmt: skip
    plans = {name: [sampler.plan(step) for step in range(args.steps)] for name, sampler in _samplers().items()}
    exact = _runs(torch.float32, learner)
    differences = {name: _differences(exact, found[0]) for name, found in plans.items()}
    if max(max(found.values()) for found in differences.values()) > _MAX_DIFFERENCE:
        raise SystemExit(f"the meta-gradients must be the same in float32, they differ by {differences}")
    runs = exact if dtype == torch.float32 else _runs(dtype, learner)
    ratios = {}
    for name, found in plans.items():
        figures = {**_compare(runs, found, args.repeats), "relative_difference_float32": differences[name]}
        report[name] = figures
        ratios[f"ratio_{name}"] = figures["ratio"]["median"]
    ratios["over_before"] = report["paragraphs"]["over_before"]["median"]
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(ratios) + "\n")


Runs = dict[str, Callable[[StepPlan], Tensor]]


def _runs(dtype: torch.dtype, learner: Learner) -> Runs:
    """Contender → the meta-gradient of a step."""
    folder = ensure_default_model()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_base_model(folder, dtype=dtype, device=str(device), attention="eager")
    other, _ = load_base_model(folder, dtype=dtype, device=str(device), attention="eager")
    models = {"batch": AdaptedModel, "before": PlainModel}
    ours = {
        name: Ours(kind(base, learner.layout, learner.scaling), learner, tokenizer) for name, kind in models.items()
    }
    return {
        "loop": Loop(other, learner, tokenizer, device).gradient,
        **{name: run.gradient for name, run in ours.items()},
    }


def _differences(runs: Runs, plan: StepPlan) -> dict[str, float]:
    found = {name: run(plan) for name, run in runs.items()}
    mine = found.pop("batch")
    return {name: float((mine - theirs).norm() / theirs.norm()) for name, theirs in found.items()}


def _samplers() -> dict[str, Sampler]:
    short = synthetic_set("train", 0, 500)
    (long,) = question_sets(load_split(SAMPLE, "test"), ["squad"])
    return {
        name: Sampler(
            sets=(tasks,), set_weights=(1.0,), seed=0, tokens_per_step=800, max_tasks=16, questions_per_task=6,
            max_words=190, top_k_weights=(0.4, 0.2, 0.2, 0.1, 0.1), icl_share=0.0, neighbour_share=0.0,
        )
        for name, tasks in (("invented_facts", short), ("paragraphs", long))
    }  # fmt: skip


class Ours:
    """One batch a step."""

    def __init__(self, model: AdaptedModel, learner: Learner, tokenizer: Any) -> None:
        self._model = model
        self._builder = PromptBuilder(tokenizer, learner.config.prompts)
        self._learner = learner
        self.phi = torch.tensor(learner.phi, device=model.device).requires_grad_()
        self.step_sizes = torch.tensor(learner.step_sizes, device=model.device).requires_grad_()

    def gradient(self, plan: StepPlan) -> Tensor:
        batch = make_batch(plan, self._builder, self._learner.config.max_document_tokens, self._model.device)
        sizes = self.step_sizes.view(self._learner.config.inner_steps, -1)
        loss = meta_loss(self._model, MetaParameters(self.phi, [list(row.unbind()) for row in sizes]), batch)
        return torch.cat(torch.autograd.grad(loss, (self.phi, self.step_sizes)))


class Loop:
    """Task by task, document by document, question by question."""

    def __init__(self, base: Any, learner: Learner, tokenizer: Any, device: torch.device) -> None:
        from peft import PeftModel

        self._model = PeftModel.from_pretrained(base, shipped_learner()).eval()
        self._builder = PromptBuilder(tokenizer, learner.config.prompts)
        self._learner = learner
        self._device, self._dtype = device, base.dtype
        self.phi = torch.tensor(learner.phi, device=device).requires_grad_()
        self.step_sizes = torch.tensor(learner.step_sizes, device=device).requires_grad_()
        sizes = torch.tensor([tensor.num_values for tensor in learner.layout.tensors], device=device)
        self._sizes = sizes

    def gradient(self, plan: StepPlan) -> Tensor:
        found = torch.zeros(len(self.phi) + len(self.step_sizes), device=self._device)
        for index, pairs in enumerate(plan.questions):
            adapted = self.phi
            for other, weight in enumerate(plan.mix[index]):
                if weight:
                    task = plan.tasks[other]
                    limit = self._learner.config.max_document_tokens
                    tokens, _ = self._builder.document(task.title, task.text, limit)
                    own = self.phi
                    for sizes in self.step_sizes.view(self._learner.config.inner_steps, -1):
                        loss = self._loss(own, tokens, 1)
                        (gradient,) = torch.autograd.grad(loss, own, create_graph=True)
                        own = own - sizes.repeat_interleave(self._sizes) * gradient
                    adapted = adapted + weight * (own - self.phi)
            losses = []
            for question, answer in pairs:
                prompt = self._builder.question(question)
                losses.append(self._loss(adapted, prompt + self._builder.answer(answer), len(prompt)))
            total = torch.stack(losses).mean() / len(plan.tasks)
            found += torch.cat(torch.autograd.grad(total, (self.phi, self.step_sizes)))
        return found

    def _loss(self, flat: Tensor, tokens: list[int], start: int) -> Tensor:
        ids = torch.tensor([tokens], device=self._device)
        labels = ids.clone()
        labels[:, :start] = -100
        parameters = {
            f"base_model.model.{tensor.module}.lora_{tensor.part}.default.weight": view.to(self._dtype)
            for tensor, view in self._learner.layout.views(flat)
        }
        loss: Tensor = functional_call(self._model, parameters, kwargs={"input_ids": ids, "labels": labels}).loss
        return loss


def _compare(runs: Runs, plans: list[StepPlan], repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(plans[0])
    for repeat in range(repeats):
        for name, run in list(runs.items())[:: 1 if repeat % 2 else -1]:
            started = time.perf_counter()
            for plan in plans:
                run(plan)
            _wait()
            seconds[name].append(time.perf_counter() - started)
    tasks = sum(len(plan.tasks) for plan in plans)
    speeds = {f"tasks_per_s_{name}": spread([tasks / value for value in found]) for name, found in seconds.items()}
    return {
        "num_tasks": tasks,
        "questions_per_task": sum(map(len, plans[0].questions)) / len(plans[0].questions),
        **speeds,
        "ratio": spread([slow / fast for slow, fast in zip(seconds["loop"], seconds["batch"], strict=True)]),
        "over_before": spread([slow / fast for slow, fast in zip(seconds["before"], seconds["batch"], strict=True)]),
    }


def _wait() -> None:
    """Waits for the GPU, which works on after a call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
