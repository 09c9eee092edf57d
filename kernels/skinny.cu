// D = epilogue(A @ B) for few rows of A: weights go from global memory to MMA fragments as they lie, past activations that stay in
// shared memory. sm_80 and up.
//
// Roles are swapped: 16 columns of B (weight rows, contiguous along k) are the 16 rows of an MMA, and rows of A ("tokens") its 8 columns.
// The order of k inside an MMA is free as long as both operands agree. So a lane's 16-byte chunk of a weight row is its part of the
// fragments of several MMAs, and A is laid down once in the order that those chunks ask for.
//
//   step    128 bytes of each weight row of a tile of 16 * ROW_BLOCKS rows; lane l multiplies chunks l % 4 and l % 4 + 4 of rows l / 4 + 8 i
//   k       SPLIT CTAs of a cluster cut k into runs of steps; in each, WARPS_K warps take its steps in turn
//   rows    groups of WARPS_K warps, and clusters, take tiles in turn; more than TOKENS rows of A are cut among clusters
//   ring    each warp copies what it will read itself, STAGES - 1 steps ahead and across tiles: no barrier in the main loop
//   sums    of a tile meet in shared memory, in one order: those of warps behind a barrier of their group, those of CTAs in the one of
//           them whose turn it is, SPLIT tiles later
//   launch  may begin before its predecessor has ended: weights are prefetched or loaded then, everything else waits
//
// Not handled: B contiguous along n or not in 16-byte pieces, segments, floats of 32 or 64 k, zero points, fp16 beside bf16.
#include "common/args.cuh"
#include "common/epilogue.cuh"
#include "common/numbers.cuh"
#include "common/ptx.cuh"

constexpr bool kComputeBf16 = A_ELEMENT == kBf16 || B_ELEMENT == kBf16 || A_SCALE == kE8m0 || B_SCALE == kE8m0;

constexpr int kThreads = 32 * WARPS, kGroups = WARPS / WARPS_K;
constexpr int kRows = 16 * ROW_BLOCKS;                                                   // of a tile: columns of D
constexpr int kTokens = smaller(TOKENS, 8), kTokenBlocks = (TOKENS + 7) / 8;             // held of each block of 8
constexpr int kValues = kChunkValues<B_ELEMENT>;                                         // of a chunk
constexpr int kUnits = kValues / 8;                                                      // of a chunk: 8 values, two MMAs
constexpr int kStepValues = 8 * kValues;                                                 // along k
constexpr int kScaleWords = B_SCALE == kE4m3 ? 4 : B_SCALE == kE8m0 ? kValues / 16 : 0;  // of four block bytes, for a row and step
constexpr int kParts = SCALE_BLOCK ? kStepValues / SCALE_BLOCK : 1;                      // k-blocks of a step that floats scale
static_assert(kParts == 1 || kParts == 2, "a chunk lies in one block");
static_assert(WARPS % WARPS_K == 0);

// A stage: 128 bytes of each row, of which odd ones have their halves swapped, so that no bank is asked twice; then its scales.
constexpr int kStageBytes = kRows * (128 + kScaleWords * 4);
constexpr int kUnitBytes = kTokenBlocks * kTokens * 4 * 16;  // of A: 8 values of each token for each of 4 lanes
constexpr int kStepBytes = 2 * kUnits * kUnitBytes;
constexpr int kSumBytes = ROW_BLOCKS * kTokenBlocks * 512;  // of a warp, or of a CTA

// Weights ------------------------------------------------------------------------------------------------------------------------

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
        for (int i = 0; i < 4; ++i) v[i] = decode_spread<B_ELEMENT, kComputeBf16>(raw.word[kUnit] << (12 - 4 * i));
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
constexpr bool kInOrder = kValues == 8 || (kValues == 16 && !(B_ELEMENT == kE4m3 && kComputeBf16));  // of decoded pairs

