"""Bind a litmus test: parse its operations, and resolve the references between its sections."""

from __future__ import annotations

import re

from emulator.errors import shown
from emulator.litmus.apic_checks import check_apic
from emulator.litmus.checks import SchemaError, check_test, parse_delay
from emulator.litmus.model import Delay, LitmusTest, ThreadSection
from emulator.litmus.nested_checks import check_nested
from emulator.litmus.ops import Op, OpError, parse_op

# Names of the machine's own tasks and CPUs; schedules refer to all tasks by name.
_OTHERS = re.compile(r"main|rcu|(pcpu|irq)\d+")


def bind(test: LitmusTest) -> None:
    """Parse the operations and check all references.  Raises SchemaError."""
    for name, thread in test.threads.items():
        _check_thread(test, name, thread)
    for name, thread in test.threads.items():
        thread._parsed = tuple(
            _parse(test, f"threads.{name}.ops[{i}]", name, text) for i, text in enumerate(thread.ops)
        )
    test._init = _parse_prefixed(test, "init", test.init)
    test._final = _parse_prefixed(test, "final", test.final)
    delays = (parse_delay(test, f"stress.delays[{i}]", text) for i, text in enumerate(test.stress.delays))
    test._delays = tuple(
        Delay(thread=thread, point=point, mode=mode, microseconds=microseconds)
        for thread, point, mode, microseconds in delays
    )
    check_test(test)
    check_nested(test)
    check_apic(test)


def _check_thread(test: LitmusTest, name: str, thread: ThreadSection) -> None:
    key = f"threads.{name}"
    if not name.isidentifier():
        raise SchemaError(key, shown(name), 'a name of letters, digits and "_"')
    if _OTHERS.fullmatch(name):
        raise SchemaError(key, shown(name), "a name that is not the machine's own: rcu, pcpu0, irq0, ...")
    if thread.vm >= len(test.vm):
        raise SchemaError(f"{key}.vm", shown(thread.vm), f"less than {len(test.vm)}, the number of VMs")
    if thread.vcpu is None:
        return
    vcpus = test.vm[thread.vm].vcpus
    if thread.vcpu >= vcpus:
        expected = f"less than {vcpus}, the vCPUs of VM {thread.vm}"
        raise SchemaError(f"{key}.vcpu", shown(thread.vcpu), expected)
    if thread.pcpu >= test.machine.pcpus:
        raise SchemaError(f"{key}.pcpu", shown(thread.pcpu), f"less than machine.pcpus, {test.machine.pcpus}")
    for other, section in test.threads.items():
        if other != name and (section.vm, section.vcpu) == (thread.vm, thread.vcpu):
            raise SchemaError(f"{key}.vcpu", shown(thread.vcpu), f"another vCPU than that of thread {other}")


def _parse(test: LitmusTest, key: str, name: str, text: str) -> Op:
    thread = test.threads[name]
    try:
        op = parse_op(text, "vcpu" if thread.is_vcpu else "kvm")
        op.check(test, name)
    except OpError as error:
        raise SchemaError(key, error.found, error.expected) from None
    return op


def _parse_prefixed(test: LitmusTest, where: str, texts: tuple[str, ...]) -> tuple[tuple[str, Op], ...]:
    parsed = []
    for i, text in enumerate(texts):
        key = f"{where}[{i}]"
        name, colon, rest = text.partition(":")
        name = name.strip()
        if not colon or name not in test.threads:
            raise SchemaError(
                key, shown(text), f'"THREAD: OPERATION", THREAD one of {", ".join(test.threads)}'
            )
        op = _parse(test, key, name, rest.strip())
        if op.waits_for() is not None:
            raise SchemaError(key, shown(text), f"no wait: the operations of {where} follow one another")
        parsed.append((name, op))
    return tuple(parsed)
