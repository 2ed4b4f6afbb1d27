/* Items that threads take from both ends, so that each goes on where it was. */
#ifndef PAWL_ENDS_H
#define PAWL_ENDS_H

#include <stdint.h>

/* Threads of odd numbers take from the last item back. */
static inline int from_the_last(int32_t thread) { return thread & 1; }

/* The next item of a thread, or -1 where no more than `left` are left. taken: items from both ends, in its lower and its
   upper half. */
static inline int64_t take_item(int64_t *taken, int64_t items, int64_t left, int32_t thread) {
    int64_t before = __atomic_load_n(taken, __ATOMIC_RELAXED), front, back;
    int last = from_the_last(thread);
    do {
        front = before & 0xffffffff, back = before >> 32;
        if (front + back + left >= items) return -1;
    } while (!__atomic_compare_exchange_n(taken, &before, before + (last ? (int64_t)1 << 32 : 1), 1, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return last ? items - 1 - back : front;
}

#endif
