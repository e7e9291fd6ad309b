"""Write `native/_native.pyi`, the core's types for mypy, from the declarations that cffi reads.

`python -m native.build` updates the stub from the headers.  It is committed, so that mypy and
editors need no build; tests/native/test_stub.py compares it with the headers.

Types of cffi's objects follow cffi's own rules: `struct x *` (`XPtr`) has the fields of `struct x` (`X`), an
array (`Array[X]`) has none; an argument has the array type if its name is a plural.  A field named like a
keyword must be read with getattr().
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Final

from pycparser import c_ast, c_parser

from native.headers import HERE, declarations

STUB: Final = HERE / "_native.pyi"

# Names of arguments that stand for one kind of number (native/types.py) in every function on a machine.
ARGUMENTS: Final = {
    "callback": "RcuCallback",
    "cpu": "CpuId",
    "custody": "Custody",
    "target": "CpuId",
    "gfn": "Gfn",
    "hfn": "Hfn",
    "host_writable": "HostWritable",
    "hva": "Hva",
    "index": "SpteIndex",
    "insn": "GuestInsn",
    "keep": "bool",
    "level": "Level",
    "linear": "Gva",
    "on": "bool",
    "populate": "bool",
    "report": "ReportNumber",
    "root": "Hfn",
    "root_level": "Level",
    "shared": "bool",
    "slot": "SignalSlot",
    "table": "Hfn",
    "tag": "Custody",
    "step": "KernelSpteStep",
    "ticket": "Ticket",
    "type": "AccessKind",
    "vpid": "Vpid",
    "vm": "VmId",
    "vcpu": "VcpuId",
    "vmcs": "VmcsId",
    "counter": "CounterId",
    "histogram": "HistogramId",
    "promise": "PromiseKind",
    "stat": "VmStat",
    "wait": "IpiWait",
    "word": "WordIndex",
    "writable": "bool",
    "write": "bool",
}
# The same for functions on a TLB by itself, for which the VM and the frames are tags without a meaning.
TLB_ARGUMENTS: Final = {
    "ep4ta": "Ep4ta",
    "ept": "bool",
    "gpa_page": "Gfn",
    "kind": "MappingKind",
    "linear_page": "LinearPage",
    "linear_valid": "bool",
    "pcid": "Pcid",
    "right": "Right",
    "type": "AccessKind",
    "vpid": "Vpid",
}
# Arguments that have a meaning of their own in these functions.
EXCEPTIONS: Final = {
    **{
        (function, bound): kind
        for kind, functions in (
            ("Gfn", ("oracle_revoke", "mmu_invalidate_range_add", "mmu_invalidate_overlaps")),
            ("Gfn", ("mmu_invalidate_retry_range",)),
            ("Hva", ("mm_present", "mm_unmap", "mm_protect", "mm_migrate")),
        )
        for function in functions
        for bound in ("start", "end")
    },
    ("cpu_wait_event", "seq"): "EventSeq",
    ("event_record", "kind"): "EventKind",
    ("flush_invvpid_address", "page"): "LinearPage",
    ("mmu_spte_get_lockless", "page"): "LinearPage",
    **{
        (f"mmu_invalidate_{part}", "seq"): "InvalidateSeq"
        for part in ("retry_gfn", "retry_range", "seq_init")
    },
    ("oracle_reports", "from"): "ReportNumber",
    ("oracle_revoke_mask", "base"): "Gfn",
    ("mm_image_create", "start"): "Hva",
    ("mm_image_copy", "base"): "Hva",
    ("mm_image_differs", "from"): "Hva",
    ("srcu_read_unlock", "index"): "int",  # of a counter
    ("vcpu_set_cpu", "cpu"): "int",  # -1: not loaded
    ("tlb_dropped", "vm"): "int",  # -1: of any VM
    **{(function, "kind"): "FrameKind" for function in ("frame_alloc", "frames_in_use", "frames_total")},
    **{(function, "kind"): "FrameKind" for function in ("ept_table_alloc", "shadow_page_alloc")},
    **{
        (function, "function"): "IpiFunction"
        for function in ("smp_call_function_many", "smp_call_function_single", "on_each_cpu")
    },
    **{
        (function, "reason"): "FlushReason"
        for function in (
            "flush_invept_global",
            "flush_invept_single",
            "flush_invvpid_single",
            "flush_invvpid_all",
            "flush_invvpid_address",
            "flush_invvpid_retain_globals",
            "vcpu_add_flush_reason",
        )
    },
}
# Arguments that may be NULL: then the function only counts.
NULLABLE: Final = frozenset({("tlb_dump", "entries"), ("psc_dump", "entries")})
# Numbers that these functions return, for others to take.  A function that may fail returns an int.
RESULTS: Final = {
    "cpu_event": "EventSeq",
    "kvm_mmu_page_get_gfn": "Gfn",
    "mmu_invalidate_seq": "InvalidateSeq",
    "oracle_ticket": "Ticket",
    "spte_next": "SpteIndex",
    "tdp_mmu_get_walk": "Level",
}
# Fields that KVM's code passes to functions of the core.
FIELDS: Final = {
    ("mm_page", "hfn"): "Hfn",
    ("mm_page", "level"): "Level",
    ("mm_page", "tag"): "Custody",
    ("tdp_chunk", "root"): "Hfn",
    ("tdp_chunk", "root_level"): "Level",
    ("tdp_chunk", "level"): "Level",
    ("tdp_chunk", "next_gfn"): "Gfn",
    ("tdp_chunk", "end_gfn"): "Gfn",
    ("tdp_chunk", "found_table"): "Hfn",
    ("tdp_chunk", "found_index"): "SpteIndex",
    ("tdp_chunk", "found_level"): "Level",
    ("tdp_chunk", "found_gfn"): "Gfn",
    ("tdp_removal", "top"): "Level",
    ("tdp_removal", "level"): "Level",
    ("tdp_removal", "gfn"): "Gfn",
    ("tdp_removal", "page"): "Hfn",
    ("tdp_removal", "page_level"): "Level",
}
# Members of these enums have the type of the arguments that take them, except the member that counts them.
ENUMS: Final = {
    "access_type": "AccessKind",
    "counter": "CounterId",
    "event_kind": "EventKind",
    "histogram": "HistogramId",
    "flush_reason": "FlushReason",
    "frame_kind": "FrameKind",
    "guest_insn": "GuestInsn",
    "ipi_function": "IpiFunction",
    "ipi_wait": "IpiWait",
    "kernel_spte_step": "KernelSpteStep",
    "mapping_kind": "MappingKind",
    "pg_level": "Level",
    "promise": "PromiseKind",
    "rcu_callback": "RcuCallback",
    "vm_stat": "VmStat",
}
WORDS: Final = {"uint32_t": "U32", "uint64_t": "U64"}
_COMMENT: Final = re.compile(r"/\*.*?\*/", re.DOTALL)
_PLAIN: Final = ("bool", "int")
_INTEGERS: Final = ("uint8_t", "uint16_t", "uint32_t", "uint64_t", "int32_t", "int64_t")

_HEAD: Final = '''\
# Generated by native/stub.py from the headers here: run 'python -m native.build' after changing them.
from _typeshed import ReadableBuffer
from collections.abc import Iterator, Sequence
from typing import Final, Generic, Literal, TypeAlias, TypeVar, overload

from native.types import {types}

_T = TypeVar("_T")

class CDataBase: ...

class Array(CDataBase, Generic[_T]):
    """`T[]`, and `T *` of a number: memory that Python indexes."""

    @overload
    def __getitem__(self, index: int, /) -> _T: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array[_T]: ...
    @overload
    def __setitem__(self, index: int, value: _T, /) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Sequence[_T], /) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_T]: ...

class U32(Array[int]): ...
class U64(Array[int]): ...
class Chars(Array[bytes]): ...

class MachinePtr(CDataBase):
    def __eq__(self, other: object, /) -> bool: ...

class TlbPtr(CDataBase):
    def __eq__(self, other: object, /) -> bool: ...

class Null(MachinePtr, TlbPtr): ...

class CType:
    kind: str
    cname: str
    item: CType
    fields: list[tuple[str, CType]]
    relements: dict[str, int]
    args: tuple[CType, ...]
    result: CType

class Buffer:
    def __getitem__(self, index: slice, /) -> bytes: ...
    def __setitem__(self, index: slice, value: ReadableBuffer, /) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

'''

_FFI: Final = """\
class FFI:
    CData: TypeAlias = CDataBase
    NULL: Final[Null]
    class error(Exception): ...
{new}
    @overload
    def from_buffer(self, cdecl: Literal["uint32_t[]"], source: object, /) -> U32: ...
    @overload
    def from_buffer(self, cdecl: Literal["uint64_t[]"], source: object, /) -> U64: ...
{addressof}
    def buffer(self, cdata: CData, size: int = -1, /) -> Buffer: ...
    def cast(self, cdecl: str, value: CData | int, /) -> CData: ...
    def list_types(self) -> tuple[list[str], list[str], list[str]]: ...
    def sizeof(self, cdecl: str | CData, /) -> int: ...
    def string(self, cdata: Chars, maxlen: int = -1, /) -> bytes: ...
    # A function of the library is no CData.
    def typeof(self, cdecl: object, /) -> CType: ...
    def unpack(self, cdata: U32 | U64, length: int, /) -> list[int]: ...

