// Log-probability of a stored sampler step and its divergences, forward and backward: reference.py says what, rows.cuh how rows are walked.
//
//   mean, v   = as in guided_step.cu, from x and the outputs; v_ref likewise from the reference's outputs
//   forward     sums of (x_next - mean)^2, (v - v_ref)^2, (v - v_old)^2 and v_old^2
//   backward    d/dm_k = factor [ c_k  g_log_prob (x_next - mean) / std^2  +  v_k c_v^2 / std^2 ( g_ref (v - v_ref) + g_old (v - v_old) ) ]
//               and, with guidance rescale, the gradient of the factor (a sum over the row) times its own gradient
//
// Specialised by macros: NUM_OUTPUTS, X_TYPE, NEXT_TYPE, OUTPUT_TYPE; USES_X, HAS_REFERENCE, HAS_OLD, RESCALE, CONDITIONAL.
#include "rows.cuh"

const int NUM_SUMS = 1 + HAS_REFERENCE + 2 * HAS_OLD;
const int REFERENCE_SLOTS = HAS_REFERENCE ? NUM_OUTPUTS : 1;

struct Args {
    const void* x;
    i64 x_stride;
    const void* x_next;
    i64 x_next_stride;
    const void* velocity_old;
    i64 velocity_old_stride;
    const void* outputs[NUM_OUTPUTS];
    i64 output_strides[NUM_OUTPUTS];
    const void* reference[REFERENCE_SLOTS];
    i64 reference_strides[REFERENCE_SLOTS];
    const float* factor;
    const float* reference_factor;
    const float* moments;          // (rows, 4), see guidance_rescale.cu
    float* partials;
    float* log_prob;
    float* kl_reference;
    float* kl_old;
    float* output_gap;
    const float* grad_log_prob;
    const float* grad_kl_reference;
    const float* grad_kl_old;
    float* grad_factor;
    void* grad_outputs[NUM_OUTPUTS];
    i64 rows, dims, chunks;
    double log_prob_scale, log_prob_constant, kl_scale, strength;
    float mean_x, mean_outputs[NUM_OUTPUTS], velocity_x, velocity_outputs[NUM_OUTPUTS];
    float by_mean, by_velocity;    // 1 / std^2 and c_v^2 / std^2
    float weights[NUM_OUTPUTS];
};
static_assert(sizeof(Args) == ARGS_SIZE, "the argument structure differs between Python and CUDA");

struct Elements {
    float x[LANES], next[LANES], old[LANES], outputs[NUM_OUTPUTS][LANES], reference[REFERENCE_SLOTS][LANES];
};

__device__ __forceinline__ void read(const Args& args, i64 row, i64 at, int count, Elements& of) {
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) of.x[lane] = of.old[lane] = 0.0f;
    if (USES_X) load(row_of<X_TYPE>(args.x, args.x_stride, row), at, count, of.x);
    load(row_of<NEXT_TYPE>(args.x_next, args.x_next_stride, row), at, count, of.next);
    if (HAS_OLD) load(row_of<float>(args.velocity_old, args.velocity_old_stride, row), at, count, of.old);
    load_each<OUTPUT_TYPE>(args.outputs, args.output_strides, row, at, count, of.outputs);
    if (HAS_REFERENCE) load_each<OUTPUT_TYPE>(args.reference, args.reference_strides, row, at, count, of.reference);
}

// Of guidance rescale, 1 without.
struct Factors {
    float own, reference;
};

__device__ __forceinline__ Factors factors_of(const Args& args, i64 row) {
    Factors found;
    found.own = RESCALE ? args.factor[row] : 1.0f;
    found.reference = RESCALE && HAS_REFERENCE ? args.reference_factor[row] : 1.0f;
    return found;
}

// What the step missed, and how far its velocity is from the others'.
struct Gaps {
    float next, reference, old;
};

__device__ __forceinline__ Gaps gaps(const Args& args, const Elements& of, const Factors& factors, int lane) {
    const float mean = combine<NUM_OUTPUTS>(args.mean_x * of.x[lane], args.mean_outputs, factors.own, of.outputs, lane);
    const float velocity = combine<NUM_OUTPUTS>(args.velocity_x * of.x[lane], args.velocity_outputs, factors.own, of.outputs, lane);
    Gaps found;
    found.next = of.next[lane] - mean;
    found.old = HAS_OLD ? velocity - of.old[lane] : 0.0f;
    found.reference = 0.0f;
    if (HAS_REFERENCE)
        found.reference = velocity - combine<REFERENCE_SLOTS>(args.velocity_x * of.x[lane], args.velocity_outputs, factors.reference,
                                                              of.reference, lane);
    return found;
}

extern "C" __global__ void __launch_bounds__(THREADS) transition_log_prob(const __grid_constant__ Args args) {
    for_pieces(args.rows, args.chunks, [&](const Piece& piece) {
        const Factors factors = factors_of(args, piece.row);
        float sums[NUM_SUMS] = {};
        for_groups(piece, args.dims, [&](int, i64 at, int count) {
            Elements of;
            read(args, piece.row, at, count, of);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {  // past the end everything is 0 and adds nothing
                const Gaps gap = gaps(args, of, factors, lane);
                sums[0] = add_square(sums[0], gap.next);
                if (HAS_REFERENCE) sums[HAS_REFERENCE] = add_square(sums[HAS_REFERENCE], gap.reference);
                if (HAS_OLD) {
                    sums[NUM_SUMS - 2] = add_square(sums[NUM_SUMS - 2], gap.old);
                    sums[NUM_SUMS - 1] = add_square(sums[NUM_SUMS - 1], of.old[lane]);
                }
            }
        });
        block_sum(sums);
        write_partials(args.partials, piece, args.chunks, sums);
    });
}

