"""Fibers: the same greenlets again, whatever has become of their work."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent

from emulator.explore.engine.fibers import fiber


class Stop(BaseException):
    pass


def body_of(hub: Any, said: list[object], pauses: int) -> Callable[[], Any]:
    def body() -> Any:
        try:
            for i in range(pauses):
                said.append(i)
                hub.switch()
            said.append("end")
        except Stop:
            said.append("stopped")
        return hub

    return body


def test_a_fiber_takes_one_body_after_the_other() -> None:
    hub, said = getcurrent(), list[object]()
    first = fiber()
    first.switch(body_of(hub, said, 1))
    first.switch()
    assert said == [0, "end"]
    second = fiber()
    assert second is first
    second.switch(body_of(hub, said, 2))
    assert fiber() is not second  # it is in use
    second.throw(Stop)
    assert said == [0, "end", 0, "stopped"]
    again = fiber()
    assert again is first
    again.switch(body_of(hub, said, 0))
    assert said[4:] == ["end"]


def test_one_that_nobody_ends_goes_with_its_last_reference() -> None:
    said = list[object]()
    lost = fiber()
    lost.switch(body_of(getcurrent(), said, 1))
    there = weakref.ref(lost)
    del lost
    gc.collect()
    assert there() is None
    assert said == [0]


def test_threads_have_their_own() -> None:
    def run(found: list[Any]) -> None:
        one = fiber()
        one.switch(body_of(getcurrent(), [], 0))
        found += [one, fiber() is one]

    mine, others = list[Any](), list[Any]()
    run(mine)
    thread = threading.Thread(target=run, args=(others,))
    thread.start()
    thread.join()
    assert mine[1]
    assert others[1]
    assert mine[0] is not others[0]