// Values of A as a unit pairs them: as the decode above does.
__device__ __forceinline__ Chunk pair_up(const Chunk& c) {
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
        both = pack_bf16(fp16_to_float(both) * 0x1p117f, fp16_to_float(both >> 16) * 0x1p117f);
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

// The ring ------------------------------------------------------------------------------------------------------------------------

struct Place {
    int lane, g, t;  // g, t: row and column of the lane in an MMA's fragments
    int warp_k, group;
    i32 first_step, steps;    // of this CTA
    i32 rounds;               // steps of a warp
    i32 tile, tiles, stride;  // this group's first tile, all of them, and from one of its tiles to the next
    i32 batch;                // which matrices
    i32 first_token, tokens;  // which rows of A, and how many of them count
};

struct Fetch {
    static constexpr int kBytes = B_ELEMENT == kBf16 || B_ELEMENT == kFp16 ? 2 : 1;  // of a stored value

    const Args& args;
    const Place& at;
    const u8 *weights, *scales;  // of this matrix
    u64 policy;
    u32 ring, to;  // the first stage, and the next to be filled
    i32 tile, round;
    i32 row_bytes;
    const u8* from;                   // this lane copies chunk lane % 8 of rows lane / 8 + 4 j
    i32 last_j;                       // further rows are not there: the last one again
    const u8* scale[ROW_BLOCKS * 2];  // and word t of the scales of rows g + 8 i
    i64 eight_rows, next_scales;      // bytes from one of them to the next, and from step to step

    __device__ __forceinline__ Fetch(const Args& args, const Place& at, u32 ring)
        : args(args),
          at(at),
          weights(reinterpret_cast<const u8*>(args.b) + at.batch * args.b_batch * kBytes),
          scales(reinterpret_cast<const u8*>(args.b_scale) + at.batch * args.b_scales.matrix),
          policy(evict_first()),
          ring(ring),
          to(ring),
          tile(at.tile),
          round(0),
          row_bytes(kPacked<B_ELEMENT> ? (args.k + 1) / 2 : args.k * kBytes),
          eight_rows(args.b_scales.tile_rows == 128 ? 8 * 16
                     : args.b_scales.tile_rows == 8 ? args.b_scales.row
                                                    : 8 * args.b_scales.row),
          next_scales(WARPS_K * kScaleWords * word_bytes()) {
        point();
    }

    // From four block scales along k to the next four.
    __device__ __forceinline__ i64 word_bytes() const {
        return args.b_scales.tile_rows == 1 ? 4 * args.b_scales.block : args.b_scales.block;
    }

    // From one step of a row to the next: in weights laid out in panels, a step of 128 8-bit values is one of them.
    __device__ __forceinline__ i64 step_bytes() const { return kBytes == 1 && !kPacked<B_ELEMENT> ? 128 + args.b_panel : 128; }

    __device__ __forceinline__ void point() {
        const i32 step = at.first_step + at.warp_k, row = smaller(tile * kRows + at.lane / 8, args.n - 1);
        from = weights + row * args.b_column * kBytes + step * step_bytes() + at.lane % 8 * 16;
        last_j = (args.n - 1 - row) / 4;
        if constexpr (kScaleWords != 0) {
            const ScaleArgs& s = args.b_scales;
            const i32 column = smaller(tile * kRows + at.g, args.n - 1), r = column + (s.place == 1 ? at.batch * args.n : 0);
            const i32 row_tile = s.tile_rows == 1 ? r : s.tile_rows == 128 ? r / 128 : r / 8;
            const i32 inside = s.tile_rows == 1 ? 0 : s.tile_rows == 128 ? r % 32 * 16 + r % 128 / 32 * 4 : r % 8 * 4;
            scale[0] = scales + row_tile * s.row + (step * kScaleWords + at.t) * word_bytes() + inside;
#pragma unroll
            for (int i = 1; i < ROW_BLOCKS * 2; ++i) scale[i] = column + 8 * i < args.n ? scale[i - 1] + eight_rows : scale[i - 1];
        }
    }
    // This lane's next row, or the last one again.
    __device__ __forceinline__ const u8* below(const u8* p, int j) const { return j < last_j ? p + 4 * args.b_column * kBytes : p; }
    // The first steps of this warp's first tile, to L2: lanes take steps in turn. Their scales come along with lines that others ask for.
    __device__ __forceinline__ void prefetch() const {
        const i32 step = at.lane % 8 * WARPS_K + at.warp_k;
        if (tile >= at.tiles || step >= at.steps || row_bytes <= (at.first_step + step) * 128) return;
        const u8* p = from + at.lane % 8 * (WARPS_K * step_bytes() - 16);
#pragma unroll
        for (int j = 0; j < ROW_BLOCKS * 4; ++j, p = below(p, j - 1)) prefetch_l2(p);
    }
    __device__ __forceinline__ void next() {
        if (tile < at.tiles) {
            const i32 step = round * WARPS_K + at.warp_k;  // of this CTA
            const i32 left = step < at.steps ? row_bytes - (at.first_step + step) * 128 : 0;
            if (__builtin_expect(left >= 128 && scales_in_words(), 1))
                copy_whole();
            else
                copy_end(left);
            from += WARPS_K * step_bytes();
            if constexpr (kScaleWords != 0) {
#pragma unroll
                for (int i = 0; i < ROW_BLOCKS * 2; ++i) scale[i] += next_scales;
            }
            if (++round == at.rounds) {
                round = 0, tile += at.stride;
                point();
            }
            to = to == ring + (STAGES - 1) * kStageBytes ? ring : to + kStageBytes;
        }
        copy_async_commit();
    }
    __device__ __forceinline__ u32 data_place(int j) const {  // rows lane / 8 + 4 j are odd together
        return to + j * 512 + at.lane / 8 * 128 + (at.lane % 8 ^ at.lane / 8 % 2 * 4) * 16;
    }
    __device__ __forceinline__ u32 scale_place(int i) const { return to + 128 * kRows + ((i * 8 + at.g) * kScaleWords + at.t) * 4; }
    __device__ __forceinline__ bool scales_in_words() const {
        const ScaleArgs& s = args.b_scales;
        const bool linear = s.tile_rows == 1;
        return kScaleWords == 0 || ((reinterpret_cast<u64>(scales) | (linear ? s.row : 0)) % 4 == 0 && (!linear || s.block == 1));
    }
    __device__ __forceinline__ void copy_whole() {
        const u8* p = from;
#pragma unroll
        for (int j = 0; j < ROW_BLOCKS * 4; ++j, p = below(p, j - 1)) copy_async_16_streaming(data_place(j), p, 16, policy);
        if constexpr (kScaleWords != 0) {
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS * 2; ++i)
                if (at.t < kScaleWords) copy_async<4>(scale_place(i), scale[i]);
        }
    }
    // The last step of a row, nothing, or scales that are not whole words: what does not exist becomes zeros.
    __device__ __forceinline__ void copy_end(i32 left) {
        const i32 valid = smaller(16, left - at.lane % 8 * 16);
        const u8* p = from;
#pragma unroll 1
        for (int j = 0; j < ROW_BLOCKS * 4; ++j, p = below(p, j - 1)) {
            const Chunk part = valid > 0 ? load_partial(p, valid) : Chunk{};
            store_shared_16(data_place(j), part.word[0], part.word[1], part.word[2], part.word[3]);
        }
        if constexpr (kScaleWords != 0) {
            constexpr int kBlockBytes = B_SCALE == kE4m3 ? 8 : 32 * 16 / kValues;  // of a weight row under one block byte
            const i32 bytes = smaller(4, (left + kBlockBytes - 1) / kBlockBytes - at.t * 4);
            const i64 apart = args.b_scales.tile_rows == 1 ? args.b_scales.block : 1;
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS * 2; ++i) {
                if (at.t >= kScaleWords) continue;
                u32 word = 0;
#pragma unroll 1
                for (int b = 0; b < bytes; ++b) word |= load_global_u8(scale[i] + b * apart) << (8 * b);
                store_shared_u32(scale_place(i), word);
            }
        }
    }
};

