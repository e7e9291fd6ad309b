/* A made-up tree for tests; nothing in it is Linux's. */
#define for_each_made_up(x, list) for (x = list; x; x = x->next)

static bool made_up_helper(int level)
{
	return level > 2;
}

/* The first comment. */
int kvm_mmu_load(struct kvm_vcpu *vcpu)
{
	int r = made_up_alloc(vcpu); /* may fail */

	if (r)
		return r;
	made_up_flush(vcpu);
	return 0;
}

void kvm_mmu_unload(struct kvm_vcpu *vcpu)
{
	made_up_free(vcpu, true);
}

static void kvm_mmu_zap_all_fast(struct kvm *kvm)
{
	made_up_invalidate(kvm, made_up_helper(4));
}
