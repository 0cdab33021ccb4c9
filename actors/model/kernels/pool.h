/* Share the chunks of a piece of work among the caller's thread and helper threads.

   Each thread takes the next chunk from one ticket, so a helper that wakes up late delays nobody. */

#ifndef RANVIER_POOL_H
#define RANVIER_POOL_H

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef void (*Work)(void *context, int chunk);

typedef struct {
    int helpers;
    Work work;
    void *context;
    _Atomic uint64_t ticket; /* phase (24 bits), chunks (20), next chunk (20) */
    _Atomic int done;
    _Atomic uint32_t awake; /* grows by one when a step begins and when it ends; odd: there may be work */
    _Atomic int sleeping;   /* helpers that must be woken */
    int64_t rest_ns;        /* how long helpers wait for the next step before they sleep */
} Pool;

static Pool pool;

static void take_chunks(Pool *p) {
    for (;;) {
        uint64_t ticket = atomic_load_explicit(&p->ticket, memory_order_acquire);
        uint32_t next = ticket & 0xFFFFF, chunks = (ticket >> 20) & 0xFFFFF;
        if (next >= chunks)
            return;
        if (atomic_compare_exchange_weak(&p->ticket, &ticket, ticket + 1)) {
            p->work(p->context, (int)next);
            atomic_fetch_add_explicit(&p->done, 1, memory_order_release);
        }
    }
}

/* Wait without sleeping, but yield the core from time to time: the thread that we wait for may need it. */
static void patient(int *spins) {
    if (++*spins < 1000)
        _mm_pause();
    else {
        *spins = 0;
        sched_yield();
    }
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void *helper(void *argument) {
    Pool *p = argument;
    int spins = 0;
    for (;;) {
        uint32_t seen = atomic_load(&p->awake);
        if (seen & 1) {
            take_chunks(p);
            patient(&spins);
            continue;
        }
        for (int64_t until = now_ns() + p->rest_ns; p->rest_ns && atomic_load(&p->awake) == seen && now_ns() < until;)
            patient(&spins);
        atomic_fetch_add(&p->sleeping, 1);
        syscall(SYS_futex, &p->awake, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        atomic_fetch_sub(&p->sleeping, 1);
    }
    return NULL;
}

/* Let the helpers wait so long for the next step before they sleep. It pays where steps follow one another. */
void ranvier_rest(int microseconds) { pool.rest_ns = microseconds * 1000LL; }

/* Start threads beside the caller's, until there are `threads` in all. They live as long as the process. */
void ranvier_threads(int threads) {
    for (; pool.helpers < threads - 1; pool.helpers++) {
        pthread_t made;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        if (pthread_create(&made, &attributes, helper, &pool))
            return;
    }
}

/* Wake the helpers for a step. Until `end` they wait without sleeping. */
static void begin(void) {
    if (pool.helpers) {
        atomic_fetch_add(&pool.awake, 1);
        if (atomic_load(&pool.sleeping))
            syscall(SYS_futex, &pool.awake, FUTEX_WAKE_PRIVATE, pool.helpers, NULL, NULL, 0);
    }
}

static void end(void) {
    if (pool.helpers)
        atomic_fetch_add(&pool.awake, 1);
}

/* Call work(context, chunk) for each chunk, on all threads, and return when all are done. */
static void share(Work work, void *context, int chunks) {
    if (!pool.helpers || chunks < 2) {
        for (int chunk = 0; chunk < chunks; chunk++)
            work(context, chunk);
        return;
    }
    pool.work = work;
    pool.context = context;
    atomic_store(&pool.done, 0);
    uint64_t phase = (atomic_load(&pool.ticket) >> 40) + 1;
    atomic_store_explicit(&pool.ticket, phase << 40 | (uint64_t)chunks << 20, memory_order_release);
    take_chunks(&pool);
    int spins = 0;
    while (atomic_load_explicit(&pool.done, memory_order_acquire) < chunks)
        patient(&spins);
}

typedef struct {
    int32_t tokens;
    void (*one)(const void *context, int token);
    const void *context;
} Each;

static void each_chunk(void *context, int chunk) {
    const Each *e = context;
    int end = (chunk + 1) * 8 < e->tokens ? (chunk + 1) * 8 : e->tokens;
    for (int token = chunk * 8; token < end; token++)
        e->one(e->context, token);
}

/* Call one(context, token) for each token, on all threads. A chunk has eight tokens: fewer are not worth a second thread. */
static void each(int tokens, void (*one)(const void *, int), const void *context) {
    Each e = {tokens, one, context};
    share(each_chunk, &e, (tokens + 7) / 8);
}

#endif
