/* A worker spins for about the time between two calls of one decode step, then sleeps until it is woken. */
#include "pool.h"

#include <stdatomic.h>

#include "platform.h"

enum { SPINS_BEFORE_SLEEP = 2000, SPINS_BEFORE_YIELD = 4000 };

typedef struct {
    Pool *pool;
    int thread;
} Worker;

struct Pool {
    int num_threads;
    Thread threads[MAX_THREADS];
    Worker workers[MAX_THREADS];
    Mutex caller, lock;
    Condition wake;
    int num_asleep; /* under lock */
    PoolTask task;
    void *context;
    _Alignas(64) atomic_uint job; /* counts jobs; the top job is the end */
    _Alignas(64) atomic_uint arrived;
    _Alignas(64) atomic_uint round;
    atomic_int stopping;
};

void pool_barrier(Pool *pool) {
    if (pool->num_threads == 1) return;
    unsigned round = atomic_load_explicit(&pool->round, memory_order_relaxed);
    unsigned others = (unsigned)pool->num_threads - 1;
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) == others) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&pool->round, memory_order_acquire) == round; spins++) {
        if (spins < SPINS_BEFORE_YIELD) spin_pause();
        else thread_yield(); /* someone else needs this core, perhaps the thread waited for */
    }
}

static void await_job(Pool *pool, unsigned done) {
    for (int spins = 0; spins < SPINS_BEFORE_SLEEP; spins++) {
        if (atomic_load_explicit(&pool->job, memory_order_acquire) != done) return;
        spin_pause();
    }
    mutex_lock(&pool->lock);
    pool->num_asleep++;
    while (atomic_load_explicit(&pool->job, memory_order_acquire) == done) condition_wait(&pool->wake, &pool->lock);
    pool->num_asleep--;
    mutex_unlock(&pool->lock);
}

static THREAD_RESULT work(void *argument) {
    Worker *worker = argument;
    Pool *pool = worker->pool;
    flush_tiny_numbers();
    for (unsigned done = 0;; done++) {
        await_job(pool, done);
        if (atomic_load(&pool->stopping)) return 0;
        pool->task(pool->context, worker->thread, pool->num_threads);
        pool_barrier(pool);
    }
}

static void announce(Pool *pool) {
    atomic_fetch_add_explicit(&pool->job, 1, memory_order_release);
    mutex_lock(&pool->lock);
    if (pool->num_asleep) condition_wake_all(&pool->wake);
    mutex_unlock(&pool->lock);
}

Pool *pool_create(int num_threads) {
    if (num_threads < 1 || num_threads > MAX_THREADS) return NULL;
    Pool *pool = zeroed_memory(sizeof(Pool));
    if (!pool) return NULL;
    mutex_init(&pool->caller);
    mutex_init(&pool->lock);
    condition_init(&pool->wake);
    pool->num_threads = 1;
    for (int i = 1; i < num_threads; i++) {
        pool->workers[i] = (Worker){pool, i};
        if (!thread_start(&pool->threads[i], work, &pool->workers[i])) {
            pool_free(pool);
            return NULL;
        }
        pool->num_threads = i + 1;
    }
    return pool;
}

void pool_free(Pool *pool) {
    if (!pool) return;
    atomic_store(&pool->stopping, 1);
    announce(pool);
    for (int i = 1; i < pool->num_threads; i++) thread_join(pool->threads[i]);
    aligned_release(pool);
}

int pool_size(const Pool *pool) { return pool->num_threads; }

void pool_run(Pool *pool, PoolTask task, void *context) {
    mutex_lock(&pool->caller);
    unsigned mode = flush_tiny_numbers();
    pool->task = task;
    pool->context = context;
    if (pool->num_threads > 1) announce(pool);
    task(context, 0, pool->num_threads);
    pool_barrier(pool);
    restore_float_mode(mode);
    mutex_unlock(&pool->caller);
}
