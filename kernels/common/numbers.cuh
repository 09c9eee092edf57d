// What stored codes mean. Every decode is exact for every code, subnormals, infinities and NaN included, and yields two 16-bit
// values in a word. Only this file and encode.cuh ask for the architecture.
//
// Decodes take a *spread* word: the code of each value at the top of its 16-bit half (8-bit codes in bits 15..8, e2m1 in bits 15..12).
// Moving sign and exponent into the wider format's fields gives value * 2^-(bias difference), subnormals included; one exact multiply
// undoes that. The all-ones exponents need one more step.
#pragma once
#include "common/ptx.cuh"

enum Element : int {
    kBf16 = 0,
    kFp16 = 1,
    kE4m3 = 2,
    kE5m2 = 3,
    kE2m1 = 4,
    kE2m1x2 = 5,
    kFp32 = 6,
    kInt8 = 7,
    kInt4x2 = 8,
    kUint4x2 = 9,
    kE8m0 = 10
};

template <int kElement>
constexpr bool kPacked = kElement == kE2m1x2 || kElement == kInt4x2 || kElement == kUint4x2;  // two codes a byte, low nibble first

// Values in 16 stored bytes.
template <int kElement>
constexpr int kChunkValues = kPacked<kElement>                          ? 32
                             : (kElement == kBf16 || kElement == kFp16) ? 8
                                                                        : 16;

__device__ __forceinline__ u32 multiply_bf16x2(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
    return multiply_bf16x2_sm90(a, b);
#else
    return multiply_add_bf16x2(a, b, 0x80008000u);  // -0.0 keeps the sign of a zero product
#endif
}

// a - 1 * b; sub.bf16x2 came with sm_90.
__device__ __forceinline__ u32 subtract_bf16x2(u32 a, u32 b) { return multiply_add_bf16x2(b, 0xBF80BF80u, a); }

// 0x8000 in each half whose bits under `mask` are all ones; `step` is the lowest bit of the mask.
__device__ __forceinline__ u32 all_ones(u32 x, u32 mask, u32 step) { return ((x & mask) + step) & 0x80008000u; }

// 4-bit integers, in the low bits of both halves. One below 2^7 (2^10) there adds itself to bf16 128 (fp16 1024); 8 more make two's
// complement unsigned.
template <int kElement, bool kToBf16>
__device__ __forceinline__ u32 decode_low_bits(u32 x) {
    constexpr u32 kNone = (kToBf16 ? 0x43004300u : 0x64006400u) | (kElement == kInt4x2 ? 0x00080008u : 0);
    const u32 code = and_xor(x, 0x000F000Fu, kNone);
    return kToBf16 ? subtract_bf16x2(code, kNone) : subtract_fp16x2(code, kNone);
}

template <int kElement, bool kToBf16>
__device__ __forceinline__ u32 decode_spread(u32 x) {
    const u32 sign = x & 0x80008000u;
    if constexpr (kElement == kInt4x2 || kElement == kUint4x2) {
        return decode_low_bits<kElement, kToBf16>(x >> 12);
    } else if constexpr (kElement == kInt8) {
        const u32 code = x >> 8;
        return kToBf16 ? subtract_bf16x2(code & 0x007F007Fu | 0x43004300u, code & 0x00800080u | 0x43004300u)  // 128 + low bits, 128 or 256
                       : subtract_fp16x2((code & 0x00FF00FFu ^ 0x00800080u) | 0x64006400u, 0x64806480u);
    } else if constexpr (kElement == kE2m1 || kElement == kE2m1x2) {
        const u32 magnitude = x & 0x70007000u;
        return kToBf16 ? multiply_bf16x2(sign | (magnitude >> 6), 0x7E807E80u)   // 2^126
                       : multiply_fp16x2(sign | (magnitude >> 3), 0x74007400u);  // 2^14
    } else if constexpr (kElement == kE5m2 && !kToBf16) {
        return x;  // e5m2 is the upper byte of fp16
    } else if constexpr (kElement == kE5m2) {
        const u32 special = all_ones(x, 0x7C007C00u, 0x04000400u);
        return multiply_bf16x2(sign | ((x & 0x7F007F00u) >> 3), 0x77807780u) | (special - (special >> 8));  // 2^112; exponent to ones
    } else {
        const u32 nan = all_ones(x, 0x7F007F00u, 0x01000100u);
        return kToBf16 ? multiply_bf16x2(sign | ((x & 0x7F007F00u) >> 4), 0x7B807B80u) | (nan - (nan >> 9))   // 2^120
                       : multiply_fp16x2(sign | ((x & 0x7F007F00u) >> 1), 0x5C005C00u) | (nan - (nan >> 6));  // 2^8
    }
}

// Four 8-bit codes -> four values.
template <int kElement, bool kToBf16>
__device__ __forceinline__ void decode_bytes(u32 codes, u32& low, u32& high) {
#if __CUDA_ARCH__ >= 890
    if constexpr (kElement == kE4m3 && !kToBf16) {
        low = decode_e4m3_fp16(static_cast<u16>(codes));
        high = decode_e4m3_fp16(static_cast<u16>(codes >> 16));
        return;
    }
#endif
    if constexpr (kElement == kE2m1) codes <<= 4;  // the low nibble counts; what the neighbour shifts in is masked away
    low = decode_spread<kElement, kToBf16>(permute_bytes(codes, 0, 0x1404));
    high = decode_spread<kElement, kToBf16>(permute_bytes(codes, 0, 0x3424));
}

