/* The kernel objects of a tree (struct kvm_mmu_page): after its end nothing can touch one. */
#include "linux.h"
#include "machine_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OBJECTS = 1 << 18, QUARANTINE = 4096 };

static unsigned char *objects;
static unsigned char *object_live;
static unsigned int *free_objects; /* a ring: the object that was freed first is allocated first */
static unsigned long freed_first, freed_last, objects_used;
spinlock_t shim_objects_lock;

static void *object_at(unsigned int number)
{
	return objects + (unsigned long)number * PAGE_SIZE;
}

static unsigned int object_number(void)
{
	unsigned int number = OBJECTS;

	if (freed_last - freed_first > QUARANTINE || objects_used == OBJECTS) {
		if (freed_first != freed_last)
			number = free_objects[freed_first++ % OBJECTS];
	} else {
		number = (unsigned int)objects_used++;
	}
	return number;
}

void *shim_object_alloc(void)
{
	unsigned int number;

	shim_spin_lock(&shim_objects_lock);
	number = object_number();
	shim_spin_unlock(&shim_objects_lock);
	if (number == OBJECTS || mprotect(object_at(number), PAGE_SIZE, PROT_READ | PROT_WRITE))
		shim_bug("kmem_cache_alloc", 0, "the shim is out of objects");
	object_live[number] = 1;
	here->fresh_object = object_at(number);
	return object_at(number);
}

static void no_access(void *object)
{
	if (mmap(object, PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != object)
		shim_bug("kmem_cache_free", 0, "mmap failed");
}

void shim_object_free(void *object)
{
	unsigned int number = (unsigned int)(((unsigned long)object - (unsigned long)objects) / PAGE_SIZE);

	if (!object)
		return;
	if ((unsigned char *)object < objects || number >= OBJECTS ||
	    !__atomic_exchange_n(&object_live[number], 0, __ATOMIC_ACQ_REL))
		shim_bug("kmem_cache_free", 0, "an object is freed that is not allocated, or freed twice");
	no_access(object);
	shim_spin_lock(&shim_objects_lock);
	free_objects[freed_last++ % OBJECTS] = number;
	shim_spin_unlock(&shim_objects_lock);
}

/* --- kept and put back ---------------------------------------------------------------------------------------------- */
static unsigned char *was_live; /* by object, when it was kept */
static unsigned long were_used;

bool shim_keep_objects(void)
{
	free(was_live);
	were_used = objects_used;
	was_live = malloc(were_used + 1);
	if (!was_live || !shim_keep(free_objects, were_used * sizeof(*free_objects)))
		return false;
	memcpy(was_live, object_live, were_used);
	for (unsigned int i = 0; i < were_used; i++)
		if (was_live[i] && !shim_keep(object_at(i), PAGE_SIZE))
			return false;
	return true;
}

/* Give access to the objects that were kept, and only to them. */
void shim_put_objects_back(void)
{
	for (unsigned int i = 0; i < objects_used; i++) {
		bool live = i < were_used && was_live[i];

		if (live && !object_live[i] && mprotect(object_at(i), PAGE_SIZE, PROT_READ | PROT_WRITE))
			shim_bug("kmem_cache_alloc", 0, "mprotect failed");
		if (!live && object_live[i])
			no_access(object_at(i));
		object_live[i] = live;
	}
}

bool shim_is_object(const void *p)
{
	return (const unsigned char *)p >= objects && (const unsigned char *)p < objects + (unsigned long)OBJECTS * PAGE_SIZE;
}

bool shim_make_objects(void)
{
	if (objects)
		return true;
	objects = mmap(NULL, (unsigned long)OBJECTS * PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	object_live = calloc(OBJECTS, 1);
	free_objects = calloc(OBJECTS, sizeof(*free_objects));
	return objects != MAP_FAILED && object_live && free_objects;
}