// Activations ---------------------------------------------------------------------------------------------------------------------

// The row of A that a row of D comes from; -1 where `gather` names none.
__device__ __forceinline__ i32 source_row(const Args& args, i32 row) {
    if (args.gather == 0) return row;
    const i32 source = reinterpret_cast<const i32*>(args.gather)[row];
    return source >= 0 && source < args.a_rows ? source : -1;
}

// All of A that this CTA multiplies, in the order of the units, 16 bytes for 8 values; the rest is zeros. A thread has pieces of one row.
struct Activations {
    static constexpr int kBytes = A_ELEMENT == kBf16 || A_ELEMENT == kFp16 ? 2 : 1;
    static constexpr int kApart = kThreads / (4 * kTokens * kTokenBlocks);  // units from one piece of a thread to its next
    static_assert(kThreads % (4 * kTokens * kTokenBlocks) == 0, "threads take whole units");
    u32 first, end;

    __device__ __forceinline__ Activations(const Place& at, u32 shared)
        : first(shared + threadIdx.x * 16), end(shared + at.steps * kStepBytes) {}

    // Asynchronously, as they are stored, where they can be read in pieces of 8 values.
    __device__ __forceinline__ void fetch(const Args& args, const Place& at) const {
        const int t = threadIdx.x % 4, token = threadIdx.x / 4 % kTokens + threadIdx.x / (4 * kTokens) % kTokenBlocks * 8;
        const i32 row = token < at.tokens ? source_row(args, at.first_token + token) : -1;
        const u8* a = reinterpret_cast<const u8*>(args.a) + (at.batch * args.a_batch + row * args.a_row) * kBytes;
        const bool pieces = args.a_k == 1 && args.k % 8 == 0 && reinterpret_cast<u64>(a) % 16 == 0;
        int unit = threadIdx.x / (4 * kTokens * kTokenBlocks);
#pragma unroll 1
        for (u32 to = first; to < end; to += kThreads * 16, unit += kApart) {
            const i32 k = ((at.first_step * 2 + unit / kUnits) * 4 + t) * kValues + unit % kUnits * 8;
            const i32 count = row < 0 ? 0 : smaller(args.k - k, 8);
            if (count > 0 && pieces)
                copy_async<8 * kBytes>(to, a + k * kBytes);
            else
                store_values(to, a, k, count, args.a_k);
        }
        copy_async_commit();
    }
    static __device__ __forceinline__ void store_values(u32 to, const u8* a, i32 k, i32 count, i64 apart) {
        u32 w[4] = {};
#pragma unroll 1
        for (i32 v = count - 1; v >= 0; --v) {  // the last first
            constexpr int kBits = 8 * kBytes;
            const u8* p = a + (k + v) * apart * kBytes;
            const u32 code = kBytes == 2 ? load_global_u16(p) : load_global_u8(p);
            w[3] = w[3] << kBits | w[2] >> (32 - kBits), w[2] = w[2] << kBits | w[1] >> (32 - kBits);
            w[1] = w[1] << kBits | w[0] >> (32 - kBits), w[0] = w[0] << kBits | code;
        }
        store_shared_16(to, w[0], w[1], w[2], w[3]);
    }

