"""virt/kvm: what all architectures share, from memslots to the mmu_notifier."""
