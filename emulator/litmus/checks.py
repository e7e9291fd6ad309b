"""Checks of a litmus test as a whole: operations that do not fit together, and tests that test nothing.

Operations are checked in the order in which a thread executes them: its operations in `init`, then its own,
then those in `final`.  If several threads race, only an error that occurs in every order is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from emulator.errors import closest, shown
from emulator.points import POINTS

if TYPE_CHECKING:
    from emulator.litmus.model import LitmusTest
    from emulator.litmus.syntax import Op

# The longest delay: far below the time after which a thread counts as stuck.
_MOST_MICROSECONDS = 1_000_000
# Points with a name of one word.
_NAMED_POINTS: Final = {str(kind): modes for kind, modes in POINTS.items() if " " not in kind}
_DEVICE_OPS: Final = ("device-unplug", "device-plug")
_NEEDS_LOG: Final = ("log-get", "log-clear")
_NEEDS_TABLES: Final = ("map", "unmap", "protect", "mov-cr3", "join")
_SLOT_OPS: Final = frozenset({"slot-delete", "slot-create", "log-arm", "log-disarm", *_NEEDS_LOG})

Placed = tuple[str, "Op"]  # a key of the file, the operation there


class SchemaError(ValueError):
    """An error that pydantic cannot check: key, found, expected."""

    def __init__(self, key: str, found: str, expected: str) -> None:
        super().__init__(f"{key}: found {found}; expected {expected}")
        self.key, self.found, self.expected = key, found, expected


def check_test(test: LitmusTest) -> None:
    """Raise SchemaError for the first error in the test."""
    if not any((*(thread.ops for thread in test.threads.values()), test.final)):
        raise SchemaError("threads", "no operation in any of them", "something to test")
    _check_needs(test)
    for name in test.threads:
        placed = list(sequence(test, name))
        _check_notifiers(placed)
        if test.threads[name].is_vcpu:
            _check_guest(test, name, placed)
    for vm in range(len(test.vm)):
        _check_slot(test, vm)
        _check_device(test, vm)
    _check_progress(test)


def _check_needs(test: LitmusTest) -> None:
    needs = test.expect.needs
    if not needs:
        raise SchemaError("expect.needs", "an empty list", 'at least one danger, or "nothing"')
    if "nothing" in needs and len(needs) > 1:
        raise SchemaError("expect.needs", '"nothing" beside others', '"nothing" alone: any of them is enough')


def sequence(test: LitmusTest, name: str) -> Iterator[Placed]:
    """Yield one thread's operations, from first to last."""
    for i, (who, op) in enumerate(test.parsed_init):
        if who == name:
            yield f"init[{i}]", op
    for i, op in enumerate(test.threads[name].parsed):
        yield f"threads.{name}.ops[{i}]", op
    for i, (who, op) in enumerate(test.parsed_final):
        if who == name:
            yield f"final[{i}]", op


# --- mmu_notifiers ------------------------------------------------------------------------------------------


def _check_notifiers(placed: list[Placed]) -> None:
    """Refuse a range that the thread that began it does not end: mmu_invalidate_in_progress must not go below
    0 (KVM_BUG_ON() in kvm_mmu_invalidate_end()), nor stay above it.

    notifier-free needs no bracket: a host that frees pages without one is a bug that Linux has had
    (CVE-2022-48991), and a test may show its consequences.
    """
    begun: list[tuple[str, Op]] = []
    for key, op in placed:
        if op.verb == "notifier-start":
            begun.append((key, op))
        elif op.verb == "notifier-end":
            same = [one for one in begun if _range_of(one[1]) == _range_of(op)]
            if not same:
                expected = "a notifier-start of this very range before, by the same thread"
                raise SchemaError(key, shown(op.text), expected)
            begun.remove(same[-1])
    if begun:
        key, op = begun[-1]
        expected = "a notifier-end of this very range after it, by the same thread"
        raise SchemaError(key, shown(op.text), expected)


def _range_of(op: Op) -> tuple[int, int]:
    return op.number("page"), op.number("count")


# --- vCPUs --------------------------------------------------------------------------------------------------


def _check_guest(test: LitmusTest, name: str, placed: list[Placed]) -> None:
    """Refuse operations that need page tables of the guest, which it lacks, or that raise #GP or #UD."""
    section = test.vm[test.threads[name].vm]
    smm, pcid = False, section.pcid
    for key, op in placed:
        bit = op.name("bit") if "bit" in op.values else ""
        if (op.verb, bit) == ("cr4", "pcide"):
            pcid = op.number("value") == 1
        tables = op.verb in _NEEDS_TABLES or (op.verb in ("cr0", "set-sregs") and bit == "pg")
        if tables and not section.paging:
            raise SchemaError(
                key, shown(op.text), f"{op.verb} {bit}".rstrip() + " in a VM with paging = true"
            )
        process = op.verb == "invpcid" and op.number("type") < 2 and op.number("process")
        if ("noflush" in op.flags or process) and not pcid:
            expected = "pcid = true in its VM, or a cr4 pcide 1 before it, or neither noflush nor a PROCESS"
            raise SchemaError(key, shown(op.text), expected)
        if op.verb == "join" and not key.startswith("init"):
            raise SchemaError(key, shown(op.text), "join in init, before threads run")
        if op.verb == "rsm" and not smm:
            raise SchemaError(key, shown(op.text), "an smi before it, by the same thread")
        smm = op.verb == "smi" or (smm and op.verb != "rsm")


