// From fp32 results to stored ones: rounded once, to nearest even.
#pragma once
#include "common/numbers.cuh"

template <int kType>
constexpr int kStoredBytes = kType == kFp32 ? 4 : 2;

// Two neighbours along n, contiguous and aligned to their joint size.
template <int kType>
__device__ __forceinline__ void store_pair(u64 address, float x0, float x1) {
    if constexpr (kType == kFp32)
        asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x0), "f"(x1) : "memory");
    else
        *reinterpret_cast<u32*>(address) = kType == kBf16 ? pack_bf16(x0, x1) : pack_fp16(x0, x1);
}

template <int kType>
__device__ __forceinline__ void store_one(u64 address, float x) {
    if constexpr (kType == kFp32)
        *reinterpret_cast<float*>(address) = x;
    else
        *reinterpret_cast<u16*>(address) = static_cast<u16>(kType == kBf16 ? pack_bf16(x, x) : pack_fp16(x, x));
}
