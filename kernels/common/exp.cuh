// exp and silu in fp32 from operations that IEEE 754 defines: the same bits as NumPy's (cugemm/rows_reference.py), on every GPU.
#pragma once
#include "common/ptx.cuh"

// exp(x) = 2**n * exp(r), n = x / ln 2 rounded, r = x - n ln 2. Within 1 ulp; NaN gives NaN, overflow inf.
// NOTE: every product and sum is rounded on its own. A fused one, or ex2.approx, would be more exact or quicker, and not what NumPy does.
__device__ __forceinline__ float exp32(float x) {
    constexpr float kMagic = 12582912.f;                      // 1.5 * 2**23: adding it rounds to an integer, which its low bits then hold
    const float bounded = minimum(maximum(x, -105.f), 89.f);  // beyond, exp is 0 and inf
    const float shifted = add(multiply(bounded, 0x1.715476p+0f), kMagic);
    const i32 n = static_cast<i32>(__float_as_uint(shifted) - __float_as_uint(kMagic));
    const float count = add(shifted, -kMagic);
    // ln 2 in two parts; the first has 16 bits, so that count times it is exact.
    const float r = add(add(bounded, -multiply(count, 0x1.62e4p-1f)), -multiply(count, 0x1.7f7d1cp-20f));
    // Least maximum of |exp(r) - 1 - r - r**2 q(r)| / exp(r) over |r| <= ln 2 / 2: 2**-27.8.
    float q = 0x1.6a2256p-10f;
    q = add(multiply(q, r), 0x1.123b02p-7f);
    q = add(multiply(q, r), 0x1.5558f8p-5f);
    q = add(multiply(q, r), 0x1.55549p-3f);
    q = add(multiply(q, r), 0x1.fffffcp-2f);
    const float e = add(add(multiply(multiply(r, r), q), r), 1.f);
    // 2**n in two factors, as n reaches below the exponents of normal numbers: the first product is exact, the second rounds subnormals.
    const i32 half = n >> 1;
    const float scaled = multiply(multiply(e, __uint_as_float((half + 127) << 23)), __uint_as_float((n - half + 127) << 23));
    return x == x ? scaled : x;
}

// x / (1 + exp(-x)), without the overflow of exp(-x) below -88; -inf gives NaN, as that quotient does. Within 3.3 ulp above -86, where
// exp(x) is a normal number, and within 4e-43 below.
__device__ __forceinline__ float silu(float x) {
    const float e = exp32(-fabsf(x));
    return divide(x < 0.f ? multiply(x, e) : x, add(e, 1.f));
}
