"""Verdicts, recordings and counterexamples."""
