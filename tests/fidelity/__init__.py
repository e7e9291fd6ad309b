"""The emulator against a real KVM, operation by operation (ground_truth.toml)."""
