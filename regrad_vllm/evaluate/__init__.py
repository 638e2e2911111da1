"""Evaluation: which share of the questions each method answers, and how that changes as things grow."""
