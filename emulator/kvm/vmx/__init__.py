"""arch/x86/kvm/vmx: the code for Intel's hardware."""
