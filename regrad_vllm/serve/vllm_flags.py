"""The flags for ``vllm serve`` that the user gave, on the command line and in the file of --config.

vLLM parses them again, a minute later. Here they are read only as far as ``regrad serve`` fills in others by them.
"""

from __future__ import annotations

from collections.abc import Sequence

from regrad_vllm.serve.settings import SettingsError

_WHOLE_NUMBERS = ("max-num-seqs", "max-loras", "max-cpu-loras", "max-lora-rank", "port")


def given_flags(argv: Sequence[str]) -> dict[str, str]:
    """Flag → its last value. The command line comes before the file, as in vLLM.

    SettingsError for a file that vLLM couldn't use, and for a value that must be a whole number.
    """
    given = {**config_flags(argv), **_on_command_line(argv)}
    for flag in _WHOLE_NUMBERS:
        if flag in given and not given[flag].isdecimal():
            raise SettingsError(f"--{flag} must be a whole number, got {given[flag]!r}")
    return given


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
        given[f"no-{flag}" if value is False else flag] = "" if isinstance(value, bool) else str(value)
    return given


def _on_command_line(argv: Sequence[str]) -> dict[str, str]:
    """In each spelling of argparse: --max_num_seqs=4, --max-num-seqs 4, --enable-lora."""
    given: dict[str, str] = {}
    for index, argument in enumerate(argv):
        if not argument.startswith("--"):
            continue
        name, _, value = argument[2:].partition("=")
        following = argv[index + 1] if index + 1 < len(argv) and not argv[index + 1].startswith("--") else ""
        given[name.replace("_", "-")] = value or following
    return given
