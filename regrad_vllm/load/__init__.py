"""Load on a server: ReGrad and its rivals with the same questions, the same hits and the same engine."""
