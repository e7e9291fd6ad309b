"""Load the extension and take the core's names from it.

Importing this module realises every type and symbol of the extension once, in the importing thread.
Otherwise cffi does that lazily, which is not safe on CPython 3.11 when many threads start at once.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = [
    "COUNTER_NAMES",
    "EXIT_REASONS",
    "FLUSH_REASONS",
    "FLUSH_SCOPES",
    "HISTOGRAM_NAMES",
    "VIOLATION_KINDS",
    "VM_STAT_NAMES",
    "enum_names",
    "ffi",
    "lib",
]

try:
    from native._native import ffi, lib
except ModuleNotFoundError as error:
    checkout = Path(__file__).resolve().parent.parent
    raise ImportError(
        f"the C core is not built in {checkout}: type 'pip install -e .' there, or use the installed command "
        "'flushlab', which does not look into the current directory",
        name="native._native",
    ) from error


def enum_names(enum: str, prefix: str, count: str = "") -> tuple[str, ...]:
    """Return the names of an enum's values 0, 1, ... in lower case without the prefix.

    `count` names the member that ends the list, if the prefix does not distinguish it.

    >>> enum_names("page_size", "PAGE_")
    ('4k', '2m', '1g')
    """
    members = ffi.typeof(f"enum {enum}").relements
    ordered = sorted(
        (value, name) for name, value in members.items() if name.startswith(prefix) and name != count
    )
    if [value for value, _ in ordered] != list(range(len(ordered))):
        raise ImportError(f"native: values of enum {enum} with prefix {prefix} are not 0, 1, 2, ...")
    return tuple(name.removeprefix(prefix).lower() for _, name in ordered)


def _realise_everything() -> None:
    typedefs, structs, unions = ffi.list_types()
    for name in typedefs:
        ffi.typeof(name)
    for name in (*(f"struct {s}" for s in structs), *(f"union {u}" for u in unions)):
        ffi.typeof(f"{name} *")
        # new() lays the fields out; opaque types have none, so it fails for them.
        with suppress(TypeError, ffi.error):
            ffi.new(f"{name} *")
    for name in dir(lib):
        symbol = getattr(lib, name)
        if callable(symbol):
            signature = ffi.typeof(symbol)
            _ = (signature.args, signature.result)
    for name in ("uint8_t", "uint16_t", "uint32_t", "uint64_t", "int32_t", "int64_t", "char"):
        ffi.typeof(f"{name} *")
        ffi.typeof(f"{name}[]")


_realise_everything()

COUNTER_NAMES = enum_names("counter", "COUNT_")
HISTOGRAM_NAMES = enum_names("histogram", "HISTOGRAM_")
FLUSH_SCOPES = enum_names("flush_scope", "SCOPE_")
FLUSH_REASONS = enum_names("flush_reason", "REASON_")
VM_STAT_NAMES = enum_names("vm_stat", "STAT_")
EXIT_REASONS = enum_names("exit_reason", "EXIT_", count="EXIT_REASONS")
# Spelled as in reports and documents: use-after-free.
VIOLATION_KINDS = tuple(name.replace("_", "-") for name in enum_names("violation", "VIOLATION_"))
