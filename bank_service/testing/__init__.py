"""Helpers for tests and benchmarks: a thin client, an encoder without a model, a tokens file. For no other code."""
