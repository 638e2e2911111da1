"""Encodes, stores, reads and discards gradient records."""
