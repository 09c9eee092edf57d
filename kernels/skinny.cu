// D = epilogue(A @ B) for few rows of A: weights go from global memory to MMA fragments as they lie, past activations that stay in
// shared memory. sm_80 and up.
//
// Roles are swapped: 16 columns of B (weight rows, contiguous along k) are the 16 rows of an MMA, and rows of A ("tokens") its 8 columns.
// The order of k inside an MMA is free as long as both operands agree. So a lane's 16-byte chunk of a weight row is its part of the
// fragments of several MMAs, and A is laid down once in the order that those chunks ask for.
//
//   step    128 bytes of each weight row of a tile of 16 * ROW_BLOCKS rows; lane l multiplies chunks l % 4 and l % 4 + 4 of rows l / 4 + 8 i
//   tiles   clusters have successive ones, as many each; more than TOKENS rows of A are cut among clusters
//   k       SPLIT CTAs of a cluster cut k into runs of steps. Where there are no clusters, PARTS CTAs cut it, and leave their sums in memory
//           for reduce.cu
//   runs    the steps of all tiles of a CTA, one behind the other, are cut into a run for each group of WARPS_K warps, which take its steps
//           in turn: all have the same to do, and what is read at a time lies together
//   ring    each warp copies what it will read itself, STAGES - 1 steps ahead and across tiles: no barrier in the main loop
//   sums    of all tiles meet in shared memory, in one order, behind the only barrier; those of CTAs in the one of them that stores the
//           tile, behind one barrier of the cluster
//   launch  may begin before its predecessor has ended: weights are prefetched or loaded then, everything else waits
//
// Not handled: B contiguous along n or not in 16-byte pieces, floats of 32 or 64 k, zero points, fp16 beside bf16.
#define STEPS_APART WARPS_K
#include "common/rows.cuh"

constexpr int kThreads = 32 * WARPS, kGroups = WARPS / WARPS_K, kCuts = SPLIT * PARTS;
constexpr int kUnitBytes = kTokenBlocks * kTokens * 4 * 16;  // of A: 8 values of each token for each of 4 lanes
constexpr int kStepBytes = 2 * kUnits * kUnitBytes;
constexpr int kPartsOfTile = ROW_BLOCKS * kTokenBlocks;  // an MMA's 16 columns of D and 8 rows
constexpr int kSumLanes = larger(1, kTokens / 2);        // of four, that have sums of tokens which others have not
constexpr int kPartBytes = 128 * kSumLanes, kTileBytes = kPartsOfTile * kPartBytes;
// Tiles whose sums are held at once, half of them being added up, where one group and one CTA have all steps of many.
constexpr i32 kSlots = kGroups == 1 && SPLIT == 1 ? larger(2, 65536 / (WARPS * kTileBytes)) : 1 << 30;
static_assert(WARPS % WARPS_K == 0 && (SPLIT == 1 || PARTS == 1));

// Activations ---------------------------------------------------------------------------------------------------------------------

// All of A that this CTA multiplies, in the order of the units, 16 bytes for 8 values; the rest is zeros. A thread has pieces of one row.
struct Activations {
    static constexpr int kApart = kThreads / (4 * kTokens * kTokenBlocks);  // units from one piece of a thread to its next
    static_assert(kThreads % (4 * kTokens * kTokenBlocks) == 0, "threads take whole units");
    static constexpr u32 kPieceBytes = kThreads * 16;  // from one to the next
    u32 first, end;

    __device__ __forceinline__ Activations(const Place& at, u32 shared)
        : first(shared + threadIdx.x * 16), end(shared + at.steps * kStepBytes) {}

