"""virt/kvm: the code that all architectures share, from memslots to the mmu_notifier."""
