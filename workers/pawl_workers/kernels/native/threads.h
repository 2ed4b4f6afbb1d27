/* Where the threads of a program run. See threads.c. */
#ifndef PAWL_THREADS_H
#define PAWL_THREADS_H

#include <stdint.h>

typedef struct {
    _Alignas(64) int32_t core; /* where its thread was last; others read it */
    double moved;              /* when it was last sent elsewhere, seconds */
} Seat;

void empty_seats(Seat *seats, int32_t threads);

/* Note where this thread runs; if one before it is on the same core and another core is free, move there. */
void take_seat(Seat *seats, int32_t thread, int32_t threads);

#endif
