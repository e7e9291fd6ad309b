void kvm_flush_remote_tlbs(struct kvm *kvm)
{
	made_up_request(kvm, MADE_UP_FLUSH);
}

bool kvm_make_all_cpus_request(struct kvm *kvm, unsigned int req)
{
	return made_up_kick(kvm, req);
}