extern "C" __global__ void __launch_bounds__(WARP) transition_log_prob_finish(const __grid_constant__ Args args) {
    for_rows(args.rows, [&](i64 row) {
        double sums[NUM_SUMS];
        row_sums(args.partials, row, args.chunks, sums);
        if (threadIdx.x != 0) return;
        args.log_prob[row] = (float)(args.log_prob_scale * sums[0] + args.log_prob_constant);
        if (HAS_REFERENCE) args.kl_reference[row] = (float)(args.kl_scale * sums[HAS_REFERENCE]);
        if (HAS_OLD) {
            const double norm = sqrt(sums[NUM_SUMS - 1]);
            args.kl_old[row] = (float)(args.kl_scale * sums[NUM_SUMS - 2]);
            args.output_gap[row] = (float)(sqrt(sums[NUM_SUMS - 2]) / (norm > 1e-12 ? norm : 1e-12));
        }
    });
}

// Gradients with respect to mean and velocity.
struct Slopes {
    float mean, velocity;
};

__device__ __forceinline__ Slopes slopes(const Args& args, i64 row, const Gaps& gap) {
    Slopes found;
    found.mean = args.grad_log_prob[row] * args.by_mean * gap.next;
    found.velocity = 0.0f;
    if (HAS_REFERENCE) found.velocity = fmaf(args.grad_kl_reference[row] * args.by_velocity, gap.reference, found.velocity);
    if (HAS_OLD) found.velocity = fmaf(args.grad_kl_old[row] * args.by_velocity, gap.old, found.velocity);
    return found;
}

// Gradient of the factor: sum_d slope_mean sum_k c_k m_k + slope_velocity sum_k v_k m_k.
extern "C" __global__ void __launch_bounds__(THREADS) transition_log_prob_factor(const __grid_constant__ Args args) {
    for_pieces(args.rows, args.chunks, [&](const Piece& piece) {
        const Factors factors = factors_of(args, piece.row);
        float sums[1] = {};
        for_groups(piece, args.dims, [&](int, i64 at, int count) {
            Elements of;
            read(args, piece.row, at, count, of);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Slopes slope = slopes(args, piece.row, gaps(args, of, factors, lane));
                sums[0] = fmaf(slope.mean, combine<NUM_OUTPUTS>(0.0f, args.mean_outputs, 1.0f, of.outputs, lane), sums[0]);
                sums[0] = fmaf(slope.velocity, combine<NUM_OUTPUTS>(0.0f, args.velocity_outputs, 1.0f, of.outputs, lane), sums[0]);
            }
        });
        block_sum(sums);
        write_partials(args.partials, piece, args.chunks, sums);
    });
}

extern "C" __global__ void __launch_bounds__(WARP) transition_log_prob_factor_finish(const __grid_constant__ Args args) {
    for_rows(args.rows, [&](i64 row) {
        double sums[1];
        row_sums(args.partials, row, args.chunks, sums);
        if (threadIdx.x == 0) args.grad_factor[row] = (float)sums[0];
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) transition_log_prob_backward(const __grid_constant__ Args args) {
    for_pieces(args.rows, args.chunks, [&](const Piece& piece) {
        const i64 row = piece.row;
        const Factors factors = factors_of(args, row);
        float mean_m = 0.0f, mean_p = 0.0f, by_m = 0.0f, by_p = 0.0f;  // see guidance_rescale/reference.py
        if (RESCALE) {
            mean_m = args.moments[row * 4];
            mean_p = args.moments[row * 4 + 2];
            const double std_m = args.moments[row * 4 + 1], std_p = args.moments[row * 4 + 3];
            const double scale = (double)args.grad_factor[row] * args.strength / (double)(args.dims - 1);
            by_m = (float)(-scale * std_p / (std_m * std_m * std_m));
            by_p = (float)(scale / (std_m * std_p));
        }
        for_groups(piece, args.dims, [&](int, i64 at, int count) {
            Elements of;
            read(args, row, at, count, of);
            float grads[NUM_OUTPUTS][LANES];
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Slopes slope = slopes(args, row, gaps(args, of, factors, lane));
                const float combined = RESCALE ? combine<NUM_OUTPUTS>(0.0f, args.weights, 1.0f, of.outputs, lane) : 0.0f;
#pragma unroll
                for (int k = 0; k < NUM_OUTPUTS; ++k) {
                    grads[k][lane] = factors.own * fmaf(args.velocity_outputs[k], slope.velocity, args.mean_outputs[k] * slope.mean);
                    if (RESCALE) grads[k][lane] = fmaf(args.weights[k] * by_m, combined - mean_m, grads[k][lane]);
                    if (RESCALE && k == CONDITIONAL) grads[k][lane] = fmaf(by_p, of.outputs[k][lane] - mean_p, grads[k][lane]);
                }
            }
#pragma unroll
            for (int k = 0; k < NUM_OUTPUTS; ++k) store(row_of<OUTPUT_TYPE>(args.grad_outputs[k], args.dims, row), at, count, grads[k]);
        });
    });
}
