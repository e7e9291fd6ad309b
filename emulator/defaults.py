"""Names and bounds that `--help` shows, apart from the modules that they are about.

Whatever the command line needs before it runs a command is imported for every command, `--version` among
them.  So its modules import the rest in the functions that need it, and these constants from here.
"""

from __future__ import annotations

from typing import Final

DEFAULT_SCENARIO: Final = "main"
DEFAULT_POLICY: Final = "linux-7.3"
MAX_PCPUS: Final = 4096
