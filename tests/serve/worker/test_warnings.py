"""The plugin's warnings in the log of vLLM's server."""

from __future__ import annotations

import logging

import pytest

from regrad_vllm.serve.worker.part import keep_warnings


@pytest.mark.usefixtures("loggers")
def test_warnings_are_logged_though_vllms_server_raises_the_level_of_all_loggers() -> None:
    logging.getLogger().setLevel(logging.ERROR)
    logger = logging.getLogger("regrad")
    logger.setLevel(logging.NOTSET)
    assert not logger.isEnabledFor(logging.WARNING)
    keep_warnings()
    assert logger.isEnabledFor(logging.WARNING)
    logger.setLevel(logging.CRITICAL)
    keep_warnings()
    assert logger.level == logging.CRITICAL, "a level that somebody chose stays"
