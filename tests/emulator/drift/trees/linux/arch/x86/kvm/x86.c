static int vcpu_enter_guest(struct kvm_vcpu *vcpu)
{
#ifdef CONFIG_MADE_UP
	if (made_up(vcpu)) {
#else
	if (vcpu->made_up) {
#endif
		return -EINTR;
	}
	/* The strings are as they were. */
	return made_up_run(vcpu, "no /* comment", '"');
}