    // What the thread has fetched, which is here now, becomes 16-bit and pairs up.
    __device__ __forceinline__ void finish() const {
        if constexpr (kBytes == 2 && kInOrder) return;
#pragma unroll 1
        for (u32 at = first; at < end; at += kThreads * 16) {
            Chunk c = load_shared_16(at);
            if constexpr (kBytes == 1) {
                const u32 low = c.word[0], high = c.word[1];
                decode_bytes<A_ELEMENT, kComputeBf16>(low, c.word[0], c.word[1]);
                decode_bytes<A_ELEMENT, kComputeBf16>(high, c.word[2], c.word[3]);
            }
            c = pair_up(c);
            store_shared_16(at, c.word[0], c.word[1], c.word[2], c.word[3]);
        }
    }
};

// Main loop -----------------------------------------------------------------------------------------------------------------------

using Sums = float[ROW_BLOCKS][kTokenBlocks][4];  // [..][2 r + c]: row g + 8 r, token 2 t + c

template <int kUnit>
__device__ __forceinline__ void multiply_units(Sums& sum, const Chunk (&raw)[ROW_BLOCKS * 2], const u32 (&scale)[ROW_BLOCKS * 2][2], u32 a,
                                               bool there) {
    Chunk x[kTokenBlocks] = {};
#pragma unroll
    for (int j = 0; j < kTokenBlocks; ++j)
        if (there) x[j] = load_shared_16(a + kUnit * kUnitBytes + j * (kTokens * 64));
    constexpr int kBlock = B_SCALE == kE4m3 && kValues == 32 ? kUnit / 2 : 0;
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS; ++i) {
        u32 low[4], high[4];
        decode_unit<kUnit>(raw[2 * i], low);
        decode_unit<kUnit>(raw[2 * i + 1], high);
#pragma unroll
        for (int v = 0; v < 4; ++v) low[v] = scaled(low[v], scale[2 * i][kBlock]), high[v] = scaled(high[v], scale[2 * i + 1][kBlock]);
        const u32 first[4] = {low[0], high[0], low[1], high[1]}, second[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
        for (int j = 0; j < kTokenBlocks; ++j) {
            if constexpr (kComputeBf16) {
                mma_bf16(sum[i][j], first, x[j].word[0], x[j].word[1]);
                mma_bf16(sum[i][j], second, x[j].word[2], x[j].word[3]);
            } else {
                mma_fp16(sum[i][j], first, x[j].word[0], x[j].word[1]);
                mma_fp16(sum[i][j], second, x[j].word[2], x[j].word[3]);
            }
        }
    }
    if constexpr (kUnit + 1 < kUnits) multiply_units<kUnit + 1>(sum, raw, scale, a, there);
}

