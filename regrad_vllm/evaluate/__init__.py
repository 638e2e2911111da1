"""Evaluation: the share of the questions that each method answers, and its change as bank and documents grow."""
