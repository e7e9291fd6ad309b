"""A hash join: the rows of one table, in random order, look up their partner in a dict that holds the other.

Recorded as the trace `python`; see SOURCES.md.
"""

import random

ROWS = 100_000

random.seed(1)
users = {f"user{number:06d}": (number, number % 97) for number in range(ROWS)}
orders = list(users)
random.shuffle(orders)
totals = dict.fromkeys(range(97), 0)
for name in orders:
    number, region = users[name]
    totals[region] += number
print(totals)
