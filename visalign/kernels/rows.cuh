// How tensors (rows, dims) are walked and summed. The schedule depends on dims alone, never on the batch, the dtype, the alignment or the
// device, so that two kernels which add the same numbers get the same sum.
//
//   chunk     CHUNK neighbouring elements of a row, the work of one block at a time
//   thread    GROUPS groups of LANES neighbouring elements of it, added in order, in float32
//   block     a fixed tree over its threads: lanes of a warp, then warps
//   row       a second launch adds the chunks of a row, in float64: lane l takes chunks l, l + 32, ..., then a fixed tree over lanes
#pragma once

#include "elements.h"

const int THREADS = 256, GROUPS = 2, CHUNK = THREADS * LANES * GROUPS, WARP = 32, WARPS = THREADS / WARP;
static_assert(CHUNK == CHUNK_SIZE, "chunks have another size in Python");

template <class T> __device__ __forceinline__ const T* row_of(const void* base, i64 stride, i64 row) {
    return (const T*)base + stride * row;
}

template <class T> __device__ __forceinline__ T* row_of(void* base, i64 stride, i64 row) {
    return (T*)base + stride * row;
}

__device__ __forceinline__ bool is_aligned(const void* pointer) { return ((u64)pointer & 15u) == 0; }

// Elements [at, at + count) of a row as float32, in 128-bit loads where the group is whole and the address allows it; the rest become 0.
template <class T> __device__ __forceinline__ void load(const T* row, i64 at, int count, float (&out)[LANES]) {
    const T* from = row + at;
    if (count == LANES && is_aligned(from)) {
        union { uint4 vectors[sizeof(T) * LANES / 16]; T values[LANES]; } packed;
#pragma unroll
        for (int v = 0; v < (int)(sizeof(T) * LANES / 16); ++v) packed.vectors[v] = ((const uint4*)from)[v];
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) out[lane] = to_float(packed.values[lane]);
    } else {
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) out[lane] = lane < count ? to_float(from[lane]) : 0.0f;
    }
}

// The same elements of N tensors.
template <class T, int N>
__device__ __forceinline__ void load_each(const void* const (&bases)[N], const i64 (&strides)[N], i64 row, i64 at, int count,
                                          float (&out)[N][LANES]) {
#pragma unroll
    for (int n = 0; n < N; ++n) load(row_of<T>(bases[n], strides[n], row), at, count, out[n]);
}

template <class T> __device__ __forceinline__ void store(T* row, i64 at, int count, const float (&values)[LANES]) {
    T* to = row + at;
    if (count == LANES && is_aligned(to)) {
        union { uint4 vectors[sizeof(T) * LANES / 16]; T values[LANES]; } packed;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) packed.values[lane] = from_float<T>(values[lane]);
#pragma unroll
        for (int v = 0; v < (int)(sizeof(T) * LANES / 16); ++v)
            __stwb((uint4*)to + v, packed.vectors[v]);  // an assignment is merged with the branch below and split into words, of float32
    } else {
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane)
            if (lane < count) to[lane] = from_float<T>(values[lane]);
    }
}

// A block's share of the work: one chunk of one row.
struct Piece {
    i64 row, chunk;
};

// All chunks of all rows in turn, so that a grid of any size does all of it.
template <class Body> __device__ __forceinline__ void for_pieces(i64 rows, i64 chunks, Body body) {
    for (i64 item = blockIdx.x; item < rows * chunks; item += gridDim.x) {
        Piece piece;
        piece.row = item / chunks;
        piece.chunk = item - piece.row * chunks;
        body(piece);
    }
}

// A thread's groups of elements in a chunk: body(group, first element, how many there are, 1 to LANES).
template <class Body> __device__ __forceinline__ void for_groups(const Piece& piece, i64 dims, Body body) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        const i64 at = piece.chunk * CHUNK + ((i64)group * THREADS + threadIdx.x) * LANES;
        if (at < dims) body(group, at, dims - at < LANES ? (int)(dims - at) : LANES);
    }
}

// Rows in turn, one warp each: body(row).
template <class Body> __device__ __forceinline__ void for_rows(i64 rows, Body body) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) body(row);
}

// Sums of N values over the block; thread 0 has them.
template <int N> __device__ __forceinline__ void block_sum(float (&values)[N]) {
    __shared__ float of_warps[N][WARPS];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) values[n] += __shfl_down_sync(0xffffffffu, values[n], offset);
        if (threadIdx.x % WARP == 0) of_warps[n][threadIdx.x / WARP] = values[n];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float pairs[WARPS / 2];
#pragma unroll
            for (int w = 0; w < WARPS / 2; ++w) pairs[w] = of_warps[n][w] + of_warps[n][w + WARPS / 2];
            values[n] = (pairs[0] + pairs[2]) + (pairs[1] + pairs[3]);
        }
    }
    __syncthreads();  // of_warps is free again
}

// Partial sums are (rows, N, chunks): one row's are together.
template <int N> __device__ __forceinline__ void write_partials(float* partials, const Piece& piece, i64 chunks, const float (&values)[N]) {
    if (threadIdx.x == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) partials[(piece.row * N + n) * chunks + piece.chunk] = values[n];
    }
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
    return value;  // of lane 0
}

// Sums of one row over its chunks, by one warp; lane 0 has them.
template <int N> __device__ __forceinline__ void row_sums(const float* partials, i64 row, i64 chunks, double (&sums)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        double sum = 0.0;
        for (i64 chunk = threadIdx.x; chunk < chunks; chunk += WARP) sum += (double)partials[(row * N + n) * chunks + chunk];
        sums[n] = warp_sum(sum);
    }
}
