"""arch/x86/kvm/vmx: what Intel's hardware asks for."""
