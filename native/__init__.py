"""The C core: `ffi`, `lib`, and names derived from the core's own enums."""

from __future__ import annotations

import sys

# `python -m native.build` imports this package before the extension exists.
if "native.build" not in sys.orig_argv:
    from native._core import *  # noqa: F403
    from native._core import __all__ as __all__
