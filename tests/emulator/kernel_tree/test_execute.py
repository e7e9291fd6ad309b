"""Code that differs, crashes or never ends becomes a report, and nothing is left running."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from emulator.errors import BadInput
from emulator.kernel_tree.build import Built, shim_text
from emulator.kernel_tree.execute import execute, policy_for
from emulator.kernel_tree.report import as_text

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")

# A TDP MMU that does nothing, and something bad in alloc_root().
NOTHING = """\
#include <stdio.h>
#include <stdlib.h>
#include "api.h"
static unsigned long long none;
void tree_start(unsigned long long n, int ad, const unsigned long long *w, unsigned int k,
                void (*o)(void)) { }
void tree_set_logging(int as_id, int on) { }
void tree_set_levels(int as_id, const unsigned char *levels, unsigned int n) { }
void tree_set_points(const struct shim_point *points, unsigned int n) { }
void tree_clear(void) { }
unsigned int tree_events(const struct shim_event **events) { return 0; }
int tree_record(void) { return 0; }
const unsigned long long *tree_state(int place, unsigned int *words) { *words = 0; return &none; }
unsigned int tree_pages(void) { return 0; }
int tree_locks(void) { return 0; }
unsigned long long tree_alloc_root(int as_id) { BAD; return 4096; }
int tree_root_invalid(unsigned long long root) { return 0; }
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nothing")
    (path / "api.h").write_text(shim_text("api.h"))
    (path / "nothing.c").write_text(NOTHING)
    return path


def built(directory: Path, bad: str) -> Built:
    target = directory / f"{abs(hash(bad))}.so"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-w",
        f"-DBAD={bad}",
        "-o",
        str(target),
        str(directory / "nothing.c"),
    ]
    subprocess.run(command, check=True)
    return Built(target, "6.12.0", directory, "", 0, 0, (), cached=False)


@pytest.mark.slow
def test_a_difference_is_reduced_and_told_side_by_side(directory: Path) -> None:
    result = execute(built(directory, "(void)0"), "linux-6.12", 60, 0)
    assert not result.died
    assert not result.clean
    assert result.counts["differing"] == 1
    (found,) = result.differences
    assert found["before"] == []
    assert found["operation"] == "alloc_root space 0"
    text = as_text(1, found, "linux-6.12", "Linux 6.12.0", directory)
    assert "Difference 1: alloc_root space 0" in text
    assert "emulator/kvm/mmu/tdp_roots.py:" in text
    assert "1 roots" in text
    assert "0 roots" in text
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.slow
def test_a_crash(directory: Path) -> None:
    result = execute(built(directory, 'fputs("BUG: here\\\\n", stderr), abort()'), "linux-6.12", 60, 3)
    assert result.died == "it was ended by SIGABRT"
    assert "BUG: here" in result.said
    assert result.seed == 3
    assert result.last == ["alloc_root space 0"]
    assert not result.clean


@pytest.mark.slow
def test_a_loop_without_an_end(directory: Path) -> None:
    result = execute(built(directory, "for (;;) { }"), "linux-6.12", 60, 0, silence=3.0)
    assert "did not end in 3 seconds" in result.died
    assert result.last == ["alloc_root space 0"]


@pytest.mark.parametrize(
    ("version", "policy"),
    [
        ("6.1.192", "linux-6.1"),
        ("6.11.3", "linux-6.1"),
        ("6.12.117", "linux-6.12"),
        ("7.4.0-rc1", "linux-7.3"),
    ],
)
def test_the_preset_of_a_version(version: str, policy: str) -> None:
    assert policy_for(version) == policy


def test_an_old_tree_is_refused() -> None:
    with pytest.raises(BadInput, match=r"found Linux 5\.15\.0; expected Linux 6\.1 or newer"):
        policy_for("5.15.0")


def test_an_unknown_policy_is_refused(directory: Path) -> None:
    with pytest.raises(BadInput, match="--policy"):
        execute(built(directory, "(void)0"), "linux-6.21", 60, 0)
