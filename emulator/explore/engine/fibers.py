"""A pool of greenlets: creating one costs a system call or two and a page fault for its stack.

A fiber runs one body after the other.  Each thread has its own idle fibers, because a greenlet belongs to
the thread that created it.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import local
from typing import Any

from greenlet import getcurrent, greenlet

# The code that a fiber runs; it returns the greenlet to switch to next.
Body = Callable[[], Any]


class _Idle(local):
    def __init__(self) -> None:
        self.fibers: list[Any] = []


_idle = _Idle()


def fiber() -> Any:
    """Return an idle greenlet; `switch(body)` starts it."""
    fibers = _idle.fibers
    return fibers.pop() if fibers else greenlet(_run)


def _run(body: Body) -> None:
    # Hold no reference to the greenlet itself: one that is abandoned inside a body must be collected.
    while True:
        other = body()
        del body
        _idle.fibers.append(getcurrent())
        body = other.switch()
