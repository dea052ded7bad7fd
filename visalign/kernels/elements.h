// Arithmetic of one element, for the device and for the host: the same functions, the same bits.
//
// Every fused multiply-add is written as fmaf and compilers must not form others (--fmad=false, -ffp-contract=off); division and square
// root are IEEE; logarithm, cosine and sine are the series below, not a library's. What a test computes on the host is what a device computes.
// No system header is included, so that NVRTC needs no include path.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#include <math.h>
#define HOST_DEVICE inline
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

HOST_DEVICE u32 bits_of(float value) {
    union { float f; u32 u; } same;
    same.f = value;
    return same.u;
}

HOST_DEVICE float float_of(u32 bits) {
    union { float f; u32 u; } same;
    same.u = bits;
    return same.f;
}

// ---- storage types: to float32 exactly, from float32 rounded to nearest, ties to even; NaN stays NaN. A device has instructions for it.

struct bf16 { u16 bits; };
struct f16 { u16 bits; };

HOST_DEVICE float to_float(float value) { return value; }

HOST_DEVICE float to_float(bf16 value) { return float_of((u32)value.bits << 16); }

HOST_DEVICE float to_float(f16 value) {
#ifdef __CUDA_ARCH__
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
    return out;
#else
    const u32 sign = (u32)(value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 0x1fu, mantissa = value.bits & 0x3ffu;
    if (exponent == 0) return float_of(sign | bits_of((float)mantissa * 0x1p-24f));  // zero and subnormals
    if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));      // infinity and NaN
    return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
#endif
}

template <class T> HOST_DEVICE T from_float(float value);

template <> HOST_DEVICE float from_float<float>(float value) { return value; }

template <> HOST_DEVICE bf16 from_float<bf16>(float value) {
    bf16 out;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const u32 bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) out.bits = 0x7fffu;  // NaN
    else out.bits = (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
    return out;
}

template <> HOST_DEVICE f16 from_float<f16>(float value) {
    f16 out;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const u32 sign = (bits_of(value) >> 16) & 0x8000u, bits = bits_of(value) & 0x7fffffffu;
    if (bits > 0x7f800000u) out.bits = (u16)(sign | 0x7fffu);                          // NaN
    else if (bits >= 0x477ff000u) out.bits = (u16)(sign | 0x7c00u);                    // 65520 and more: infinity
    else if (bits < 0x38800000u)                                                       // subnormal: the sum rounds at 2^-24
        out.bits = (u16)(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000u));
    else out.bits = (u16)(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
#endif
    return out;
}

// ---- noise: see visalign/maths/philox.py

struct Words { u32 w[4]; };

HOST_DEVICE Words philox(Words counter, u32 key0, u32 key1) {
    for (int round = 0; round < 10; ++round) {
        const u64 first = (u64)0xD2511F53u * counter.w[0], second = (u64)0xCD9E8D57u * counter.w[2];
        Words next;
        next.w[0] = (u32)(second >> 32) ^ counter.w[1] ^ key0;
        next.w[1] = (u32)second;
        next.w[2] = (u32)(first >> 32) ^ counter.w[3] ^ key1;
        next.w[3] = (u32)first;
        counter = next;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// ln(v) for v in [2^-33, 1]: v = m 2^e with m in (1/sqrt 2, sqrt 2], ln m = 2 artanh(f), f = (m - 1) / (m + 1), |f| < 0.172.
HOST_DEVICE float ln_of_unit(float v) {
    int exponent = (int)(bits_of(v) >> 23) - 127;
    float m = float_of((bits_of(v) & 0x7fffffu) | 0x3f800000u);
    if (m > 1.41421356f) {
        m *= 0.5f;
        exponent += 1;
    }
    const float f = (m - 1.0f) / (m + 1.0f), s = f * f;
    float series = fmaf(s, 1.0f / 11.0f, 1.0f / 9.0f);
    series = fmaf(s, series, 1.0f / 7.0f);
    series = fmaf(s, series, 1.0f / 5.0f);
    series = fmaf(s, series, 1.0f / 3.0f);
    const float twice = f + f;
    const float ln_m = fmaf(twice * s, series, twice), e = (float)exponent;
    return fmaf(e, 0.693145751953125f, fmaf(e, 1.42860682e-6f, ln_m));  // ln 2 in two parts: the first has 15 bits, e times it is exact
}

// cos and sin of 2 pi word / 2^32: quarter turns are taken off exactly, |angle| <= pi / 4 is left for the Taylor series.
HOST_DEVICE void cos_sin_of_turn(u32 word, float& cosine, float& sine) {
    const u32 quarter = (word + 0x20000000u) >> 30;  // the nearest, modulo 4: the sum wraps around
    const float t = (float)(int)(word - (quarter << 30)) * 1.46291807927e-9f;  // 2 pi / 2^32
    const float s = t * t;
    float even = fmaf(s, -2.75573192e-7f, 2.48015873e-5f);
    even = fmaf(s, even, -1.38888889e-3f);
    even = fmaf(s, even, 4.16666667e-2f);
    even = fmaf(s, even, -0.5f);
    const float c = fmaf(s, even, 1.0f);
    float odd = fmaf(s, 2.75573192e-6f, -1.98412698e-4f);
    odd = fmaf(s, odd, 8.33333333e-3f);
    odd = fmaf(s, odd, -1.66666667e-1f);
    const float d = fmaf(t * s, odd, t);
    cosine = quarter == 0 ? c : quarter == 1 ? -d : quarter == 2 ? -c : d;
    sine = quarter == 0 ? d : quarter == 1 ? c : quarter == 2 ? -d : -c;
}

// The four normals of one block of a sample's noise.
HOST_DEVICE void normals_of_block(u64 seed, u64 block, float* out) {
    Words counter;
    counter.w[0] = (u32)block;
    counter.w[1] = (u32)(block >> 32);
    counter.w[2] = counter.w[3] = 0;
    const Words words = philox(counter, (u32)seed, (u32)(seed >> 32));
    for (int pair = 0; pair < 2; ++pair) {
        const float unit = fmaf((float)words.w[2 * pair], 0x1p-32f, 0x1p-33f);  // (v + 1/2) / 2^32, in (0, 1]
        const float radius = sqrtf(-2.0f * ln_of_unit(unit));
        float cosine, sine;
        cos_sin_of_turn(words.w[2 * pair + 1], cosine, sine);
        out[2 * pair] = radius * cosine;
        out[2 * pair + 1] = radius * sine;
    }
}

// ---- linear combinations, in the order of the tensors. Every kernel that needs a mean or a velocity computes it here.

const int LANES = 8;  // neighbouring elements that one thread handles together

template <int K>
HOST_DEVICE float combine(float start, const float* coefficients, float factor, const float (&values)[K][LANES], int lane) {
    for (int k = 0; k < K; ++k) start = fmaf(coefficients[k] * factor, values[k][lane], start);
    return start;
}

HOST_DEVICE float add_square(float sum, float value) { return fmaf(value, value, sum); }
