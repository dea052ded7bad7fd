// Squared errors of policy and reference on noised samples, forward and backward: reference.py says what, rows.cuh how rows are walked.
//
//   f = sum_k a_k m_k + a_x0 x0 + a_noise noise,   y = b_x0 x0 + b_noise noise,   one set of scalars per row
//   forward    sums of (f - y)^2, (f_ref - y)^2, (f - f_ref)^2, f^2, f_ref^2 and of the mask
//   backward   d/dm_k = 2 a_k / count [ g_error (f - y) + g_gap (f - f_ref) ]
//
// Specialised by macros: NUM_OUTPUTS, OUTPUT_TYPE; USES_X0, USES_NOISE, HAS_REFERENCE, HAS_MASK, NORMS.
#include "rows.cuh"

const int REFERENCE_SLOTS = HAS_REFERENCE ? NUM_OUTPUTS : 1;
const int OF_REFERENCE = 1, OF_GAP = 2, OF_NORM = 1 + 2 * HAS_REFERENCE;  // places among the sums, the policy's error first
const int OF_COUNT = OF_NORM + NORMS * (1 + HAS_REFERENCE), NUM_SUMS = OF_COUNT + HAS_MASK;
const int SCALARS = NUM_OUTPUTS + 4;

struct Args {
    const void* x0;
    i64 x0_stride;
    const void* noise;
    i64 noise_stride;
    const void* mask;
    i64 mask_stride;
    const void* outputs[NUM_OUTPUTS];
    i64 output_strides[NUM_OUTPUTS];
    const void* reference[REFERENCE_SLOTS];
    i64 reference_strides[REFERENCE_SLOTS];
    const float* scalars;  // (rows, SCALARS)
    float* partials;
    float* error;
    float* error_reference;
    float* gap;
    float* norm;
    float* norm_reference;
    float* count;
    const float* grad_error;
    const float* grad_gap;
    void* grad_outputs[NUM_OUTPUTS];
    i64 rows, dims, chunks;
};
static_assert(sizeof(Args) == ARGS_SIZE, "the argument structure differs between Python and CUDA");

struct Elements {
    float x0[LANES], noise[LANES], outputs[NUM_OUTPUTS][LANES], reference[REFERENCE_SLOTS][LANES];
    bool kept[LANES];
};

__device__ __forceinline__ void read(const Args& args, i64 row, i64 at, int count, Elements& of) {
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) of.x0[lane] = of.noise[lane] = 0.0f;
    if (USES_X0) load(row_of<float>(args.x0, args.x0_stride, row), at, count, of.x0);
    if (USES_NOISE) load(row_of<float>(args.noise, args.noise_stride, row), at, count, of.noise);
    load_each<OUTPUT_TYPE>(args.outputs, args.output_strides, row, at, count, of.outputs);
    if (HAS_REFERENCE) load_each<OUTPUT_TYPE>(args.reference, args.reference_strides, row, at, count, of.reference);
    const unsigned char* mask = row_of<unsigned char>(args.mask, args.mask_stride, row);
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) of.kept[lane] = lane < count && (!HAS_MASK || mask[at + lane] != 0);
}

struct Answers {
    float own, held, target;
};

__device__ __forceinline__ Answers answers(const float (&scalars)[SCALARS], const Elements& of, int lane) {
    const float state = fmaf(scalars[NUM_OUTPUTS + 1], of.noise[lane], scalars[NUM_OUTPUTS] * of.x0[lane]);
    Answers found;
    found.own = combine<NUM_OUTPUTS>(state, scalars, 1.0f, of.outputs, lane);
    found.held = HAS_REFERENCE ? combine<REFERENCE_SLOTS>(state, scalars, 1.0f, of.reference, lane) : 0.0f;
    found.target = fmaf(scalars[NUM_OUTPUTS + 3], of.noise[lane], scalars[NUM_OUTPUTS + 2] * of.x0[lane]);
    return found;
}

__device__ __forceinline__ void read_scalars(const Args& args, i64 row, float (&scalars)[SCALARS]) {
#pragma unroll
    for (int s = 0; s < SCALARS; ++s) scalars[s] = args.scalars[row * SCALARS + s];
}

extern "C" __global__ void __launch_bounds__(THREADS) paired_error(const __grid_constant__ Args args) {
    for_pieces(args.rows, args.chunks, [&](const Piece& piece) {
        float scalars[SCALARS], sums[NUM_SUMS] = {};
        read_scalars(args, piece.row, scalars);
        for_groups(piece, args.dims, [&](int, i64 at, int count) {
            Elements of;
            read(args, piece.row, at, count, of);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {  // past the end everything is 0 and adds nothing
                const Answers found = answers(scalars, of, lane);
                if (NORMS) sums[OF_NORM] = add_square(sums[OF_NORM], found.own);
                if (NORMS && HAS_REFERENCE) sums[OF_COUNT - 1] = add_square(sums[OF_COUNT - 1], found.held);
                if (!of.kept[lane]) continue;
                sums[0] = add_square(sums[0], found.own - found.target);
                if (HAS_REFERENCE) {
                    sums[OF_REFERENCE] = add_square(sums[OF_REFERENCE], found.held - found.target);
                    sums[OF_GAP] = add_square(sums[OF_GAP], found.own - found.held);
                }
                if (HAS_MASK) sums[NUM_SUMS - 1] += 1.0f;
            }
        });
        block_sum(sums);
        write_partials(args.partials, piece, args.chunks, sums);
    });
}

extern "C" __global__ void __launch_bounds__(WARP) paired_error_finish(const __grid_constant__ Args args) {
    for_rows(args.rows, [&](i64 row) {
        double sums[NUM_SUMS];
        row_sums(args.partials, row, args.chunks, sums);
        if (threadIdx.x != 0) return;
        const double count = HAS_MASK ? sums[NUM_SUMS - 1] : (double)args.dims;
        args.count[row] = (float)count;
        args.error[row] = (float)(sums[0] / count);
        if (HAS_REFERENCE) {
            args.error_reference[row] = (float)(sums[OF_REFERENCE] / count);
            args.gap[row] = (float)(sums[OF_GAP] / count);
        }
        if (NORMS) args.norm[row] = (float)sqrt(sums[OF_NORM]);
        if (NORMS && HAS_REFERENCE) args.norm_reference[row] = (float)sqrt(sums[OF_COUNT - 1]);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) paired_error_backward(const __grid_constant__ Args args) {
    for_pieces(args.rows, args.chunks, [&](const Piece& piece) {
        const i64 row = piece.row;
        float scalars[SCALARS];
        read_scalars(args, row, scalars);
        const float twice = 2.0f / args.count[row];
        const float by_error = twice * args.grad_error[row], by_gap = HAS_REFERENCE ? twice * args.grad_gap[row] : 0.0f;
        for_groups(piece, args.dims, [&](int, i64 at, int count) {
            Elements of;
            read(args, row, at, count, of);
            float grads[NUM_OUTPUTS][LANES];
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Answers found = answers(scalars, of, lane);
                float slope = by_error * (found.own - found.target);
                if (HAS_REFERENCE) slope = fmaf(by_gap, found.own - found.held, slope);
                if (!of.kept[lane]) slope = 0.0f;
#pragma unroll
                for (int k = 0; k < NUM_OUTPUTS; ++k) grads[k][lane] = scalars[k] * slope;
            }
#pragma unroll
            for (int k = 0; k < NUM_OUTPUTS; ++k) store(row_of<OUTPUT_TYPE>(args.grad_outputs[k], args.dims, row), at, count, grads[k]);
        });
    });
}
