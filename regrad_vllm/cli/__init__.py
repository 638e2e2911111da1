"""The command line: `regrad COMMAND`. Light to import; each command loads what it needs when it runs."""

from regrad_vllm.cli.main import main

__all__ = ["main"]
