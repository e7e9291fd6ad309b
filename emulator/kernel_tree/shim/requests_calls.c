/* Functions that call the requests of a tree's kvm_main.c, and their view of a vCPU.  Follows vms.c in the unit of the tree's files. */
unsigned int glue_vcpu_at(const volatile void *p, unsigned int *field)
{
	unsigned long at = (unsigned long)p - shim_vcpus, inside = at % sizeof(*all_vcpus);

	*field = inside == offsetof(struct kvm_vcpu, mode)     ? FIELD_MODE :
		 inside == offsetof(struct kvm_vcpu, requests) ? FIELD_REQUESTS :
		 inside == offsetof(struct kvm_vcpu, cpu)      ? FIELD_CPU :
								 FIELD_NONE;
	return (unsigned int)(at / sizeof(*all_vcpus));
}

/* Called for each access that is logged, so its own accesses must not be. */
__attribute__((no_sanitize_thread)) bool glue_is_statistic(const volatile void *p)
{
	const struct kvm *kvm = vms[here->api.vm];

	return kvm && (unsigned long)p - (unsigned long)&kvm->stat < sizeof(kvm->stat);
}

bool glue_exits_guest(u64 old, u64 value)
{
	return old == IN_GUEST_MODE && value == EXITING_GUEST_MODE;
}

bool glue_is_kick(void (*function)(void *argument))
{
	return function == ack_kick;
}

int tree_set_vcpus(unsigned int number, const unsigned int *numbers, unsigned int n)
{
	struct kvm *kvm = vms[number];
	void **entries = calloc(n + 1, sizeof(*entries));

	if (!entries)
		return core.nomem;
	for (unsigned int i = 0; i < n; i++) {
		entries[i] = &all_vcpus[numbers[i]];
		all_vcpus[numbers[i]].kvm = kvm;
	}
	free(kvm->vcpu_array.shim_entries);
	kvm->vcpu_array.shim_entries = entries;
	atomic_set(&kvm->online_vcpus, (int)n);
	return 0;
}

int tree_make_all_cpus_request(unsigned int cpu, unsigned int request)
{
	volatile int r = 0;
	int error = OPERATION(cpu, OPERATION_OTHER, r = kvm_make_all_cpus_request(vm(), request));

	return error ? error : r;
}

int tree_flush_remote_tlbs(unsigned int cpu)
{
	return OPERATION(cpu, OPERATION_OTHER, kvm_flush_remote_tlbs(vm()));
}

unsigned long long tree_take_flushes(unsigned int number)
{
	return __atomic_exchange_n(&vms[number]->stat.generic.remote_tlb_flush, 0, __ATOMIC_RELAXED);
}
