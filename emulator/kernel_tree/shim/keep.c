/* The state of everything that the tree's code and the shim can change, kept once and put back before each explored
 * execution: the variables of this object, and the memory that it has allocated.  Tables lie in the machine's frames,
 * which the machine puts back. */
#define _GNU_SOURCE
#include "linux.h"
#include "machine_internal.h"

#include <link.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PIECES = 64 };

struct piece {
	void *memory, *copy;
	size_t bytes;
};

static struct piece pieces[MOST_PIECES];
static unsigned int n_pieces;

bool shim_keep(void *memory, size_t bytes)
{
	struct piece *piece = &pieces[n_pieces];

	if (!bytes)
		return true;
	if (n_pieces == MOST_PIECES)
		return false;
	*piece = (struct piece){ memory, malloc(bytes), bytes };
	if (!piece->copy)
		return false;
	n_pieces++;
	return true;
}

bool shim_is_kept(const void *p)
{
	for (unsigned int i = 0; i < n_pieces; i++)
		if ((unsigned long)p - (unsigned long)pieces[i].memory < pieces[i].bytes)
			return true;
	return false;
}

static bool is_ours(const struct dl_phdr_info *object)
{
	unsigned long at = (unsigned long)pieces - object->dlpi_addr;

	for (unsigned int i = 0; i < object->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &object->dlpi_phdr[i];

		if (part->p_type == PT_LOAD && at >= part->p_vaddr && at < part->p_vaddr + part->p_memsz)
			return true;
	}
	return false;
}

/* Keep this object's variables, without those that the linker has made read-only. */
static int keep_variables(struct dl_phdr_info *object, size_t size, void *kept)
{
	unsigned long fixed = 0;

	(void)size;
	if (!is_ours(object))
		return 0;
	for (unsigned int i = 0; i < object->dlpi_phnum; i++)
		if (object->dlpi_phdr[i].p_type == PT_GNU_RELRO)
			fixed = (object->dlpi_phdr[i].p_vaddr + object->dlpi_phdr[i].p_memsz + PAGE_SIZE - 1) & PAGE_MASK;
	*(bool *)kept = true;
	for (unsigned int i = 0; i < object->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &object->dlpi_phdr[i];
		unsigned long begin = part->p_vaddr > fixed ? part->p_vaddr : fixed, end = part->p_vaddr + part->p_memsz;

		if (part->p_type == PT_LOAD && part->p_flags & PF_W && begin < end)
			*(bool *)kept &= shim_keep((void *)(object->dlpi_addr + begin), end - begin);
	}
	return 1;
}

int tree_keep(void)
{
	bool kept = false;

	while (n_pieces)
		free(pieces[--n_pieces].copy);
	dl_iterate_phdr(keep_variables, &kept);
	if (!kept || !shim_keep_memory() || !shim_keep_objects() || !glue_keep())
		return core.nomem;
	for (unsigned int i = 0; i < n_pieces; i++)
		memcpy(pieces[i].copy, pieces[i].memory, pieces[i].bytes);
	return 0;
}

void tree_put_back(void)
{
	shim_put_objects_back();
	for (unsigned int i = 0; i < n_pieces; i++)
		memcpy(pieces[i].memory, pieces[i].copy, pieces[i].bytes);
}
