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
    return kElement == kE4m3 ? encode_e4m3_sm89(low, high) : encode_e5m2_sm89(low, high);
#else
    return encode_fp8<kElement>(low) | encode_fp8<kElement>(high) << 8;
#endif
}

// Rounded to an integer in the low bits of the sum, two's complement, below the bits of the number added: 1.5 * 2^23.
constexpr u32 kIntegerBits = 0x4B400000u;
__device__ __forceinline__ u32 encode_integer(float x) { return __float_as_uint(add(x, __uint_as_float(kIntegerBits))); }

// Half a value -> its magnitude's code in the low bits of the sum, below those of 2^23. Codes count 1/2 up to 2, 1 up to 4, 2 up to 6: a term each, of which
// at most one is no integer, so that the additions round once, ties to even codes, and saturate.
// NOTE: all of it runs in the pipe of multiply-adds, at twice the rate of comparisons and logic. cvt.e2m1x2 exists from sm_100 on only.
constexpr u32 kE2m1Bits = 0x4B000000u;
__device__ __forceinline__ u32 encode_e2m1(float half) {
    const float size = fabsf(half), sum = fmaf(add_saturated(size, 0.f), 4.f, __uint_as_float(kE2m1Bits));
    return __float_as_uint(add(fmaf(add_saturated(size, -1.f), 2.f, sum), add_saturated(size, -2.f)));
}

// kCodes values -> a word of their codes, the first in the low bits. They are in range, but for those that fp8 and e2m1
// saturate; of e2m1 v has halves, and the codes have no signs.
// `zero`: added to uint4 codes.
template <int kElement>
constexpr int kCodes = kPacked<kElement> ? 8 : 4;

template <int kElement>
__device__ __forceinline__ u32 encode_word(const float (&v)[kCodes<kElement>], float zero = 0.f) {
    if constexpr (kIsFp8<kElement>) {
        return permute_bytes(encode_fp8x2<kElement>(v[0], v[1]), encode_fp8x2<kElement>(v[2], v[3]), 0x5410);
    } else if constexpr (kElement == kInt8) {
        return permute_bytes(permute_bytes(encode_integer(v[0]), encode_integer(v[1]), 0x40),
                             permute_bytes(encode_integer(v[2]), encode_integer(v[3]), 0x40), 0x5410);
    } else {
        // The sum of code_i * 16^i, with what the codes lie below: that times 0x11111111, which comes off at the end.
        u32 word = 0;
#pragma unroll
        for (int i = 7; i >= 0; --i) {
            const u32 code = kElement == kE2m1x2    ? encode_e2m1(v[i])
                             : kElement == kUint4x2 ? encode_integer(minimum(v[i], kElementMax<kElement> - zero))
                                                    : encode_integer(v[i]);
            word = (word << 4) + code;
        }
        constexpr u32 kOnes = 0x11111111u;
        if constexpr (kElement == kE2m1x2) return word - kE2m1Bits * kOnes;
        if constexpr (kElement == kUint4x2) return word + (static_cast<u32>(zero) - kIntegerBits) * kOnes;
        return word - (kIntegerBits - 8) * kOnes ^ 8 * kOnes;  // 8 more while they are added: no nibble borrows from the next
    }
}

// The signs of eight e2m1 codes: of the values before they are divided, as that may cost a -0 its sign.
template <int kElement>
__device__ __forceinline__ u32 encode_signs(const float (&v)[kCodes<kElement>]) {
    if constexpr (kElement == kE2m1x2) {
        u32 top[4];  // bytes of values i and i + 2, i + 4 and i + 6
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = i / 2 * 4 + i % 2;
            top[i] = permute_bytes(__float_as_uint(v[at]), __float_as_uint(v[at + 2]), 0x73);
        }
        return permute_bytes(top[0], top[2], 0x5410) >> 4 & 0x08080808u | permute_bytes(top[1], top[3], 0x5410) & 0x80808080u;
    }
    return 0;
}

// A divisor for many quotients. `plain`: it is amax / kElementMax, and amax and the values have at most 11 significant bits.
// NOTE: an infinite one becomes zeros, with which finite x give 0 and others NaN, as they do divided by inf.
struct Divisor {
    float value, reciprocal;
    bool plain;
};

__device__ __forceinline__ Divisor divide_by(float scale, bool plain) {
    if (scale > kLargest) return {0.f, 0.f, plain};
    return {scale, divide(1.f, scale), plain};
}

// v / divisor, with the bits of the IEEE quotient wherever that decides a code: from 2^-18 up, for divisors of 2^-85 .. 2^126.
// The first correction leaves less than one unit in the last place; then the remainder is exact, and Markstein's theorem makes the second
// round correctly. Five multiply-adds beside the twenty instructions of `divide`. Source: P. Markstein, IBM J. Res. Dev. 34 (1990).
// Of plain divisors the first is enough: so says a trial of all pairs of significands, for 448, 57344, 127, 7 and 6.
template <int kElement, int kCount>
__device__ __forceinline__ void divide_all(float (&v)[kCount], const Divisor& d) {
    float q[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        q[i] = v[i] * d.reciprocal;
        q[i] = fmaf(fmaf(-q[i], d.value, v[i]), d.reciprocal, q[i]);
    }
    if (!d.plain) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) q[i] = fmaf(fmaf(-q[i], d.value, v[i]), d.reciprocal, q[i]);
    }
    constexpr bool kSigned = kIsFp8<kElement>;  // the corrections lose the sign of -0
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        v[i] = kSigned ? __uint_as_float(__float_as_uint(q[i]) & 0x7FFFFFFFu | __float_as_uint(v[i]) & 0x80000000u) : q[i];
}

// The largest x, or |x|, seen so far, in words that hold two 16-bit values or a float as they are stored. fp8 leaves NaN out; elsewhere it
// stays. NaN and inf have the largest bits.
template <int kFloat>
constexpr u32 kSizeBits = kFloat == kFp32 ? 0x7FFFFFFFu : 0x7FFF7FFFu;

template <int kFloat, bool kLeaveNan>
__device__ __forceinline__ u32 larger_values(u32 a, u32 b) {
    if constexpr (kFloat == kBf16) {
        return kLeaveNan ? maximum_bf16x2(a, b) : maximum_or_nan_bf16x2(a, b);
    } else if constexpr (kFloat == kFp16) {
        return kLeaveNan ? maximum_fp16x2(a, b) : maximum_or_nan_fp16x2(a, b);
    } else {
        const float x = __uint_as_float(a), y = __uint_as_float(b);
        return __float_as_uint(kLeaveNan ? maximum(x, y) : maximum_or_nan(x, y));
    }
}
template <int kFloat, bool kLeaveNan>
__device__ __forceinline__ u32 larger_sizes(u32 sizes, u32 word) {
    return larger_values<kFloat, kLeaveNan>(sizes, word & kSizeBits<kFloat>);
}
template <int kFloat>
__device__ __forceinline__ float largest_size(u32 sizes) {
    if constexpr (kFloat == kFp32) return __uint_as_float(sizes);
    const u32 bits = larger(sizes & 0xFFFFu, sizes >> 16);
    return kFloat == kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
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
