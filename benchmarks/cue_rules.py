# ruff: noqa
# mypy: ignore-errors
"""Two rules for the two sentences of a cue, with three retrieved documents: ReGrad in mode cue, and FT-RAG.

    python -m benchmarks.cue_rules DATA QUESTIONS_A_SET FILE

k3_now: each document gives its nearest sentence before any gives a second one. k3_plain: the nearest sentences of all
documents together. k1: one document. Run it at a commit before the rule was changed.
"""

import sys
import argparse, json, time
from dataclasses import replace
from pathlib import Path
import torch
from benchmarks import trials, knowledge
from regrad_vllm.default_model import resolve_model, shipped_learner
from regrad_vllm.evaluate.in_process import InProcess
from regrad_vllm.learner import Learner
from bank_service.values.embedder import default_embedder, embedded_text
from regrad_vllm.learn.cues import sentences

N = int(sys.argv[2])
out = Path(sys.argv[3])
a = argparse.Namespace(
    data=Path(sys.argv[1]), sets=list(knowledge.SETS), num_questions=N, num_distractors=400, seed=0, cue_sentences=2
)
g = knowledge.load(a)
now = trials.retrieved(a, g)
e = default_embedder()
cache = {}


def emb(t):
    if t not in cache:
        cache[t] = e.embed(t)
    return cache[t]


def plain(entry, k):
    q = emb(entry.question.question)
    at = {}
    docs = entry.documents[:k]
    order = sorted(
        ((float(emb(embedded_text(*p)) @ q), p) for d in docs for p in sentences(d.title, d.text)), key=lambda z: -z[0]
    )
    for _, p in order:
        at.setdefault(p[1], p)
    return replace(entry, documents=docs, scores=entry.scores[:k], cue=tuple(list(at.values())[:2]))


sets = {"k3_now": now, "k3_plain": [plain(x, 3) for x in now], "k1": [plain(x, 1) for x in now]}
model = resolve_model("default")


def run(label, answerer, adapter, names):
    for n in names:
        known = {(r["learner"], r["way"], r["id"]) for r in knowledge.records(out)}
        waiting = [x for x in sets[n] if (label, n, x.question.id) not in known]
        t = time.monotonic()
        gold = {x.question.id: x.question.documents[0] for x in g}
        with out.open("a") as f:
            for r in answerer.answer(waiting, "cue", adapter):
                f.write(
                    json.dumps({"learner": label, "way": n, **r, "document": gold[r["id"]]}, ensure_ascii=False) + "\n"
                )
        print(label, n, len(waiting), round(time.monotonic() - t), file=sys.stderr)


folder = shipped_learner()
rl = Learner.load(folder / "ft_rag") if (folder / "ft_rag" / "regrad.json").exists() else None
if rl is not None:
    run(
        "ft_rag",
        knowledge.Answerer(InProcess(model, rl, {}, dtype=torch.bfloat16), rl),
        "phi",
        ["k3_now", "k3_plain", "k1"],
    )
l = Learner.load(folder)
t = trials.Trial(InProcess(model, l, {}, dtype=torch.bfloat16), l)
t.variant = "k3_as_is"
run("regrad", t, "gradients", ["k1", "k3_now", "k3_plain"])
