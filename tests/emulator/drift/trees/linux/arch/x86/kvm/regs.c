int kvm_set_cr3(struct kvm_vcpu *vcpu,
		unsigned long cr3)
{
	return made_up_set(vcpu, cr3);
}

static int handle_cr(struct kvm_vcpu *vcpu)
{
	return 1;
}
