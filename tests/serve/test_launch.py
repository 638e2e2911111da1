"""``regrad serve``: the flags that it fills in, and what it refuses before vLLM starts."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.config.lora import LoRAConfig

from regrad_vllm.learner import Learner
from regrad_vllm.serve import launch
from regrad_vllm.serve.engine import check_engine_settings
from regrad_vllm.serve.launch import EXTENSION_CLASS, main, memory_environment, merged_modules, plugins, serve_args
from regrad_vllm.serve.settings import SettingsError
from tests.serve.support import VllmServer


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_everything_that_regrad_needs_is_filled_in(model: Path, learner: Learner) -> None:
    arguments = serve_args(str(model), learner, ["--port", "80", "--max-num-seqs", "7"])
    assert arguments[:3] == [str(model), "--port", "80"]
    assert "--enable-lora" in arguments
    assert value(arguments, "--max-loras") == value(arguments, "--max-cpu-loras") == "7"
    assert value(arguments, "--max-lora-rank") == "16"
    assert value(arguments, "--worker-extension-cls") == EXTENSION_CLASS
    assert value(arguments, "--served-model-name") == model.resolve().name
    start = arguments.index("--lora-target-modules") + 1
    assert arguments[start : start + 30] == list(merged_modules(learner))
    assert merged_modules(learner)[:2] == ("model.layers.15.mlp.gate_up_proj", "model.layers.15.mlp.down_proj")


@pytest.mark.parametrize("spelling", [["--max-num-seqs=3"], ["--max_num_seqs", "3"], ["--max-num-seqs", "3"]])
def test_a_flag_that_the_user_gave_stays(model: Path, learner: Learner, spelling: list[str]) -> None:
    arguments = serve_args(str(model), learner, [*spelling, "--max-loras", "9", "--dtype", "half", "--enable_lora"])
    assert [argument for argument in arguments if argument.startswith("--max-num-seqs")] in (spelling[:1], [])
    assert value(arguments, "--max-loras") == value(arguments, "--max-cpu-loras") == "9"
    assert arguments.count("--dtype") == 1 and "--enable-lora" not in arguments


def test_float32_on_cpus_where_bfloat16_is_emulated(
    model: Path, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_has_wide_vectors", lambda: False)
    monkeypatch.setattr(launch, "_has_gpu", lambda: False)
    assert value(serve_args(str(model), learner, []), "--dtype") == "float32"
    monkeypatch.setattr(launch, "_has_gpu", lambda: True)
    assert "--dtype" not in serve_args(str(model), learner, [])


def test_a_rank_between_vllms_is_rounded_up(model: Path, learner: Learner) -> None:
    layout = type(learner.layout).build(12, [("model.layers.0.mlp.down_proj", 4, 4)])
    small = SimpleNamespace(layout=layout)
    assert value(serve_args(str(model), small, []), "--max-lora-rank") == "16"  # type: ignore[arg-type]


def test_the_printed_command_is_one_line_that_a_shell_reads_back(
    model: Path, learner_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    namespace = "it's & more"
    flags = ["--learner", str(learner_folder), "--namespace", namespace, "--chat-template", "a b"]
    assert main([str(model), *flags, "--print-command"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and printed.endswith("\n")
    words = shlex.split(printed)
    start = words.index(sys.executable)
    given = dict(word.split("=", 1) for word in words[:start])
    assert given["REGRAD_NAMESPACE"] == namespace and given["REGRAD_LEARNER"] == str(learner_folder)
    assert "regrad" in given["VLLM_PLUGINS"].split(",")
    assert words[start + 1 : start + 5] == ["-m", "regrad_vllm.serve.vllm_main", "serve", str(model)]
    assert value(words, "--chat-template") == "a b" and "--print-command" not in words


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (["--gpu-memory-utilization", "0.3"], {}),
        (["--kv_cache_memory_bytes=1000000000"], {}),
        ([], {"VLLM_CPU_KVCACHE_SPACE": "3"}),
    ],
)
def test_on_a_cpu_the_kv_cache_leaves_room_for_the_bank_unless_the_user_says_how_much(
    flags: list[str], environment: dict[str, str]
) -> None:
    assert memory_environment(flags, environment) == {}
    chosen = memory_environment(["--port", "8000"], {})
    if torch.cuda.is_available():
        assert chosen == {}
    else:
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        assert 1 <= int(chosen["VLLM_CPU_KVCACHE_SPACE"]) <= max(1, gib / 10)


def test_our_plugin_is_named_beside_those_that_would_load_anyway() -> None:
    assert plugins({"VLLM_PLUGINS": "a,b"}) == "a,b,regrad"
    assert plugins({"VLLM_PLUGINS": "regrad"}) == "regrad"
    assert plugins({}).split(",")[-1:] == ["regrad"] or "regrad" in plugins({}).split(",")


def test_a_model_of_ones_own_needs_a_learner(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGRAD_LEARNER", raising=False)
    with pytest.raises(SettingsError, match="--learner must name"):
        main([str(model)])
    with pytest.raises(SettingsError, match="MODEL must come first"):
        main(["--port", "80"])


def test_an_unknown_setting_ends_the_command_with_the_known_ones(model: Path, tmp_path: Path) -> None:
    server = VllmServer(model, ["--learner", str(tmp_path)], {"REGRAD_TOPK": "3"}, tmp_path / "log")
    try:
        assert server.wait_until_ended(120) == 1
        assert "REGRAD_TOPK must be one of" in server.tail() and "REGRAD_TOP_K" in server.tail()
    finally:
        server.stop()


def engine(learner: Learner, **changed: object) -> SimpleNamespace:
    lora = LoRAConfig(max_lora_rank=16, max_loras=4, max_cpu_loras=4)
    parts = {
        "lora_config": lora,
        "scheduler_config": SimpleNamespace(max_num_seqs=4),
        "parallel_config": SimpleNamespace(worker_extension_cls=EXTENSION_CLASS),
    }
    return SimpleNamespace(**{**parts, **changed})


def test_an_engine_that_fits_the_learner_is_accepted(learner: Learner) -> None:
    check_engine_settings(engine(learner), learner)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"lora_config": None}, "--enable-lora"),
        ({"lora_config": LoRAConfig(max_lora_rank=8, max_loras=4)}, "--max-lora-rank"),
        ({"scheduler_config": SimpleNamespace(max_num_seqs=5)}, "--max-loras"),
        ({"parallel_config": SimpleNamespace(worker_extension_cls="")}, "--worker-extension-cls"),
        ({"lora_config": LoRAConfig(max_loras=4, fully_sharded_loras=True)}, "--fully-sharded-loras"),
    ],
)
def test_an_engine_that_does_not_fit_is_told_which_flag_to_set(
    learner: Learner, changed: dict[str, object], flag: str
) -> None:
    with pytest.raises(SettingsError, match=flag):
        check_engine_settings(engine(learner, **changed), learner)
