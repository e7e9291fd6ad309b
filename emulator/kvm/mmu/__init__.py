"""arch/x86/kvm/mmu: roots, faults, and the TDP MMU."""
