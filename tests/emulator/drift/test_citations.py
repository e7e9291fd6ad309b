"""Which kernel functions code cites, where, and whether it mirrors them."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.drift.citations import How, cited, in_c, in_python, origins_in
from emulator.drift.record import shipped_record

ROOT = Path(__file__).parents[3]
NAMED, MIRRORED, MENTIONED = How.NAMED, How.MIRRORED, How.MENTIONED

PYTHON = '''\
"""As kvm_of_the_module() does."""

class Kvm:
    """Stands for kvm_of_a_class()."""

    def track_slot(self):
        """kvm_slot_dirty_track_enabled()"""


def kvm_own_name(cpu):
    """first_one(), before 6.13 __second_one(): do it, as close() does.

    Later, like third_one().
    """
    install()
    fourth_in_code()  # fifth_in_comment()


def _private_name():
    """Return fast.  sixth_one() is slow.
    As seventh_one() is.
    """
'''

C = """\
/* file_comment_first(): what this file has.  Not other_one(). */

/*
 * put_page(): free it.
 * As third_one() does.
 */
static int put_page(int a)
{
	called_here(a); /* the way that last_one() goes */
}
"""


def test_python() -> None:
    found = sorted(in_python(PYTHON), key=lambda one: (one[1], one[0]))
    assert found == [
        ("kvm_of_the_module", 1, MENTIONED),
        ("kvm_of_a_class", 4, MENTIONED),
        ("kvm_slot_dirty_track_enabled", 6, MIRRORED),
        ("track_slot", 6, NAMED),
        ("__second_one", 10, MIRRORED),
        ("first_one", 10, MIRRORED),
        ("kvm_own_name", 10, NAMED),
        ("third_one", 13, MENTIONED),
        ("fifth_in_comment", 16, MENTIONED),
        ("sixth_one", 20, MENTIONED),
        ("seventh_one", 21, MENTIONED),
    ]


def test_c() -> None:
    assert sorted(in_c(C), key=lambda one: (one[1], one[0])) == [
        ("file_comment_first", 1, MIRRORED),
        ("other_one", 1, MENTIONED),
        ("put_page", 4, MIRRORED),
        ("third_one", 5, MENTIONED),
        ("put_page", 7, NAMED),
        ("last_one", 9, MENTIONED),
    ]


@pytest.mark.slow
def test_the_models_own_citations_are_found() -> None:
    functions = cited()
    places = {(one.file, one.mirrors) for one in functions["kvm_mmu_load"]}
    assert ("emulator/kvm/mmu/roots.py", True) in places
    assert any(one.file.endswith(".c") for one in functions["tdp_mmu_set_spte_atomic"])
    for citations in functions.values():
        assert citations == sorted(citations)
    for one in functions["kvm_mmu_load"] + functions["tdp_mmu_set_spte_atomic"]:
        line = (ROOT / one.file).read_text("utf-8").splitlines()[one.line - 1]
        assert "kvm_mmu_load" in line or "tdp_mmu_set_spte_atomic" in line or line.lstrip().startswith("def ")


def test_origins() -> None:
    """In docstrings and comments, over the ends of their lines."""
    source = """
    sched_due() (include/linux/sched.h): return whether it is due, unlike not_this() (a remark).
    # zap_work() (5.18 to
    # 6.5), flush_root()  (proposed
    # in July 2025), and this_one()
    """
    assert [(name, str(origin)) for name, origin in origins_in(source)] == [
        ("sched_due", "include/linux/sched.h"),
        ("zap_work", "5.18 to 6.5"),
        ("flush_root", "proposed in July 2025"),
    ]


@pytest.mark.slow
def test_most_of_what_is_recorded_is_cited() -> None:
    """After many citations were renamed, the record has to be made anew."""
    recorded = set(shipped_record().functions)
    assert len(recorded & set(cited())) > 150
