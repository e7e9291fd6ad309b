"""Puts functions in the place of KVM's, in a process that does nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def replace_function(function: Callable[..., Any], by: Callable[..., Any]) -> None:
    """Put `by` where modules of KVM's have imported the function of that name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("emulator.kvm."):
            for key, value in list(vars(module).items()):
                if value is function or getattr(value, "_stands_for", None) is function:
                    by._stands_for = function  # type: ignore[attr-defined]
                    setattr(module, key, by)
