"""Patches of emulator/kvm as a user would have them from `git diff`, made of edits of the shipped files.

Edits find their file by the text that they replace, so that code may move between files.
"""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

from emulator.policy.patch.code import SHIPPED
from emulator.policy.patch.diff import ROOT


def file_with(text: str) -> str:
    """Return the path, within emulator/kvm, of the only file that contains the text."""
    found = [path for path, source in SHIPPED.sources.items() if text in source]
    assert len(found) == 1, (text, found)
    return found[0]


def diff_of(path: str, before: str, after: str, context: int = 3) -> str:
    """Return the diff of one file as git writes it."""
    a, b = f"a/{ROOT}{path}", f"b/{ROOT}{path}"
    lines = []
    for line in unified_diff(_lines(before), _lines(after), a, b, n=context):
        lines.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return f"diff --git {a} {b}\n" + "".join(lines)


def _lines(text: str) -> list[str]:
    parts = text.split("\n")
    return [*(part + "\n" for part in parts[:-1]), *([parts[-1]] if parts[-1] else [])]


def edited(*edits: tuple[str, str], context: int = 3) -> str:
    """Return a patch in which each first text, which occurs once in emulator/kvm, becomes the second."""
    changed: dict[str, str] = {}
    for before, after in edits:
        path = file_with(before)
        text = changed.get(path, SHIPPED.sources[path])
        assert text.count(before) == 1, before
        changed[path] = text.replace(before, after)
    return "".join(
        diff_of(path, SHIPPED.sources[path], text, context) for path, text in sorted(changed.items())
    )


def new_file(path: str, text: str) -> str:
    """Return a patch that adds a file."""
    lines = _lines(text)
    body = "".join(f"+{line}" for line in lines)
    return (
        f"diff --git a/{ROOT}{path} b/{ROOT}{path}\nnew file mode 100644\nindex 0000000..1111111\n"
        f"--- /dev/null\n+++ b/{ROOT}{path}\n@@ -0,0 +1,{len(lines)} @@\n{body}"
    )


def written(directory: Path, text: str, name: str = "idea.patch") -> str:
    """Write a patch; return its path as a command line names it."""
    path = directory / name
    path.write_text(text)
    return str(path)


MIGRATION = "    answer = kvm.policy.migration(cpu, vcpu)\n"
# A VMCS that is loaded on another pCPU flushes nothing there: a use after free in the litmus test return-zap.
NO_FLUSH = edited((MIGRATION, '    answer = "none"\n'))
# The patch that breaks everything: no flush removes anything from a TLB.
BREAKS_ALL = "".join((
    edited(
        (
            'def vmx_flush_tlb_all(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:\n',
            'def vmx_flush_tlb_all(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:\n    return\n',
        ),
        (
            'def vmx_flush_tlb_current(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:\n',
            'def vmx_flush_tlb_current(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:\n    return\n',
        ),
    ),
))  # fmt: skip
