#ifdef CONFIG_MADE_UP
void kvm_vcpu_kick(struct kvm_vcpu *vcpu);
#else
static inline void kvm_vcpu_kick(struct kvm_vcpu *vcpu) { }
#endif
