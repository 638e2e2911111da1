"""Real servers that benchmarks and tests start."""