// The block scales of this lane's chunk c of each row.
__device__ __forceinline__ void load_scales(u32 (&scale)[ROW_BLOCKS * 2][2], const Place& at, u32 stage, int c) {
    if constexpr (kScaleWords != 0) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * 2; ++i) {
            const u32 row = stage + 128 * kRows + (i * 8 + at.g) * (kScaleWords * 4);
            if constexpr (B_SCALE == kE4m3) {
                two_scales(load_shared_u16(row + c * 8 + at.t * 2), scale[i][0], scale[i][1]);
            } else {
                constexpr int kPerChunk = kValues == 32 ? 1 : 2;  // lanes under one byte
                scale[i][0] = scale[i][1] = decode_scale<kE8m0, true>(load_shared_u8(row + (c * 4 + at.t) / kPerChunk));
            }
        }
    }
}

// Floats that scale the sums of k-blocks, for this lane's rows and tokens.
struct BlockScales {
    i64 b_row[ROW_BLOCKS * 2], a_row[kTokenBlocks * 2];
    float b[kParts][ROW_BLOCKS * 2], a[kParts][kTokenBlocks * 2];

    __device__ __forceinline__ BlockScales(const Args& args, const Place& at, i32 tile) {
        if constexpr (SCALE_BLOCK == 0) return;
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * 2; ++i)
            b_row[i] = start(args.b_scales, at.batch, smaller(tile * kRows + i * 8 + at.g, args.n - 1));
#pragma unroll
        for (int j = 0; j < kTokenBlocks * 2; ++j)
            a_row[j] = start(args.a_scales, at.batch,
                             larger(source_row(args, smaller(at.first_token + j / 2 * 8 + at.t * 2 + j % 2, args.m - 1)), 0));
    }
    static __device__ __forceinline__ i64 start(const ScaleArgs& s, i32 matrix, i32 row) {
        return matrix * s.matrix + (s.rows == 1 ? row : row / s.rows) * s.row;
    }
    __device__ __forceinline__ void load(const Args& args, i32 step) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const i32 block = smaller(step * kParts + part, (args.k - 1) / (SCALE_BLOCK ? SCALE_BLOCK : 1));
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS * 2; ++i)
                b[part][i] = B_SCALE == 0 && args.b_scale
                                 ? load_float(args.b_scale, b_row[i] + block * args.b_scales.block, args.b_scales.type)
                                 : 1.f;
#pragma unroll
            for (int j = 0; j < kTokenBlocks * 2; ++j)
                a[part][j] = args.a_scale ? load_float(args.a_scale, a_row[j] + block * args.a_scales.block, args.a_scales.type) : 1.f;
        }
    }
};

