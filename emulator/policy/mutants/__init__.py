"""Mutants: bugs that KVM had, and plausible ones, each a policy `mutant:NAME` and a file NAME.patch here."""

from __future__ import annotations

from emulator.policy.mutants.catalogue import MUTANTS, Mutant, canonical, find_mutant
from emulator.policy.mutants.header import PREFIX

__all__ = ["MUTANTS", "PREFIX", "Mutant", "canonical", "find_mutant"]
