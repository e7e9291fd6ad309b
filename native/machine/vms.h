/* Making VMs and vCPUs of their parts: locks, ledger, user memory, guests. */
#ifndef FLUSHLAB_VMS_H
#define FLUSHLAB_VMS_H

#include "core/machine_types.h"

/* api */
/* Create a VM with guest-physical memory of gfns 0 .. gfns-1.  Returns the VM's number or an error. */
/* call: aside */
int vm_create(struct machine *m, uint64_t gfns);
void vm_destroy(struct machine *m, uint32_t vm);
/* Create a vCPU of a VM; its number is machine-wide. */
/* call: aside */
int vcpu_create(struct machine *m, uint32_t vm);
void vcpu_destroy(struct machine *m, uint32_t vcpu);
/* end api */

int vms_create(struct machine *m);
void vms_destroy(struct machine *m);

#endif
