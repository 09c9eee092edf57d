// Few rows of A ("tokens"), all that a CTA multiplies: where they come from, the order that decoded weights ask for, what scales their
// sums, and where those go. Beside what weights.cuh reads, TOKENS and SCALE_BLOCK configure the including kernel.
#pragma once
#include "common/epilogue.cuh"
#include "common/scales.cuh"
#include "common/weights.cuh"

constexpr int kTokens = smaller(TOKENS, 8), kTokenBlocks = (TOKENS + 7) / 8;  // held of each block of 8
constexpr int kParts = SCALE_BLOCK ? kStepValues / SCALE_BLOCK : 1;           // k-blocks of a step that floats scale
static_assert(kParts == 1 || kParts == 2, "a chunk lies in one block");

using Sums = float[ROW_BLOCKS][kTokenBlocks][4];  // [..][2 r + c]: row g + 8 r, token 2 t + c

// Which rows ----------------------------------------------------------------------------------------------------------------------

// Up to TOKENS rows of a batch or segment, and all of n: their number -> which.
__device__ __forceinline__ Work rows_of(const Args& args, u32 number) {
    constexpr i32 kAll = 1 << 30;  // columns
    if (args.grouped == 0) return dense_work<TOKENS, kAll>(args, number);
#if __CUDA_ARCH__ >= 900
    wait_for_predecessor();  // which may have written indptr
#endif
    return args.grouped == 1 ? grouped_work<TOKENS, kAll>(args, number) : masked_work<TOKENS, kAll>(args, number);
}
__device__ __forceinline__ i32 tokens_of(const Work& work) { return work.any ? smaller(TOKENS, work.row_end - work.row_begin) : 0; }

// Elements of D: where CTAs that are no cluster cut k, each part leaves so many sums.
__device__ __forceinline__ i64 sums_of_part(const Args& args) {
    return static_cast<i64>(args.m) * args.n * (args.grouped == 1 ? 1 : args.batch);
}

// Of D, and of A: -1 where `gather` names none.
__device__ __forceinline__ i32 result_row(const Args& args, const Work& work, int token) {
    const i32 position = work.row_begin + token;
    return args.grouped == 1 && args.row_map ? reinterpret_cast<const i32*>(args.row_map)[position] : position;
}
__device__ __forceinline__ i32 source_row(const Args& args, i32 row) {
    if (args.gather == 0) return args.a_repeat == 1 ? row : row / args.a_repeat;
    const i32 source = reinterpret_cast<const i32*>(args.gather)[row];
    return source >= 0 && source < args.a_rows ? source : -1;
}
// The row of its scales.
__device__ __forceinline__ i32 scale_row(const Args& args, const ScaleArgs& scales, const Work& work, int token, i32 source) {
    const i32 first = first_scale_row(scales, work, work.row_begin, args.m);
    return first < 0 ? larger(source, 0) : first + token;
}

// Values of A ---------------------------------------------------------------------------------------------------------------------

constexpr int kRowValueBytes = A_ELEMENT == kBf16 || A_ELEMENT == kFp16 ? 2 : 1;

// 8 values of A as they are stored, one by one; from the `count`-th on zeros.
__device__ __forceinline__ Chunk gather_values(const u8* row, i32 k, i32 count, i64 apart) {
    u32 w[4] = {};
#pragma unroll 1
    for (i32 v = count - 1; v >= 0; --v) {  // the last first
        constexpr int kBits = 8 * kRowValueBytes;
        const u8* p = row + (k + v) * apart * kRowValueBytes;
        const u32 code = kRowValueBytes == 2 ? load_global_u16(p) : load_global_u8(p);
        w[3] = w[3] << kBits | w[2] >> (32 - kBits), w[2] = w[2] << kBits | w[1] >> (32 - kBits);
        w[1] = w[1] << kBits | w[0] >> (32 - kBits), w[0] = w[0] << kBits | code;
    }
    return {{w[0], w[1], w[2], w[3]}};
}

constexpr bool kInOrder = kValues == 8 || (kValues == 16 && !(B_ELEMENT == kE4m3 && kComputeBf16));  // of decoded pairs of weights

// 8 stored values -> 16-bit ones, in the pairs that a unit of weights has.
__device__ __forceinline__ Chunk pair_up(Chunk c) {
    if constexpr (kRowValueBytes == 1) {
        const u32 low = c.word[0], high = c.word[1];
        decode_bytes<A_ELEMENT, kComputeBf16>(low, c.word[0], c.word[1]);
        decode_bytes<A_ELEMENT, kComputeBf16>(high, c.word[2], c.word[3]);
    }
    const u32(&w)[4] = c.word;
    if constexpr (kPacked<B_ELEMENT>)  // i and i + 4
        return {{permute_bytes(w[0], w[2], 0x5410), permute_bytes(w[0], w[2], 0x7632), permute_bytes(w[1], w[3], 0x5410),
                 permute_bytes(w[1], w[3], 0x7632)}};
    else if constexpr (!kInOrder)  // 0 and 2, 1 and 3 of four
        return {{permute_bytes(w[0], w[1], 0x5410), permute_bytes(w[0], w[1], 0x7632), permute_bytes(w[2], w[3], 0x5410),
                 permute_bytes(w[2], w[3], 0x7632)}};
    else
        return c;
}