ffi: Final[FFI]
lib: Final[Lib]
"""


def _class_of(struct: str) -> str:
    """
    >>> _class_of("tlb_entry")
    'TlbEntry'
    """
    return "".join(word.capitalize() for word in struct.split("_"))


def _parsed() -> c_ast.FileAST:
    typedefs = "".join(f"typedef unsigned long {name};\n" for name in _INTEGERS)
    return c_parser.CParser().parse(typedefs + _COMMENT.sub(" ", declarations()))


def _spelled(node: c_ast.Node) -> tuple[str, int, bool]:
    """Return the name at a type's core (`struct x`, `uint32_t`), the number of pointers and arrays around it,
    and whether it is const."""
    depth = 0
    while isinstance(node, c_ast.PtrDecl | c_ast.ArrayDecl):
        node, depth = node.type, depth + 1
    assert isinstance(node, c_ast.TypeDecl), f"native/stub.py: {type(node).__name__} in the api of the core"
    inner = node.type
    name = f"struct {inner.name}" if isinstance(inner, c_ast.Struct) else " ".join(inner.names)
    return name, depth, "const" in node.quals


def _value(name: str) -> str:
    """Return the type of a number passed by value, of any width."""
    if name != "int" and name not in _INTEGERS:
        raise ValueError(f"native/stub.py: no Python type for {name!r}")
    return "int"


def _result(function: str, node: c_ast.Node) -> str:
    name, depth, _ = _spelled(node)
    if not depth:
        return "None" if name == "void" else RESULTS.get(function) or _value(name)
    return "Chars" if name == "char" else f"{_class_of(name.removeprefix('struct '))}Ptr"


def _argument(function: str, decl: c_ast.Decl, opaque: set[str], names: Mapping[str, str]) -> str:
    name, depth, const = _spelled(decl.type)
    if not depth:
        return EXCEPTIONS.get((function, decl.name)) or names.get(decl.name) or _value(name)
    null = " | Null" if (function, decl.name) in NULLABLE else ""
    if name == "char":
        return "bytes | Chars" if const else "Chars"
    if name in WORDS:
        return WORDS[name] + null
    struct = name.removeprefix("struct ")
    if struct in opaque:
        return f"{_class_of(struct)}Ptr"
    # entries, events, reports: arrays; the next argument is their length.
    own = _class_of(struct)
    return (f"Array[{own}]" if decl.name.endswith("s") else f"{own}Ptr") + null


def _function(decl: c_ast.Decl, opaque: set[str]) -> str:
    params = [argument for argument in decl.type.args.params if argument.name is not None]
    names = TLB_ARGUMENTS if params and params[0].name == "t" else ARGUMENTS
    # The name is documentation only: calls of cffi take no keywords.
    arguments = [
        f"{argument.name}{'_' * iskeyword(argument.name)}: {_argument(decl.name, argument, opaque, names)}"
        for argument in params
    ]
    result = _result(decl.name, decl.type.type)
    return f"    def {decl.name}(self, {', '.join(arguments)}, /) -> {result}: ..."


def _struct(struct: c_ast.Struct) -> Iterator[str]:
    own = _class_of(struct.name)
    yield f"class {own}(CDataBase):"
    for field in struct.decls:
        name, depth, _ = _spelled(field.type)
        if depth:
            kind = WORDS[name]
        else:
            kind = _class_of(name.removeprefix("struct ")) if name.startswith("struct ") else _value(name)
        kind = FIELDS.get((struct.name, field.name), kind)
        if not iskeyword(field.name):
            yield f"    {field.name}: {kind}"
    yield ""
    yield f"class {own}Ptr({own}):"
    yield f"    def __getitem__(self, index: int, /) -> {own}: ..."
    yield ""


def _enum(enum: c_ast.Enum) -> Iterator[str]:
    kind = ENUMS.get(enum.name or "", "")
    last = enum.values.enumerators[-1].name
    for member in enum.values.enumerators:
        counts = member.name == last and last.endswith("S") and member.value is None
        yield f"    {member.name}: Final[{kind if kind and not counts else 'int'}]"


def _news(structs: Iterable[str]) -> Iterator[str]:
    """Yield the overloads of ffi.new() by the text of the type."""
    kinds = [("char[]", "Chars")]
    for word, kind in WORDS.items():
        kinds += [(f"{word} *", kind), (f"{word}[]", kind)]
    for struct in structs:
        own = _class_of(struct)
        kinds += [(f"struct {struct} *", f"{own}Ptr"), (f"struct {struct}[]", f"Array[{own}]")]
    for cdecl, kind in kinds:
        yield "    @overload"
        yield f'    def new(self, cdecl: Literal["{cdecl}"], init: object = ..., /) -> {kind}: ...'
    # Types that are computed at run time.
    yield "    @overload"
    yield "    def new(self, cdecl: str, init: object = ..., /) -> CData: ..."


def _addressofs(structs: Iterable[str]) -> Iterator[str]:
    for struct in structs:
        yield "    @overload"
        yield f"    def addressof(self, cdata: {_class_of(struct)}, /) -> {_class_of(struct)}Ptr: ..."


def text() -> str:
    """Return the stub of the headers as they are."""
    tree = _parsed()
    decls = [node for node in tree.ext if isinstance(node, c_ast.Decl)]
    structs = {
        node.type.name: node.type for node in decls if isinstance(node.type, c_ast.Struct) and node.type.decls
    }
    opaque = {node.type.name for node in decls if isinstance(node.type, c_ast.Struct)} - structs.keys()
    kinds = (ARGUMENTS, TLB_ARGUMENTS, EXCEPTIONS, RESULTS, FIELDS, ENUMS)
    types = sorted({kind for table in kinds for kind in table.values()} - set(_PLAIN))
    lines = [_HEAD.format(types=", ".join(types))]
    for struct in structs.values():
        lines += _struct(struct)
    lines.append("class Lib:")
    for decl in decls:
        if isinstance(decl.type, c_ast.Enum):
            lines += _enum(decl.type)
    lines += [_function(decl, opaque) for decl in decls if isinstance(decl.type, c_ast.FuncDecl)]
    lines.append("")
    lines.append(_FFI.format(new="\n".join(_news(structs)), addressof="\n".join(_addressofs(structs))))
    return "\n".join(lines)


def update(path: Path = STUB) -> bool:
    """Write the stub unless it is current; return whether it was written."""
    stub = text()
    if path.exists() and path.read_text() == stub:
        return False
    path.write_text(stub)
    return True
