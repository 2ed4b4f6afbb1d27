/* When an operation that threads share is done. See progress.c. */
#ifndef PAWL_PROGRESS_H
#define PAWL_PROGRESS_H

#include <stdint.h>

/* Of one operation; all zero before anyone begins it. */
typedef struct {
    int64_t next;              /* what is taken next, as the operation counts it */
    uint32_t inside, sleeping; /* threads that may hold a part of it, and those that slept until there were none */
} Progress;

/* Before a thread takes its first part, and once it has computed its last. */
void enter_operation(Progress *progress);
void leave_operation(Progress *progress);

/* For a thread that found no more parts: until nobody is inside. Then all are computed, and it sees what came of them. */
void wait_until_done(Progress *progress);

#endif
