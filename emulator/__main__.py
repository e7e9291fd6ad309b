"""`python -m emulator` is the command `flushlab`: signals first, then the imports, then the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from emulator import interrupts


def main() -> int:
    """Run the command line of this process; return the exit status."""
    _open_standard_descriptors()
    interrupts.install()
    try:
        with interrupts.held():
            from emulator.cli.main import main as run
        status = run()
    except ModuleNotFoundError as error:
        if (error.name or "emulator").partition(".")[0] in ("emulator", "native", "metrics"):
            raise
        status = _not_installed(error.name)
    except KeyboardInterrupt:
        status = interrupts.status()
    interrupts.ignore()
    return status


def _not_installed(library: str | None) -> int:
    """Say what to type if this Python has none of the libraries, such as the system's in a checkout."""
    checkout = Path(__file__).resolve().parent.parent
    print(
        f"flushlab: {library} is not installed for {sys.executable}: type 'pip install -e .' in {checkout}, "
        "or use the installed command 'flushlab'",
        file=sys.stderr,
    )
    return 3


def _open_standard_descriptors() -> None:
    """Open the standard descriptors that are closed on /dev/null.

    Otherwise a file or socket that is opened later would become standard output or standard error.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
