"""The command line: `regrad COMMAND`. Each command imports its heavy modules only when it runs."""

from regrad_vllm.cli.main import main

__all__ = ["main"]
