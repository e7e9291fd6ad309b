"""KVM for x86 on VMX: the parts of arch/x86/kvm and virt/kvm that manage TLBs, roots and SPTEs.

Every function takes the acting `Cpu` first and is named as in Linux 7.3.  Other packages call:

    virt/kvm_main
                kvm_create_vm(cpu, gfns, policy, params) -> Kvm; kvm_destroy_vm(cpu, kvm)
                kvm_vm_ioctl_create_vcpu(cpu, kvm) -> Vcpu
                kvm_set_memory_region(cpu, kvm, slot_id, base_gfn, npages, userspace_addr, flags=0):
                npages 0 deletes, other flags arm or disarm dirty logging
                kvm_vm_ioctl_enable_manual_dirty_log(cpu, kvm, flags)
                kvm_vm_ioctl_get_dirty_log(cpu, kvm, slot_id) -> list of 64-bit words
                kvm_vm_ioctl_clear_dirty_log(cpu, kvm, slot_id, first_page, num_pages, words)
                kvm_mmu_notifier_invalidate_range_start(cpu, kvm, start, end, promise), ..._end(cpu, kvm,
                ...): host virtual pages; promise is PROMISE_NOTIFIER, or PROMISE_NOTIFIER_WRITE when the host
                takes only write access away
                kvm_flush_remote_tlbs(cpu, kvm, reason)
                kvm_sched_in(cpu, vcpu), kvm_sched_out(cpu, vcpu)
    x86         vcpu_run(vcpu): generator, see there
    smm         kvm_inject_smi(cpu, vcpu); SMM's slots are those of kvm_set_memory_region(..., as_id=1)
    mmu/mmu     kvm_zap_gfn_range(cpu, kvm, start, end)

Folders are the kernel's:

    virt/   virt/kvm: requests.py (kvm_main.c: requests, kicks, remote flushes), slots.py (looking slots up),
            vcpu.py, vm.py, memslots.py, mmu_notifier.py, dirty_log.py; other packages call kvm_main.py
    mmu/    arch/x86/kvm/mmu: mmu.py (zaps, dirty logging), roots.py (roles, loading, the cache of previous
            roots), page_fault.py and hugepage.py are mmu.c, fault.py is mmu_internal.h; tdp_iter.py,
            tdp_zap.py (zapping walks), tdp_roots.py (the life of roots), tdp_mmu.py (zaps of ranges),
            tdp_remove.py (removed tables), tdp_map.py (faults) and tdp_dirty.py (dirty logging, splitting,
            recovery) are tdp_mmu.c.  Without EPT: guest_walk.py (walks of the guest's tables, by format)
            and paging.py (faults on them) are paging_tmpl.h, page_track.py is page_track.c; shadow.py (shadow
            pages), sync.py (unsync ones),
            shadow_map.py (leafs), shadow_roots.py, shadow_slots.py, rmap.py and shadow_spte.py are mmu.c
    vmx/    arch/x86/kvm/vmx: vmcs.py (the VMCS and where it is loaded, VPIDs), vmx.py; main.py has Intel's
            operations, by which common code calls them
    .       the rest of arch/x86/kvm: x86.py, tlb.py (flush requests), regs.py, smm.py, reset.py (lapic.c);
            x86_ops.py is what common code asks of the vendor, decisions.py what KVM asks of a policy,
            notifications.py what KVM tells it
"""

from __future__ import annotations
