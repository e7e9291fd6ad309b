"""Strategies that choose the next task: exhaustive, sampled, divided among processes."""
