"""The flags for ``vllm serve`` that the user gave, on the command line and in the file of --config.

vLLM parses them again, a minute later. Here they are read only as far as ``regrad serve`` fills in others by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from regrad_vllm.serve.settings import SettingsError

_WHOLE_NUMBERS = (
    "max-num-seqs", "max-loras", "max-cpu-loras", "port", "api-server-count", "data-parallel-size",
    "data-parallel-size-local",
)  # fmt: skip
_SHORT = {
    "-dp": "--data-parallel-size", "-dpl": "--data-parallel-size-local", "-dpn": "--data-parallel-rank",
    "-dpe": "--data-parallel-external-lb",
}  # fmt: skip


def given_flags(argv: Sequence[str]) -> dict[str, str]:
    """Flag → its last value. The command line comes before the file, as in vLLM.

    SettingsError for a file that vLLM couldn't use, and for a value that must be a whole number.
    """
    given = {**config_flags(argv), **_on_command_line(argv)}
    for flag in _WHOLE_NUMBERS:
        if flag in given and not given[flag].isdecimal():
            raise SettingsError(f"--{flag} must be a whole number, got {given[flag]!r}")
    return given


def servers_and_ranks(given: Mapping[str, str]) -> tuple[int, int]:
    """The numbers of API servers and of data parallel ranks that vLLM starts on this machine. ``given``: the flags.

    By default vLLM starts an API server for each rank.
    """
    if "data-parallel-rank" in given or "data-parallel-external-lb" in given:  # the others are servers of their own
        ranks = 1
    else:
        ranks = int(given.get("data-parallel-size-local") or given.get("data-parallel-size") or 1)
    return max(1, int(given.get("api-server-count") or ranks)), max(1, ranks)


def kv_transfer(given: Mapping[str, str]) -> dict[str, Any]:
    """The fields of --kv-transfer-config, as JSON and as --kv-transfer-config.FIELD. SettingsError."""
    flag = "kv-transfer-config"
    try:
        fields = json.loads(given.get(flag) or "{}")
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise SettingsError(f"--{flag} must be a JSON object, got {given[flag]!r}")
    dotted = {name.removeprefix(f"{flag}."): value for name, value in given.items() if name.startswith(f"{flag}.")}
    return {**fields, **{name.replace("-", "_"): value for name, value in dotted.items()}}


def config_flags(argv: Sequence[str]) -> dict[str, str]:
    """Flag → value of the YAML file that --config names. A flag that is false counts as --no-FLAG. SettingsError."""
    path = _on_command_line(argv).get("config")
    if path is None:
        return {}
    import yaml

    try:
        if not path.endswith((".yaml", ".yml")):
            raise ValueError("its name must end with .yaml or .yml")
        with open(path, encoding="utf-8") as file:
            flags = yaml.safe_load(file)
        if not isinstance(flags, dict):
            raise ValueError("it must have a line for each flag, such as 'max-num-seqs: 8'")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"--config must name a file of vLLM's flags, got {path!r}: {error}") from error
    given = {}
    for key, value in flags.items():
        if value is None or value == []:  # vLLM takes its default
            continue
        flag = str(key).replace("_", "-")
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        given[f"no-{flag}" if value is False else flag] = "" if isinstance(value, bool) else text
    return given


def _on_command_line(argv: Sequence[str]) -> dict[str, str]:
    """In each spelling of argparse: --max_num_seqs=4, --max-num-seqs 4, --enable-lora, -dp 2."""
    given: dict[str, str] = {}
    for index, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        name = _SHORT.get(name, name)
        if not name.startswith("--"):
            continue
        following = argv[index + 1] if index + 1 < len(argv) and not argv[index + 1].startswith("--") else ""
        given[name[2:].replace("_", "-")] = value or following
    return given
