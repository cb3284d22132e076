/* Threads that run one function together and sleep when there is nothing to run.
 *
 * The function goes through phases. Each phase has items, which the threads share out among themselves: every thread
 * has a part of its own and then helps with the others' parts. A phase is over when its items are done, not when all
 * threads have come by, so a thread that the system has put aside holds up at most the item in its hands.
 */
#ifndef POOL_H
#define POOL_H

#include <stdint.h>

#define MAX_THREADS 64

typedef struct Pool Pool;
typedef void (*PoolTask)(void *context, int thread, int num_threads);

/* One thread's way through the phases of a task: zero but for these fields at the start of a task. */
typedef struct {
    Pool *pool;
    int thread;
    uint64_t phase;
    int count, victim, taken;
} Walk;

/* Start `num_threads` - 1 workers; the caller of `pool_run` is the last one. NULL when they cannot be started. */
Pool *pool_create(int num_threads);
void pool_free(Pool *pool);
int pool_size(const Pool *pool);

/* Run the task on the caller, as thread 0, and on the workers that come in time. One caller at a time, by a lock. */
void pool_run(Pool *pool, PoolTask task, void *context);

/* Inside a task, in every thread alike: enter the task; then for each phase begin, take items until there is none
 * (-1), and end, which waits for the items of the others. */
Walk pool_enter(Pool *pool, int thread);
void phase_begin(Walk *walk, int count);
int phase_take(Walk *walk);
void phase_end(Walk *walk);

#define FOR_EACH_ITEM(walk, item, count)                                                                       \
    for (int item = (phase_begin(walk, count), phase_take(walk)); item >= 0 || (phase_end(walk), 0); item = phase_take(walk))

#endif
