// From weights that lie contiguous along k, in 16-byte pieces, to MMA fragments: a ring in shared memory for each warp, and the decode.
//
// 16 weight rows are the 16 rows of an MMA. The order of k inside an MMA is free as long as both operands agree, so a lane's 16-byte chunk
// of a weight row is its part of the fragments of several MMAs; rows of A are laid down in the order that those chunks ask for (rows.cuh).
// A step is 128 bytes of each weight row of a tile of 16 * ROW_BLOCKS; lane l has chunks l % 4 and l % 4 + 4 of rows l / 4 + 8 i.
//
// The including kernel is configured by A_ELEMENT, A_SCALE, B_ELEMENT, B_SCALE, ROW_BLOCKS, STAGES and STEPS_APART (from one step of a warp
// to its next), which this header reads.
#pragma once
#include "common/args.cuh"
#include "common/delay.cuh"
#include "common/schedule.cuh"

constexpr int kRows = 16 * ROW_BLOCKS;                                                   // of a tile: columns of D
constexpr int kValues = kChunkValues<B_ELEMENT>;                                         // of a chunk
constexpr int kUnits = kValues / 8;                                                      // of a chunk: 8 values, two MMAs
constexpr int kStepValues = 8 * kValues;                                                 // along k
constexpr int kScaleWords = B_SCALE == kE4m3 ? 4 : B_SCALE == kE8m0 ? kValues / 16 : 0;  // of four block bytes, for a row and step

// A stage: 128 bytes of each row, of which odd ones have their halves swapped, so that no bank is asked twice; then its scales.
constexpr int kStageBytes = kRows * (128 + kScaleWords * 4);

// Decode --------------------------------------------------------------------------------------------------------------------------

// A unit of one weight row -> {a0, a2} of two MMAs. e4m3 comes out as value * 2^-120 in bf16, e2m1 as value * 2^-126 (fp16: 2^-14); a NaN
// of e4m3 looks finite in bf16, see nan_codes.
template <int kUnit>
__device__ __forceinline__ void decode_unit(const Chunk& raw, u32 (&v)[4]) {
    if constexpr (B_ELEMENT == kBf16 || B_ELEMENT == kFp16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = raw.word[i];
    } else if constexpr (B_ELEMENT == kE2m1x2) {
        const u32 q = raw.word[kUnit];
#pragma unroll
        for (int i = 0; i < 4; ++i) {      // nibbles i and i + 4
            if constexpr (kComputeBf16) {  // a product puts two copies, one where the magnitude belongs and one where the sign does
                const u32 both = (i < 2 ? q : q >> 8) & (i % 2 ? 0x00F000F0u : 0x000F000Fu);
                v[i] = both * ((1u << 12 | 1u << 6) >> (i % 2 * 4)) & 0x81C081C0u;
            } else {  // where they would overlap
                v[i] = (9 >= 4 * i ? q << (9 - 4 * i) : q >> (4 * i - 9)) & 0x0E000E00u | q << (12 - 4 * i) & 0x80008000u;
            }
        }
    } else if constexpr (kPacked<B_ELEMENT>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = decode_low_bits<B_ELEMENT, kComputeBf16>(raw.word[kUnit] >> (4 * i));
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 q = raw.word[2 * kUnit + i];
            if constexpr (B_ELEMENT == kE4m3 && kComputeBf16) {  // bytes 0 and 2, 1 and 3
                v[2 * i] = (q << 8 & 0x80008000u) | (q << 4 & 0x07F007F0u);
                v[2 * i + 1] = (q & 0x80008000u) | (q >> 4 & 0x07F007F0u);
            } else {
                decode_bytes<B_ELEMENT, kComputeBf16>(q, v[2 * i], v[2 * i + 1]);  // in order
            }
        }
    }
}
// Where the decode leaves a power of two, it goes into the block scale, or is undone here.
__device__ __forceinline__ u32 scaled(u32 v, u32 scale) {
    if constexpr (B_SCALE == kE4m3) return kComputeBf16 ? multiply_bf16x2(v, scale) : multiply_fp16x2(v, scale);
    if constexpr (B_ELEMENT == kE2m1x2) v = kComputeBf16 ? multiply_bf16x2(v, 0x7E807E80u) : multiply_fp16x2(v, 0x74007400u);
    if constexpr (B_ELEMENT == kE4m3 && kComputeBf16) v = multiply_bf16x2(v, 0x7B807B80u);
    return B_SCALE == kE8m0 ? multiply_bf16x2(v, scale) : v;
}

