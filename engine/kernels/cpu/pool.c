/* A worker spins for about the time between two calls of one decode step, then sleeps until it is woken. */
#include "pool.h"

#include <stdatomic.h>

#include "platform.h"

#define AWAKE_SECONDS 300e-6 /* longer than Python takes from one call of a decode step to the next */

enum { SPINS_BETWEEN_LOOKS = 64, SPINS_BEFORE_YIELD = 500, ITEM_BITS = 24, INSIDE_BITS = 8 };

typedef struct {
    Pool *pool;
    int thread;
} Worker;

/* The number of a phase above ITEM_BITS, and below it how many items were taken, or are done. Phases are numbered
 * through the life of a pool, so a counter left by an earlier phase counts as zero, and a late thread sees that its
 * phase is over. */
typedef struct {
    _Alignas(64) _Atomic uint64_t value;
} Counter;

struct Pool {
    int num_threads;
    Thread threads[MAX_THREADS];
    Worker workers[MAX_THREADS];
    Mutex caller, lock;
    Condition wake;
    int num_asleep; /* under lock */
    PoolTask task;
    void *context;
    uint64_t first_phase;
    atomic_int stopping;
    /* The number of the job above INSIDE_BITS, odd while it is open; below it the workers that are inside. */
    _Alignas(64) _Atomic uint64_t gate;
    Counter done;
    Counter taken[MAX_THREADS];
};

static void wait_a_little(int spins) {
    if (spins < SPINS_BEFORE_YIELD) spin_pause();
    else thread_yield(); /* someone else needs this core, perhaps the thread waited for */
}

Walk pool_enter(Pool *pool, int thread) { return (Walk){.pool = pool, .thread = thread, .phase = pool->first_phase}; }

void phase_begin(Walk *walk, int count) {
    walk->phase++;
    walk->count = count;
    walk->victim = 0;
    walk->taken = 0;
}

/* Take one item of the part of thread `owner`; -1 when there is none left. */
static int take_from(Walk *walk, int owner) {
    const int threads = walk->pool->num_threads;
    const int first = (int)((int64_t)walk->count * owner / threads);
    const int size = (int)((int64_t)walk->count * (owner + 1) / threads) - first;
    _Atomic uint64_t *counter = &walk->pool->taken[owner].value;
    uint64_t seen = atomic_load_explicit(counter, memory_order_relaxed);
    for (;;) {
        const uint64_t phase = seen >> ITEM_BITS;
        const int taken = phase == walk->phase ? (int)(seen & ((1u << ITEM_BITS) - 1)) : 0;
        if (phase > walk->phase || taken >= size) return -1;
        const uint64_t next = walk->phase << ITEM_BITS | (uint64_t)(taken + 1);
        if (atomic_compare_exchange_weak_explicit(counter, &seen, next, memory_order_relaxed, memory_order_relaxed))
            return first + taken;
    }
}

int phase_take(Walk *walk) {
    const int threads = walk->pool->num_threads;
    for (; walk->victim < threads; walk->victim++) {
        const int item = take_from(walk, (walk->thread + walk->victim) % threads);
        if (item >= 0) return walk->taken++, item;
    }
    return -1;
}

void phase_end(Walk *walk) {
    _Atomic uint64_t *done = &walk->pool->done.value;
    uint64_t seen = atomic_load_explicit(done, memory_order_acquire);
    const uint64_t all = walk->phase << ITEM_BITS | (uint64_t)walk->count;
    while (walk->taken) {
        const uint64_t before = seen >> ITEM_BITS == walk->phase ? seen : walk->phase << ITEM_BITS;
        if (atomic_compare_exchange_weak_explicit(done, &seen, before + (uint64_t)walk->taken, memory_order_acq_rel,
                                                  memory_order_acquire))
            walk->taken = 0, seen = before;
    }
    for (int spins = 0; atomic_load_explicit(done, memory_order_acquire) < all; spins++) wait_a_little(spins);
}

/* Enter the open job if it is not `last`, and return its number; 0 when there is none. */
static uint64_t try_enter(Pool *pool, uint64_t last) {
    uint64_t seen = atomic_load_explicit(&pool->gate, memory_order_acquire);
    for (;;) {
        const uint64_t job = seen >> INSIDE_BITS;
        if (job % 2 == 0 || job == last) return 0;
        if (atomic_compare_exchange_weak_explicit(&pool->gate, &seen, seen + 1, memory_order_acq_rel, memory_order_acquire))
            return job;
    }
}

static uint64_t await_job(Pool *pool, uint64_t last) {
    uint64_t job;
    const double until = seconds_now() + AWAKE_SECONDS;
    for (unsigned spins = 1; spins % SPINS_BETWEEN_LOOKS || seconds_now() < until; spins++) {
        if ((job = try_enter(pool, last)) || atomic_load(&pool->stopping)) return job;
        spin_pause();
    }
    mutex_lock(&pool->lock);
    pool->num_asleep++;
    while (!(job = try_enter(pool, last)) && !atomic_load(&pool->stopping)) condition_wait(&pool->wake, &pool->lock);
    pool->num_asleep--;
    mutex_unlock(&pool->lock);
    return job;
}

static THREAD_RESULT work(void *argument) {
    Worker *worker = argument;
    Pool *pool = worker->pool;
    flush_tiny_numbers();
    for (uint64_t job = 0; (job = await_job(pool, job));) {
        pool->task(pool->context, worker->thread, pool->num_threads);
        atomic_fetch_sub_explicit(&pool->gate, 1, memory_order_release);
    }
    return 0;
}

static void wake_workers(Pool *pool) {
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
    wake_workers(pool);
    for (int i = 1; i < pool->num_threads; i++) thread_join(pool->threads[i]);
    aligned_release(pool);
}

int pool_size(const Pool *pool) { return pool->num_threads; }

void pool_run(Pool *pool, PoolTask task, void *context) {
    mutex_lock(&pool->caller);
    const unsigned mode = flush_tiny_numbers();
    const uint64_t one_job = (uint64_t)1 << INSIDE_BITS;
    pool->task = task;
    pool->context = context;
    if (pool->num_threads > 1) {
        atomic_fetch_add_explicit(&pool->gate, one_job, memory_order_release);
        wake_workers(pool);
    }
    task(context, 0, pool->num_threads);
    if (pool->num_threads > 1) {
        atomic_fetch_add_explicit(&pool->gate, one_job, memory_order_acq_rel); /* closed: nobody enters any more */
        const uint64_t inside = one_job - 1;
        for (int spins = 0; atomic_load_explicit(&pool->gate, memory_order_acquire) & inside; spins++) wait_a_little(spins);
    }
    /* The phases of this task are over; the last one's number is in the counter of what is done. */
    pool->first_phase = atomic_load(&pool->done.value) >> ITEM_BITS;
    restore_float_mode(mode);
    mutex_unlock(&pool->caller);
}
