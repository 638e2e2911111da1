"""ONNX Runtime, imported as it has to be.

Before usearch: with usearch 2.26 loaded first, importing onnxruntime 1.32 ends the process with a segmentation fault.
So whatever imports usearch imports this first. And without its telemetry, which leaves an id of the machine in the
user's cache folder.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime  # type: ignore[import-untyped]  # noqa: E402

__all__ = ["onnxruntime"]
