"""``regrad serve MODEL …``: ``vllm serve`` with every flag that ReGrad needs filled in and all others passed on.

A flag that the user gave stays unchanged, except for --max-loras: it counts the operator's own adapters, and φ* takes
one more slot. A value that doesn't fit ReGrad is refused when the server has started, and the message names the flag
(``engine_flags.check_engine_settings``).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from bank_service.wire.ports import check_port
from regrad_vllm.base_model import has_wide_vectors
from regrad_vllm.flags import settings_of
from regrad_vllm.learner import Learner
from regrad_vllm.serve import budgets
from regrad_vllm.serve.engine_flags import (
    EXTENSION_CLASS,
    GPU_COMPILATION,
    PLUGIN_NAME,
    check_kv_connectors,
    merged_modules,
)
from regrad_vllm.serve.settings import PREFIX, Settings, SettingsError, variable
from regrad_vllm.serve.vllm_flags import config_flags, given_flags, kv_transfer, servers_and_ranks

KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"  # GiB
CPU_MAX_NUM_SEQS = 32
GPU_MAX_NUM_SEQS = 128
_MAX_LORAS = 1  # vLLM's default
_VLLM_PORT = 8000  # vLLM's default
_SHORT_FLAGS = ("learner", "bank", "namespace")  # without the prefix regrad-


def main(argv: Sequence[str]) -> int:
    """Replaces this process by ``vllm serve``, or prints the command. SettingsError, LearnerError.

    RuntimeError if the port is taken.
    """
    parser = build_parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise SettingsError(f"MODEL must come first, got {argv[0]!r}; as in `regrad serve default --port 8000`")
    flags, rest = parser.parse_known_args([part for argument in argv[1:] for part in _spelled(argument)])
    _check_rest(rest, parser)
    check_kv_connectors(kv_transfer(given_flags(rest)))
    print_command = vars(flags).pop("print_command", False)
    if not print_command:
        _check_port(rest)
    model = _model_folder(argv[0])
    settings = _settings(flags, os.environ, argv[0], rest, sweep=not print_command)
    learner = Learner.load(settings.learner)
    if find_spec("vllm") is None:
        raise SettingsError("vllm must be installed to serve; pip install '.[cpu]' or '.[gpu]' in the project's folder")
    arguments = [sys.executable, "-m", "regrad_vllm.serve.vllm_main", "serve", *serve_args(model, learner, rest)]
    added = {**settings.environment(), "VLLM_PLUGINS": plugins(os.environ), **memory_environment(rest, os.environ)}
    if print_command:
        sys.stdout.write(command_line(added, arguments) + "\n")
        return 0
    sys.stdout.flush()
    os.execve(sys.executable, arguments, {**os.environ, **added})


def command_line(environment: Mapping[str, str], arguments: Sequence[str]) -> str:
    """The command as one line for a POSIX shell, with the environment in front."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(arguments)])


def serve_args(model: str, learner: Learner, argv: Sequence[str]) -> list[str]:
    """Arguments of ``vllm serve``: the model, ``argv``, and the flags that ReGrad needs and ``argv`` doesn't have.

    The operator's own adapters get as many slots as --max-loras says, and φ* gets one more. SettingsError for a wrong
    number in ``argv``.
    """
    given = given_flags(argv)
    on_cpu = not has_gpu()
    num_seqs = given.get("max-num-seqs") or str(CPU_MAX_NUM_SEQS if on_cpu else GPU_MAX_NUM_SEQS)
    # On a GPU vLLM's kernels are launched in every step if there is room for an adapter of the operator's.
    default_loras = _MAX_LORAS if on_cpu or "lora-modules" in given else 0
    max_loras = int(given.get("max-loras") or default_loras)
    wanted: dict[str, list[str]] = {
        "enable-lora": [],
        "max-num-seqs": [num_seqs],
        "lora-target-modules": list(merged_modules(learner)),
        "worker-extension-cls": [EXTENSION_CLASS],
    }
    if Path(model).is_dir():
        wanted["served-model-name"] = [Path(model).resolve().name]
    if on_cpu and not has_wide_vectors():
        wanted["dtype"] = ["float32"]  # bfloat16 is emulated there and several times slower
    if not on_cpu and not _says_how_to_compile(argv, given):
        wanted["compilation-config"] = [GPU_COMPILATION]
    arguments = [model, *argv]
    for flag, values in wanted.items():
        if flag not in given and f"no-{flag}" not in given:
            arguments += [f"--{flag}", *values]
    # Of a flag that is given twice, vLLM takes the last value.
    max_cpu_loras = max(max_loras, int(given.get("max-cpu-loras") or 0))
    return [*arguments, "--max-loras", str(max_loras + 1), "--max-cpu-loras", str(max_cpu_loras + 1)]


