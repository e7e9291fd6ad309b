"""Litmus files: everything that is wrong with one is said in one line, with file, key, found, expected."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

import emulator
from emulator.errors import BadInput
from emulator.litmus.loader import load_test, load_tests, parse_test, shipped_tests
from emulator.litmus.model import INCONCLUSIVE, SAFE, LitmusTest
from emulator.litmus.ops import VERBS, OpError, parse_op
from emulator.litmus.policies import expected_of, policies_for
from emulator.points import POINTS, PointKind
from emulator.policy import MUTANTS

GOOD = """
doc = "d"
source = "s"
init = ["v0: read 0x10"]
final = ["mm: host-unmap 0x10"]
[threads.v0]
vcpu = 0
ops = ["read 0x10", "wait mm 1", "migrate 1"]
[threads.mm]
ops = ["host-unmap 0x10"]
[stress]
delays = ["v0 mode write 300"]
[expect]
"migration=none" = ["use-after-free"]
"""


def parse(text: str) -> LitmusTest:
    return parse_test(text, "t.toml", None)


def test_a_good_one() -> None:
    test = parse(GOOD)
    v0 = test.threads["v0"]
    assert [op.text for op in v0.parsed] == ["read 0x10", "wait mm 1", "migrate 1"]
    assert v0.parsed[1].waits_for() == ("mm", 1)
    assert [(who, op.text) for who, op in test.parsed_init] == [("v0", "read 0x10")]
    assert test.expect.policies == {"migration=none": ("use-after-free",)}
    assert test.expect.needs == ("averted",)
    (delay,) = test.delays
    assert (delay.thread, delay.point, delay.mode, delay.microseconds) == ("v0", "mode", "write", 300)


BAD = [
    (
        '["use-after-free"]',
        '[["x"]]',
        'migration=none: found [[\'x\']]; expected "safe", "inconclusive", or a list',
    ),
    ('["use-after-free"]', "[{a = 1}]", "expect.migration=none: found [{'a': 1}]; expected"),
    ('["use-after-free"]', "[]", "expect.migration=none: found []; expected"),
    (
        "vcpu = 0",
        "vcpu = 1.5",
        "threads.v0.vcpu: found 1.5; expected the number of a vCPU of the VM, a whole",
    ),
    (
        "vcpu = 0",
        "vcpu = -1",
        "threads.v0.vcpu: found -1; expected the number of a vCPU of the VM, at least 0",
    ),
    ("[stress]", "[machine]\npcpus = 99\n[stress]", "machine.pcpus: found 99; expected at most 8 pCPUs"),
    ("read 0x10", "read 0x" + "f" * 70_000, "init[0]: found '0xff"),
    ("read 0x10", "read " + "9" * 5000, "init[0]: found '9999"),
    ("read 0x10", "x" * 70_000, "init[0]: found unknown operation 'xxx"),
    ("read 0x10", "raed 0x10", "init[0]: found unknown operation 'raed'; expected 'read'"),
    ("migrate 1", "migrate 9", "threads.v0.ops[2]: found 9; expected a pCPU below machine.pcpus, 2"),
    ("migrate 1", "migrate", "threads.v0.ops[2]: found 'migrate'; expected 'migrate PCPU'"),
    ('"read 0x10", "wait', '"read 0x9999", "wait', "expected pages of VM 0, which has 0x800"),
    ('"read 0x10", "wait', '"read x", "wait', "threads.v0.ops[0]: found 'x'; expected a page number such as"),
    ('"wait mm 1"', '"wait mn 1"', "found 'mn'; expected another thread: mm"),
    ('"wait mm 1"', '"wait mm 2"', "found 2; expected 1 to 1, the operations of thread mm"),
    ('ops = ["host-unmap 0x10"]', 'ops = ["wait v0 3"]', "expected a wait that can end"),
    (
        'ops = ["host-unmap 0x10"]',
        'ops = ["read 1"]',
        "found 'read 1'; expected read in a thread with a vcpu",
    ),
    ('"v0: read 0x10"', '"read 0x10"', "init[0]: found 'read 0x10'; expected \"THREAD: OPERATION\""),
    ('"v0: read 0x10"', '"v0: wait mm 1"', "init[0]: found 'v0: wait mm 1'; expected no wait"),
    ("vcpu = 0", "vcpu = 1", "threads.v0.vcpu: found 1; expected less than 1, the vCPUs of VM 0"),
    ("vcpu = 0", "vcpu = 0\npcpu = 2", "threads.v0.pcpu: found 2; expected less than machine.pcpus, 2"),
    ("[threads.mm]", "[threads.irq0]", "threads.irq0: found 'irq0'; expected a name that is not the"),
    ("[threads.mm]", "[threads.rcu]", "threads.rcu: found 'rcu'; expected a name that is not the"),
    ("migration=none", "linux-7.4", "expect: unknown policy 'linux-7.4'"),
    ("migration=none", "migration=no", "expect: migration: unknown alternative 'no'"),
    (
        "[threads.mm]",
        "[expect.evict]\n'mutant:ZZ'='safe'\n[threads.mm]",
        "expect.evict: unknown mutant 'mutant:ZZ'",
    ),
    ("vcpu = 0", "vcpu = 0\nvm = 1", "threads.v0.vm: found 1; expected less than 1, the number of VMs"),
    ("v0 mode write 300", "v7 mode", "stress.delays[0]: found 'v7'; expected one of the threads v0, mm"),
    ("mode write 300", "mode write 1000001", "stress.delays[0]: found '1000001'; expected at most 1000000"),
    ("[threads.v0]", "[[vm]]\nsmram = 0x801\n[threads.v0]", "expected smram of at most 0x800"),
    ("[threads.v0]", "[[vm]]\nfault_around = 3\n[threads.v0]", "expected fault_around to be a power of 2"),
    ("[threads.v0]", "[[vm]]\nfault_around = 65\n[threads.v0]", "found 65; expected"),
    ("[threads.v0]", "[[vm]]\nsmram = 0\n[threads.v0]", "vm[0].smram: found 0; expected"),
    ("v0 mode write 300", "v0", "stress.delays[0]: found 'v0'; expected \"THREAD POINT"),
    (
        "v0 mode write 300",
        "v0 mod write",
        "stress.delays[0]: found 'mod'; expected one of the points call_queue, call_rcu, dirty_bitmap,",
    ),
    ("v0 mode write 300", "v0 mod write", "vcpu->cpu, write_flooding, write_track (did you mean mode?)"),
    (
        "v0 mode write 300",
        "v0 nosuchpoint 400",
        "found 'nosuchpoint'; expected one of the points call_queue,",
    ),
    ("v0 mode write 300", "v0 spte read", "expected spte write: that point is never announced as a read"),
    ("v0 mode write 300", "v0 plain write", "stress.delays[0]: found 'plain'; expected one of the points"),
    ("[expect]", "[expect]\nneeds = []", "expect.needs: found an empty list; expected at least one danger"),
    (
        "[expect]",
        '[expect]\nneeds = ["nothing", "averted"]',
        'expect.needs: found "nothing" beside others; expected "nothing" alone',
    ),
    ('doc = "d"', 'dok = "d"', "t.toml: dok: found an unknown key; expected 'doc'"),
    ('doc = "d"\n', "", "t.toml: doc: found nothing; expected this key to be present"),
    ('["use-after-free"]', '["use-after-fre"]', 'expected "safe", "inconclusive", or a list of violations'),
    ("[expect]", '[expect]\nneeds = "luck"', "expect.needs[0]: found 'luck'; expected one of 'averted'"),
    ('"d"', '"d', "t.toml: not TOML"),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD, ids=[bad for _, bad, _ in BAD])
def test_a_bad_one_says_where(good: str, bad: str, message: str) -> None:
    assert good in GOOD
    with pytest.raises(BadInput) as caught:
        parse(GOOD.replace(good, bad, 1))
    line = str(caught.value)
    assert line.startswith("t.toml: ")
    assert message in line
    assert "\n" not in line


def announced() -> dict[str, set[str]]:
    """Each kind of point that KVM's code or a mutant's announces, with the accesses; "" where the source does
    not say."""
    found: dict[str, set[str]] = {}
    texts = [path.read_text() for path in sorted(Path(emulator.__file__).parent.rglob("*.py"))]
    patches = [mutant.patch for mutant in MUTANTS.values() if mutant.patch is not None]
    texts += [text for patch in patches for text in patch.sources.values() if text is not None]
    for text in texts:
        for call in ast.walk(ast.parse(text)):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr == "point" and len(call.args) == 3 and isinstance(call.args[0], ast.Constant):
                constants = {n.value for n in ast.walk(call.args[2]) if isinstance(n, ast.Constant)}
                modes = {mode for mode in ("read", "write") if mode in constants}
                kind = call.args[0].value
                assert isinstance(kind, str)
                found.setdefault(kind, set()).update(modes or {""})
    return found


@pytest.mark.slow
def test_the_list_of_points_is_what_kvms_code_announces() -> None:
    found = announced()
    assert set(found) == set(POINTS) == set(get_args(PointKind))
    assert len(found) > 25
    for kind, listed in POINTS.items():
        assert found[kind] - {""} <= set(listed), kind
        assert "" in found[kind] or found[kind] == set(listed), kind


# Any number will do: linear pages, and waits that never end.
ANY_NUMBER = {("map", "linear"), ("unmap", "linear"), ("protect", "linear"), ("preempt", "nth")}
ARGUMENTS = [
    (verb, arg.name)
    for verb, kind in VERBS.items()
    for arg in kind.args
    if arg.kind not in ("thread", "name") and (verb, arg.name) not in ANY_NUMBER
]


@pytest.mark.parametrize(("verb", "name"), ARGUMENTS)
def test_an_operand_that_is_far_too_large_is_refused_at_once(verb: str, name: str) -> None:
    usual = {"page": "0x200", "linear": "0x200", "bit": "wp", "thread": "other"}
    kind = VERBS[verb]
    words = ["0xfffffffff" if arg.name == name else usual.get(arg.name, "1") for arg in kind.args]
    vcpu = "vcpu = 0" if "kvm" not in kind.who else ""
    text = (
        f'doc="d"\nsource="s"\n[threads.one]\n{vcpu}\nops=["{verb} {" ".join(words)}"]\n'
        '[threads.other]\nops=["rcu"]\n'
    )
    with pytest.raises(BadInput, match=r"^t\.toml: threads\.one\.ops\[0\]: found .*; expected "):
        parse(text)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("invpcid 4", "found '4'; expected a whole number, at most 3, for TYPE"),
        ("mov-cr3 16", "found '16'; expected a whole number, at most 15, for PROCESS"),
        ("map 0x200 0x201 huge", "expected a multiple of 0x200 for PAGE"),
        ("map 0x201 0x200 huge", "expected a multiple of 0x200 for LINEAR"),
        ("host-collapse 0x600", "expected pages of VM 0, which has 0x700"),
        ("host-split 0x600", "expected pages of VM 0, which has 0x700"),
        ("host-collapse 0x201", "expected a multiple of 0x200 for PAGE"),
        ("linger 10001", "expected a number, at least 1, at most 10000, for TIMES"),
    ],
)
def test_an_operand_that_is_a_little_off_is_refused_as_well(op: str, message: str) -> None:
    vcpu = "vcpu = 0" if "kvm" not in VERBS[op.split()[0]].who else ""
    with pytest.raises(BadInput) as caught:
        parse(f'doc="d"\nsource="s"\n[[vm]]\npages=0x700\n[threads.one]\n{vcpu}\nops=["{op}"]\n')
    assert message in str(caught.value)


def test_many_threads() -> None:
    text = 'doc="d"\nsource="s"\n' + "".join(f'[threads.t{i}]\nops=["wait t{i + 1} 1"]\n' for i in range(64))
    with pytest.raises(BadInput, match=r"threads: found .*; expected at most 64 entries$"):
        parse(text + "[threads.t64]\nops=[]\n")
    with pytest.raises(BadInput, match=r"wait that can end"):
        parse(text.replace("wait t64 1", "wait t0 1"))


def test_two_threads_cannot_be_one_vcpu() -> None:
    with pytest.raises(BadInput, match="another vCPU than that of thread v1"):
        parse(GOOD.replace("[threads.mm]", "[threads.v1]\nvcpu = 0\n[threads.mm]"))


@pytest.mark.slow
def test_files_directories_names(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no such test; expected .*did you mean return-zap\?"):
        load_test("retrun-zap")
    with pytest.raises(BadInput, match=r"no such test; expected .* or a \.toml file$"):
        load_test("no-such-test")
    with pytest.raises(BadInput, match=r"gone\.toml"):
        load_test("gone.toml")
    with pytest.raises(BadInput, match=r"no \.toml file"):
        load_tests([f"{tmp_path}/"])
    (tmp_path / "mine.toml").write_text(GOOD)
    assert [test.name for test in load_tests([f"{tmp_path}/"])] == ["mine"]
    assert load_test("away-zap").path is None
    assert len(load_tests([])) == len(shipped_tests())


def test_a_test_is_taken_once_and_a_name_is_one_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "x.toml").write_text(GOOD)
    (tmp_path / "away-zap.toml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    assert [test.name for test in load_tests(["away-zap", "return-zap", "away-zap"])] == [
        "away-zap",
        "return-zap",
    ]
    assert [str(test.path) for test in load_tests(["a/x.toml", "./a/", "a/../a/x.toml"])] == ["a/x.toml"]
    with pytest.raises(BadInput) as caught:
        load_tests(["a/x.toml", "b/x.toml"])
    expected = "b/x.toml: the second test of the name 'x', after a/x.toml; expected each name once"
    assert str(caught.value) == expected
    with pytest.raises(BadInput, match=r"away-zap\.toml: .* after the one that ships;"):
        load_tests(["away-zap", "away-zap.toml"])


def test_operations_explain_themselves() -> None:
    for verb, kind in VERBS.items():
        assert kind.doc
        assert kind.usage().split()[0] == verb
    with pytest.raises(OpError, match="an operation"):
        parse_op("", "kvm")


def test_what_ships() -> None:
    """Enough tests, each with its origin, and one at least for each mutant that is more than a cost."""
    tests = shipped_tests()
    assert len(tests) >= 40
    assert all(test.source and test.threads for test in tests)
    verdicts = [
        verdicts for test in tests for verdicts in (test.expect.policies, *test.expect.apart().values())
    ]
    named = {name for one in verdicts for name, verdict in one.items() if verdict}
    missing = {name for name, mutant in MUTANTS.items() if not mutant.cost_only} - {
        name.removeprefix("mutant:") for name in named
    }
    assert not missing


def test_no_thread_waits_for_the_wait_of_another() -> None:
    """A wait counts as an operation: what is to be awaited is the operation behind it."""
    waits = set()
    for test in shipped_tests():
        for text in (text for thread in test.threads.values() for text in thread.ops):
            verb, *args = text.split()
            if verb not in ("wait", "block"):
                continue
            awaited = test.threads[args[0]].ops[int(args[1]) - 1]
            if awaited.split()[0] in ("wait", "block"):
                waits.add(f"{test.name}: {text}")
    # The host lets its invalidation last until the vCPU has seen its beginning.
    assert waits == {"notifier-protect: wait v0 2"}


def test_what_takes_late_stores_is_expected_to_be_safe_without() -> None:
    test = load_test("entry-races-request")
    assert expected_of(test, "mutant:entry-without-barrier") == (SAFE, INCONCLUSIVE)
    assert expected_of(test, "mutant:requests-before-mode") == (("use-after-free",),)
    assert expected_of(load_test("return-zap"), "mutant:entry-without-barrier") == (SAFE, INCONCLUSIVE)
    assert expected_of(load_test("speculative-fill"), "migration=none") == (SAFE, INCONCLUSIVE)
    # As Linux 7.3 has it, which is the mutant's base.
    renewed = expected_of(load_test("shadow-mmio-sync"), "mutant:entry-without-barrier")
    assert renewed == (("inconsistent",), INCONCLUSIVE)
    assert {"mutant:entry-without-barrier", "mutant:request-without-barrier"} <= set(
        policies_for(test, (), False)
    )


@pytest.mark.parametrize("key", ["vm", "vcpu", "pcpu"])
def test_a_number_that_has_no_decimal_text_is_told(key: str) -> None:
    """Python refuses to write more than 4,300 digits; TOML reads any number of hexadecimal ones."""
    numbers = {"vm": "0", "vcpu": "0", "pcpu": "0", key: f"0x{'f' * 5000}"}
    thread = "\n".join(f"{name} = {number}" for name, number in numbers.items())
    text = f'doc = "d"\nsource = "s"\n[threads.v0]\n{thread}\nops = ["read 0x10"]\n'
    with pytest.raises(BadInput, match=f"threads.v0.{key}: found a number of 20000 bits"):
        parse_test(text, "here", None)


@pytest.mark.parametrize("op", ["wait k {}", "host-unmap {}", "migrate {}", "zap 0x10 {}"])
def test_so_is_one_in_an_operation(op: str) -> None:
    thread = "[threads.v0]\nvcpu = 0\n" if op.startswith(("wait", "migrate")) else "[threads.v0]\n"
    huge = op.format("0x" + "f" * 5000)
    text = f'doc = "d"\nsource = "s"\n{thread}ops = ["{huge}"]\n[threads.k]\nops = []\n'
    with pytest.raises(BadInput) as caught:
        parse_test(text, "here", None)
    assert len(str(caught.value)) < 1000
