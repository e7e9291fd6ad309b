"""A running service in a terminal, from its metrics."""
