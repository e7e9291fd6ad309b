"""Greenlets that are used again: a new one costs a system call or two and a page fault for its stack.

A fiber runs one body after the other.  Idle ones are kept by thread, as greenlets belong to one.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import local
from typing import Any

from greenlet import getcurrent, greenlet

# What a fiber does; it returns the greenlet to go on with.
Body = Callable[[], Any]


class _Idle(local):
    def __init__(self) -> None:
        self.fibers: list[Any] = []


_idle = _Idle()


def fiber() -> Any:
    """A greenlet; `switch(body)` starts it."""
    fibers = _idle.fibers
    return fibers.pop() if fibers else greenlet(_run)


def _run(body: Body) -> None:
    # It keeps no reference to itself: one that is given up in the middle of a body is to go.
    while True:
        other = body()
        del body
        _idle.fibers.append(getcurrent())
        body = other.switch()
