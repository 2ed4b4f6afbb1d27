/* What GCC's code asks of OpenMP, by pthreads: ThreadSanitizer knows their barriers, and not those of libgomp.

   With PAWL_TEST_NO_WAITS in the environment nobody waits until an operation is done: for a test of whether that is seen
   (linked with --wrap=wait_until_done). With PAWL_TEST_LATE_THREADS the other threads begin when the first has ended. */
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#define MOST_THREADS 16

typedef struct {
    void (*work)(void *);
    void *data;
    int threads;
    pthread_barrier_t barrier;
    pthread_mutex_t lock;
    bool dealt; /* whether a loop of the region has begun */
    bool late;
    long next, end, step;
} Team;

typedef struct {
    Team *team;
    int number;
    pthread_t thread;
} Member;

static __thread Team *team;
static __thread int number;

static void *join_in(void *member) {
    Member *self = member;
    team = self->team, number = self->number;
    if (!team->late) pthread_barrier_wait(&team->barrier); /* all begin together, so that each gets a share */
    team->work(team->data);
    return NULL;
}

void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    (void)flags;
    if (threads < 1 || threads > MOST_THREADS) abort(); /* the kernels say how many */
    Team own = {.work = work, .data = data, .threads = (int)threads, .late = getenv("PAWL_TEST_LATE_THREADS")};
    Member members[MOST_THREADS];
    pthread_barrier_init(&own.barrier, NULL, threads);
    pthread_mutex_init(&own.lock, NULL);
    for (int i = 0; i < own.threads; i++) members[i] = (Member){.team = &own, .number = i};
    if (own.late) join_in(&members[0]);
    for (int i = 1; i < own.threads; i++)
        if (pthread_create(&members[i].thread, NULL, join_in, &members[i])) abort();
    if (!own.late) join_in(&members[0]);
    for (int i = 1; i < own.threads; i++) pthread_join(members[i].thread, NULL);
    pthread_barrier_destroy(&own.barrier);
    pthread_mutex_destroy(&own.lock);
    team = NULL, number = 0;
}

void GOMP_barrier(void) { pthread_barrier_wait(&team->barrier); }

void __real_wait_until_done(void *progress);
void __wrap_wait_until_done(void *progress) {
    if (!getenv("PAWL_TEST_NO_WAITS")) __real_wait_until_done(progress);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *from, long *to) {
    *from = __atomic_fetch_add(&team->next, team->step, __ATOMIC_RELAXED);
    *to = *from + team->step < team->end ? *from + team->step : team->end;
    return *from < team->end;
}

/* One loop in a region at most, upwards. */
bool GOMP_loop_nonmonotonic_dynamic_start(long first, long end, long by, long chunk, long *from, long *to) {
    pthread_mutex_lock(&team->lock);
    if (!team->dealt) team->next = first, team->end = end, team->step = by * chunk;
    team->dealt = true;
    pthread_mutex_unlock(&team->lock);
    return GOMP_loop_nonmonotonic_dynamic_next(from, to);
}

void GOMP_loop_end_nowait(void) {}
int omp_get_thread_num(void) { return number; }
int omp_get_num_threads(void) { return team ? team->threads : 1; }

double omp_get_wtime(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}
