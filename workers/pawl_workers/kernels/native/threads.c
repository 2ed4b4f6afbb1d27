/* Threads that meet at a barrier after each operation, kept from sharing a core while another one is free.

The kernel wakes a thread where it slept or where the one that wakes it runs, unless it sees an idle core. In a virtual
machine it does not see one: a core that halts looks like one that was taken away (Linux, available_idle_cpu). Two
threads then take turns on one core until the balancer looks, some milliseconds later. They are not bound to cores: that
would hold a thread behind whatever else runs on its own. */
#include "threads.h"

#include <omp.h>
#ifdef __linux__
#include <sched.h>
#endif

static const double REST = 1e-3; /* seconds between two moves: with more to run than cores, one is shared in any case */

void empty_seats(Seat *seats, int32_t threads) {
    for (int32_t i = 0; i < threads; i++) seats[i].core = -1, seats[i].moved = 0.0;
}

#ifdef __linux__
static int taken(Seat *seats, int32_t threads, int core) {
    for (int32_t i = 0; i < threads; i++)
        if (__atomic_load_n(&seats[i].core, __ATOMIC_RELAXED) == core) return 1;
    return 0;
}

/* With more cores than threads, the free ones may be those of other replicas: the kernel knows better. */
static void move(Seat *seats, int32_t thread, int32_t threads) {
    double now = omp_get_wtime();
    cpu_set_t allowed, only;
    if (now - seats[thread].moved < REST) return;
    seats[thread].moved = now;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) != threads) return;
    for (int core = 0; core < CPU_SETSIZE; core++) {
        if (!CPU_ISSET(core, &allowed) || taken(seats, threads, core)) continue;
        CPU_ZERO(&only);
        CPU_SET(core, &only);
        sched_setaffinity(0, sizeof only, &only);
        sched_setaffinity(0, sizeof allowed, &allowed);
        __atomic_store_n(&seats[thread].core, core, __ATOMIC_RELAXED);
        return;
    }
}
#endif

void take_seat(Seat *seats, int32_t thread, int32_t threads) {
#ifdef __linux__
    int core = sched_getcpu();
    __atomic_store_n(&seats[thread].core, core, __ATOMIC_RELAXED);
    if (taken(seats, thread, core)) move(seats, thread, threads);
#else
    (void)seats, (void)thread, (void)threads;
#endif
}
