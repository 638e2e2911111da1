"""Gradient records in and out: encode, store, read and discard them."""
