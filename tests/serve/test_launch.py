"""``regrad serve``: the flags that it fills in, and what it refuses before vLLM starts."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from pathlib import Path

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from regrad_vllm.learner import Learner
from regrad_vllm.serve import launch
from regrad_vllm.serve.engine_flags import EXTENSION_CLASS, merged_modules
from regrad_vllm.serve.launch import main, memory_environment, plugins, serve_args
from regrad_vllm.serve.settings import SettingsError
from tests.serve.support import VllmServer


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_everything_that_regrad_needs_is_filled_in(model: Path, learner: Learner) -> None:
    arguments = serve_args(str(model), learner, ["--port", "80", "--max-num-seqs", "7"])
    assert arguments[:3] == [str(model), "--port", "80"]
    assert "--enable-lora" in arguments
    assert arguments[-4:] == ["--max-loras", "2", "--max-cpu-loras", "2"]
    assert value(arguments, "--max-num-seqs") == "7"
    assert "--max-lora-rank" not in arguments, "it is for the operator's own adapters"
    assert value(arguments, "--worker-extension-cls") == EXTENSION_CLASS
    assert value(arguments, "--served-model-name") == model.resolve().name
    start = arguments.index("--lora-target-modules") + 1
    modules = merged_modules(learner)
    assert arguments[start : start + len(modules)] == list(modules)
    assert {name.split(".", 3)[3] for name in modules} == {"mlp.gate_up_proj", "mlp.down_proj"}
    assert len(modules) == 2 * len({name.split(".")[2] for name in modules}) > 0


@pytest.mark.parametrize("spelling", [["--max-num-seqs=3"], ["--max_num_seqs", "3"], ["--max-num-seqs", "3"]])
def test_a_flag_that_the_user_gave_stays(model: Path, learner: Learner, spelling: list[str]) -> None:
    arguments = serve_args(str(model), learner, [*spelling, "--max-loras", "9", "--dtype", "half", "--enable_lora"])
    assert [argument for argument in arguments if argument.startswith("--max-num-seqs")] in (spelling[:1], [])
    assert arguments.count("--dtype") == 1 and "--enable-lora" not in arguments


@pytest.mark.parametrize(
    ("given", "max_loras", "max_cpu_loras"),
    [([], 2, 2), (["--max-loras", "4"], 5, 5), (["--max_loras=4", "--max-cpu-loras", "20"], 5, 21)],
)
def test_phi_gets_one_slot_more_than_the_operator_asks_for(
    model: Path, learner: Learner, given: list[str], max_loras: int, max_cpu_loras: int
) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", *serve_args(str(model), learner, [*given, "--enforce-eager"])])
    assert (parsed.max_loras, parsed.max_cpu_loras) == (max_loras, max_cpu_loras)


@pytest.mark.parametrize(
    ("flags", "environment", "rule"),
    [
        (["--regrad-top-k", "99"], {}, r"^--regrad-top-k must be in 1\.\.16, got 99; --regrad-max-documents, at"),
        (["--regrad-top-k", "9"], {"MAX_DOCUMENTS": "4"}, r"^--regrad-top-k must be in 1\.\.4, got 9; REGRAD_MAX_D"),
        (["--regrad-max-documents=4"], {"TOP_K": "9"}, r"^REGRAD_TOP_K must be in 1\.\.4, .*--regrad-max-documents"),
        (["--bank", "nowhere"], {"BANK": "here:1"}, "^--bank must be host:port, got 'nowhere'"),
        ([], {"BANK": "nowhere"}, "^REGRAD_BANK must be host:port, got 'nowhere'"),
        (["--regrad-gamma", "nan"], {"TOP_K": "9"}, "^--regrad-gamma must be a finite number"),
        (["--regrad-bank-cert", "/c", "--regrad-bank-ca", "/a"], {}, "see --regrad-bank-ca, --regrad-bank-cert, --reg"),
        (["--regrad-top-k", "1"], {"TOPK": "1"}, "^REGRAD_TOPK must be one of REGRAD_ARENA_BYTES, "),
    ],
)
def test_an_error_names_what_the_user_wrote(
    flags: list[str], environment: dict[str, str], rule: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in environment.items():
        monkeypatch.setenv(f"REGRAD_{name}", text)
    with pytest.raises(SettingsError, match=rule):
        main([str(model), "--learner", "/l", *flags, "--print-command"])


def test_float32_on_cpus_where_bfloat16_is_emulated(
    model: Path, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "has_wide_vectors", lambda: False)
    monkeypatch.setattr(launch, "has_gpu", lambda: False)
    assert value(serve_args(str(model), learner, []), "--dtype") == "float32"
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    assert "--dtype" not in serve_args(str(model), learner, [])


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
        assert "Traceback" not in server.tail()
    finally:
        server.stop()


def test_a_flag_of_ours_that_there_is_not_is_refused_with_the_one_that_is_near(
    model: Path, learner_folder: Path
) -> None:
    command = [str(model), "--learner", str(learner_folder)]
    with pytest.raises(SettingsError, match="--regrad-topk must be one of --regrad-top-k; see"):
        main([*command, "--regrad-topk", "2"])
    with pytest.raises(SettingsError, match="--regrad-zzz must be one of --bank, --learner, --namespace, --print-com"):
        main([*command, "--port=0", "--regrad-zzz=2"])
    with pytest.raises(SettingsError, match="--regrad-top-k must be in"):
        main([*command, "--port=0", "--regrad_top_k", "99"])


@pytest.mark.parametrize(
    "flags",
    [
        ['--kv-transfer-config={"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}'],
        ["--kv_transfer_config", '{"kv_connector": "LMCacheConnectorV1"}'],
        ["--kv-transfer-config.kv_connector", "LMCacheConnectorV1"],
    ],
)
def test_a_connector_that_finds_kv_by_tokens_is_refused_before_anything_starts(model: Path, flags: list[str]) -> None:
    with pytest.raises(SettingsError, match="must name OffloadingConnector, .* got LMCacheConnectorV1: others may"):
        main([str(model), "--port=0", *flags])
    with pytest.raises(SettingsError, match="--kv-transfer-config must be a JSON object, got 'x'"):
        main([str(model), "--port=0", "--kv-transfer-config", "x"])


def test_a_port_that_is_taken_is_refused_before_anything_starts(
    model: Path, learner_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(os, "execve", lambda *_: started.append("vllm"))
    command = [str(model), "--learner", str(learner_folder)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        in_file, socket_in_file = tmp_path / "port.yaml", tmp_path / "socket.yaml"
        in_file.write_text(f"port: {port}\nhost: 127.0.0.1\n")
        socket_in_file.write_text("uds: a-socket\n")
        for flags in (["--port", port], [f"--port={port}", "--host", "127.0.0.1"], ["--config", str(in_file)]):
            with pytest.raises(
                RuntimeError, match=rf"the server can't listen on [\d.]+:{port} \(Address already in use"
            ):
                main([*command, *flags])
        assert not started
        with pytest.raises(RuntimeError, match="can't listen"):
            main(["/nowhere", "--learner", "/nowhere", "--port", port])  # before anything is read
        others = (["--uds", "a-socket"], ["--headless"], ["--config", str(socket_in_file)], ["--help"], ["-h"])
        for number, flags in enumerate((*others, ["--api-server-count", "0"]), 1):
            main([*command, "--port", port, *flags])
            assert len(started) == number
    main([*command, "--port", port])
    assert len(started) == 7


def test_the_help_says_what_each_setting_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the base model answers; fail_closed: an error (fail_open; REGRAD_ON_ERROR in the environment)" in said
    assert "(off; REGRAD_DEFAULT in the environment)" in said


@pytest.mark.parametrize(
    ("given", "is_added"),
    [([], True), (["--enforce-eager"], False), (["-O3"], False), (["--compilation-config", "{}"], False),
     (["-cc.mode=3"], False), (["--optimization-level", "2"], False)],
)  # fmt: skip
def test_a_gpu_gets_graphs_of_its_decoding_steps_unless_something_else_is_asked_for(
    model: Path, learner: Learner, monkeypatch: pytest.MonkeyPatch, given: list[str], is_added: bool
) -> None:
    assert "FULL_DECODE_ONLY" not in str(serve_args(str(model), learner, given))
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    arguments = serve_args(str(model), learner, given)
    assert ("FULL_DECODE_ONLY" in str(arguments)) == is_added
    assert arguments[-4:] == ["--max-loras", "1", "--max-cpu-loras", "1"], "no room for adapters that nobody asked for"
    if is_added:
        EngineArgs(model=str(model), compilation_config=json.loads(value(arguments, "--compilation-config")))


def test_the_flags_of_the_image_are_vllms() -> None:
    """Those of deploy/compose.yaml and of the chart are the same (tests/house)."""
    dockerfile = (Path(__file__).parents[2] / "deploy" / "serve.Dockerfile").read_text("utf-8")
    (command,) = (line.removeprefix("CMD ") for line in dockerfile.splitlines() if line.startswith("CMD ["))
    _, rest = launch.build_parser().parse_known_args(json.loads(command)[1:])
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "default", *rest])
    assert (parsed.host, parsed.port, parsed.served_model_name) == ("0.0.0.0", 8000, ["smollm2"])
