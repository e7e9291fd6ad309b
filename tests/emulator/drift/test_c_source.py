"""Finding functions in C source: differences that count as a change, and others."""

from __future__ import annotations

import string
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.drift.c_source import Definition, definitions


def found(source: str) -> dict[str, Definition]:
    return {one.name: one for one in definitions(textwrap.dedent(source))}


def mark(source: str, name: str = "f") -> str:
    return found(source)[name].fingerprint


# --- which functions there are ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("int f(void) { return 0; }", "f"),
        ("static __always_inline bool f(int a)\n{\n}\n", "f"),
        ("static noinline __must_check struct kvm *f(struct kvm *a[2], int (*g)(int)) { }", "f"),
        ("__attribute__((noinline)) void f(void) { }", "f"),
        ("static __printf(1, 2) void f(const char *format, ...) { }", "f"),
        ("void f(void) __acquires(a->lock) __releases(b) { }", "f"),
        ("void f(void) __must_hold(&lock) noinline_for_stack { }", "f"),
        ("void __f(void) __cold { }", "__f"),
        ("static inline bool __kvm_f(int a) { }", "__kvm_f"),
        ("EXPORT_SYMBOL_GPL(g);\nvoid f(void) { }", "f"),
        ("MADE_UP_ACCESSORS(a, A)\nvoid f(void) { }", "f"),
        ("#define F(x) \\\n\t(x)\n", "F"),
        ("struct a f(struct a { int x; } b) { }", "f"),
        ("static int FNAME(walk)(struct walker *w) { }", "FNAME(walk)"),
        ("int f(int a\n#ifdef A\n, int b\n#endif\n)\n{ }", "f"),
    ],
)
def test_a_function_is_found(source: str, name: str) -> None:
    assert list(found(source)) == [name]


@pytest.mark.parametrize(
    "source",
    [
        "int f(void);",
        "struct f { int a; };",
        "struct __packed f { int a; } __aligned(8);",
        "static const struct ops f = { .run = g(1), .stop = h };",
        "int f[] = { 1, 2 };",
        "enum { A, B };",
        "typedef struct { int a; } f;",
        "#define F (x)",
        "#define F 1",
        "#",
        "/* int f(void) { } */ // int f(void) { }\n",
        'char *s = "int f(void) { }";',
        "TRACE_EVENT(f, TP_STRUCT__entry(__field(int, a)), TP_fast_assign({ entry->a = a; }));",
        "MADE_UP(a, int f(void) { return 1; });",
        "} if (a) { g(); }",
        "int f(void) {",
        "}",
        "",
    ],
)
def test_what_is_no_function(source: str) -> None:
    assert found(source) == {}


def test_lines_begin_with_the_return_type_and_count_continued_ones() -> None:
    source = """\
        #define A(x) \\
            (x)

        /* two
           lines */
        static bool
        f(int a)
        {
            return A(a) \\
                + 1;
        }
        int g(void) { return 1; }
    """
    functions = found(source)
    lines = {name: (one.first, one.last) for name, one in functions.items()}
    assert lines == {"A": (1, 2), "f": (6, 11), "g": (12, 12)}


def test_both_definitions_of_an_ifdef_are_found() -> None:
    source = (
        "#ifdef A\nint f(void) { return 1; }\n#else\nint f(void) { return 0; }\n#endif\nint g(void) { }\n"
    )
    assert [one.name for one in definitions(source)] == ["f", "f", "g"]
    assert len({one.fingerprint for one in definitions(source)}) == 3


def test_a_body_of_two_branches_ends_where_it_ends() -> None:
    source = """\
        int f(int a)
        {
        #ifdef A
            if (a) {
        #elif defined(B)
            while (a) {
        #else
            {
        #endif
                g();
            }
        }
        int h(void) { }
    """
    assert {name: one.last for name, one in found(source).items()} == {"f": 12, "h": 13}


def test_two_headers_of_one_body() -> None:
    source = "#ifdef A\nint f(int a)\n#else\nint f(long a)\n#endif\n{ g(); }\nint h(void) { }\n"
    with_brace = "#ifdef A\nint f(int a) {\n#else\nint f(long a) {\n#endif\ng(); }\nint h(void) { }\n"
    for text in (source, with_brace):
        assert list(found(text)) == ["f", "h"]
        assert mark(text) != mark(text.replace("int f(int a)", "int f(int b)"))
        assert mark(text) != mark(text.replace("long", "short"))


# --- changes ------------------------------------------------------------------------------------------------


