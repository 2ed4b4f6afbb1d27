/* An operation is done when all its parts are computed, not when all threads have come by.

   Where others compute on the same cores, as front ends do, a thread may be without one for a millisecond. At a barrier
   all others would wait for it even if it holds no part of anything: one that is woken late, or that others' work keeps
   from its core between two steps. So threads count those inside an operation, and one that comes when all parts are
   taken passes by.

   Who finds no part left has read `next` after every thread that took one had added to it, and those were inside by
   then: the fences say that it sees them there. */
#include "progress.h"

#include "vector.h"

#ifdef __linux__
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#define SPINS 300 /* pauses of 24 to 50 ns: by then a part of the usual size is computed */

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Returns at once where so many are no longer inside, and whenever it likes. */
INLINE void sleep_while(uint32_t *inside, uint32_t many) {
#ifdef __linux__
    syscall(SYS_futex, inside, FUTEX_WAIT_PRIVATE, many, NULL, NULL, 0);
#else
    (void)inside, (void)many;
    sched_yield();
#endif
}

INLINE void wake_all(uint32_t *inside) {
#ifdef __linux__
    syscall(SYS_futex, inside, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
    (void)inside;
#endif
}

void enter_operation(Progress *p) {
    __atomic_fetch_add(&p->inside, 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
}

void leave_operation(Progress *p) {
    uint32_t left = __atomic_sub_fetch(&p->inside, 1, __ATOMIC_SEQ_CST);
    if (left == 0 && __atomic_load_n(&p->sleeping, __ATOMIC_SEQ_CST)) wake_all(&p->inside);
}

void wait_until_done(Progress *p) {
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&p->inside, __ATOMIC_ACQUIRE) == 0) return;
        pause_briefly();
    }
    __atomic_fetch_add(&p->sleeping, 1, __ATOMIC_SEQ_CST);
    for (uint32_t many; (many = __atomic_load_n(&p->inside, __ATOMIC_SEQ_CST)) != 0;) sleep_while(&p->inside, many);
}
