"""The README and docs/ are true: their examples run as they stand there, and their tables are the code's.

The examples share one bank and one server. The README's own commands start them, on ports of their own.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from regrad_vllm.client import Bank
from regrad_vllm.data.questions import load_split
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.demo import by_hand
from regrad_vllm.demo.quiz import DOCUMENTS, load_questions
from regrad_vllm.demo.story import Stage, base_weights
from regrad_vllm.evaluate.methods import DEFAULT_METHODS, METHODS
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.request import RegradOptions
from tests.house.pages import ROOT, all_examples, examples, pages
from tests.house.served import House

RUN = {
    "bank", "server", "ingest", "curl", "openai", "client", "backup", "export", "eval", "load", "vllm_bench",
    "questions", "python_ingest", "python_query", "python_async", "python_past", "python_errors", "langchain",
    "llama_index", "litellm", "vercel", "mcp_config", "http",
}  # fmt: skip


def test_every_example_is_run_by_a_test_or_says_why_not() -> None:
    names = [example.name for example in all_examples() if example.name]
    assert sorted(names) == sorted(RUN), "each name once"


@pytest.mark.only_test_all
@pytest.mark.timeout(600)
def test_the_example_of_the_questions_writes_data_to_train_with(house: House, tmp_path: Path) -> None:
    said = house.run("questions", tmp_path)
    assert "about 40 passages" in said
    for split in ("train", "validation"):
        data = load_split(tmp_path / "my-data", split)
        for question in data.questions:
            text = data.documents[question.documents[0]].text.lower()
            assert question.answers[0].lower().rstrip(".") in text


@pytest.mark.timeout(900)
def test_the_examples_of_the_server_ingest_ask_and_name_the_document_they_used(house: House, tmp_path: Path) -> None:
    weights = base_weights(f"http://{house.server}")
    ingested = house.run("ingest", tmp_path)
    stored = re.search(r"(\d+) created, 0 updated, (\d+) unchanged", ingested)
    assert stored and int(stored[1]) + int(stored[2]) == 60, ingested  # another test may have run the example before
    assert "ship-the-quilegren" in ingested.splitlines()[1], "the query's best hit"
    answer = json.loads(house.run("curl", tmp_path))
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["regrad"]["documents"][0]["id"] == "ship-the-quilegren"
    assert len(answer["regrad"]["documents"]) == Learner.load(shipped_learner()).config.top_k
    printed = house.run("openai", tmp_path).splitlines()
    assert len(printed) == 2
    assert re.fullmatch(r"ship-the-quilegren 1 0\.\d+", printed[1])
    assert base_weights(f"http://{house.server}") == weights


@pytest.mark.timeout(600)
def test_the_demos_story_comes_true_with_the_readmes_bank_and_server(house: House, tmp_path: Path) -> None:
    house.run("ingest", tmp_path)
    questions = load_questions()
    asked = {question.document_id for question in questions if not question.invented}
    records = (DOCUMENTS / "records.jsonl").read_text("utf-8").splitlines()
    lines = [line for line in records if json.loads(line)["id"] in asked]
    (tmp_path / "records.jsonl").write_text("\n".join(lines), "utf-8")
    house.ingest(tmp_path / "records.jsonl")
    stage = Stage(tmp_path, ensure_default_model(), shipped_learner(), questions, namespace="default")
    figures = stage.tell(house.bank, f"http://{house.server}")
    assert figures["questions"] == len(questions) > len(lines) > 0
    assert figures["cue_right"] > figures["base_right"] + 0.3
    assert figures["deleted_ok"] is True and figures["base_weights_unchanged"] is True


@pytest.mark.timeout(300)
def test_the_example_of_the_bank_stores_finds_and_deletes(house: House, tmp_path: Path) -> None:
    lines = house.run("client", tmp_path).splitlines()
    assert re.fullmatch(r"harbour 1 [0-9a-f]{64}", lines[0])
    assert lines[1].startswith("harbour 0.")


@pytest.mark.timeout(600)
def test_the_five_examples_of_the_python_client_follow_each_other(house: House, tmp_path: Path) -> None:
    stored = house.run("python_ingest", tmp_path).splitlines()
    assert stored == ["master created 1", "lamp created 1", "hafen created 1"]
    *hits, german = house.run("python_query", tmp_path).splitlines()
    assert re.fullmatch(r"master 0\.\d+ The harbour master of Orlen is Ada Quist\.", hits[0]) and len(hits) == 2
    assert german == "['hafen']"
    assert house.run("python_async", tmp_path).splitlines() == [
        "Who is the harbour master? master", "Which colour has the lamp? lamp", "['hafen', 'lamp', 'master']",
    ]  # fmt: skip
    assert house.run("python_past", tmp_path).split() == ["False", "True"]
    assert house.run("python_errors", tmp_path).splitlines() == [
        "document 1 was refused for its document.text", "there is no document nobody", "UnreachableError",
    ]  # fmt: skip


@pytest.mark.timeout(600)
def test_the_example_of_the_backup_makes_another_bank_of_the_same_documents(house: House, tmp_path: Path) -> None:
    house.run("ingest", tmp_path)
    house.run("backup", tmp_path)
    num_restored = len(list((tmp_path / "bank-restored" / "blobs").glob("[0-9a-f][0-9a-f]/*")))
    with Bank(house.bank) as bank:
        stats = bank.stats()
    assert num_restored == stats.num_gradients >= 60


@pytest.mark.timeout(300)
def test_the_example_of_the_export_writes_an_adapter_that_peft_loads(house: House, tmp_path: Path) -> None:
    from peft import PeftConfig

    house.run("export", tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter-of-the-quilegren"))
    assert config.peft_type == "LORA"


@pytest.mark.only_test_all
@pytest.mark.timeout(1200)
def test_the_example_of_the_evaluation_ends_with_a_report_that_agrees_with_the_method_in_one_process(
    house: House, tmp_path: Path
) -> None:
    figures = json.loads(house.run("eval", tmp_path).splitlines()[-1])
    methods = {name for name in DEFAULT_METHODS if METHODS[name].adapter != "own"}
    assert set(figures) == {*methods, "questions"} and figures["questions"] == 6
    out = tmp_path / "eval-first-look"
    served = [json.loads(line) for line in (out / "answers.jsonl").read_text("utf-8").splitlines()]
    assert len(served) == 6 * len(methods) and not any(record["error"] for record in served)
    assert "<svg" in (out / "report.html").read_text("utf-8")
    nll = {(r["method"], r["question"]): r["answer_nll"] for r in served}
    fresh = [r["question"] for r in served if r["set_name"] == "fresh" and r["method"] == "regrad"]
    assert all(0 < nll["regrad", question] < nll["base", question] for question in fresh)

    words = shlex.split(examples()["eval"].code.replace("\\\n", " "))
    words = words[1 : words.index("--server")] + words[words.index("--num-fresh") :]  # no server, no bank
    words.remove("--likelihood")
    words[words.index("--out") + 1] = str(tmp_path / "in-process")
    chosen = ["base", "learner", "rag", "ft_rag", "regrad", "regrad_gold", "cpt", "prag", "raw_gradient"]
    command = [sys.executable, "-m", "regrad_vllm.cli", *words, "--in-process", "--cpt-epochs", "1"]
    subprocess.run([*command, "--methods", *chosen], check=True, capture_output=True)
    lines = (tmp_path / "in-process" / "answers.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 6 * len(chosen)
    alone = {(r["method"], r["question"]): r for r in map(json.loads, lines)}
    pairs = [(r, alone[r["method"], r["question"]]) for r in served if r["method"] in chosen]
    assert len(pairs) == 6 * 4
    # Both ways in float32: only a tie of two tokens may fall differently.
    assert sum(mine["prediction"] == other["prediction"] for mine, other in pairs) >= len(pairs) - 1
    right: dict[str, float] = Counter()
    for (method, _), r in alone.items():
        right[method] += r["em"] if r["set_name"] == "fresh" else 0.0
    assert all(right[method] >= 3 for method in ("regrad", "regrad_gold", "prag", "ft_rag")), right
    assert all(right[method] <= 1 for method in ("base", "learner", "raw_gradient")), right


@pytest.mark.only_test_all
@pytest.mark.timeout(600)
def test_the_example_of_the_load_ends_with_a_report_in_which_all_used_the_same_documents(
    house: House, tmp_path: Path
) -> None:
    figures = json.loads(house.run("load", tmp_path).splitlines()[-1])
    ratios = {"regrad_over_rag_learner", "regrad_over_rag", "regrad_over_base"}
    ratios |= {"regrad_cue_over_rag_learner", "regrad_cue_over_ft_rag_sentence"}
    assert set(figures) == {"base", "rag", "regrad", "regrad_icl"} | ratios
    assert figures["regrad_over_rag_learner"] is None
    assert figures["regrad_over_rag"] > 0 and figures["regrad_over_base"] > 0
    assert all(figures[name]["failed"] == 0 and figures[name]["requests_s"] > 0 for name in ("base", "regrad"))
    with Bank(house.bank) as bank:
        stats = bank.stats()
    own = {name: number for name, number in stats.namespaces.items() if name.startswith(("natural-", "tokens-"))}
    assert own and not any(own.values()), "they were there, and are gone again"
    command = [sys.executable, "-m", "regrad_vllm.cli", "bench", "load", "--server", f"http://{house.server}"]
    command += ["--bank", house.bank, "--model-name", "smollm2", "--contenders", "rag_learner"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode and "needs φ* as the adapter phi-star" in refused.stderr
    out = tmp_path / "load-first-look"
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert {group["same_documents"] for group in report["groups"] if group["same_documents"] is not None} == {1.0}
    by_phase = {group["condition"]["phase"]: group["figures"] for group in report["groups"]}
    assert set(by_phase) == {"cost", "curve", "growth", "quality"}
    cost = next(group["figures"] for group in report["groups"])
    assert cost["rag"]["prompt_tokens"] > 3 * cost["base"]["prompt_tokens"] == 3 * cost["regrad"]["prompt_tokens"]
    assert cost["regrad"]["server_ms"]["resident"] > 0 and cost["regrad"]["output_tokens"] == 32
    assert (out / "report.html").read_text("utf-8").count("<svg") == 5
    lines = (out / "requests.jsonl").read_text("utf-8").splitlines()
    again = subprocess.run(
        [sys.executable, "-m", "regrad_vllm.cli", "bench", "report", str(out)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(again.stdout.splitlines()[-1]) == figures
    assert len(lines) == sum(f["completed"] for g in report["groups"] for f in g["figures"].values())


@pytest.mark.only_test_all
@pytest.mark.timeout(300)
def test_vllms_own_benchmark_drives_the_server(house: House, tmp_path: Path) -> None:
    said = house.run("vllm_bench", tmp_path)
    assert re.search(r"Successful requests:\s+8\b", said) and not re.search(r"Failed requests:\s+[1-9]", said)


@pytest.mark.only_test_all
@pytest.mark.timeout(600)
def test_curves_are_measured_and_drawn(tmp_path: Path) -> None:
    words = ["growth", "--num-fresh", "3", "--sets", "squad", "--num-questions", "1"]
    words += ["--curves", "documents", "gamma", "length", "--counts", "60", "--lengths", "32", "256"]
    command = [sys.executable, "-m", "regrad_vllm.cli", *words, "--out", str(tmp_path / "g")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = json.loads(printed.splitlines()[-1])
    assert figures["questions"] == 4 and figures["documents"][0][0] == figures["documents_k3"][0][0] == 60
    by_gamma = dict(figures["gamma"])
    assert by_gamma[1.0] > by_gamma[0.0], "with γ = 0 the documents count nothing"
    points = [json.loads(line) for line in (tmp_path / "g" / "points.jsonl").read_text("utf-8").splitlines()]
    lengths = [(p["x"], p["f1"]["mean"]) for p in points if p["curve"] == "length" and p["method"] == "regrad_gold"]
    assert [x for x, _ in lengths] == [32, 256]
    assert len({f1 for _, f1 in lengths}) > 1, "a longer text is another gradient"
    assert "<svg" in (tmp_path / "g" / "growth.svg").read_text("utf-8")


def test_every_link_leads_to_a_file() -> None:
    targets = [(page, target) for page in pages() for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8"))]
    assert len(targets) > 10
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page, target in targets
        if not target.startswith("http") and not (page.parent / target).exists()
    ]
    assert not missing


def test_what_the_demo_prints_to_go_on_by_hand_are_the_readmes_examples(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand.show()
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("bank", "server", "ingest", "openai", "client"):
        for line in examples()[name].code.splitlines():
            if line.startswith(("regrad", "bank =", "client =")):
                assert " ".join(line.split()) in shown


def test_the_table_of_a_requests_fields_has_each_of_them() -> None:
    (table,) = (
        found
        for page in pages()
        for found in re.findall(r"<!-- fields -->\n(.*?)<!-- end -->", page.read_text("utf-8"), re.DOTALL)
    )
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(rows) == sorted(field.name for field in fields(RegradOptions))
