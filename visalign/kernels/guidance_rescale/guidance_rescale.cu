// The factor of guidance rescale, F = strength std(p) / std(m) + 1 - strength, with m = sum_k w_k m_k and p one of the m_k.
//
// Means and squared deviations are taken chunk by chunk around the chunk's own mean, and joined in float64: no difference of large sums.
// Specialised by macros: NUM_OUTPUTS, CONDITIONAL, OUTPUT_TYPE.
#include "rows.cuh"

struct Args {
    const void* outputs[NUM_OUTPUTS];
    i64 output_strides[NUM_OUTPUTS];
    float* partials;  // (rows, 4, chunks): mean and squared deviations of m, then of p
    float* moments;   // (rows, 4): mean and standard deviation of m, then of p
    float* factor;
    i64 rows, dims, chunks;
    double strength;
    float weights[NUM_OUTPUTS];
};
static_assert(sizeof(Args) == ARGS_SIZE, "the argument structure differs between Python and CUDA");

__device__ __forceinline__ i64 size_of_chunk(i64 chunk, i64 dims) {
    return dims - chunk * CHUNK < CHUNK ? dims - chunk * CHUNK : CHUNK;
}

extern "C" __global__ void __launch_bounds__(THREADS) guidance_rescale(const __grid_constant__ Args args) {
    __shared__ float means[2];
    for_pieces(args.rows, args.chunks, [&](const Piece& piece) {
        float values[2][GROUPS * LANES] = {};
        float sums[2] = {0.0f, 0.0f}, deviations[2] = {0.0f, 0.0f};
        for_groups(piece, args.dims, [&](int group, i64 at, int count) {
            float outputs[NUM_OUTPUTS][LANES];
            load_each<OUTPUT_TYPE>(args.outputs, args.output_strides, piece.row, at, count, outputs);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                values[0][group * LANES + lane] = combine<NUM_OUTPUTS>(0.0f, args.weights, 1.0f, outputs, lane);
                values[1][group * LANES + lane] = outputs[CONDITIONAL][lane];
                for (int n = 0; n < 2; ++n) sums[n] += values[n][group * LANES + lane];  // lanes past the end are 0
            }
        });
        block_sum(sums);
        if (threadIdx.x == 0)
            for (int n = 0; n < 2; ++n) means[n] = sums[n] / (float)size_of_chunk(piece.chunk, args.dims);
        __syncthreads();
        for_groups(piece, args.dims, [&](int group, i64, int count) {
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane)
                for (int n = 0; n < 2; ++n)
                    if (lane < count) deviations[n] = add_square(deviations[n], values[n][group * LANES + lane] - means[n]);
        });
        block_sum(deviations);
        const float written[4] = {means[0], deviations[0], means[1], deviations[1]};
        write_partials(args.partials, piece, args.chunks, written);
        __syncthreads();  // means are free again
    });
}

extern "C" __global__ void __launch_bounds__(WARP) guidance_rescale_finish(const __grid_constant__ Args args) {
    for_rows(args.rows, [&](i64 row) {
        double standard[2];
        for (int n = 0; n < 2; ++n) {
            const float* means = args.partials + (row * 4 + 2 * n) * args.chunks;
            const float* deviations = means + args.chunks;
            double sum = 0.0, squares = 0.0;
            for (i64 chunk = threadIdx.x; chunk < args.chunks; chunk += WARP)
                sum += (double)size_of_chunk(chunk, args.dims) * (double)means[chunk];
            const double mean = __shfl_sync(0xffffffffu, warp_sum(sum), 0) / (double)args.dims;
            for (i64 chunk = threadIdx.x; chunk < args.chunks; chunk += WARP) {
                const double away = (double)means[chunk] - mean;
                squares += (double)deviations[chunk] + (double)size_of_chunk(chunk, args.dims) * away * away;
            }
            standard[n] = sqrt(warp_sum(squares) / (double)(args.dims - 1));
            if (threadIdx.x == 0) {
                args.moments[row * 4 + 2 * n] = (float)mean;
                args.moments[row * 4 + 2 * n + 1] = (float)standard[n];
            }
        }
        if (threadIdx.x == 0) args.factor[row] = (float)(args.strength * standard[1] / standard[0] + (1.0 - args.strength));
    });
}
