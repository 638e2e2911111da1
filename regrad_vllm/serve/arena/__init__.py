"""Gradient records in shared memory: the API server writes them, the workers read them."""
