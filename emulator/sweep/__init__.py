"""Sweeps: comparisons over a grid of scenarios, in units that are run once and kept."""
