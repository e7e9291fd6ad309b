"""Policies side by side: one seeded workload under each policy, its cost, and the omniscient bound."""
