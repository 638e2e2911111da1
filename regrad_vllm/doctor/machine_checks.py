"""Checks of the machine: Python, cores, instructions, memory, shared memory, mappings."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from regrad_vllm.console import count
from regrad_vllm.doctor.finding import Finding
from regrad_vllm.serve import budgets
from regrad_vllm.serve.arena.folders import default_root
from regrad_vllm.serve.settings import PREFIX, Settings, SettingsError, variable

LEAST_MEMORY_BYTES = 6 * 2**30  # what bank and server with the default model take, with a KV cache of 1 GiB
VLLM_SHARED_BYTES = 240 * 2**20  # what vLLM 0.32 asks of shared memory
LEAST_MAP_COUNT = 65530  # Linux's default
_CGROUP = Path("/sys/fs/cgroup")  # of a container
_GPUS = Path("/proc/driver/nvidia/gpus")


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    found = ".".join(map(str, version))
    if (3, 11) <= version < (3, 14):
        return Finding("Python", "ok", found)
    return Finding("Python", "wrong", found, "make an environment with Python 3.11, 3.12 or 3.13")


def check_cores(cgroup: Path = _CGROUP) -> Finding:
    """The cores that this process may use, by its affinity and its container's quota."""
    number: float = len(os.sched_getaffinity(0))
    quota, period = ((*_words(cgroup / "cpu.max"), "max", "max"))[:2]
    if quota != "max":
        number = min(number, int(quota) / int(period))
    if number >= 2:
        return Finding("cores", "ok", f"{number:g}")
    return Finding("cores", "odd", f"{number:g}; bank and server slow each other down", "give it two cores or more")


def check_compute(cpuinfo: Path = Path("/proc/cpuinfo"), gpus: Path = _GPUS, torch: str = "") -> Finding:
    """A GPU that torch, of that version, can use, or the CPU's vector instructions. Costs: docs/benchmarks.md."""
    num_gpus = len(list(gpus.iterdir())) if gpus.is_dir() else 0
    if num_gpus and torch.endswith("+cpu"):
        told = f"{count(num_gpus, 'NVIDIA GPU')}, but torch {torch} is built for CPUs"
        remedy = "make a new environment, and pip install '.[gpu]' in the project's folder"
        return Finding("compute", "odd", told, remedy)
    if num_gpus:
        return Finding("compute", "ok", count(num_gpus, "NVIDIA GPU"))
    flags = set(cpuinfo.read_text("utf-8").split()) if cpuinfo.exists() else set()
    if {"amx_bf16", "avx512_bf16"} & flags:
        known = "AMX" if "amx_bf16" in flags else "AVX-512 with bf16"
        return Finding("compute", "ok", f"no GPU; the CPU has {known}")
    known = "AVX-512 without bf16" if "avx512f" in flags else "AVX2" if "avx2" in flags else "neither AVX-512 nor AVX2"
    cost = "a gradient takes about twice as long as with AVX-512's bf16"
    return Finding("compute", "odd", f"no GPU; the CPU has {known}: {cost}", "a GPU or a newer CPU is faster")


def check_memory(cgroup: Path = _CGROUP) -> Finding:
    """The free memory, in the machine and in its container."""
    import psutil

    free = psutil.virtual_memory().available
    limit = next(iter(_words(cgroup / "memory.max")), "max")
    if limit != "max":
        stat = _words(cgroup / "memory.stat")
        cached = int(dict(zip(stat[::2], stat[1::2], strict=True)).get("inactive_file", 0))  # given up under pressure
        free = min(free, int(limit) - int(_words(cgroup / "memory.current")[0]) + cached)
    found = f"{_gib(free)} free"
    if free >= LEAST_MEMORY_BYTES:
        return Finding("memory", "ok", found)
    needed = f"bank and server with the default model take {_gib(LEAST_MEMORY_BYTES)}"
    return Finding("memory", "odd", f"{found}; {needed}", "end other programs, or raise the container's limit")


def check_settings(environment: Mapping[str, str], learner: Path) -> tuple[Finding, Settings]:
    """The variables REGRAD_… as `regrad serve` reads them, and the settings: the defaults if they can't be used."""
    given = [name for name in environment if name.startswith(PREFIX)]
    try:
        settings = Settings.from_environment({variable("learner"): str(learner), **environment})
    except SettingsError as error:
        return Finding("settings", "wrong", str(error), "mend or remove that variable"), Settings(learner=learner)
    found = ", ".join(sorted(given)) or f"no variable {PREFIX}… is set"
    return Finding("settings", "ok", found), settings or Settings(learner=learner)


def check_shared_memory(settings: Settings) -> Finding:
    """The room for arena, workers and vLLM itself, see ``budgets``."""
    try:
        free = budgets.room(settings, sweep=False)
    except SettingsError as error:
        return Finding("shared memory", "wrong", str(error), f"mend {variable('arena_dir')}")
    wanted = settings.arena_bytes + settings.worker_bytes
    found = f"{free >> 20:,} MiB free in {settings.arena_dir or default_root()}"
    remedy = "enlarge it: docker run --shm-size 1g, or mount -o remount,size=1g /dev/shm"
    if free < VLLM_SHARED_BYTES:
        return Finding("shared memory", "wrong", f"{found}; vLLM alone asks for {VLLM_SHARED_BYTES >> 20} MiB", remedy)
    if free < wanted:
        return Finding("shared memory", "odd", f"{found}; arena and workers shrink from {wanted >> 20:,} MiB", remedy)
    return Finding("shared memory", "ok", found)


def check_mappings(path: Path = Path("/proc/sys/vm/max_map_count")) -> Finding:
    """Each document of a worker on a CPU is a mapping, and so half of them bound the documents."""
    name = "vm.max_map_count"
    number = int(path.read_text("ascii")) if path.exists() else LEAST_MAP_COUNT
    if number >= LEAST_MAP_COUNT:
        return Finding(name, "ok", f"{number:,}; a worker keeps up to {number // 2:,} documents")
    return Finding(
        name,
        "odd",
        f"{number:,}; a worker keeps {number // 2:,} documents",
        f"sysctl -w {name}={LEAST_MAP_COUNT}",
    )


def _words(path: Path) -> list[str]:
    return path.read_text("ascii").split() if path.exists() else []


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
