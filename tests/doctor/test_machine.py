"""Machines that lack something. Files of another machine stand for it where this one can't be changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from regrad_vllm.doctor.finding import Finding
from regrad_vllm.doctor.machine_checks import (
    LEAST_MAP_COUNT,
    VLLM_SHARED_BYTES,
    check_compute,
    check_cores,
    check_mappings,
    check_memory,
    check_python,
    check_settings,
    check_shared_memory,
)
from regrad_vllm.serve.settings import Settings


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(("version", "state"), [((3, 10, 9), "wrong"), ((3, 11, 0), "ok"), ((3, 14, 0), "wrong")])
def test_a_python_out_of_the_range_is_wrong(version: tuple[int, ...], state: str) -> None:
    assert check_python(version).state == state


def test_a_containers_share_of_the_cores_and_of_the_memory_counts(tmp_path: Path) -> None:
    half = written(tmp_path, cpu_max="50000 100000\n", memory_max="1073741824\n", memory_current="536870912\n")
    assert check_cores(half) == Finding(
        "cores", "odd", "0.5; bank and server slow each other down", "give it two cores or more"
    )
    tight = check_memory(half)
    assert tight.state == "odd" and tight.found.startswith("0.5 GiB free; bank and server") and tight.remedy
    written(tmp_path, memory_stat="anon 1\ninactive_file 268435456\n")
    assert check_memory(half).found.startswith("0.8 GiB free")
    assert check_cores(tmp_path / "none").found == check_cores(written(tmp_path, cpu_max="max 100000\n")).found


@pytest.mark.parametrize(
    ("flags", "state", "found"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16", "ok", "no GPU; the CPU has AMX"),
        ("avx2 avx512f avx512_bf16", "ok", "no GPU; the CPU has AVX-512 with bf16"),
        ("avx2", "odd", "no GPU; the CPU has AVX2: a gradient takes about twice"),
        ("sse2", "odd", "no GPU; the CPU has neither AVX-512 nor AVX2"),
    ],
)
def test_slow_instructions_are_odd_and_their_cost_is_told(tmp_path: Path, flags: str, state: str, found: str) -> None:
    cpuinfo = written(tmp_path, cpuinfo=f"flags\t\t: fpu {flags} sha_ni\n") / "cpuinfo"
    finding = check_compute(cpuinfo, tmp_path / "no-gpus")
    assert finding.state == state and finding.found.startswith(found)
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert check_compute(cpuinfo, tmp_path / "gpus", "2.11.0").found == "1 NVIDIA GPU"
    idle = check_compute(cpuinfo, tmp_path / "gpus", "2.11.0+cpu")
    assert idle.state == "odd" and "built for CPUs" in idle.found


def test_shared_memory_is_compared_with_the_sizes_of_arena_and_workers(tmp_path: Path) -> None:
    def check(**sizes: int) -> Finding:
        return check_shared_memory(Settings(learner=tmp_path, arena_dir=tmp_path, **sizes))

    assert check().state == "ok"
    odd = check(worker_bytes=2**50)
    assert odd.state == "odd" and "arena and workers shrink from 1,073,742,080 MiB" in odd.found
    assert "--shm-size" in odd.remedy
    wrong = check_shared_memory(Settings(learner=tmp_path, arena_dir=Path("/proc/none/arena")))
    assert wrong.state == "wrong" and "vLLM alone asks for 240 MiB" in wrong.found
    assert VLLM_SHARED_BYTES == 240 << 20


def test_few_mappings_bound_the_documents_of_a_worker(tmp_path: Path) -> None:
    few = check_mappings(written(tmp_path, count="2000\n") / "count")
    assert (few.state, few.found) == ("odd", "2,000; a worker keeps 1,000 documents")
    assert few.remedy == f"sysctl -w vm.max_map_count={LEAST_MAP_COUNT}"
    assert check_mappings(tmp_path / "none").state == "ok"


def test_a_variable_that_regrad_serve_would_refuse_is_wrong(tmp_path: Path) -> None:
    finding, settings = check_settings({"REGRAD_TOPK": "3"}, tmp_path)
    assert finding.state == "wrong" and "REGRAD_TOPK must be one of" in finding.found
    assert settings == Settings(learner=tmp_path)
    finding, settings = check_settings({"REGRAD_ARENA_BYTES": "5", "OTHER": "x"}, tmp_path)
    assert finding == Finding("settings", "ok", "REGRAD_ARENA_BYTES") and settings.arena_bytes == 5