def test_the_name_and_the_return_type_do_not_count() -> None:
    assert mark("static bool f(int a) { return a; }") == mark("int\ng(int a) { return a; }", "g")


def test_parameters_and_directives_count() -> None:
    plain = "int f(int a)\n{\n\tg();\n}\n"
    assert mark(plain) != mark(plain.replace("int a", "int b"))
    conditional = plain.replace("\tg();", "#ifdef A\n\tg();\n#endif")
    assert mark(conditional) != mark(plain)
    assert mark(conditional) != mark(conditional.replace("ifdef A", "ifdef B"))
    assert mark(conditional) == mark(conditional.replace("#ifdef A", "  #  ifdef /* why */ A"))


def test_the_end_of_a_directive_counts() -> None:
    one, other = "int f(void)\n{\n#if A\n+ g();\n#endif\n}\n", "int f(void)\n{\n#if A + g();\n#endif\n}\n"
    assert mark(one) != mark(other)


def test_white_space_before_the_parenthesis_of_a_macro_counts() -> None:
    source = "int f(void)\n{\n#define A(x) (x)\n}\n"
    assert mark(source) != mark(source.replace("A(x)", "A (x)"))
    assert mark(source) == mark(source.replace("A(x) (x)", "A( x )  ( x )"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a + ++b", "a++ + b"),
        ("a - >b", "a->b"),
        ("a < <b", "a << b"),
        ('"a b"', '"a  b"'),
        ('"a" "b"', '"a b"'),
        ("'a'", '"a"'),
        ("0x1e", "0x1e+1"),
        ("a b", "ab"),
        ('L"x"', 'L "x"'),
    ],
)
def test_other_tokens(one: str, other: str) -> None:
    assert mark(f"int f(void) {{ {one}; }}") != mark(f"int f(void) {{ {other}; }}")


def test_a_continued_line_is_one_line() -> None:
    assert mark("int f(void) { return ab; }") == mark("int f(void) { return a\\\nb; }")
    assert mark("int f(void) { g(); }") == mark("int f(void) { // one \\\n still the comment\n g(); }")


_WORDS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=6)
_TOKENS = st.one_of(
    _WORDS,
    st.sampled_from(["->", "++", "<<=", "=", "&", "&&", ";", ",", "?", ":", ".", "...", "*", "/", "!", "##"]),
    st.sampled_from(['"/* no comment */"', '"\\""', "'\"'", "'\\''", '"//"', "0x1fUL", "1e+5", "'{'"]),
)
_BODIES = st.lists(_TOKENS, min_size=1, max_size=25)
_BLANKS = st.lists(
    st.sampled_from(
        [" ", "\t", "\n", "\r\n", "\\\n", "/**/", "/* } ) \" ' # */", "/*\n#if 0\n*/", "// } \\\n {\n"]
    ),
    max_size=3,
).map(lambda parts: " " + "".join(parts) + " ")


def written(tokens: list[str], blanks: list[str]) -> str:
    return "".join(token + blank for token, blank in zip(tokens, blanks, strict=True))


def whole(body: list[str]) -> list[str]:
    return ["int", "f", "(", "int", "a", ")", "{", "{", *body, "}", "}"]


@pytest.mark.slow
@settings(deadline=None)
@given(_BODIES, st.data())
def test_comments_and_white_space_do_not_count(body: list[str], data: st.DataObject) -> None:
    tokens = whole(body)
    blanks = data.draw(st.lists(_BLANKS, min_size=len(tokens), max_size=len(tokens)))
    assert mark(written(tokens, blanks)) == mark(" ".join(tokens))


@pytest.mark.slow
@settings(deadline=None)
@given(_BODIES, _TOKENS, st.data())
def test_each_token_counts(body: list[str], token: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(body) - 1))
    inserted = [*body[:at], token, *body[at:]]
    removed = [*body[:at], *body[at + 1 :]]
    replaced = [*body[:at], token, *body[at + 1 :]]
    marks = {tuple(one): mark(" ".join(whole(one))) for one in (body, inserted, removed, replaced)}
    assert len(set(marks.values())) == len(marks)


_TEXT = st.lists(
    st.sampled_from(
        [*"(){};=,#\"'\\/*\n f", "\n#if ", "\n#else\n", "\n#endif\n", "\n#define f(", "int f(void) {"]
    )
).map("".join)


@settings(deadline=None)
@given(_TEXT)
def test_any_text_is_read_to_its_end(text: str) -> None:
    lines = text.count("\n") + 1
    for one in definitions(text):
        assert 1 <= one.first <= one.last <= lines