// Scales --------------------------------------------------------------------------------------------------------------------------

// Floats that scale the sums of k-blocks, for this lane's rows and tokens.
struct BlockScales {
    RowScales<ROW_BLOCKS * 2> of_b;
    RowScales<kTokenBlocks * 2> of_a;
    float b[kParts][ROW_BLOCKS * 2], a[kParts][kTokenBlocks * 2];

    __device__ __forceinline__ BlockScales(const Args& args, const Place& at, i32 tile) {
        if constexpr (SCALE_BLOCK == 0) return;
        of_b.begin(args.b_scales, B_SCALE == 0 ? args.b_scale : 0, at.work.expert);
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * 2; ++i) of_b.row[i] = first(args.b_scales, smaller(tile * kRows + i * 8 + at.g, args.n - 1));
        of_a.begin(args.a_scales, args.a_scale, at.work.batch);
        if (args.a_scale == 0) return;
#pragma unroll
        for (int j = 0; j < kTokenBlocks * 2; ++j) {
            const int token = smaller(j / 2 * 8 + at.t * 2 + j % 2, tokens_of(at.work) - 1);
            const i32 source = source_row(args, result_row(args, at.work, token));
            of_a.row[j] = first(args.a_scales, scale_row(args, args.a_scales, at.work, token, source));
        }
    }
    static __device__ __forceinline__ i32 first(const ScaleArgs& s, i32 row) {
        return (s.rows == 1 ? row : row / s.rows) * static_cast<i32>(s.row);
    }
    __device__ __forceinline__ void load(const Args& args, i32 step) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const i32 block = smaller(step * kParts + part, (args.k - 1) / (SCALE_BLOCK ? SCALE_BLOCK : 1));
            of_b.load(args.b_scales, block, b[part]);
            of_a.load(args.a_scales, block, a[part]);
        }
    }
    // The sums of one of the step's blocks, which begin again.
    __device__ __forceinline__ void add(Sums& sum, Sums& part, int block) const {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i)
#pragma unroll
            for (int j = 0; j < kTokenBlocks; ++j)
#pragma unroll
                for (int v = 0; v < 4; ++v) {
                    sum[i][j][v] += b[block][2 * i + v / 2] * a[block][2 * j + v % 2] * part[i][j][v];
                    part[i][j][v] = 0.f;
                }
    }
};

// Epilogue ------------------------------------------------------------------------------------------------------------------------

// What the sums of one part of a tile (an MMA's 16 columns of D and 8 rows) are multiplied by and added to. Loaded long before it is used.
struct Factors {
    float column[2], row[2], bias[2], alpha;
    i32 to[2];     // rows of D
    bool none[2];  // no row of A: zeros

    __device__ __forceinline__ void load(const Args& args, const Place& at, i32 tile, int part) {
        const i32 tokens = tokens_of(at.work);
        alpha = args.alpha ? load_float(args.alpha, 0, args.alpha_type) : args.alpha_value;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const i32 n = smaller(tile * kRows + part / kTokenBlocks * 16 + r * 8 + at.g, args.n - 1);
            column[r] = outer_scale(args.b_outer, args.b_outers, at.work.expert, n, args.b_outer_value);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                if (r == 1) continue;
                const int token = smaller(part % kTokenBlocks * 8 + at.t * 2 + c, tokens - 1);
                to[c] = result_row(args, at.work, token);
                const i32 source = source_row(args, to[c]);
                row[c] = outer_scale(args.a_outer, args.a_outers, at.work.batch, scale_row(args, args.a_outers, at.work, token, source),
                                     args.a_outer_value);
                none[c] = source < 0;
            }
            bias[r] = args.bias ? load_float(args.bias, at.work.expert * args.bias_expert + n, args.bias_type) : 0.f;
        }
    }
    // sum * row[m] * column[n] * alpha + bias[n], in this order; D begins `from` elements behind args.out.
    __device__ __forceinline__ void store(const Args& args, const Place& at, i32 tile, int part, const float (&sum)[4],
                                          i64 from = 0) const {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            const i32 n = tile * kRows + part / kTokenBlocks * 16 + v / 2 * 8 + at.g, token = part % kTokenBlocks * 8 + at.t * 2 + v % 2;
            if (n >= args.n || token >= tokens_of(at.work)) continue;
            float b = bias[v / 2];
            if (args.bias_row != 0) b = load_float(args.bias, to[v % 2] * args.bias_row + n, args.bias_type);  // of each row
            const float x = none[v % 2] ? 0.f : sum[v] * kResidue * row[v % 2] * column[v / 2] * alpha + b;
            const float four[4] = {x, 0.f, 0.f, 0.f};
            store_four(args.out, from + at.work.batch * args.out_batch + to[v % 2] * args.out_row + n * args.out_column, args.out_column,
                       args.out_type, four, 1);
        }
    }
};

// Adds up what `count` warps or CTAs have left for this lane, `step` bytes apart.
__device__ __forceinline__ void add_up(float (&total)[4], u32 first, int count, int step) {
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
        const Chunk c = load_shared_16(first + i * step);
#pragma unroll
        for (int v = 0; v < 4; ++v) total[v] += __uint_as_float(c.word[v]);
    }
}
