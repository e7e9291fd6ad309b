"""The host beside KVM: the memory management that KVM is a user of, and that notifies it."""