    // Asynchronously, as they are stored, where they can be read in pieces of 8 values.
    __device__ __forceinline__ void fetch(const Args& args, const Place& at) const {
        const int t = threadIdx.x % 4, token = threadIdx.x / 4 % kTokens + threadIdx.x / (4 * kTokens) % kTokenBlocks * 8;
        const i32 row = token < tokens_of(at.work) ? source_row(args, result_row(args, at.work, token)) : -1;
        const u8* a = reinterpret_cast<const u8*>(args.a) + (at.work.batch * args.a_batch + row * args.a_row) * kRowValueBytes;
        const bool pieces = row >= 0 && args.a_k == 1 && args.k % 8 == 0 && reinterpret_cast<u64>(a) % 16 == 0;
        int unit = threadIdx.x / (4 * kTokens * kTokenBlocks);
        const auto place = [&] { return ((at.first_step * 2 + unit / kUnits) * 4 + t) * kValues + unit % kUnits * 8; };
        u32 to = first;
        if (kApart % kUnits == 0 && pieces) {  // equal distances
            constexpr i32 kFar = kApart / kUnits * 4 * kValues;
            const i32 k = place();
            i32 left = smaller((static_cast<i32>(end - to) + static_cast<i32>(kPieceBytes) - 1) / static_cast<i32>(kPieceBytes),
                               k < args.k ? (args.k - k + kFar - 1) / kFar : 0);
            const u8* p = a + k * kRowValueBytes;
            unit += left * kApart;
#pragma unroll 4
            for (; left > 0; --left, to += kPieceBytes, p += kFar * kRowValueBytes) copy_async<8 * kRowValueBytes>(to, p);
        }
#pragma unroll 1
        for (; to < end; to += kPieceBytes, unit += kApart) {
            const i32 k = place(), count = row < 0 ? 0 : smaller(args.k - k, 8);
            if (count > 0 && pieces)
                copy_async<8 * kRowValueBytes>(to, a + k * kRowValueBytes);
            else {
                const Chunk c = gather_values(a, k, count, args.a_k);
                store_shared_16(to, c.word[0], c.word[1], c.word[2], c.word[3]);
            }
        }
        copy_async_commit();
    }
    // What the thread has fetched, which is here now, becomes 16-bit and pairs up.
    __device__ __forceinline__ void finish() const {
        if constexpr (kRowValueBytes == 2 && kInOrder) return;
        u32 at = first;
#pragma unroll 1
        for (; at + 3 * kPieceBytes < end; at += 4 * kPieceBytes) {  // several at a time: shared memory takes a while to answer
            Chunk c[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) c[i] = load_shared_16(at + i * kPieceBytes);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Chunk x = pair_up(c[i]);
                store_shared_16(at + i * kPieceBytes, x.word[0], x.word[1], x.word[2], x.word[3]);
            }
        }
#pragma unroll 1
        for (; at < end; at += kPieceBytes) {
            const Chunk c = pair_up(load_shared_16(at));
            store_shared_16(at, c.word[0], c.word[1], c.word[2], c.word[3]);
        }
    }
};

// Main loop -----------------------------------------------------------------------------------------------------------------------

template <int kUnit>
__device__ __forceinline__ void multiply_units(Sums& sum, const Chunk (&raw)[ROW_BLOCKS * 2], const u32 (&scale)[ROW_BLOCKS * 2][2],
                                               u32 a) {
    Chunk x[kTokenBlocks];
#pragma unroll
    for (int j = 0; j < kTokenBlocks; ++j) x[j] = load_shared_16(a + kUnit * kUnitBytes + j * (kTokens * 64));
    constexpr int kBlock = kScaleOfUnit<kUnit>;
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS; ++i) {
        u32 first[4], second[4];
        decode_fragments<kUnit>(raw[2 * i], raw[2 * i + 1], scale[2 * i][kBlock], scale[2 * i + 1][kBlock], first, second);
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
    if constexpr (kUnit + 1 < kUnits) multiply_units<kUnit + 1>(sum, raw, scale, a);
}

