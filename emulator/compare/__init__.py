"""Policies side by side: the same seeded workload under each, what it cost, and what it had to cost."""
