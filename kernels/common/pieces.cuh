// Rows in pieces: which one a thread takes, how its values are read and written, and where the scale of a block lies.
#pragma once
#include "common/numbers.cuh"

constexpr int kPieceThreads = 256;

// CTAs cover tiles of 256 >> log_pieces rows by 1 << log_pieces pieces of one of `batch` matrices, row by row.
// NOTE: 32-bit divisions only; 64-bit ones would take a hundred instructions of each thread.
struct Place {
    i32 batch, row, piece;
};
__device__ __forceinline__ Place place_of_thread(u32 tiles_down, u32 tiles_across, int log_pieces) {
    const u32 line = blockIdx.x / tiles_across, across = blockIdx.x - line * tiles_across;
    const u32 batch = line / tiles_down, down = line - batch * tiles_down;
    return {static_cast<i32>(batch), static_cast<i32>(down * (kPieceThreads >> log_pieces) + (threadIdx.x >> log_pieces)),
            static_cast<i32>(across << log_pieces | threadIdx.x & ((1u << log_pieces) - 1))};
}

// The byte of scale (row, block) in its matrix; `blocks` is the padded number of them for tiled layouts. Source: scale_layout.py.
constexpr int kLinear = 1, kTiles128 = 128, kTiles8 = 8;  // layouts, by the rows of a tile
__device__ __forceinline__ i64 scale_place(u32 row, u32 block, i32 blocks, int layout) {
    if (layout == kLinear) return static_cast<i64>(row) * blocks + block;
    const bool large = layout == kTiles128;
    const u32 tile_row = large ? row & ~127u : row & ~7u, inside = large ? (row & 31) * 16 + (row >> 5 & 3) * 4 : (row & 7) * 4;
    return static_cast<i64>(tile_row) * blocks + (block >> 2) * (large ? 512 : 32) + (inside | block & 3);
}

template <int kElement>
constexpr int kFloatBytes = kElement == kFp32 ? 4 : 2;

// kValues neighbouring floats of a row as they are stored.
template <int kElement, int kValues>
struct Floats {
    static constexpr int kChunks = kValues * kFloatBytes<kElement> / 16, kWords = 4 * kChunks;
    Chunk chunk[kChunks];

    __device__ __forceinline__ float value(int i) const {
        if constexpr (kElement == kFp32) return __uint_as_float(chunk[i / 4].word[i % 4]);
        const u32 word = chunk[i / 8].word[i % 8 / 2];
        if constexpr (kElement == kBf16) return __uint_as_float(i % 2 ? word & 0xFFFF0000u : word << 16);
        return fp16_to_float(word >> (i % 2 * 16));
    }

    __device__ __forceinline__ u32 word(int i) const { return chunk[i / 4].word[i % 4]; }

    // Takes values that its dtype has.
    __device__ __forceinline__ void keep(const float (&v)[kValues]) {
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            chunk[i / 4].word[i % 4] = kElement == kFp32   ? __float_as_uint(v[i])
                                       : kElement == kBf16 ? pack_bf16(v[2 * i % kValues], v[2 * i % kValues + 1])
                                                           : pack_fp16(v[2 * i % kValues], v[2 * i % kValues + 1]);
    }

    // All of them, contiguous and aligned.
    __device__ __forceinline__ void load_whole(u64 p) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) chunk[i] = load_global_16(reinterpret_cast<const void*>(p + 16 * i));
    }

    // The first `count`, zeros behind. `stride` in values.
    __device__ __forceinline__ void load(u64 p, i64 stride, int count) {
        if (count == kValues && stride == 1 && p % 16 == 0) return load_whole(p);
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            const void* at = reinterpret_cast<const void*>(p + i * stride * kFloatBytes<kElement>);
            if constexpr (kElement == kFp32) {
                chunk[i / 4].word[i % 4] = i < count ? load_global_u32(at) : 0;
            } else {
                const u32 bits = i < count ? load_global_u16(at) : 0;
                u32& word = chunk[i / 8].word[i % 8 / 2];
                word = i % 2 ? word | bits << 16 : bits;
            }
        }
    }
};

// What v becomes when it is stored in the dtype of x.
template <int kElement>
__device__ __forceinline__ float rounded(float v) {
    if constexpr (kElement == kFp32) return v;
    return kElement == kBf16 ? bf16_to_float(pack_bf16(v, 0.f)) : fp16_to_float(pack_fp16(v, 0.f));
}

// kWords words in one piece, to where that is aligned.
template <int kWords>
__device__ __forceinline__ void store_words(const u32 (&word)[kWords], u64 p) {
    if constexpr (kWords == 4)
        *reinterpret_cast<uint4*>(p) = {word[0], word[1], word[2], word[3]};
    else if constexpr (kWords == 2)
        *reinterpret_cast<uint2*>(p) = {word[0], word[1]};
    else
        *reinterpret_cast<u32*>(p) = word[0];
}

// kWords words to consecutive bytes, of which `count` exist.
template <int kWords>
__device__ __forceinline__ void store_bytes(const u32 (&word)[kWords], u64 p, int count) {
    if (count == 4 * kWords && p % (4 * kWords) == 0) return store_words(word, p);
#pragma unroll
    for (int i = 0; i < 4 * kWords; ++i)
        if (i < count) reinterpret_cast<u8*>(p)[i] = static_cast<u8>(word[i / 4] >> (i % 4 * 8));
}

template <int kWords>
__device__ __forceinline__ void load_bytes(u32 (&word)[kWords], u64 p, int count) {
    static_assert(kWords <= 2, "four and eight bytes have been enough");
    if (count == 4 * kWords && p % (4 * kWords) == 0) {
        if constexpr (kWords == 2) {
            const uint2 c = *reinterpret_cast<const uint2*>(p);
            word[0] = c.x, word[1] = c.y;
        } else {
            word[0] = *reinterpret_cast<const u32*>(p);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = 0;
#pragma unroll
    for (int i = 0; i < 4 * kWords; ++i)
        if (i < count) word[i / 4] |= load_global_u8(reinterpret_cast<const u8*>(p) + i) << (i % 4 * 8);
}
