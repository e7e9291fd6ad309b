"""Scenarios: their files, what they cost, and whether this machine can run them."""
