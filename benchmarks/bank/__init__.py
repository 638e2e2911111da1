"""A bank of many documents through its own RPCs: build, restart, queries against raw usearch, fetches, ingest."""
