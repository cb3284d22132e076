/* Threads that run one function together, with barriers inside it, and sleep when there is nothing to run. */
#ifndef POOL_H
#define POOL_H

#define MAX_THREADS 64

typedef struct Pool Pool;
typedef void (*PoolTask)(void *context, int thread, int num_threads);

/* Start `num_threads` - 1 workers; the caller of `pool_run` is the last one. NULL when they cannot be started. */
Pool *pool_create(int num_threads);
void pool_free(Pool *pool);
int pool_size(const Pool *pool);

/* Run the task on all threads and wait for it; thread 0 is the caller. One caller at a time, kept by a lock. */
void pool_run(Pool *pool, PoolTask task, void *context);

/* Wait inside a task until every thread is here. */
void pool_barrier(Pool *pool);

/* The part of `count` items that belongs to a thread: [*first, *last). */
static inline void pool_share(int count, int thread, int num_threads, int *first, int *last) {
    *first = (int)((long long)count * thread / num_threads);
    *last = (int)((long long)count * (thread + 1) / num_threads);
}

#endif
