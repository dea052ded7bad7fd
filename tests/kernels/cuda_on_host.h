// CUDA's execution model on one host thread: the kernels' own sources, launch by launch, block by block.
//
// The threads of a block are fibers. Each runs until it reaches a barrier; a barrier opens when every thread of its block (or warp) that has
// not returned is there, and if none can open the program stops: a kernel whose threads disagree about a barrier is found here.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__ static  // one block runs at a time
#define __grid_constant__
#define __launch_bounds__(threads)
#define __align__(bytes) alignas(bytes)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
static Index threadIdx, blockIdx, gridDim;

namespace host {

enum State { READY, AT_WARP, AT_BLOCK, DONE };
const int MOST = 256, LANES_OF_WARP = 32;
const size_t STACK = 128 * 1024;

struct Fiber {
    ucontext_t context;
    State state;
};

static Fiber fibers[MOST];
static ucontext_t scheduler;
static void (*body)();
static unsigned char exchange[MOST][sizeof(double)];

static void wait(State barrier) {
    Fiber& self = fibers[threadIdx.x];
    self.state = barrier;
    swapcontext(&self.context, &scheduler);
}

static void start() {
    body();
    wait(DONE);
}

static bool open(int first, int end, State barrier) {
    bool any = false;
    for (int t = first; t < end; ++t) {
        if (fibers[t].state != barrier && fibers[t].state != DONE) return false;
        any |= fibers[t].state == barrier;
    }
    for (int t = first; t < end; ++t)
        if (fibers[t].state == barrier) fibers[t].state = READY;
    return any;
}

static void run_block(int threads) {
    static char* stacks = (char*)malloc(MOST * STACK);
    for (int t = 0; t < threads; ++t) {
        getcontext(&fibers[t].context);
        fibers[t].context.uc_stack.ss_sp = stacks + t * STACK;
        fibers[t].context.uc_stack.ss_size = STACK;
        makecontext(&fibers[t].context, start, 0);
        fibers[t].state = READY;
    }
    for (;;) {
        for (int t = 0; t < threads; ++t)
            if (fibers[t].state == READY) {
                threadIdx.x = t;
                swapcontext(&scheduler, &fibers[t].context);
            }
        int done = 0;
        for (int t = 0; t < threads; ++t) done += fibers[t].state == DONE;
        if (done == threads) return;
        bool opened = open(0, threads, AT_BLOCK);
        for (int t = 0; t < threads; t += LANES_OF_WARP) opened |= open(t, t + LANES_OF_WARP < threads ? t + LANES_OF_WARP : threads, AT_WARP);
        if (!opened) {
            fprintf(stderr, "block %u: threads wait at barriers that others never reach\n", blockIdx.x);
            abort();
        }
    }
}

static void run(void (*kernel)(), int grid, int threads) {
    body = kernel;
    gridDim.x = grid;
    for (int block = 0; block < grid; ++block) {
        blockIdx.x = block;
        run_block(threads);
    }
}

template <class T> T shuffle(T value, int source) {
    const int self = threadIdx.x, warp = self / LANES_OF_WARP * LANES_OF_WARP;
    memcpy(exchange[self], &value, sizeof(T));
    wait(AT_WARP);
    T got = value;
    if (source < LANES_OF_WARP) memcpy(&got, exchange[warp + source], sizeof(T));
    wait(AT_WARP);
    return got;
}

}  // namespace host

static inline void __stwb(uint4* to, uint4 value) { *to = value; }

static inline void __syncthreads() { host::wait(host::AT_BLOCK); }

template <class T> T __shfl_down_sync(unsigned, T value, int offset) {
    return host::shuffle(value, threadIdx.x % host::LANES_OF_WARP + offset);
}

template <class T> T __shfl_sync(unsigned, T value, int lane) { return host::shuffle(value, lane); }