// Sums of one tile over `count` of this warp's steps from `step` on.
__device__ __forceinline__ void multiply_tile(Sums& sum, const Place& at, Fetch& fetch, const Reads& reads, i32 tile, i32 step, i32 count,
                                              u32& stage, u32 activations) {
    u32 nan[ROW_BLOCKS * 2] = {};
    BlockScales block(fetch.args, at, tile);
    u32 a = activations + step * kStepBytes + (at.g % kTokens * 4 + at.t) * 16;  // lanes of tokens that nobody asked for take others'
#pragma unroll 1
    for (; count > 0; --count, step += WARPS_K, a += WARPS_K * kStepBytes) {
        copy_async_wait<STAGES - 2>();
        delay();
        __syncwarp();  // lanes read what others fetched, and all are done with the stage that is filled next
        Chunk raw[2][ROW_BLOCKS * 2];
        u32 scale[2][ROW_BLOCKS * 2][2] = {};
#pragma unroll
        for (int c = 0; c < 2; ++c) reads.load(raw[c], scale[c], stage, c);
        stage = fetch.behind(stage);
        fetch.next();
        if constexpr (SCALE_BLOCK != 0) block.load(fetch.args, at.first_step + step);
        if constexpr (kLookForNan) {
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS * 8; ++i) {
                nan[i / 4] |= nan_codes(raw[0][i / 4].word[i % 4]);
                nan[i / 4] |= nan_codes(raw[1][i / 4].word[i % 4]);
            }
        }
        if constexpr (SCALE_BLOCK == 0) {
            multiply_units<0>(sum, raw[0], scale[0], a);
            multiply_units<0>(sum, raw[1], scale[1], a + kUnits * kUnitBytes);
        } else {
            Sums part = {};
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                multiply_units<0>(part, raw[c], scale[c], a + c * kUnits * kUnitBytes);
                if (c == 0 && kParts == 1) continue;
                if (c == 1 && kParts == 2 && ((at.first_step + step) * 2 + 1) * SCALE_BLOCK >= fetch.args.k) break;  // no block, no scale
                block.add(sum, part, c * (kParts - 1));
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

// Sums ----------------------------------------------------------------------------------------------------------------------------

// What groups of warps have of the CTA's tiles, of which each has `steps` steps: group g from its step g * run on.
struct Runs {
    const Args& args;
    const Place& at;
    i32 first, count, run;  // tiles
    i32 most;               // the most of them that a group has a part of
    u32 sums, mail;         // in shared memory: [groups][most][WARPS_K] tiles; [tiles that this CTA stores][SPLIT]
    int rank;
    i32 from = 0, to = 0, base = 0;  // tiles of this turn; base: one group's tile that would have the first slot

    __device__ __forceinline__ u32 own() const { return (at.g * kSumLanes + at.t % kSumLanes) * 16; }
    __device__ __forceinline__ u32 place(int group, i32 i) const {  // of the sums of its first warp
        const i32 before = kGroups == 1 ? base : run > 0 ? group * run / at.steps : 0;
        return sums + (group * most + i - before) * (WARPS_K * kTileBytes) + own();
    }
    __device__ __forceinline__ u32 letter(i32 i, int from) const { return mail + (i / SPLIT * SPLIT + from) * kTileBytes + own(); }

    // This warp's sums of tile i.
    __device__ __forceinline__ void leave(const Sums& sum, i32 i, int warp) const {
        if (at.t >= kSumLanes) return;
        const u32 to = place(warp / WARPS_K, i) + warp % WARPS_K * kTileBytes;
#pragma unroll
        for (int part = 0; part < kPartsOfTile; ++part) {
            const float (&s)[4] = sum[part / kTokenBlocks][part % kTokenBlocks];
            store_shared_16(to + part * kPartBytes, __float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]),
                            __float_as_uint(s[3]));
        }
    }
    // Ahead of the sums: what scales the first part that this warp will store.
    __device__ __forceinline__ void load(Factors& factors, int warp) const {
        const i32 i = SPLIT > 1 ? warp / kPartsOfTile * SPLIT + rank : from + warp / kPartsOfTile;
        if (i < (SPLIT > 1 ? count : to)) factors.load(args, at, first + i, warp % kPartsOfTile);
    }
    // Parts of tiles of this turn, which warps take in turn.
    __device__ __forceinline__ void meet(Factors& factors, int warp) const {
        const i32 parts = (to - from) * kPartsOfTile;
        __syncthreads();  // all have left their sums
        delay();
#pragma unroll 1
        for (i32 number = warp; number < parts; number += WARPS) {
            const i32 i = from + number / kPartsOfTile, part = number % kPartsOfTile, begin = i * at.steps;
            const bool several = kGroups > 1 && run > 0;
            const i32 last = several ? (begin + at.steps - 1) / run : 0;  // of the groups that have some of it
            if (SPLIT == 1 && number != warp) factors.load(args, at, first + i, part);
            float total[4] = {};
#pragma unroll 1
            for (int group = several ? begin / run : 0; group <= last; ++group) {
                if (run > 0) add_up(total, place(group, i) + part * kPartBytes, WARPS_K, kTileBytes);
            }
            if constexpr (SPLIT == 1)
                factors.store(args, at, first + i, part, total, PARTS > 1 ? rank * sums_of_part(args) : 0);
            else if (at.t < kSumLanes)
                store_remote_16(letter(i, rank) + part * kPartBytes, i % SPLIT, total);
        }
    }
    // Sums of CTAs.
    __device__ __forceinline__ void open_mail(Factors& factors, int warp) const {
        const i32 parts = count > rank ? ((count - 1 - rank) / SPLIT + 1) * kPartsOfTile : 0;
        const auto tile = [&](i32 number) { return number / kPartsOfTile * SPLIT + rank; };
        delay();
        cluster_arrive();
        cluster_wait();
        delay();
#pragma unroll 1
        for (i32 number = warp; number < parts; number += WARPS) {
            const i32 i = tile(number), part = number % kPartsOfTile;
            if (number != warp) factors.load(args, at, first + i, part);
            float total[4] = {};
            add_up(total, letter(i, 0) + part * kPartBytes, SPLIT, kTileBytes);
            factors.store(args, at, first + i, part, total);
        }
    }
};

