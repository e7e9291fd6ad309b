"""Words that several threads share without a lock."""

from __future__ import annotations

from threading import Thread

from native import ffi, lib


def test_a_bit_is_set_once() -> None:
    words = ffi.new("uint64_t[]", 3)
    for bit in (0, 63, 64, 191):
        assert not lib.test_bit(words, bit)
        assert lib.test_and_set_bit(words, bit) == 0
        assert lib.test_and_set_bit(words, bit) == 1
        assert lib.test_bit(words, bit)
    assert list(words) == [1 << 63 | 1, 1, 1 << 63]
    lib.bitmap_clear(words, 2)
    assert list(words) == [0, 0, 1 << 63]


def test_a_counter_loses_nothing() -> None:
    counter = ffi.new("uint64_t *", 1)
    words = ffi.new("uint64_t[]", 2)

    def count(first: int) -> None:
        for i in range(20000):
            lib.atomic64_inc_return(counter)
            lib.test_and_set_bit(words, first + i % 64)

    threads = [Thread(target=count, args=(32 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lib.atomic64_read(counter) == 60001
    assert list(words) == [(1 << 64) - 1] * 2
    lib.atomic64_set(counter, 7)
    assert lib.atomic64_inc_return(counter) == 8
