"""Scenarios: their files, their phases and costs, and a check that this machine can run them."""
