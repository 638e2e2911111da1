"""Gradient records, immutable, named by their SHA-256; and the stores of objects under them and under snapshots."""
