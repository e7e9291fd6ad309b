"""Litmus files with operations that do not go together (emulator/litmus/checks.py)."""

from __future__ import annotations

import pytest

from emulator.errors import BadInput
from emulator.litmus.loader import parse_test
from emulator.litmus.model import LitmusTest


def parse(text: str) -> LitmusTest:
    return parse_test(text, "t.toml", None)


EMPTY = 'doc="d"\nsource="s"\n[threads.v0]\nvcpu=0\n[threads.k]\n'
# The operations of a vCPU's thread, of one without, those before and those after; the error.
NOT_TOGETHER = [
    (
        [],
        ["notifier-end 0x10"],
        [],
        [],
        "k.ops[0]: found 'notifier-end 0x10'; expected a notifier-start of this",
    ),
    (
        [],
        ["notifier-start 0x10"],
        [],
        [],
        "k.ops[0]: found 'notifier-start 0x10'; expected a notifier-end of",
    ),
    ([], ["notifier-start 1 2", "notifier-end 1"], [], [], "k.ops[1]: found 'notifier-end 1'; expected a no"),
    (
        [],
        ["notifier-start 1", "notifier-end 1", "notifier-end 1"],
        [],
        [],
        "k.ops[2]: found 'notifier-end 1'",
    ),
    ([], ["rcu"], ["k: notifier-start 1"], [], "init[0]: found 'notifier-start 1'; expected a notifier-end"),
    ([], ["rcu"], [], ["k: notifier-end 1"], "final[0]: found 'notifier-end 1'; expected a notifier-start"),
    ([], ["log-get"], [], [], "k.ops[0]: found 'log-get'; expected memslot 0 there and its log armed"),
    (
        [],
        ["log-arm", "log-disarm", "log-clear 1"],
        [],
        [],
        "k.ops[2]: found 'log-clear 1'; expected memslot 0",
    ),
    ([], ["slot-delete", "slot-delete"], [], [], "k.ops[1]: found 'slot-delete'; expected memslot 0 there"),
    (
        [],
        ["slot-delete"],
        ["k: log-arm"],
        ["k: log-get"],
        "final[0]: found 'log-get'; expected memslot 0 there",
    ),
    (["rsm"], [], [], [], "v0.ops[0]: found 'rsm'; expected an smi before it"),
    (["smi", "rsm", "rsm"], [], [], [], "v0.ops[2]: found 'rsm'; expected an smi before it"),
    ([], ["send-smi 1"], [], [], "k.ops[0]: found 'send-smi 1'; expected a vCPU of VM 0, which has 1"),
    ([], ["send-init 9"], [], [], "k.ops[0]: found 'send-init 9'; expected a vCPU of VM 0, which has 1"),
    (["map 1 2"], [], [], [], "v0.ops[0]: found 'map 1 2'; expected map in a VM with paging = true"),
    (["mov-cr3 0"], [], [], [], "v0.ops[0]: found 'mov-cr3 0'; expected mov-cr3 in a VM with paging = true"),
    (["cr0 pg 1"], [], [], [], "v0.ops[0]: found 'cr0 pg 1'; expected cr0 pg in a VM with paging = true"),
    (["store 1 2 3"], [], [], [], "v0.ops[0]: found 'store 1 2 3'; expected machine.ept = false, and"),
    (["read 1 fault"], [], [], [], "v0.ops[0]: found 'read 1 fault'; expected machine.ept = false, and"),
    (["store 1 512 3"], [], [], [], "found '512'; expected a whole number, at most 511, for INDEX"),
    (["invpcid 0 1 2"], [], [], [], "v0.ops[0]: found 'invpcid 0 1 2'; expected pcid = true in its VM"),
    (
        ["cr4 pcide 1", "invpcid 0 1 2", "cr4 pcide 0", "invpcid 0 1 2"],
        [],
        [],
        [],
        "v0.ops[3]: found 'invpcid 0 1 2'; expected pcid = true in its VM, or a cr4 pcide 1 before it",
    ),
    (["join 0"], [], [], [], "found 'join 0'; expected the number of another thread's vCPU, of the same VM"),
    (["join 1"], [], [], [], "found 'join 1'; expected the number of another thread's vCPU, of the same VM"),
    ([], [], [], [], "threads: found no operation in any of them; expected something to test"),
    ([], [], ["v0: read 1"], [], "threads: found no operation in any of them; expected something to test"),
]
TOGETHER = [
    (
        [],
        ["notifier-start 1 4", "notifier-start 2", "notifier-free 2", "notifier-end 2", "notifier-end 1 4"],
        [],
        [],
    ),
    ([], ["notifier-free 1"], ["k: notifier-start 1"], ["k: notifier-end 1"]),
    ([], ["notifier-free 1"], [], []),
    ([], ["log-get", "slot-delete", "slot-create"], ["k: log-arm"], []),
    (["read 1", "rsm", "read 1"], [], ["v0: smi"], []),
    ([], [], [], ["v0: read 1"]),
    (["invpcid 2"], [], [], []),
]


