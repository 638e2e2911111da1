"""Meta-training tasks/s against the straightforward loop over tasks, on one machine in one run.

    make bench-train           (python -m benchmarks.training_speed [--repeats N] [--steps N])

The loop is the obvious form of the method. Hugging Face PEFT holds the adapter. Each task differentiates each of its
documents (second order), then answers its questions one at a time. Gradients add up over the tasks.

Ours takes the same tasks as one batch. Per-document gradients take one pass, layers below the first adapted one have no
gradient, and a task's questions are packed behind their common prompt. Both cast the adapter to the base model's dtype.

First the meta-gradients are compared in float32. Then both are warmed up and take turns. A repeat's ratio is loop
seconds / batch seconds over the same steps. The data are invented documents and the paragraphs of the evaluation
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

from regrad_vllm.arguments import whole
from regrad_vllm.base_model import load_base_model
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
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    learner = Learner.load(shipped_learner())
    report: dict[str, Any] = {
        "machine": describe("torch", "transformers", "peft"), "dtype": args.dtype, "learner": learner.fingerprint[:16]
    }  # fmt: skip
    plans = {name: [sampler.plan(step) for step in range(args.steps)] for name, sampler in _samplers().items()}
    exact = _pair(torch.float32, learner)
    differences = {name: _difference(*exact, found[0]) for name, found in plans.items()}
    if max(differences.values()) > _MAX_DIFFERENCE:
        raise SystemExit(f"the two meta-gradients must be the same in float32, they differ by {differences}")
    pair = exact if args.dtype == "float32" else _pair(torch.bfloat16, learner)
    ratios = {}
    for name, found in plans.items():
        figures = {**_compare(*pair, found, args.repeats), "relative_difference_float32": differences[name]}
        report[name] = figures
        ratios[f"ratio_{name}"] = figures["ratio"]["median"]
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(ratios) + "\n")


def _pair(dtype: torch.dtype, learner: Learner) -> tuple[Ours, Loop]:
    folder = ensure_default_model()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_base_model(folder, dtype=dtype, device=str(device), attention="eager")
    other, _ = load_base_model(folder, dtype=dtype, device=str(device), attention="eager")
    ours = Ours(AdaptedModel(base, learner.layout, learner.scaling), learner, tokenizer)
    return ours, Loop(other, learner, tokenizer, device)


def _difference(ours: Ours, loop: Loop, plan: StepPlan) -> float:
    mine, theirs = ours.gradient(plan), loop.gradient(plan)
    return float((mine - theirs).norm() / theirs.norm())


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


def _compare(ours: Ours, loop: Loop, plans: list[StepPlan], repeats: int) -> dict[str, Any]:
    ours.gradient(plans[0])
    loop.gradient(plans[0])
    seconds: dict[str, list[float]] = {"batch": [], "loop": []}
    for repeat in range(repeats):
        turns: list[tuple[str, Callable[[StepPlan], Tensor]]] = [("loop", loop.gradient), ("batch", ours.gradient)]
        for name, run in turns if repeat % 2 else turns[::-1]:
            started = time.perf_counter()
            for plan in plans:
                run(plan)
            _wait()
            seconds[name].append(time.perf_counter() - started)
    tasks = sum(len(plan.tasks) for plan in plans)
    return {
        "num_tasks": tasks,
        "questions_per_task": sum(map(len, plans[0].questions)) / len(plans[0].questions),
        "tasks_per_s_batch": spread([tasks / value for value in seconds["batch"]]),
        "tasks_per_s_loop": spread([tasks / value for value in seconds["loop"]]),
        "ratio": spread([slow / fast for slow, fast in zip(seconds["loop"], seconds["batch"], strict=True)]),
    }


def _wait() -> None:
    """Waits for the GPU, which works on after a call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
