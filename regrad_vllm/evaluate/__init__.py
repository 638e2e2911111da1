"""Evaluation through a running server. ``main(argv)`` is `regrad eval`."""

from regrad_vllm.evaluate.run import main

__all__ = ["main"]
