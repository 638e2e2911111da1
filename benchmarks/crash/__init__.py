"""kill -9 under load, and what must hold after it."""