// Two e4m3 scales, from the low bytes: s * 2^117 in bf16, s * 2^7 in fp16, each in both halves of a word. With the decode's 2^-126 and
// 2^-14 that is exact, and leaves kResidue to the epilogue.
__device__ __forceinline__ void two_scales(u32 codes, u32& first, u32& second) {
#if __CUDA_ARCH__ >= 890
    u32 both = decode_e4m3_fp16(static_cast<u16>(codes));
    if constexpr (kComputeBf16)
        both = multiply_bf16x2(pack_bf16(fp16_to_float(both), fp16_to_float(both >> 16)), 0x7A007A00u);
    else
        both = multiply_fp16x2(both, 0x58005800u);
#else
    u32 both = decode_spread<kE4m3, kComputeBf16>(permute_bytes(codes, 0, 0x1404));
    both = kComputeBf16 ? multiply_bf16x2(both, 0x7A007A00u) : multiply_fp16x2(both, 0x58005800u);
#endif
    first = permute_bytes(both, 0, 0x1010), second = permute_bytes(both, 0, 0x3232);
}
constexpr float kResidue = B_SCALE != kE4m3 ? 1.f : kComputeBf16 ? 0x1p9f : 0x1p7f;

// Not zero where one of four e4m3 codes is a NaN: it makes its row of D NaN whatever it meets, so a look at the whole row is enough.
__device__ __forceinline__ u32 nan_codes(u32 q) { return ((q & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u; }
constexpr bool kLookForNan = B_ELEMENT == kE4m3 && kComputeBf16;

// Unit kUnit of chunks of rows g and g + 8, under their scales -> the fragments of its two MMAs.
template <int kUnit>
__device__ __forceinline__ void decode_fragments(const Chunk& row, const Chunk& row_8, u32 scale, u32 scale_8, u32 (&first)[4],
                                                 u32 (&second)[4]) {
    u32 low[4], high[4];
    decode_unit<kUnit>(row, low);
    decode_unit<kUnit>(row_8, high);
#pragma unroll
    for (int v = 0; v < 4; ++v) low[v] = scaled(low[v], scale), high[v] = scaled(high[v], scale_8);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
        first[2 * v] = low[v], first[2 * v + 1] = high[v];
        second[2 * v] = low[v + 2], second[2 * v + 1] = high[v + 2];
    }
}
template <int kUnit>
constexpr int kScaleOfUnit = B_SCALE == kE4m3 && kValues == 32 ? kUnit / 2 : 0;  // of the two that load_scales brings

// The ring ------------------------------------------------------------------------------------------------------------------------

// Where a lane is in its warp, and what of the problem its CTA computes.
struct Place {
    int lane, g, t;  // g, t: row and column of the lane in an MMA's fragments
    i32 first_step, steps;
    Work work;  // which matrices, and which rows of A
};

// The next step to be fetched, of those of a warp: every STEPS_APART-th one of a tile, up to `end`, then those of the tile `stride` on.
struct Walk {
    i32 tile, step;  // step: of those of the CTA
    i32 left;        // steps, this one included
    i32 end, stride;

    __device__ __forceinline__ bool next() {  // in another tile?
        --left, step += STEPS_APART;
        if (step < end) return false;
        do step -= end, tile += stride;
        while (step >= end);
        return true;
    }
};

struct Fetch {
    static constexpr int kBytes = B_ELEMENT == kBf16 || B_ELEMENT == kFp16 ? 2 : 1;  // of a stored value
    static constexpr int kCopies = ROW_BLOCKS * 4, kScaleCopies = ROW_BLOCKS * 2;    // of a lane

    const Args& args;
    const Place& at;
    Walk walk;
    const u8 *weights, *scales;    // of this matrix
    u32 ring, to;                  // the first stage, and the next to be filled
    u32 place, scale_place;        // of this lane's first copies in a stage
    i32 row_bytes, whole;          // steps before `whole` can be copied as they lie
    const u8* from;                // this lane copies chunk lane % 8 of rows lane / 8 + 4 j,
    u32 down[kCopies];             // which lie so many 16-byte pieces further; those that are not there: the last one again
    const u8* scale;               // and word t of the scales of rows g + 8 i,
    u32 scale_down[kScaleCopies];  // which lie so many bytes further
    u32 next_scales;               // from step to step

    __device__ __forceinline__ Fetch(const Args& args, const Place& at, const Walk& walk, u32 ring)
        : args(args),
          at(at),
          walk(walk),
          weights(reinterpret_cast<const u8*>(args.b) + at.work.expert * args.b_batch * kBytes),
          scales(reinterpret_cast<const u8*>(args.b_scale) + at.work.expert * args.b_scales.matrix),
          ring(ring),
          to(ring),
          place(at.lane / 8 * 128 + (at.lane % 8 ^ at.lane / 8 % 2 * 4) * 16),  // rows lane / 8 + 4 j are odd together
          scale_place(128 * kRows + (at.g * kScaleWords + at.t) * 4),
          row_bytes(kPacked<B_ELEMENT> ? (args.k + 1) / 2 : args.k * kBytes),
          whole(scales_in_words() ? row_bytes / 128 - at.first_step : 0),
          next_scales(STEPS_APART * kScaleWords * word_bytes()) {
        whole = smaller(whole, at.steps);
#pragma unroll
        for (int j = 0; j < kCopies; ++j) down[j] = 4 * j * (static_cast<u32>(args.b_column) * kBytes / 16);
        hold(this->ring), hold(place), hold(scale_place), hold(next_scales);
        point();
    }

    // From four block scales along k to the next four.
    __device__ __forceinline__ i64 word_bytes() const {
        return args.b_scales.tile_rows == 1 ? 4 * args.b_scales.block : args.b_scales.block;
    }
    __device__ __forceinline__ bool scales_in_words() const {
        const ScaleArgs& s = args.b_scales;
        const bool linear = s.tile_rows == 1;
        return kScaleWords == 0 || ((reinterpret_cast<u64>(scales) | (linear ? s.row : 0)) % 4 == 0 && (!linear || s.block == 1));
    }

    // From one step of a row to the next: in weights laid out in panels, a step of 128 8-bit values is one of them.
    __device__ __forceinline__ i64 step_bytes() const { return kBytes == 1 && !kPacked<B_ELEMENT> ? 128 + args.b_panel : 128; }
    __device__ __forceinline__ const u8* line(i32 row, i32 step) const {
        return weights + smaller(row, args.n - 1) * args.b_column * kBytes + (at.first_step + step) * step_bytes();
    }

    __device__ __forceinline__ void point() {
        const i32 row = walk.tile * kRows + at.lane / 8;
        from = line(row, walk.step) + at.lane % 8 * 16;
        if (walk.tile * kRows + kRows > args.n) {
#pragma unroll
            for (int j = 0; j < kCopies; ++j)
                down[j] = larger(0, smaller(4 * j, (args.n - 1 - row) / 4 * 4)) * (static_cast<u32>(args.b_column) * kBytes / 16);
        }
        if constexpr (kScaleWords != 0) {
            const ScaleArgs& s = args.b_scales;
            const i32 column = smaller(walk.tile * kRows + at.g, args.n - 1), r = column + (s.place == 1 ? at.work.batch * args.n : 0);
            const i32 row_tile = s.tile_rows == 1 ? r : s.tile_rows == 128 ? r / 128 : r / 8;
            const u32 eight_rows = s.tile_rows == 128 ? 8 * 16 : static_cast<u32>(s.row) * (s.tile_rows == 8 ? 1 : 8);
            const i32 inside = s.tile_rows == 1 ? 0 : s.tile_rows == 128 ? r % 32 * 16 + r % 128 / 32 * 4 : r % 8 * 4;
            scale = scales + row_tile * s.row + ((at.first_step + walk.step) * kScaleWords + at.t) * word_bytes() + inside;
#pragma unroll
            for (int i = 0; i < kScaleCopies; ++i) scale_down[i] = column + 8 * i < args.n ? i * eight_rows : i > 0 ? scale_down[i - 1] : 0;
        }
    }
    __device__ __forceinline__ u32 behind(u32 stage) const {
        return stage == ring + (STAGES - 1) * kStageBytes ? ring : stage + kStageBytes;
    }
    // The warp's first steps, to L2: lanes take steps in turn. Their scales come along with lines that others ask for.
    __device__ __forceinline__ void prefetch() const {
        Walk to = walk;
#pragma unroll 1
        for (int i = at.lane % 8; i > 0 && to.left > 0; --i) to.next();
        if (to.left <= 0 || to.step >= at.steps) return;
#pragma unroll
        for (int j = 0; j < kCopies; ++j) prefetch_l2(line(to.tile * kRows + at.lane / 8 + 4 * j, to.step));
    }
    __device__ __forceinline__ void next() {
        delay();
        if (walk.left > 0) {
            if (__builtin_expect(walk.step < whole, 1))
                copy_whole();
            else
                copy_end(walk.step < at.steps ? row_bytes - (at.first_step + walk.step) * 128 : 0);
            from += STEPS_APART * step_bytes();
            if constexpr (kScaleWords != 0) scale += next_scales;
            if (walk.next()) point();
            to = behind(to);
        }
        copy_async_commit();
    }
    __device__ __forceinline__ void copy_whole() {
#pragma unroll
        for (int j = 0; j < kCopies; ++j) copy_async_16_streaming(to + place + j * 512, from + static_cast<u64>(down[j]) * 16);
        if constexpr (kScaleWords != 0) {
#pragma unroll
            for (int i = 0; i < kScaleCopies; ++i)
                if (at.t < kScaleWords) copy_async<4>(to + scale_place + i * (32 * kScaleWords), scale + scale_down[i]);
        }
    }
    // The last step of a row, nothing, or scales that are not whole words: what does not exist becomes zeros.
    __device__ __forceinline__ void copy_end(i32 left) {
        const i32 valid = larger(0, smaller(16, left - at.lane % 8 * 16));
#pragma unroll 1
        for (int j = 0; j < kCopies; ++j) {
            const u8* p = line(walk.tile * kRows + at.lane / 8 + 4 * j, walk.step) + at.lane % 8 * 16;
            copy_async_16_if(valid % 16 == 0, to + place + j * 512, p, valid);
            if (valid % 16 == 0) continue;  // NOTE: compute-sanitizer takes a copy of fewer bytes for a read of all 16
            const Chunk part = load_partial(p, valid);
            store_shared_16(to + place + j * 512, part.word[0], part.word[1], part.word[2], part.word[3]);
        }
        if constexpr (kScaleWords != 0) {
            constexpr int kBlockBytes = B_SCALE == kE4m3 ? 8 : 32 * 16 / kValues;  // of a weight row under one block byte
            const i32 bytes = smaller(4, (left + kBlockBytes - 1) / kBlockBytes - at.t * 4);
            const i64 apart = args.b_scales.tile_rows == 1 ? args.b_scales.block : 1;
#pragma unroll
            for (int i = 0; i < kScaleCopies; ++i) {
                if (at.t >= kScaleWords) continue;
                u32 word = 0;
#pragma unroll
                for (int b = 0; b < 4; ++b) word |= b < bytes ? load_global_u8(scale + scale_down[i] + b * apart) << (8 * b) : 0;
                store_shared_u32(to + scale_place + i * (32 * kScaleWords), word);
            }
        }
    }
};

// A lane's part of a stage: chunk c of each row, and the scales of its halves.
struct Reads {
    u32 chunk, scales;  // where chunk 0 of the first row is, and its scales

    __device__ __forceinline__ explicit Reads(const Place& at)
        : chunk(at.g * 128 + at.t * 16 + at.g % 2 * 64),
          scales(128 * kRows + at.g * kScaleWords * 4 +
                 (B_SCALE == kE4m3 ? at.t * 2
                  : kValues == 32  ? at.t
                                   : at.t / 2)) {
        hold(chunk), hold(scales);
    }
    __device__ __forceinline__ void load(Chunk (&raw)[ROW_BLOCKS * 2], u32 (&scale)[ROW_BLOCKS * 2][2], u32 stage, int c) const {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * 2; ++i) {
            raw[i] = load_shared_16(stage + (chunk ^ c * 64) + i * 1024);
            if constexpr (kScaleWords != 0) {
                const u32 place = stage + scales + i * (kScaleWords * 32) + c * (kScaleWords * 2);
                if constexpr (B_SCALE == kE4m3)
                    two_scales(load_shared_u16(place), scale[i][0], scale[i][1]);
                else
                    scale[i][0] = scale[i][1] = decode_scale<kE8m0, true>(load_shared_u8(place));
            }
        }
    }
};
