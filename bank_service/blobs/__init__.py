"""Gradient records, immutable and named by their SHA-256. Also the stores of objects, which snapshots share."""
