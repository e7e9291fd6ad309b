/* A made-up tree for tests; nothing in it is Linux's. */
#define for_each_made_up(x, list) \
	for (x = list; x; x = x->next)

static __always_inline bool made_up_helper(int level) { return level > 2; }

/* Another comment. */
int kvm_mmu_load(struct kvm_vcpu *vcpu)
{
	int r = made_up_alloc(vcpu);

	if (r)
		return r;

	if (!made_up_tracked(vcpu))
		made_up_flush(vcpu);
	return 0;
}

static void kvm_mmu_zap_everything(struct kvm *kvm)
{
	made_up_invalidate(kvm, made_up_helper(4));
}