// 16 stored bytes -> kChunkValues 16-bit values, in order.
template <int kElement, bool kToBf16>
__device__ __forceinline__ void decode_chunk(const Chunk& raw, u32 (&values)[kChunkValues<kElement> / 2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 word = raw.word[i];
        if constexpr (kElement == kBf16 || kElement == kFp16) {
            values[i] = word;
        } else if constexpr (kPacked<kElement>) {
            const u32 shifted = word << 4;
#pragma unroll
            for (int byte = 0; byte < 4; ++byte)  // even k from the shifted word, odd k from the word itself
                values[4 * i + byte] = decode_spread<kElement, kToBf16>(permute_bytes(word, shifted, byte << 12 | (4 + byte) << 4));
        } else {
            decode_bytes<kElement, kToBf16>(word, values[2 * i], values[2 * i + 1]);
        }
    }
}

// Two codes as loaded one by one (zero-extended) -> a word of two values. Packed: `first` is the byte of both codes.
template <int kElement, bool kToBf16>
__device__ __forceinline__ u32 decode_pair(u32 first, u32 second) {
    if constexpr (kElement == kBf16 || kElement == kFp16) {
        return permute_bytes(first, second, 0x5410);
    } else if constexpr (kPacked<kElement>) {
        return decode_spread<kElement, kToBf16>(first << 12 | first << 24);
    } else {
        const u32 spread = permute_bytes(first, second, 0x4101);
        return decode_spread<kElement, kToBf16>(kElement == kE2m1 ? spread << 4 : spread);
    }
}

// What a block's byte does to its values. kScale: kE4m3 and kE8m0 multiply, kZero subtracts a zero point, 0 leaves them.
// e2m1 * e4m3 has at most six significant bits and is exact in both types. A power of two is exact in bf16 wherever float32 holds the
// product, but for codes 0..2 (e5m2: 0..9), which round it to bf16's subnormals, off by 2^-134 at most.
constexpr int kZero = 100;

template <int kScale, bool kToBf16>
__device__ __forceinline__ u32 decode_scale(u32 code) {  // the same value in both halves
    if constexpr (kScale == kE4m3) {
        return decode_spread<kE4m3, kToBf16>(code << 8 | code << 24);
    } else if constexpr (kScale == kE8m0) {
        static_assert(kScale != kE8m0 || kToBf16, "fp16 does not hold these scales");
        const u32 bits = code == 0 ? 0x40u : code == 255 ? 0x7FFFu : code << 7;  // 2^-127 is a subnormal; 255 is NaN
        return bits | bits << 16;
    } else {
        const float zero = static_cast<float>(code);
        return kToBf16 ? pack_bf16(zero, zero) : pack_fp16(zero, zero);
    }
}

template <int kScale, bool kToBf16>
__device__ __forceinline__ u32 apply_scale(u32 values, u32 scale) {
    if constexpr (kScale == kZero) return kToBf16 ? subtract_bf16x2(values, scale) : subtract_fp16x2(values, scale);
    return kToBf16 ? multiply_bf16x2(values, scale) : multiply_fp16x2(values, scale);
}

// fp16 x = high + low, both bf16, exactly: 11 significant bits fit in 8 + 8. An infinite or NaN x lives in `high` alone.
__device__ __forceinline__ void split_fp16(u32 x, u32& high, u32& low) {
    const float x0 = fp16_to_float(x), x1 = fp16_to_float(x >> 16);
    high = pack_bf16(x0, x1);
    const u32 rest = pack_bf16(x0 - bf16_to_float(high), x1 - bf16_to_float(high >> 16));
    const u32 special = all_ones(x, 0x7C007C00u, 0x04000400u);
    low = rest & ~(special | (special - (special >> 15)));
}

// The partner of a `low` plane: an infinity times low, which may be zero, would be NaN, and the `high` plane already carries it.
__device__ __forceinline__ u32 finite_bf16_or_zero(u32 x) {
    const u32 special = all_ones(x, 0x7F807F80u, 0x00800080u);
    return x & ~(special | (special - (special >> 15)));
}

// The first `bytes` of 16, zeros behind: the end of an operand, where a 16-byte load would read past it.
__device__ __forceinline__ Chunk load_partial(const u8* p, int bytes) {
    u64 low = 0, high = 0;
#pragma unroll 1
    for (int i = bytes - 1; i >= 0; --i) {
        high = high << 8 | low >> 56;
        low = low << 8 | load_global_u8(p + i);
    }
    return {{static_cast<u32>(low), static_cast<u32>(low >> 32), static_cast<u32>(high), static_cast<u32>(high >> 32)}};
}

// A scalar whose type is known at run time (bf16, fp16 or fp32).
__device__ __forceinline__ float load_float(u64 pointer, i64 index, int type) {
    if (type == kFp32) return __uint_as_float(load_global_u32(reinterpret_cast<const float*>(pointer) + index));
    const u32 bits = load_global_u16(reinterpret_cast<const u16*>(pointer) + index);
    return type == kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

template <int kElement>
__device__ __forceinline__ float decode_fp8(u32 code) {
    return bf16_to_float(decode_spread<kElement, true>(code << 8) & 0xFFFFu);
}
