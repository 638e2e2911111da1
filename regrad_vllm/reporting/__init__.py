"""Figures for readers: intervals, tables, plots, pages. Evaluation, load and benchmarks share them."""
