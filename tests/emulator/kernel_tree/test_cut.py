"""Functions are cut out of a large file with the static functions that they call, and with their places."""

from __future__ import annotations

import pytest

from emulator.errors import BadInput
from emulator.kernel_tree.cut import cut_functions

SOURCE = """\
#define kvm_twice(x) (2 * (x))
static int unused(void) { return 1; }

static bool mine(int cpu)
{
	return cpu && helper_of_mine(cpu);
}
static bool helper_of_mine(int cpu) { return cpu > 1; }

/* Not static: a prototype of it is in a header. */
void other(void) { }

bool kvm_make_all_cpus_request(struct kvm *kvm, unsigned int req)
{
	other();
	return kvm_twice(mine(req));
}
EXPORT_SYMBOL_GPL(kvm_make_all_cpus_request);

void kvm_flush_remote_tlbs(struct kvm *kvm)
{
	kvm_make_all_cpus_request(kvm, 0);
}
"""


def test_functions_with_the_static_ones_that_they_call() -> None:
    found = cut_functions(SOURCE.encode())
    names = ["mine", "helper_of_mine", "kvm_make_all_cpus_request", "kvm_flush_remote_tlbs"]
    assert [one.name for one in found] == names
    lines = SOURCE.splitlines()
    for one in found:
        text = one.text.splitlines()
        assert lines[one.line - 1 : one.line - 1 + len(text)] == text
        assert text[-1].endswith("}")


def test_a_file_without_the_functions_is_refused() -> None:
    text = SOURCE.replace("kvm_flush_remote_tlbs(", "kvm_flush_all(")
    with pytest.raises(BadInput, match=r"kvm_main\.c: no kvm_flush_remote_tlbs\(\)"):
        cut_functions(text.encode())
