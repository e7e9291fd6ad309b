"""Run a tree's code in a process of its own, which may crash or never end: its parent reads its progress so
far.

Reads a request, one JSON document, from standard input, and writes one JSON document a line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from emulator.kernel_tree.compare import Comparison, happened, sequence_of
from emulator.kernel_tree.operations import Operation
from emulator.kernel_tree.report import as_dict
from emulator.policy import preset


def main() -> None:
    request = json.loads(sys.stdin.read())
    comparison = Comparison(Path(request["path"]), preset(request["policy"]))
    if request["trace"]:
        comparison.before = _tell
    differences, signatures, seeds = 0, set[tuple[str, ...]](), request["seeds"]
    for seed in range(seeds[0], seeds[1]):
        _write({"seed": seed})
        found = comparison.run(seed, sequence_of(seed, request["length"]))
        if found is None:
            continue
        differences += 1
        if found.signature not in signatures and len(signatures) < request["most"]:
            signatures.add(found.signature)
            # Runs that reduce a difference do not count.
            counted = comparison.counted()
            _write({"difference": as_dict(comparison.minimized(found))})
            comparison.restore(counted)
    _write({"argued": dict(comparison.argued)})
    _write({"end": {**happened(comparison), "sequences": seeds[1] - seeds[0], "differing": differences}})
    # The tree's code may have left anything behind: nothing of it runs at exit.
    os._exit(0)


def _tell(operation: Operation) -> None:
    _write({"operation": str(operation)})


def _write(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