def memory_environment(argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """On a CPU: a tenth of the memory for the KV cache, from 1 to 16 GiB, unless the user sets it.

    By default vLLM takes 92% of the memory. It refuses to start if bank and API server use a part of that.
    """
    said = {"gpu-memory-utilization", "kv-cache-memory-bytes", "num-gpu-blocks-override"} & set(given_flags(argv))
    if said or KV_CACHE_VARIABLE in environment or has_gpu():
        return {}
    total_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {KV_CACHE_VARIABLE: str(max(1, min(16, int(total_gib / 10))))}


def plugins(environment: Mapping[str, str]) -> str:
    """VLLM_PLUGINS with our plugin added. If it is unset: all installed plugins, which vLLM loads by default."""
    named = environment.get("VLLM_PLUGINS")
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        names = sorted({entry.name for entry in entry_points(group="vllm.general_plugins")})
    return ",".join(dict.fromkeys([*names, PLUGIN_NAME]))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regrad serve MODEL",
        description="vLLM's OpenAI server with ReGrad. MODEL: a Hugging Face folder, a hub id, or 'default'.",
        epilog="All other flags go to `vllm serve`, such as --port, --max-model-len, --max-num-seqs, --api-key.",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--print-command", action="store_true", help="print the environment and command, run nothing")
    for setting in settings_of(Settings):
        default = f"{setting.default_text}; " if setting.default_text else ""
        parser.add_argument(
            _flag(setting.name),
            dest=setting.name,
            help=f"{setting.help} ({default}{variable(setting.name)} in the environment)".lstrip().replace("%", "%%"),
        )
    return parser


def _check_rest(rest: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """SettingsError for an unknown --regrad flag, with the known ones. vLLM's own error comes a minute later.

    It is the same for a flag of ours in the file that vLLM reads.
    """
    ours = [name for action in parser._actions for name in action.option_strings]
    for flag in config_flags(rest):
        if f"--{flag}" in ours:
            raise SettingsError(f"--{flag} must be given on the command line, because only vLLM reads --config's file")
    unknown = [flag for flag in given_flags(rest) if flag.startswith("regrad-")]
    if unknown:
        flag = f"--{unknown[0]}"
        near = get_close_matches(flag, ours, 1, cutoff=0.85)
        raise SettingsError(f"{flag} must be one of {', '.join(near or sorted(ours))}; see `regrad serve --help`")


def _spelled(argument: str) -> list[str]:
    """The flag as our parser and vLLM's take it.

    vLLM accepts --max_model_len for --max-model-len, so our flags accept underscores too. vLLM ignores --config=FILE.
    """
    name, equals, value = argument.partition("=")
    if name == "--config" and equals:
        return [name, value]
    return [name.replace("_", "-") + equals + value if name.startswith("--regrad_") else argument]


def _check_port(rest: Sequence[str]) -> None:
    """RuntimeError if the port is taken. vLLM finds out only after all its imports."""
    given = given_flags(rest)
    port = given.get("port", str(_VLLM_PORT))
    # With these flags there is no port.
    portless = {"uds", "headless", "help"} & set(given) or "-h" in rest or given.get("api-server-count") == "0"
    if not portless and 0 < int(port) < 65536:
        check_port("the server", given.get("host") or "0.0.0.0", int(port), "--port")


def _settings(
    flags: argparse.Namespace, environment: Mapping[str, str], model: str, rest: Sequence[str], *, sweep: bool
) -> Settings:
    """The settings from flags and environment. Flags come first. The default model gets the learner that ships.

    rest: vLLM's own flags. sweep: see ``budgets.room``.
    """
    merged = {**environment, **{variable(name): str(value) for name, value in vars(flags).items()}}
    if not merged.get(variable("learner")):
        if model != "default":
            raise SettingsError("--learner must name the learner's folder for a model of your own; see `regrad train`")
        from regrad_vllm.default_model import shipped_learner

        merged[variable("learner")] = str(shipped_learner())
    try:
        settings = Settings.from_environment(merged)
        if settings is None:
            raise AssertionError("the learner was set above")
        _ = settings.bank_credentials  # the server would refuse them when its engine has started
        if not has_gpu():
            defaults = [name for name in budgets.SIZES if not merged.get(variable(name))]
            free, numbers = budgets.room(settings, sweep=sweep), servers_and_ranks(given_flags(rest))
            settings = budgets.fitted(settings, defaults, free, *numbers)
            budgets.check_room(settings, free, *numbers)
    except SettingsError as error:
        raise SettingsError(_by_flags(str(error), environment, vars(flags))) from error
    return settings


def _by_flags(message: str, environment: Mapping[str, str], flags: Mapping[str, str]) -> str:
    """The message with flags in the place of variables, except for those that the environment sets."""
    names = {variable(setting.name): setting.name for setting in settings_of(Settings)}
    if message.startswith(PREFIX) and message.split()[0] not in names:
        return message  # about an unknown variable

    def spelled(match: re.Match[str]) -> str:
        name = names.get(match[0])
        return match[0] if name is None or (match[0] in environment and name not in flags) else _flag(name)

    return re.sub(rf"{PREFIX}\w+", spelled, message)


def _flag(name: str) -> str:
    """The flag of a setting."""
    dashed = name.replace("_", "-")
    return f"--{dashed}" if name in _SHORT_FLAGS else f"--regrad-{dashed}"


def _model_folder(model: str) -> str:
    if model != "default":
        return model
    from regrad_vllm.default_model import ensure_default_model

    return str(ensure_default_model())


def _says_how_to_compile(argv: Sequence[str], given: Mapping[str, str]) -> bool:
    return any(argument.startswith(("-O", "-cc")) for argument in argv) or any(
        flag.startswith(("compilation-config", "optimization-level", "enforce-eager")) for flag in given
    )


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
