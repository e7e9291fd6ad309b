"""A run: the machine that a scenario boots, and the phases that it goes through."""
