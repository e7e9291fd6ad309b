"""Sweeps: comparisons over a grid of scenarios, in units of work that run once and keep their results."""
