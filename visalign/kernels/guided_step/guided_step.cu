// One sampler step in one pass: visalign/kernels/guided_step/reference.py says what, visalign/kernels/rows.cuh how rows are walked.
//
//   mean     = c_x x + sum_k c_k factor m_k + sum_j c_j g_j           velocity likewise
//   x_next   = round(mean + std noise)                                 noise given, or made here (Philox)
//   log_prob = constant + scale sum_d (x_next - mean)^2                of the rounded x_next
//
// Specialised by macros: NUM_OUTPUTS, NUM_GRADIENTS; X_TYPE, OUTPUT_TYPE, GRADIENT_TYPE, NEXT_TYPE; NOISE (0 none, 1 given, 2 Philox);
// USES_X, RESCALE, WRITES_MEAN, WRITES_VELOCITY, LOG_PROB.
#include "rows.cuh"

const int GRADIENT_SLOTS = NUM_GRADIENTS > 0 ? NUM_GRADIENTS : 1;

struct Args {
    const void* x;
    i64 x_stride;
    const void* outputs[NUM_OUTPUTS];
    i64 output_strides[NUM_OUTPUTS];
    const void* gradients[GRADIENT_SLOTS];
    i64 gradient_strides[GRADIENT_SLOTS];
    const void* noise;
    i64 noise_stride;
    const i64* seeds;
    const float* factor;
    void* x_next;
    float* mean;
    float* velocity;
    float* partials;
    float* log_prob;
    i64 rows, dims, chunks;
    double log_prob_scale, log_prob_constant;
    float mean_x, mean_outputs[NUM_OUTPUTS], mean_gradients[GRADIENT_SLOTS];
    float velocity_x, velocity_outputs[NUM_OUTPUTS], velocity_gradients[GRADIENT_SLOTS];
    float std;
};
static_assert(sizeof(Args) == ARGS_SIZE, "the argument structure differs between Python and CUDA");

extern "C" __global__ void __launch_bounds__(THREADS) guided_step(const __grid_constant__ Args args) {
    for_pieces(args.rows, args.chunks, [&](const Piece& piece) {
        const i64 row = piece.row;
        const float factor = RESCALE ? args.factor[row] : 1.0f;
        float squares[1] = {0.0f};
        for_groups(piece, args.dims, [&](int, i64 at, int count) {
            float x[LANES] = {}, noise[LANES] = {}, outputs[NUM_OUTPUTS][LANES], gradients[GRADIENT_SLOTS][LANES] = {};
            if (USES_X) load(row_of<X_TYPE>(args.x, args.x_stride, row), at, count, x);
            load_each<OUTPUT_TYPE>(args.outputs, args.output_strides, row, at, count, outputs);
            if (NUM_GRADIENTS > 0) load_each<GRADIENT_TYPE>(args.gradients, args.gradient_strides, row, at, count, gradients);
            if (NOISE == 1) load(row_of<float>(args.noise, args.noise_stride, row), at, count, noise);
            if (NOISE == 2) {
                const u64 seed = (u64)args.seeds[row];
                normals_of_block(seed, (u64)at / 4, noise);
                normals_of_block(seed, (u64)at / 4 + 1, noise + 4);
            }
            float mean[LANES], velocity[LANES], next[LANES];
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                mean[lane] = combine<NUM_OUTPUTS>(args.mean_x * x[lane], args.mean_outputs, factor, outputs, lane);
                velocity[lane] = combine<NUM_OUTPUTS>(args.velocity_x * x[lane], args.velocity_outputs, factor, outputs, lane);
                if (NUM_GRADIENTS > 0) {
                    mean[lane] = combine<GRADIENT_SLOTS>(mean[lane], args.mean_gradients, 1.0f, gradients, lane);
                    velocity[lane] = combine<GRADIENT_SLOTS>(velocity[lane], args.velocity_gradients, 1.0f, gradients, lane);
                }
                const float drawn = NOISE ? fmaf(args.std, noise[lane], mean[lane]) : mean[lane];
                next[lane] = to_float(from_float<NEXT_TYPE>(drawn));  // the value that is stored, and that an update will see
                if (LOG_PROB && lane < count) squares[0] = add_square(squares[0], next[lane] - mean[lane]);
            }
            store(row_of<NEXT_TYPE>(args.x_next, args.dims, row), at, count, next);
            if (WRITES_MEAN) store(row_of<float>(args.mean, args.dims, row), at, count, mean);
            if (WRITES_VELOCITY) store(row_of<float>(args.velocity, args.dims, row), at, count, velocity);
        });
        if (LOG_PROB) {
            block_sum(squares);
            write_partials(args.partials, piece, args.chunks, squares);
        }
    });
}

extern "C" __global__ void __launch_bounds__(WARP) guided_step_finish(const __grid_constant__ Args args) {
    for_rows(args.rows, [&](i64 row) {
        double squares[1];
        row_sums(args.partials, row, args.chunks, squares);
        if (threadIdx.x == 0) args.log_prob[row] = (float)(args.log_prob_scale * squares[0] + args.log_prob_constant);
    });
}
