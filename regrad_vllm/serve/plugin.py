"""The two entry points by which vLLM finds the plugin. Heavy modules are imported only when vLLM calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regrad_vllm.serve.api.endpoint import RegradEndpoint


def register() -> None:
    """``vllm.general_plugins``: the worker's side, in every process of vLLM. Off if REGRAD_LEARNER is unset."""
    import os

    if os.environ.get("REGRAD_LEARNER"):
        from regrad_vllm.serve.worker import part

        part.register()


def endpoint_plugin() -> RegradEndpoint:
    """``vllm.endpoint_plugins``: the API server's side. Off if REGRAD_LEARNER is unset."""
    from regrad_vllm.serve.api.endpoint import RegradEndpoint

    return RegradEndpoint()
