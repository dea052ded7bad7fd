// The functions of elements.h, over arrays.
#include "elements.h"

extern "C" {

void widen_bf16(const u16* from, float* to, i64 count) {
    for (i64 i = 0; i < count; ++i) to[i] = to_float(bf16{from[i]});
}

void widen_f16(const u16* from, float* to, i64 count) {
    for (i64 i = 0; i < count; ++i) to[i] = to_float(f16{from[i]});
}

void round_bf16(const float* from, u16* to, i64 count) {
    for (i64 i = 0; i < count; ++i) to[i] = from_float<bf16>(from[i]).bits;
}

void round_f16(const float* from, u16* to, i64 count) {
    for (i64 i = 0; i < count; ++i) to[i] = from_float<f16>(from[i]).bits;
}

void words(const u32* counter, const u32* key, u32* out) {
    Words given;
    for (int i = 0; i < 4; ++i) given.w[i] = counter[i];
    const Words found = philox(given, key[0], key[1]);
    for (int i = 0; i < 4; ++i) out[i] = found.w[i];
}

void normals(i64 seed, i64 first_block, float* out, i64 blocks) {
    for (i64 block = 0; block < blocks; ++block) normals_of_block((u64)seed, (u64)(first_block + block), out + 4 * block);
}

void logarithms(const float* from, float* to, i64 count) {
    for (i64 i = 0; i < count; ++i) to[i] = ln_of_unit(from[i]);
}

void turns(const u32* from, float* cosine, float* sine, i64 count) {
    for (i64 i = 0; i < count; ++i) cos_sin_of_turn(from[i], cosine[i], sine[i]);
}
}