# --- memslot 0 ----------------------------------------------------------------------------------------------


def _check_slot(test: LitmusTest, vm: int) -> None:
    """Refuse ioctls that fail: KVM_GET_DIRTY_LOG of a memslot without a log (-ENOENT), deletion of a memslot
    that does not exist (-EINVAL)."""
    placed = [
        (name, [(key, op) for key, op in sequence(test, name) if op.verb in _SLOT_OPS])
        for name, thread in test.threads.items()
        if thread.vm == vm
    ]
    busy = [ops for _, ops in placed if ops]
    if len(busy) == 1:
        _follow_slot(busy[0])
    elif not any(op.verb == "log-arm" for ops in busy for _, op in ops):
        for key, op in (entry for ops in busy for entry in ops):
            if op.verb in _NEEDS_LOG:
                raise SchemaError(key, shown(op.text), "a log-arm of some thread before it")


def _follow_slot(placed: list[Placed]) -> None:
    """Check the operations of the only thread that changes memslot 0, so that its state is known."""
    there, armed = True, False
    for key, op in placed:
        if op.verb in _NEEDS_LOG and not armed:
            raise SchemaError(key, shown(op.text), "memslot 0 there and its log armed: log-arm before it")
        if op.verb == "slot-delete" and not there:
            raise SchemaError(key, shown(op.text), "memslot 0 there: slot-create before it")
        if op.verb in ("slot-delete", "slot-create", "log-arm", "log-disarm"):
            there, armed = op.verb != "slot-delete", op.verb == "log-arm"


def _check_device(test: LitmusTest, vm: int) -> None:
    """Refuse an ioctl that fails or changes nothing: one thread deletes and creates memslot 2 in turn."""
    of_whom = ""
    there = True
    for name, thread in test.threads.items():
        for key, op in sequence(test, name) if thread.vm == vm else ():
            if op.verb not in _DEVICE_OPS:
                continue
            if of_whom not in ("", name):
                expected = f"all operations on the device in thread {of_whom!r}"
                raise SchemaError(key, shown(op.text), expected)
            of_whom = name
            if there == (op.verb == "device-plug"):
                raise SchemaError(key, shown(op.text), f"the device {'away' if there else 'there'}")
            there = not there


# --- waits --------------------------------------------------------------------------------------------------


def _check_progress(test: LitmusTest) -> None:
    """Refuse a wait that cannot end: run all threads as far as they get."""
    done = dict.fromkeys(test.threads, 0)
    moved = True
    while moved:
        moved = False
        for name, thread in test.threads.items():
            while done[name] < len(thread.parsed):
                wait = thread.parsed[done[name]].waits_for()
                if wait is not None and done[wait[0]] < wait[1]:
                    break
                done[name] += 1
                moved = True
    for name, thread in test.threads.items():
        if done[name] < len(thread.parsed):
            at = done[name]
            raise SchemaError(f"threads.{name}.ops[{at}]", shown(thread.ops[at]), "a wait that can end")


# --- delays -------------------------------------------------------------------------------------------------


def parse_delay(test: LitmusTest, key: str, text: str) -> tuple[str, str, str, int]:
    """Return thread, kind of point, access ("" for any) and microseconds (0: the usual length)."""
    words = text.split()
    digits = words.pop() if len(words) > 2 and words[-1].isdecimal() else "0"
    if len(digits) > 9 or int(digits) > _MOST_MICROSECONDS:
        raise SchemaError(key, shown(digits), f"at most {_MOST_MICROSECONDS} MICROSECONDS")
    if not 2 <= len(words) <= 3 or (len(words) == 3 and words[2] not in ("read", "write")):
        raise SchemaError(key, shown(text), '"THREAD POINT [read|write] [MICROSECONDS]"')
    thread, point, mode = (*words, "")[:3]
    if thread not in test.threads:
        raise SchemaError(key, shown(thread), f"one of the threads {', '.join(test.threads)}")
    modes = _NAMED_POINTS.get(point)
    if modes is None:
        guess = closest(point, _NAMED_POINTS)
        hint = f" (did you mean {guess}?)" if guess else ""
        raise SchemaError(key, shown(point), f"one of the points {', '.join(_NAMED_POINTS)}{hint}")
    if mode and mode not in modes:
        raise SchemaError(key, shown(text), f"{point} {modes[0]}: that point is never announced as a {mode}")
    return thread, point, mode, int(digits)
