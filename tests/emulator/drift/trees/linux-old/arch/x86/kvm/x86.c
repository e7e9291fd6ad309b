#include <linux/kvm_host.h>

static int vcpu_enter_guest(struct kvm_vcpu *vcpu)
{
#ifdef CONFIG_MADE_UP
	if (made_up(vcpu)) {
#else
	if (vcpu->made_up) {
#endif
		return -EINTR;
	}
	return made_up_run(vcpu, "no /* comment", '"');
}

int kvm_set_cr3(struct kvm_vcpu *vcpu, unsigned long cr3)
{
	return made_up_set(vcpu, cr3);
}
