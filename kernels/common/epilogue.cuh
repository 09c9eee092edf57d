// From fp32 results to stored ones: rounded once, to nearest even.
#pragma once
#include "common/numbers.cuh"

// `count` neighbours along n, at most four. One store where all four are contiguous and aligned, else one each.
__device__ __forceinline__ void store_four(u64 out, i64 index, i64 column_stride, int type, const float (&x)[4], int count) {
    const bool together = count == 4 && column_stride == 1;
    if (type == kFp32) {
        float* p = reinterpret_cast<float*>(out) + index;
        if (together && reinterpret_cast<u64>(p) % 16 == 0) {
            *reinterpret_cast<float4*>(p) = {x[0], x[1], x[2], x[3]};
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count) p[i * column_stride] = x[i];
    } else {
        u16* p = reinterpret_cast<u16*>(out) + index;
        const u32 low = type == kBf16 ? pack_bf16(x[0], x[1]) : pack_fp16(x[0], x[1]);
        const u32 high = type == kBf16 ? pack_bf16(x[2], x[3]) : pack_fp16(x[2], x[3]);
        if (together && reinterpret_cast<u64>(p) % 8 == 0) {
            *reinterpret_cast<uint2*>(p) = {low, high};
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count) p[i * column_stride] = static_cast<u16>((i < 2 ? low : high) >> (i % 2 * 16));
    }
}
