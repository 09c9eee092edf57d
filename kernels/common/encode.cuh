// Values -> stored codes: round to nearest even, saturating. The same bits on every architecture and in NumPy (quantize_reference.py), so
// nothing here approximates, and nothing is fused but in `quotient`, whose result is the correctly rounded one.
#pragma once
#include "common/numbers.cuh"

template <int kElement>
constexpr float kElementMax = kElement == kE4m3      ? 448.f
                              : kElement == kE5m2    ? 57344.f
                              : kElement == kInt8    ? 127.f
                              : kElement == kInt4x2  ? 7.f
                              : kElement == kUint4x2 ? 15.f
                                                     : 6.f;
template <int kElement>
constexpr bool kIsFp8 = kElement == kE4m3 || kElement == kE5m2;

constexpr float kLargest = 0x1.fffffep+127f;
constexpr u32 kNan = 0x7FC00000u;
constexpr u32 kNanCode = 0x7F;  // of e4m3 and e5m2

// Two values -> two fp8 codes, the first in the low byte. NaN becomes 0x7F without its sign, as the hardware has it.
template <int kElement>
__device__ __forceinline__ u32 encode_fp8(float x) {
    constexpr int kDropped = kElement == kE4m3 ? 20 : 21;  // fp32 mantissa bits that fp8 lacks
    constexpr u32 kBias = kElement == kE4m3 ? 120 : 112;   // difference of the exponent biases
    constexpr u32 kMinNormal = (kBias + 1) << 23;          // fp32 bits of the smallest normal fp8
    constexpr u32 kMagic = (kBias + 1 + kDropped) << 23;   // adding it rounds to the subnormals' spacing
    const u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return kNanCode;
    const u32 magnitude = smaller(bits & 0x7FFFFFFFu, __float_as_uint(kElementMax<kElement>));
    if (magnitude < kMinNormal) return sign | (__float_as_uint(add(__uint_as_float(magnitude), __uint_as_float(kMagic))) - kMagic);
    const u32 rounded = magnitude + (1u << (kDropped - 1)) - 1 + (magnitude >> kDropped & 1);
    return sign | ((rounded >> kDropped) - (kBias << (23 - kDropped)));
}

template <int kElement>
__device__ __forceinline__ u32 encode_fp8x2(float low, float high) {
#if __CUDA_ARCH__ >= 890
    u16 r;
    if constexpr (kElement == kE4m3)
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
#else
    return encode_fp8<kElement>(low) | encode_fp8<kElement>(high) << 8;
#endif
}

// The code in the upper four bits. Adding 2^22, 2^23 or 2^24 rounds to the spacing of e2m1 in its binade, 1/2, 1 or 2, and counts it in the
// low bits of the sum; the exponent above them, twice, counts two codes for each binade. Six more units make that come out modulo 8.
// NOTE: 9 instructions; seven comparisons take 27, and cvt.e2m1x2 exists from sm_100 on only.
__device__ __forceinline__ u32 encode_e2m1(float x) {
    const float size = minimum(fabsf(x), 6.f);
    const u32 magic = larger(__float_as_uint(size) & 0x7F800000u, 0x3F800000u) + (22u << 23) + 6;
    const u32 sum = __float_as_uint(add(size, __uint_as_float(magic)));
    return (sum + (sum >> 22)) << 28 & 0x70000000u | __float_as_uint(x) & 0x80000000u;
}

// Integers below 2^22 in the low bits of the sum; negative ones in two's complement.
__device__ __forceinline__ u32 encode_integer(float x, float low, float high) {
    return __float_as_uint(add(minimum(maximum(x, low), high), 12582912.f));  // 1.5 * 2^23
}

// kCodes values -> a word of their codes, the first in the low bits. `zero`: added to uint4 codes.
template <int kElement>
constexpr int kCodes = kPacked<kElement> ? 8 : 4;

template <int kElement>
__device__ __forceinline__ u32 encode_word(const float (&v)[kCodes<kElement>], float zero = 0.f) {
    if constexpr (kIsFp8<kElement>) {
        return permute_bytes(encode_fp8x2<kElement>(v[0], v[1]), encode_fp8x2<kElement>(v[2], v[3]), 0x5410);
    } else if constexpr (kElement == kE2m1x2) {
        u32 word = 0;
#pragma unroll
        for (int i = 7; i >= 0; --i) word = __funnelshift_l(encode_e2m1(v[i]), word, 4);
        return word;
    } else if constexpr (kElement == kInt8) {
        u32 code[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) code[i] = encode_integer(v[i], -127.f, 127.f);
        return permute_bytes(permute_bytes(code[0], code[1], 0x40), permute_bytes(code[2], code[3], 0x40), 0x5410);
    } else {
        constexpr float kMax = kElementMax<kElement>;
        u32 word = 0;
#pragma unroll
        for (int i = 7; i >= 0; --i) {
            u32 code = kElement == kUint4x2 ? encode_integer(v[i], -zero, kMax - zero) + static_cast<u32>(zero)
                                            : encode_integer(v[i], -kMax, kMax);
            word = __funnelshift_l(code << 28, word, 4);
        }
        return word;
    }
}

// A divisor for many quotients. NOTE: an infinite one becomes zeros, with which finite x give 0 and others NaN, as they do divided by inf.
struct Divisor {
    float value, reciprocal;
};

__device__ __forceinline__ Divisor divide_by(float scale) {
    if (scale > kLargest) return {0.f, 0.f};
    return {scale, divide(1.f, scale)};
}

// x / divisor, with the bits of the IEEE quotient wherever that decides a code: from 2^-18 up, for divisors of 2^-85 .. 2^126.
// The first correction leaves less than one unit in the last place; then the remainder is exact, and Markstein's theorem makes the second
// round correctly. Five multiply-adds beside the twenty instructions of `divide`. Source: P. Markstein, IBM J. Res. Dev. 34 (1990).
__device__ __forceinline__ float quotient(float x, const Divisor& d) {
    float q = x * d.reciprocal;
    q = fmaf(fmaf(-q, d.value, x), d.reciprocal, q);
    q = fmaf(fmaf(-q, d.value, x), d.reciprocal, q);
    return __uint_as_float(__float_as_uint(q) & 0x7FFFFFFFu | __float_as_uint(x) & 0x80000000u);  // the corrections lose the sign of -0
}

// The largest |x| seen so far. fp8 leaves NaN out; elsewhere it stays. NaN and inf have the largest bits.
template <bool kLeaveNan>
__device__ __forceinline__ float larger_size(float amax, float x) {
    return kLeaveNan ? maximum(amax, fabsf(x)) : maximum_or_nan(amax, fabsf(x));
}

// scale = max(amax, eps) / largest, or the power of two above it.
__device__ __forceinline__ float float_scale(float amax, float eps, float largest, bool power_of_two) {
    const float scale = divide(maximum(amax, eps), largest);
    return power_of_two ? __uint_as_float(__float_as_uint(scale) + 0x7FFFFFu & 0x7F800000u) : scale;
}

// The smallest power of two that is at least x >= 0, among 2^-127 .. 2^127, as e8m0.
__device__ __forceinline__ u32 encode_e8m0_up(float x) {
    const u32 bits = __float_as_uint(x);
    return bits <= 0x400000u ? 0 : smaller(bits + 0x7FFFFFu >> 23, 254u);
}

__device__ __forceinline__ float decode_e8m0(u32 code) { return __uint_as_float(code == 0 ? 0x400000u : code == 255 ? kNan : code << 23); }
