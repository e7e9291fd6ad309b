"""Patches: unified diffs against emulator/kvm that are applied in memory and live while their policy runs."""

from __future__ import annotations

from emulator.policy.patch.diff import PatchError
from emulator.policy.patch.patch import KvmPatch, Parts, is_patch, read_patch

__all__ = ["KvmPatch", "Parts", "PatchError", "is_patch", "read_patch"]
