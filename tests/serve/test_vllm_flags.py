"""vLLM's own flags, in its config file and on the command line, as far as ``regrad serve`` reads them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from regrad_vllm.learner import Learner
from regrad_vllm.serve.launch import main, serve_args
from regrad_vllm.serve.settings import SettingsError
from regrad_vllm.serve.vllm_flags import given_flags, servers_and_ranks


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}"])
def test_flags_in_vllms_config_file_count_as_given(
    spelling: str, model: Path, learner_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "served-model-name: [mine, too]\nmax_num_seqs: 8\ndtype: half\nport: 70000\n"
        "lora-target-modules:\n- a.b\nenable-lora: true\nmax-loras: 3\nkv-cache-memory-bytes: 1g\n"
    )
    given = spelling.format(file).split(maxsplit=1)
    command = [str(model), "--learner", str(learner_folder), *given, "--print-command"]
    assert main(command) == 0
    words = shlex.split(capsys.readouterr().out)
    assert value(words, "--config") == str(file)
    assert value(words, "--max-loras") == value(words, "--max-cpu-loras") == "4"
    assert not {"--served-model-name", "--max-num-seqs", "--dtype", "--lora-target-modules", "--enable-lora"} & {*words}
    assert not [word for word in words if word.startswith("VLLM_CPU_KVCACHE_SPACE")]
    assert main([*command, "--max-loras", "9"]) == 0, "the command line comes first"
    assert shlex.split(capsys.readouterr().out)[-4:] == ["--max-loras", "10", "--max-cpu-loras", "10"]


def test_an_empty_value_in_vllms_config_file_counts_as_left_out(
    model: Path, learner_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("served-model-name: []\nlora-target-modules: []\nmax-num-seqs: null\nport:\n")
    command = [str(model), "--learner", str(learner_folder), "--print-command"]
    assert main(command) == 0
    plain = shlex.split(capsys.readouterr().out)
    assert main([*command, "--config", str(file)]) == 0
    assert {*plain} <= {*shlex.split(capsys.readouterr().out)}


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        (
            "serve.yaml",
            "kv_transfer_config: {kv_connector: NixlConnector}",
            "must name .* got NixlConnector: others may",
        ),
        ("serve.yaml", "max-num-seqs: many", "--max-num-seqs must be a whole number, got 'many'"),
        ("serve.yaml", "regrad_top_k: 3", "--regrad-top-k must be given on the command line"),
        ("serve.yaml", "learner: /l", "--learner must be given on the command line"),
        ("serve.yaml", "- port", "--config must name a file of vLLM's flags, got .*: it must have a line for each"),
        ("serve.yaml", "a: [", "--config must name a file of vLLM's flags, got "),
        ("serve.json", "{}", "its name must end with .yaml or .yml"),
        ("", "", "--config must name a file of vLLM's flags, got .*No such file"),
    ],
)
def test_a_config_file_that_vllm_could_not_use_is_refused_before_anything_starts(
    name: str, text: str, rule: str, model: Path, learner_folder: Path, tmp_path: Path
) -> None:
    if name:
        (tmp_path / name).write_text(text)
    config = str(tmp_path / (name or "none.yaml"))
    with pytest.raises(SettingsError, match=rule):
        main([str(model), "--learner", str(learner_folder), "--config", config, "--print-command"])


def test_a_flag_of_vllm_that_regrad_reads_is_checked_before_anything_starts(model: Path, learner: Learner) -> None:
    for flag, text in (("--max-num-seqs", "abc"), ("--max_loras", "-1"), ("--max-cpu-loras", ""), ("--port", "http")):
        with pytest.raises(SettingsError, match=f"{flag.replace('_', '-')} must be a whole number, got '{text}'"):
            serve_args(str(model), learner, [f"{flag}={text}"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--tensor-parallel-size 2", (1, 1)),
        ("--data-parallel-size 2", (2, 2)),
        ("-dp 4 --api-server-count=1", (1, 4)),
        ("-dp=4 -dpl 2", (2, 2)),
        ("--data_parallel_size 4 -dpn 1", (1, 1)),
        ("--headless --api-server-count 0 -dp 2", (1, 2)),
    ],
)
def test_an_api_server_for_each_rank_is_counted_as_vllm_starts_it(flags: str, expected: tuple[int, int]) -> None:
    assert servers_and_ranks(given_flags(flags.split())) == expected
