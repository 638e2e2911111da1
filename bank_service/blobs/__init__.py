"""Gradient records on disk, immutable, named by their SHA-256."""
