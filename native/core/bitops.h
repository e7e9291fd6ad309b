/* Words that several threads share and that nothing else orders: a mask with a bit per pCPU, a generation.  As
 * the kernel's test_and_set_bit() and atomic64_inc_return() are, each operation is one step and a full barrier. */
#ifndef FLUSHLAB_BITOPS_H
#define FLUSHLAB_BITOPS_H

#include <stdint.h>

/* api */
/* Return the bit's old value.  If it is set already, nothing is written (most callers need only the read). */
/* call: local; fence */
int test_and_set_bit(uint64_t *words, uint32_t bit);
/* call: local */
int test_bit(const uint64_t *words, uint32_t bit);
/* Return the bit's old value. */
/* call: local; fence */
int test_and_clear_bit(uint64_t *words, uint32_t bit);
/* Locked instructions without a result. */
/* call: local; fence */
void set_bit(uint64_t *words, uint32_t bit);
/* call: local; fence */
void clear_bit(uint64_t *words, uint32_t bit);
/* Clear `n` words, one after the other. */
/* call: local */
void bitmap_clear(uint64_t *words, uint32_t n);
/* Return the counter's new value. */
/* call: local; fence */
uint64_t atomic64_inc_return(uint64_t *counter);
/* call: local */
uint64_t atomic64_read(const uint64_t *counter);
/* call: local */
void atomic64_set(uint64_t *counter, uint64_t value);
/* end api */

#endif
