"""The built core."""

from __future__ import annotations

from pathlib import Path

from native import _native
from native.build import _remove_others


def test_it_keeps_to_the_stable_abi() -> None:
    """Then a wheel for CPython 3.11 serves newer ones."""
    assert Path(_native.__file__).name == "_native.abi3.so"


def test_no_build_under_another_name_is_left_to_be_imported(tmp_path: Path) -> None:
    names = ("_native.abi3.so", "_native.cpython-311-x86_64-linux-gnu.so", "_other.so")
    for name in names:
        (tmp_path / name).touch()
    _remove_others(tmp_path / names[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], names[2]]
