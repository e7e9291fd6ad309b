"""Workloads of traced hosts, replayed under policies."""