TWO_VCPUS = """
doc = "d"
source = "s"
init = [{init}]
[[vm]]
vcpus = 2
paging = true
[threads.v0]
vcpu = 0
ops = ["read 1"]
[threads.v1]
vcpu = 1
ops = [{ops}]
"""


def test_tables_are_joined_before_threads_run() -> None:
    parse(TWO_VCPUS.format(init='"v1: join 0"', ops='"read 1"'))
    with pytest.raises(BadInput) as caught:
        parse(TWO_VCPUS.format(init="", ops='"join 0"'))
    assert "v1.ops[0]: found 'join 0'; expected join in init, before threads run" in str(caught.value)


def whole(v0: list[str], k: list[str], init: list[str], final: list[str]) -> str:
    start = f"init={init}\nfinal={final}\n"
    return start + EMPTY.replace("[threads.k]", f"ops={v0}\n[threads.k]\nops={k}")


@pytest.mark.parametrize(("v0", "k", "init", "final", "message"), NOT_TOGETHER)
def test_operations_that_do_not_go_together_are_refused(
    v0: list[str], k: list[str], init: list[str], final: list[str], message: str
) -> None:
    with pytest.raises(BadInput) as caught:
        parse(whole(v0, k, init, final))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("v0", "k", "init", "final"), TOGETHER)
def test_operations_that_go_together_are_taken(
    v0: list[str], k: list[str], init: list[str], final: list[str]
) -> None:
    parse(whole(v0, k, init, final))


def test_of_two_threads_that_race_one_may_have_armed_the_log() -> None:
    """Operations that go wrong in every order are refused, and no others."""
    good = 'doc="d"\nsource="s"\n[threads.a]\nops=["log-arm"]\n[threads.b]\nops=["log-get"]\n'
    parse(good)
    with pytest.raises(BadInput, match=r"b\.ops\[0\]: found 'log-get'; expected a log-arm of some thread"):
        parse(good.replace("log-arm", "log-disarm"))
    other = good.replace("[threads.a]", "[[vm]]\n[[vm]]\n[threads.a]\nvm=1")
    with pytest.raises(BadInput, match=r"b\.ops\[0\]: found 'log-get'; expected memslot 0 there"):
        parse(other)


DEVICE = EMPTY.replace("[threads.v0]", "[[vm]]\ndevice = 16\n[threads.v0]\nops = []")


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (["device-plug"], "k.ops[0]: found 'device-plug'; expected the device away"),
        (["device-unplug", "device-unplug"], "k.ops[1]: found 'device-unplug'; expected the device there"),
    ],
)
def test_a_device_comes_and_goes_in_turn(k: list[str], message: str) -> None:
    parse(f"{DEVICE}ops=['device-unplug', 'device-plug', 'device-unplug']")
    with pytest.raises(BadInput) as caught:
        parse(f"{DEVICE}ops={k}")
    assert message in str(caught.value)


def test_one_thread_moves_a_device() -> None:
    expected = "expected all operations on the device in thread 'k'"
    with pytest.raises(BadInput, match=f"found 'device-plug'; {expected}"):
        parse(f"{DEVICE}ops=['device-unplug']\n[threads.l]\nops=['device-plug']")


def test_only_a_vm_with_a_device_has_its_operations() -> None:
    with pytest.raises(BadInput, match="found 'device-unplug'; expected device = 1 or more pages in VM 0"):
        parse(f"{EMPTY}ops=['device-unplug']")