// Kernel --------------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kThreads, MIN_CTAS)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        skinny(const __grid_constant__ Args args) {
    extern __shared__ u8 shared_bytes[];
    const int warp = threadIdx.x / 32, rank = SPLIT > 1 ? cluster_rank() : blockIdx.x % PARTS;
    const i32 number = blockIdx.x / kCuts;
    const bool one = gridDim.x == args.clusters * kCuts && args.grouped == 0;  // matrix and piece: no divisions then
    // CTAs that read the same weights have neighbouring numbers. Of segments, some pieces have no rows: those come last.
    const i32 pieces = one || args.grouped ? 1 : gridDim.x / kCuts / args.clusters;
    const i32 cluster = one ? number : args.grouped ? number % args.clusters : number / pieces;
    const i32 all = ceil_div(args.k, kStepValues), each = ceil_div(all, kCuts);  // steps of a row; of a CTA
    Place at;
    at.lane = threadIdx.x % 32, at.g = at.lane / 4, at.t = at.lane % 4;
    at.first_step = rank * each, at.steps = larger(smaller(each, all - at.first_step), 0);
    at.work = one ? Work{0, args.m, 0, 0, 0, 0, 0, true} : rows_of(args, args.grouped ? number / args.clusters : number % pieces);
    const i32 tiles = ceil_div(args.n, kRows), tiles_each = ceil_div(tiles, args.clusters), first = cluster * tiles_each;
    const i32 count = at.work.any ? larger(0, smaller(tiles_each, tiles - first)) : 0;
    const i32 steps = larger(at.steps, 1), total = count * at.steps, run = ceil_div(total, kGroups);
    const int group = kGroups > 1 ? warp / WARPS_K : 0, warp_k = warp % WARPS_K;
    const i32 begin = group * run, length = larger(0, smaller(run, total - begin)), before = kGroups > 1 ? begin / steps : 0;
    const i32 end = kGroups == 1 ? count : length > 0 ? (begin + length - 1) / steps + 1 : before;  // of this group's tiles
    Walk walk = {first + before, begin - before * steps + warp_k, (length - warp_k + WARPS_K - 1) / WARPS_K, steps, 1};
    i32 i = before, step = walk.step, left = walk.left;
    for (; walk.step >= steps; walk.step -= steps) ++walk.tile;

    // Shared memory: A, sums of warps, sums of CTAs, the rings.
    const i32 most = kGroups == 1 ? smaller(tiles_each, kSlots) : ceil_div(tiles_each, kGroups) + 1;
    const u32 activations = shared_address(shared_bytes), sums = activations + each * kStepBytes, mail = sums + WARPS * most * kTileBytes,
              rings = mail + (SPLIT > 1 ? ceil_div(tiles_each, SPLIT) * SPLIT * kTileBytes : 0);
    Fetch fetch(args, at, walk, rings + warp * STAGES * kStageBytes);
#if SPLIT > 1
    delay();
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
        x.fetch(args, at);
    }
    if (args.early == 2)
        copy_async_wait<0>();
    else
        copy_async_wait<STAGES - 2>();
    x.finish();
    delay();
    __syncthreads();
#if SPLIT > 1
    cluster_wait();
#endif

    Runs runs = {args, at, first, count, run, most, sums, mail, rank};
    const i32 turn = most < tiles_each && kGroups == 1 ? most / 2 : count;  // tiles
    runs.to = smaller(turn, count);
    Factors factors;
    runs.load(factors, warp);
    const Reads reads(at);
    u32 stage = fetch.ring;
#pragma unroll 1
    for (; i < end; ++i) {
        const i32 here = larger(0, smaller(left, ceil_div(at.steps - step, WARPS_K)));  // none, if others have all that is left of it
        Sums sum = {};
        multiply_tile(sum, at, fetch, reads, first + i, step, here, stage, activations);
        delay();
        runs.leave(sum, i, warp);
        if (kSlots < 1 << 30 && i + 1 == runs.to && runs.to < count) {  // who has met now is done with the other half of the slots
            runs.meet(factors, warp);
            const i32 half = turn - (runs.from - runs.base);
            runs.from = runs.to, runs.to = smaller(runs.to + turn, count), runs.base = runs.from - half;
            runs.load(factors, warp);
        }
        left -= here, step += here * WARPS_K - at.steps;
    }
    copy_async_wait<0>();
    runs.meet(factors, warp);
#if SPLIT > 1
    runs.open_mail(factors, warp);
#endif
}
