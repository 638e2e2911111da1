"""kill -9 under load, and the promises that a bank must keep after it."""
