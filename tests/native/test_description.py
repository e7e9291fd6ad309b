"""Each call has a description, which the table repeats, and a wrong one is an error that says where."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from native import lib
from native._calls import CALLS
from native.brief import keep_gil
from native.description import (
    RESULT,
    TABLE,
    Access,
    Call,
    Comparison,
    Malformed,
    Object,
    Operand,
    described_calls,
    read,
    text,
)
from native.headers import HERE, api_parts, public_headers, statements


def test_each_call_that_python_sees_has_one() -> None:
    assert {name for name in dir(lib) if callable(getattr(lib, name))} == CALLS.keys()


def test_the_table_is_what_the_headers_say() -> None:
    assert TABLE.read_text() == text(), "run 'python -m native.build'"


def test_most_are_their_own() -> None:
    """A default is for headers with calls that no controlled scheduler runs."""
    defaults = [header for header in public_headers() if "/* calls: " in header.read_text()]
    assert defaults
    for header in defaults:
        (default,) = {part.split("/* calls: ")[1].split(" */")[0] for part, _ in api_parts(header)}
        assert default == "anything", header


def described(tmp_path: Path, prototypes: str) -> dict[str, Call]:
    header = tmp_path / "some.h"
    header.write_text(f"#define SOME\n/* api */\n{prototypes}\n/* end api */\n")
    return {name: read(one) for name, one in described_calls([header]).items()}


def test_what_it_may_say(tmp_path: Path) -> None:
    found = described(
        tmp_path,
        """\
/* Walk.  Prose comes first. */
/* call: step sptes; reads ept, table(chunk->root), mode(vcpu); reads custody if chunk->set_pfn and not max;
 * writes ept if result >= 0 and chunk->walk != TDP_COUNT; at mm; at tlb; fence; quiet; keeps-gil */
int walk(struct machine *m, uint32_t vcpu, struct tdp_chunk *chunk, uint32_t max);""",
    )
    custody = (Comparison(Operand(2, "set_pfn")), Comparison(Operand(3), "not"))
    changed = (Comparison(Operand(RESULT), ">=", 0), Comparison(Operand(2, "walk"), "!=", "TDP_COUNT"))
    objects = Object("ept"), Object("table", (Operand(2, "root"),)), Object("mode", (Operand(1),))
    assert found["walk"] == Call(
        "step",
        "sptes",
        (Access(objects), Access((Object("custody"),), custody)),
        (Access((Object("ept"),), changed),),
        ("mm", "tlb"),
        fence=True,
        quiet=True,
        keeps_gil=True,
    )


def test_prototypes_without_a_comment_between_share_it(tmp_path: Path) -> None:
    found = described(
        tmp_path,
        """\
/* calls: anything */
/* call: local */
int one(int a);
int two(int a);

int three(int a);
/* Of its own. */
int four(int a);
/* call: part */
int five(int a);
enum some { SOME };
int six(int a);""",
    )
    roles = [call.role for call in found.values()]
    assert roles == ["local", "local", "anything", "anything", "part", "anything"]


@pytest.mark.parametrize(
    ("description", "found"),
    [
        ("", "no description"),
        ("/* call: local */\n/* call: local */\n", "2 descriptions"),
        ("/* call: step */\n", "found 'step', expected step KIND or one of part, modelled"),
        ("/* call: locale */\n", "found 'locale'"),
        ("/* call: part of it */\n", "found 'part of it'"),
        ("/* call: part; keep-gil */\n", "found 'keep-gil', expected reads, writes, at KIND"),
        ("/* call: part; reads mode(vcpus) */\n", "found 'vcpus', expected an argument: m, vcpu, chunk"),
        ("/* call: part; reads mode(vcpu */\n", "expected an object"),
        ("/* call: part; reads */\n", "expected an object"),
        ("/* call: part; reads table(chunk->rot) */\n", "chunk->rot: chunk points to no structure with such"),
        ("/* call: part; reads table(vcpu->root) */\n", "vcpu points to no structure"),
        ("/* call: part; writes ept if result == TDP_COUNTS */\n", "TDP_COUNTS is no member of an enum"),
        ("/* call: part; writes ept if results */\n", "found 'results', expected an argument"),
        ("/* call: part; writes ept if not result == 0 */\n", "expected a test"),
        ("/* call: local; writes ept */\n", "'local' with reads or writes"),
    ],
)
def test_a_wrong_one_is_an_error_that_says_where(tmp_path: Path, description: str, found: str) -> None:
    prototype = "int call(struct machine *m, uint32_t vcpu, struct tdp_chunk *chunk);"
    with pytest.raises(Malformed) as error:
        described(tmp_path, description + prototype)
    line = 3 + description.count("\n")
    assert str(error.value).startswith(f"some.h:{line}: call(): ")
    assert found in str(error.value)


def test_a_call_of_the_core_without_one_is_an_error(tmp_path: Path) -> None:
    header = tmp_path / "vm.h"
    shutil.copy(HERE / "vm" / "vm.h", header)
    before = header.read_text()
    assert described_calls([header])
    header.write_text(before.replace("/* end api */", "\nint vm_new(struct machine *m);\n/* end api */"))
    with pytest.raises(Malformed, match=r"vm\.h:\d+: vm_new\(\): no description"):
        described_calls([header])


def test_statements_are_found_whatever_stands_between_them() -> None:
    source = """\
/* int hidden(void); */
#define MACRO(x) \\
	int also_hidden(void);
struct s { int a; };
static inline int inlined(int a) { return a ? 1 : 2; }
const char *pointer(struct s *s, const char *text) __attribute__((format(printf, 1, 2)));
enum e result(void);
int array[2] = { 1, 2 };
int defined(int a, uint32_t b)
{
	if (a) { return call("};"); }
}
"""
    found = [(one.function(), one.line, one.body, one.static) for one in statements(source)]
    assert [one for one in found if one[0]] == [
        (("inlined", ("a",)), 5, True, True),
        (("pointer", ("s", "text")), 6, False, False),
        (("result", ()), 7, False, False),
        (("defined", ("a", "b")), 9, True, False),
    ]


def test_the_gil_is_kept_for_the_calls_that_say_so() -> None:
    wrapper = (
        "  Py_BEGIN_ALLOW_THREADS\n  _cffi_restore_errno();\n  { result = %s(x0); }\n"
        "  _cffi_save_errno();\n  Py_END_ALLOW_THREADS\n"
    )
    both = wrapper % "brief" + wrapper % "long_one"
    assert keep_gil(both, ["brief"]) == "  { result = brief(x0); }\n" + wrapper % "long_one"
    with pytest.raises(ValueError, match="absent"):
        keep_gil(both, ["brief", "absent"])
    assert read(CALLS["vcpu_mode"]).keeps_gil
    assert not read(CALLS["guest_run"]).keeps_gil
