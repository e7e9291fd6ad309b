"""Names and bounds that `--help` shows, apart from the modules that they belong to.

Every command, `--version` among them, imports the modules of the command line.  To keep that fast, they
import the rest of the package in the functions that need it, and these constants from here.
"""

from __future__ import annotations

from typing import Final

DEFAULT_SCENARIO: Final = "main"
DEFAULT_POLICY: Final = "linux-7.3"
MAX_PCPUS: Final = 4096
