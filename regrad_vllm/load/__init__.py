"""The load test: ReGrad and its rivals answer the same questions with the same hits on the same engine."""
