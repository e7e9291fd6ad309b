"""Python's side of the machine: CPUs, ordering points, waits and locks."""
