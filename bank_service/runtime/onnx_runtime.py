"""Imports ONNX Runtime before usearch, and without its telemetry.

If usearch 2.26 is loaded first, the import of onnxruntime 1.32 ends the process with a segmentation fault. So every
module that imports usearch imports this one first. The telemetry would write an id of the machine into the user's cache
folder.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime  # type: ignore[import-untyped]  # noqa: E402

__all__ = ["onnxruntime"]
