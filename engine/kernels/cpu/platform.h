/* What the operating system provides: threads that can sleep, aligned memory on large pages, the flush-to-zero mode. */
#ifndef PLATFORM_H
#define PLATFORM_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <malloc.h>
#include <process.h>
#include <windows.h>
#define EXPORT __declspec(dllexport)
typedef HANDLE Thread;
typedef SRWLOCK Mutex;
typedef CONDITION_VARIABLE Condition;
#define THREAD_RESULT unsigned __stdcall
static inline void mutex_init(Mutex *m) { InitializeSRWLock(m); }
static inline void mutex_lock(Mutex *m) { AcquireSRWLockExclusive(m); }
static inline void mutex_unlock(Mutex *m) { ReleaseSRWLockExclusive(m); }
static inline void condition_init(Condition *c) { InitializeConditionVariable(c); }
static inline void condition_wait(Condition *c, Mutex *m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }
static inline void condition_wake_all(Condition *c) { WakeAllConditionVariable(c); }
static inline int thread_start(Thread *t, unsigned(__stdcall *run)(void *), void *argument) {
    *t = (HANDLE)_beginthreadex(NULL, 0, run, argument, 0, NULL);
    return *t != 0;
}
static inline void thread_join(Thread t) { WaitForSingleObject(t, INFINITE); CloseHandle(t); }
static inline void thread_yield(void) { SwitchToThread(); }
static inline double seconds_now(void) {
    LARGE_INTEGER count, per_second;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&per_second);
    return (double)count.QuadPart / (double)per_second.QuadPart;
}
static inline void *aligned_memory(size_t alignment, size_t bytes) { return _aligned_malloc(bytes, alignment); }
static inline void aligned_release(void *p) { _aligned_free(p); }
static inline void prefer_large_pages(void *p, size_t bytes) { (void)p; (void)bytes; }
#else
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#define EXPORT __attribute__((visibility("default")))
typedef pthread_t Thread;
typedef pthread_mutex_t Mutex;
typedef pthread_cond_t Condition;
#define THREAD_RESULT void *
static inline void mutex_init(Mutex *m) { pthread_mutex_init(m, NULL); }
static inline void mutex_lock(Mutex *m) { pthread_mutex_lock(m); }
static inline void mutex_unlock(Mutex *m) { pthread_mutex_unlock(m); }
static inline void condition_init(Condition *c) { pthread_cond_init(c, NULL); }
static inline void condition_wait(Condition *c, Mutex *m) { pthread_cond_wait(c, m); }
static inline void condition_wake_all(Condition *c) { pthread_cond_broadcast(c); }
static inline int thread_start(Thread *t, void *(*run)(void *), void *argument) {
    return pthread_create(t, NULL, run, argument) == 0;
}
static inline void thread_join(Thread t) { pthread_join(t, NULL); }
static inline void thread_yield(void) { sched_yield(); }
static inline double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
static inline void *aligned_memory(size_t alignment, size_t bytes) {
    void *p = NULL;
    return posix_memalign(&p, alignment, bytes) ? NULL : p;
}
static inline void aligned_release(void *p) { free(p); }
static inline void prefer_large_pages(void *p, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    madvise(p, bytes, MADV_HUGEPAGE); /* only a wish; its failure costs speed, not correctness */
#else
    (void)p;
    (void)bytes;
#endif
}
#endif

/* Zeroed memory aligned to cache lines; on large pages where it fills some. NULL when there is none left. */
static inline void *zeroed_memory(size_t bytes) {
    const size_t large = (size_t)2 << 20;
    void *p = aligned_memory(bytes >= large ? large : 64, bytes);
    if (!p) return NULL;
    if (bytes >= large) prefer_large_pages(p, bytes);
    memset(p, 0, bytes);
    return p;
}

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
/* Tiny numbers count as zero, as the AMX unit does in any mode; returns the mode to put back. */
static inline unsigned flush_tiny_numbers(void) {
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040u);
    return mode;
}
static inline void restore_float_mode(unsigned mode) { _mm_setcsr(mode); }
static inline void spin_pause(void) { _mm_pause(); }
#else
static inline unsigned flush_tiny_numbers(void) { return 0; }
static inline void restore_float_mode(unsigned mode) { (void)mode; }
static inline void spin_pause(void) {
#if defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
#endif

#endif