// Sums of one tile over this warp's steps.
__device__ __forceinline__ void multiply_tile(Sums& sum, const Place& at, Fetch& fetch, i32 tile, u32& stage, u32 activations) {
    u32 nan[ROW_BLOCKS * 2] = {};
    BlockScales block(fetch.args, at, tile);
    const bool there = at.g < kTokens;  // lanes of tokens that nobody asked for multiply zeros
#pragma unroll 1
    for (i32 round = 0; round < at.rounds; ++round) {
        copy_async_wait<STAGES - 2>();
        __syncwarp();  // lanes read what others fetched, and all are done with the stage that is filled next
        Chunk raw[2][ROW_BLOCKS * 2];
        u32 scale[2][ROW_BLOCKS * 2][2] = {};
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS * 2; ++i)
                raw[c][i] = load_shared_16(stage + (i * 8 + at.g) * 128 + at.t * 16 + (c ^ at.g % 2) * 64);
            load_scales(scale[c], at, stage, c);
        }
        stage = stage == fetch.ring + (STAGES - 1) * kStageBytes ? fetch.ring : stage + kStageBytes;
        fetch.next();
        if constexpr (kLookForNan) {
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS * 8; ++i) {
                nan[i / 4] |= nan_codes(raw[0][i / 4].word[i % 4]);
                nan[i / 4] |= nan_codes(raw[1][i / 4].word[i % 4]);
            }
        }
        const i32 step = round * WARPS_K + at.warp_k;
        if constexpr (SCALE_BLOCK != 0) block.load(fetch.args, at.first_step + step);
        if (step >= at.steps) continue;  // the other warps, or CTAs, have one step more
        const u32 a = activations + step * kStepBytes + (at.g * 4 + at.t) * 16;
        if constexpr (SCALE_BLOCK == 0) {
            multiply_units<0>(sum, raw[0], scale[0], a, there);
            multiply_units<0>(sum, raw[1], scale[1], a + kUnits * kUnitBytes, there);
        } else {
            Sums part = {};
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                multiply_units<0>(part, raw[c], scale[c], a + c * kUnits * kUnitBytes, there);
                if (c == 0 && kParts == 1) continue;
                if (c == 1 && kParts == 2 && ((at.first_step + step) * 2 + 1) * SCALE_BLOCK >= fetch.args.k) break;  // no block, no scale
#pragma unroll
                for (int i = 0; i < ROW_BLOCKS; ++i)
#pragma unroll
                    for (int j = 0; j < kTokenBlocks; ++j)
#pragma unroll
                        for (int v = 0; v < 4; ++v) {
                            sum[i][j][v] +=
                                block.b[c * (kParts - 1)][2 * i + v / 2] * block.a[c * (kParts - 1)][2 * j + v % 2] * part[i][j][v];
                            part[i][j][v] = 0.f;
                        }
            }
        }
    }
    if constexpr (kLookForNan) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * 2; ++i) {
            nan[i] |= __shfl_xor_sync(~0u, nan[i], 1);  // of the row's four lanes
            nan[i] |= __shfl_xor_sync(~0u, nan[i], 2);
#pragma unroll
            for (int j = 0; j < kTokenBlocks; ++j)
                if (nan[i]) sum[i / 2][j][i % 2 * 2] = sum[i / 2][j][i % 2 * 2 + 1] = __uint_as_float(0x7FC00000u);
        }
    }
}

// Epilogue ------------------------------------------------------------------------------------------------------------------------

// What the sums of one part of a tile (an MMA's 16 columns of D and 8 rows) are multiplied by and added to. Loaded long before it is used.
struct Factors {
    float column[2], row[2], bias[2], alpha;
    bool none[2];  // no row of A: zeros

