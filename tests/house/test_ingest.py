"""`regrad ingest`, `query`, `delete`, `stats` and `export` against a real bank that `regrad bank` started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from regrad_vllm.cli import main
from regrad_vllm.learner import Learner


def _ingest(bank: str, namespace: str, *paths: Path) -> int:
    return main(["ingest", *map(str, paths), "--bank", bank, "--namespace", namespace])


def _query(bank: str, namespace: str, text: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main(["query", text, "--bank", bank, "--namespace", namespace, "--json", "--top-k", "10"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def _write_lines(path: Path, number: int) -> Path:
    records = ({"id": f"d{n}", "text": f"The lighthouse number {n} was painted in {1900 + n}."} for n in range(number))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_folder_goes_in_and_is_found_and_goes_in_again_for_free(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_lines(tmp_path / "lights.jsonl", 30)
    (tmp_path / "bridge.md").write_text("# The bridge of Orlen\n\nIt is built of oak.")
    assert _ingest(bank, "folder", tmp_path) == 0
    assert capsys.readouterr().out == "31 created, 0 updated, 0 unchanged\n"
    best = _query(bank, "folder", "What is the bridge of Orlen built of?", capsys)[0]
    assert (best["id"], best["title"], best["text"]) == ("bridge.md", "The bridge of Orlen", "It is built of oak.")
    assert _ingest(bank, "folder", tmp_path) == 0
    assert capsys.readouterr().out == "0 created, 0 updated, 31 unchanged\n"


def test_a_changed_file_updates_and_a_shortened_one_loses_its_rest(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    guide = tmp_path / "guide.md"
    sections = [f"# Part {n}\n\nThe part number {n} is about lamps.\n\n" for n in range(1, 5)]
    guide.write_text("".join(sections))
    assert _ingest(bank, "changes", guide) == 0
    guide.write_text("".join(sections[:2]).replace("lamps", "ropes", 1))
    capsys.readouterr()
    assert _ingest(bank, "changes", guide) == 0
    captured = capsys.readouterr()
    assert captured.out == "0 created, 1 updated, 1 unchanged, 2 removed that their files no longer hold\n"
    sequence = int(captured.err.rpartition("as of sequence ")[2])  # of the last removal
    assert main(["stats", "--bank", bank]) == 0
    assert json.loads(capsys.readouterr().out)["sequence"] == sequence
    found = {hit["id"]: hit["text"] for hit in _query(bank, "changes", "lamps and ropes", capsys)}
    assert found == {
        "guide.md#1": "The part number 1 is about ropes.",
        "guide.md#2": "The part number 2 is about lamps.",
    }
    guide.write_text("Only this is left.")
    assert _ingest(bank, "changes", guide) == 0
    assert [hit["id"] for hit in _query(bank, "changes", "lamps and ropes", capsys)] == ["guide.md"]


def test_one_bad_line_keeps_everything_out_unless_it_is_to_be_skipped(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write_lines(tmp_path / "lights.jsonl", 3)
    path.write_text(path.read_text() + "{broken\n")
    assert _ingest(bank, "partial", path) == 2
    assert main(["query", "lighthouse", "--bank", bank, "--namespace", "partial"]) == 1
    assert "namespace" in capsys.readouterr().err
    assert main(["ingest", str(path), "--bank", bank, "--namespace", "partial", "--skip-bad"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "3 created, 0 updated, 0 unchanged\n"
    assert f"{path}:4: must be a JSON object" in captured.err


def test_a_pipe_in_a_folder_is_named_and_the_exit_status_tells(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_lines(tmp_path / "lights.jsonl", 3)
    os.mkfifo(tmp_path / "pipe.txt")
    assert _ingest(bank, "pipes", tmp_path) == 2
    assert f"{tmp_path}/pipe.txt: must be a regular file" in capsys.readouterr().err
    assert main(["ingest", str(tmp_path), "--bank", bank, "--namespace", "pipes", "--skip-bad"]) == 1
    assert capsys.readouterr().out == "3 created, 0 updated, 0 unchanged\n"


def test_what_the_bank_refuses_is_named_by_its_place(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write_lines(tmp_path / "lights.jsonl", 3)
    assert _ingest(bank, "no such name!", path) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"regrad ingest: {path}:1: document.namespace must match")
    assert last.endswith("(0 documents before it are in)")


def test_texts_are_cut_by_the_tokens_of_the_model_that_is_named(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rights.txt").write_text("Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. " * 60)
    flags = ["--bank", bank, "--namespace", "cut"]
    numbers = []
    for model in ([], ["--model", "default"]):
        assert main(["ingest", str(tmp_path), *flags, *model]) == 0
        assert ("--model" in capsys.readouterr().err) is not bool(model)
        assert main(["list", *flags]) == 0
        numbers.append(capsys.readouterr().out.count("rights.txt#"))
    assert numbers[1] > numbers[0] > 1, "the estimate is for English"
    assert main(["ingest", str(tmp_path), *flags, "--model", str(tmp_path)]) == 1
    assert f"{tmp_path}/tokenizer.json must exist" in capsys.readouterr().err


def test_documents_longer_than_the_learner_reads_are_counted(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "The harbour of Orlen is deep and cold. " * 40}) + "\n")
    assert _ingest(bank, "long", path) == 0
    assert "1 longer than the learner reads" in capsys.readouterr().out


def test_deleting_names_what_was_not_there_and_deletes_the_rest(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _ingest(bank, "deletes", _write_lines(tmp_path / "lights.jsonl", 3)) == 0
    capsys.readouterr()
    assert main(["delete", "d0", "nobody", "d2", "--bank", bank, "--namespace", "deletes"]) == 1
    captured = capsys.readouterr()
    deleted = re.fullmatch(
        r"deleted d0 \(version 1, sequence (\d+)\)\ndeleted d2 \(version 1, sequence (\d+)\)\n", captured.out
    )
    assert deleted and int(deleted[2]) == int(deleted[1]) + 1
    assert captured.err == "regrad delete: 1 id not in namespace 'deletes': nobody\n"
    assert [hit["id"] for hit in _query(bank, "deletes", "lighthouse", capsys)] == ["d1"]


def test_all_of_a_namespace_are_deleted_only_where_no_id_is_named(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write_lines(tmp_path / "lights.jsonl", 3)
    assert _ingest(bank, "emptied", path) == _ingest(bank, "beside", path) == 0
    namespace = ["--bank", bank, "--namespace", "emptied"]
    assert main(["delete", "d1", "--all", *namespace]) == main(["delete", *namespace]) == 2
    assert "either ID or --all" in capsys.readouterr().err
    assert len(_query(bank, "emptied", "lighthouse", capsys)) == 3
    assert main(["delete", "--all", *namespace]) == 0
    deleted = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in deleted] == ["deleted d0", "deleted d1", "deleted d2"]
    assert not _query(bank, "emptied", "lighthouse", capsys) and len(_query(bank, "beside", "lighthouse", capsys)) == 3
    assert main(["delete", "--all", *namespace]) == 0 and not capsys.readouterr().out


def test_documents_are_listed_and_got_as_they_were_ingested(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [
        {"id": "a", "title": "Orlen", "text": "The harbour\nof Orlén.", "metadata": {"lang": "de"}},
        {"id": "b", "title": "", "text": "A lighthouse. " * 200, "metadata": {}},
        {"id": "c\nd", "title": "", "text": "Deep.", "metadata": {}},
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = {"regrad.source": str(path)}
    flags = ["--bank", bank, "--namespace", "listed"]
    assert main(["list", *flags]) == 1
    assert capsys.readouterr().err == "regrad list: namespace 'listed' has no documents\n"
    assert _ingest(bank, "listed", path) == 0
    capsys.readouterr()
    assert main(["list", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "a  version 1, 22 bytes of text  Orlen",
        "b  version 1, 2,800 bytes of text",
        "'c\\nd'  version 1, 5 bytes of text",
    ]
    assert captured.err == "3 documents in namespace 'listed'\n"
    assert main(["list", "--json", *flags]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(entry["id"], entry["version"], entry["title"]) for entry in listed] == [
        ("a", 1, "Orlen"),
        ("b", 1, ""),
        ("c\nd", 1, ""),
    ]
    assert main(["list", "--json", "--filter", "lang=de", *flags]) == 0
    (german,) = capsys.readouterr().out.splitlines()
    assert json.loads(german)["metadata"] == {"lang": "de"} | source
    assert main(["get", "b", "nobody", "a", *flags]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == [
        documents[1] | {"metadata": source},
        documents[0] | {"metadata": {"lang": "de"} | source},
    ]
    notes = captured.err.splitlines()
    assert notes[0].startswith("b: version 1, sequence ") and notes[0].endswith("longer than the learner reads")
    assert notes[-1] == "regrad get: 1 id not in namespace 'listed': nobody"


def _regrad(shell: str, *arguments: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Runs `regrad` in a shell that redirects its output, as the text ``shell`` says."""
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "regrad_vllm.cli", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    environment.pop("TQDM_DISABLE", None)
    environment.pop("PYTHONUNBUFFERED", None)  # with it, no output is left for the end
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_the_output_fits_its_encoding_and_has_no_bars_off_a_terminal(bank: str, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    documents = [{"id": "dé", "title": "Ö", "text": "A – 🦉."}, {"id": "e", "text": "B."}]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    flags = ["--bank", bank, "--namespace", "ascii"]
    ingested = _regrad("", "ingest", str(path), *flags)
    assert ingested.stdout == "2 created, 0 updated, 0 unchanged\n"
    assert re.fullmatch(r"as of sequence \d+\n", ingested.stderr)
    listed = _regrad("", "list", *flags, encoding="ascii")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [r"d\xe9", "e"]
    lines = _regrad("", "get", "dé", *flags, encoding="ascii").stdout.splitlines()
    assert [(found["id"], found["text"]) for found in map(json.loads, lines)] == [("dé", "A – 🦉.")]


@pytest.mark.parametrize(
    ("shell", "error"),
    [
        (">&-", "regrad: standard output is closed; send it to a terminal, a file or /dev/null\n"),
        (">/dev/full", "regrad list: [Errno 28] No space left on device\n"),
        ("2>&-", ""),
        ("2>/dev/full", ""),
    ],
)
def test_output_that_cannot_be_written_is_one_line(bank: str, tmp_path: Path, shell: str, error: str) -> None:
    assert _ingest(bank, "closed", _write_lines(tmp_path / "lights.jsonl", 2)) == 0
    result = _regrad(shell, "list", "--bank", bank, "--namespace", "closed")
    assert (result.returncode, result.stderr) == (1 if error else 0, error)
    assert result.stdout.count("bytes of text") == (0 if error else 2)


@pytest.mark.parametrize(
    "arguments", [["--version"], ["serve", "default", "--print-command"]], ids=lambda words: words[0]
)
def test_output_that_is_lost_at_the_end_is_one_line(arguments: list[str]) -> None:
    result = _regrad(">/dev/full", *arguments)
    assert (result.returncode, result.stderr) == (1, "regrad: [Errno 28] No space left on device\n")


def test_a_reader_that_has_ended_is_no_error_to_report() -> None:
    result = _regrad("| true", "--version")
    assert result.stderr == ""


def test_a_query_as_of_an_earlier_sequence_until_something_is_deleted(
    bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _ingest(bank, "past", _write_lines(tmp_path / "lights.jsonl", 1)) == 0
    sequence = int(capsys.readouterr().err.rpartition("as of sequence ")[2])
    assert main(["stats", "--bank", bank]) == 0
    assert json.loads(capsys.readouterr().out)["sequence"] == sequence
    assert _ingest(bank, "past", _write_lines(tmp_path / "lights.jsonl", 3)) == 0
    ask = ["query", "lighthouse", "--bank", bank, "--namespace", "past", "--as-of", str(sequence)]
    capsys.readouterr()
    assert main([*ask, "--json"]) == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["d0"]
    assert main(["delete", "d1", "--bank", bank, "--namespace", "past", "--purge"]) == 0
    assert re.fullmatch(r"purged d1 \(version 1, sequence \d+\)\n", capsys.readouterr().out)
    assert main(ask) == 0, "a purge takes nobody else's past"
    assert main(["delete", "d2", "--bank", bank, "--namespace", "past"]) == 0
    assert main(ask) == 1
    assert "as_of must be at least" in capsys.readouterr().err


def test_stats_are_json_with_numbers(bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _ingest(bank, "counted", _write_lines(tmp_path / "lights.jsonl", 2)) == 0
    capsys.readouterr()
    assert main(["stats", "--bank", bank]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["namespaces"]["counted"] == 2
    assert stats["num_documents"] == sum(stats["namespaces"].values())
    assert stats["cache_available"] is True
    assert len(stats["learner_fingerprint"]) == 64


def test_an_exported_adapter_is_the_learner_minus_the_documents_gradients(
    bank: str, tmp_path: Path, small_learner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _ingest(bank, "export", _write_lines(tmp_path / "lights.jsonl", 2)) == 0
    common = ["--bank", bank, "--namespace", "export", "--learner", str(small_learner)]
    assert main(["export", str(tmp_path / "none"), "--document", "d0", "--gamma", "0", *common]) == 0
    assert main(["export", str(tmp_path / "one"), "--document", "d0", *common]) == 0
    assert main(["export", str(tmp_path / "both"), "--document", "d0", "--document", "d1", *common]) == 0
    learner = Learner.load(small_learner)
    none, one, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("none", "one", "both"))
    for tensor, phi in learner.layout.views(learner.phi):
        key = f"base_model.model.{tensor.module}.lora_{tensor.part}.weight"
        assert np.array_equal(none[key], phi)
        assert not np.array_equal(one[key], phi)
        assert not np.array_equal(both[key], one[key])
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["r"] == learner.layout.rank
    capsys.readouterr()
    assert main(["export", str(tmp_path / "more"), "--document", "nobody", *common]) == 1
    assert "nobody" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