    static __device__ __forceinline__ float scale(u64 pointer, const ScaleArgs& s, i32 matrix, i32 at, float value) {
        return pointer ? load_float(pointer, matrix * s.matrix + (s.rows == 1 ? at : at / s.rows) * s.row, s.type) : value;
    }
    __device__ __forceinline__ void load(const Args& args, const Place& at, i32 tile, int part) {
        alpha = args.alpha ? load_float(args.alpha, 0, args.alpha_type) : args.alpha_value;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const i32 n = smaller(tile * kRows + part / kTokenBlocks * 16 + r * 8 + at.g, args.n - 1);
            column[r] = scale(args.b_outer, args.b_outers, at.batch, n, args.b_outer_value);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const i32 token = at.first_token + smaller(part % kTokenBlocks * 8 + at.t * 2 + c, at.tokens - 1);
                const i32 source = source_row(args, token);
                if (r == 0) row[c] = scale(args.a_outer, args.a_outers, at.batch, larger(source, 0), args.a_outer_value);
                if (r == 0) none[c] = source < 0;
            }
            bias[r] = args.bias ? load_float(args.bias, at.batch * args.bias_expert + n, args.bias_type) : 0.f;
        }
    }
    // sum * row[m] * column[n] * alpha + bias[n], in this order.
    __device__ __forceinline__ void store(const Args& args, const Place& at, i32 tile, int part, const float (&sum)[4]) const {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            const i32 n = tile * kRows + part / kTokenBlocks * 16 + v / 2 * 8 + at.g, token = part % kTokenBlocks * 8 + at.t * 2 + v % 2;
            if (n >= args.n || token >= at.tokens) continue;
            float b = bias[v / 2];
            if (args.bias_row != 0) b = load_float(args.bias, (at.first_token + token) * args.bias_row + n, args.bias_type);  // of each row
            const float x = none[v % 2] ? 0.f : sum[v] * kResidue * row[v % 2] * column[v / 2] * alpha + b;
            const float four[4] = {x, 0.f, 0.f, 0.f};
            store_four(args.out, at.batch * args.out_batch + (at.first_token + token) * args.out_row + n * args.out_column, args.out_column,
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

// Sums of a tile from all CTAs of the cluster go to the CTA whose turn the tile is: [2][SPLIT][groups] of SPLIT turns at a time.
__device__ __forceinline__ u32 letters(u32 mail, const Place& at, i32 batch, int from) {
    return mail + ((batch % 2 * SPLIT + from) * kGroups + at.group) * kSumBytes + at.lane * 16;
}
__device__ __forceinline__ void finish_turns(const Args& args, const Place& at, u32 mail, i32 batch, int rank) {
    const i32 tile = at.tile + (batch * SPLIT + rank) * at.stride;
    const bool mine = batch >= 0 && tile < at.tiles && at.warp_k < ROW_BLOCKS * kTokenBlocks;
    Factors factors;
    if (mine) factors.load(args, at, tile, at.warp_k);
    cluster_wait();
    for (int part = at.warp_k; mine && part < ROW_BLOCKS * kTokenBlocks; part += WARPS_K) {
        if (part != at.warp_k) factors.load(args, at, tile, part);
        float total[4] = {};
        add_up(total, letters(mail, at, batch, 0) + part * 512, SPLIT, kGroups * kSumBytes);
        factors.store(args, at, tile, part, total);
    }
}

// Kernel --------------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kThreads, MIN_CTAS)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        skinny(const __grid_constant__ Args args) {
    extern __shared__ u8 shared_bytes[];
    const int warp = threadIdx.x / 32, rank = SPLIT > 1 ? cluster_rank() : 0;
    const i32 pieces = ceil_div(args.m, TOKENS), number = blockIdx.x / SPLIT;
    const bool one = gridDim.x == args.clusters * SPLIT;  // matrix and piece: no divisions then
    const i32 matrix_and_piece = one ? 0 : number / args.clusters, cluster = one ? number : number % args.clusters;
    const i32 all = ceil_div(args.k, kStepValues), each = ceil_div(all, SPLIT);  // steps of a row; of a CTA
    Place at;
    at.lane = threadIdx.x % 32, at.g = at.lane / 4, at.t = at.lane % 4, at.warp_k = warp % WARPS_K, at.group = warp / WARPS_K;
    at.first_step = rank * each, at.steps = larger(smaller(each, all - at.first_step), 0), at.rounds = ceil_div(each, WARPS_K);
    at.batch = one ? 0 : matrix_and_piece / pieces, at.first_token = one ? 0 : matrix_and_piece % pieces * TOKENS;
    at.tile = cluster * kGroups + at.group, at.tiles = ceil_div(args.n, kRows), at.stride = args.clusters * kGroups;

    // Shared memory: A, sums of warps [2][WARPS], sums of CTAs [2][SPLIT][groups], the rings.
    const u32 activations = shared_address(shared_bytes), sums = activations + each * kStepBytes,
              mail = sums + (WARPS_K > 1 ? 2 * WARPS * kSumBytes : 0), rings = mail + (SPLIT > 1 ? 2 * SPLIT * kGroups * kSumBytes : 0);
    Fetch fetch(args, at, rings + warp * STAGES * kStageBytes);
#if SPLIT > 1
    cluster_arrive();  // nobody writes to a CTA that has not begun
#endif
    const Activations x(at, activations);
    const int early = args.early == 0 ? 1 : args.early == 1 ? 0 : STAGES - 1;  // A comes behind few weights, where it need not wait
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
        if (i != early) {
            fetch.next();
            continue;
        }
#if __CUDA_ARCH__ >= 900
        if (args.early == 1) fetch.prefetch();
        wait_for_predecessor();
#endif
        const i32 rows = args.grouped == 2 ? smaller(args.m, reinterpret_cast<const i32*>(args.indptr)[at.batch]) : args.m;
        at.tokens = larger(0, smaller(TOKENS, rows - at.first_token));
        if (at.tokens == 0) at.tiles = 0;
        x.fetch(args, at);
    }
    if (args.early == 2)
        copy_async_wait<0>();
    else
        copy_async_wait<STAGES - 2>();
    x.finish();
    __syncthreads();

    u32 stage = fetch.ring;
    i32 turn = 0;
#pragma unroll 1
    for (i32 tile = at.tile; tile - at.group < at.tiles; tile += at.stride, ++turn) {  // equally often for all groups of a cluster
        const bool any = tile < at.tiles;
        Factors factors;
        if (SPLIT == 1 && any && at.warp_k < ROW_BLOCKS * kTokenBlocks) factors.load(args, at, tile, at.warp_k);
        Sums sum = {};
        if (any) multiply_tile(sum, at, fetch, tile, stage, activations);
#if SPLIT > 1
        if (turn % SPLIT == 0) finish_turns(args, at, mail, turn / SPLIT - 1, rank);
#endif
        const u32 place = sums + (turn % 2 * WARPS + at.group * WARPS_K) * kSumBytes + at.lane * 16;
        if (WARPS_K > 1 && any) {
#pragma unroll
            for (int part = 0; part < ROW_BLOCKS * kTokenBlocks; ++part) {
                const float (&s)[4] = sum[part / kTokenBlocks][part % kTokenBlocks];
                store_shared_16(place + at.warp_k * kSumBytes + part * 512, __float_as_uint(s[0]), __float_as_uint(s[1]),
                                __float_as_uint(s[2]), __float_as_uint(s[3]));
            }
            barrier_sync(1 + at.group, 32 * WARPS_K);
        }
#pragma unroll
        for (int part = 0; part < ROW_BLOCKS * kTokenBlocks; ++part) {
            if (!any || part % WARPS_K != at.warp_k) continue;
            float total[4] = {};
            if constexpr (WARPS_K > 1)
                add_up(total, place + part * 512, WARPS_K, kSumBytes);
            else
                for (int v = 0; v < 4; ++v) total[v] = sum[part / kTokenBlocks][part % kTokenBlocks][v];
#if SPLIT > 1
            store_remote_16(letters(mail, at, turn / SPLIT, rank) + part * 512, turn % SPLIT, total);
#else
            if (part >= WARPS_K) factors.load(args, at, tile, part);
            factors.store(args, at, tile, part, total);
#endif
        }
#if SPLIT > 1
        if (turn % SPLIT == SPLIT - 1 || tile - at.group + at.stride >= at.tiles) cluster_arrive();
#endif
    }
#if SPLIT > 1
    finish_turns(args, at, mail, (turn - 1 + SPLIT) / SPLIT - 1, rank);
#endif
    copy_async_wait<0>();
}
