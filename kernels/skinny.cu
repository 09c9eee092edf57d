// D = epilogue(A @ B) for few rows of A: weights go from global memory to MMA fragments as they lie, past activations that stay in
// shared memory. sm_80 and up.
//
// Roles are swapped: 16 columns of B (weight rows, contiguous along k) are the 16 rows of an MMA, and rows of A ("tokens") its 8 columns.
// The order of k inside an MMA is free as long as both operands agree. So a lane's 16-byte chunk of a weight row is its part of the
// fragments of several MMAs, and A is laid down once in the order that those chunks ask for.
//
//   step    128 bytes of each weight row of a tile of 16 * ROW_BLOCKS rows; lane l multiplies chunks l % 4 and l % 4 + 4 of rows l / 4 + 8 i
//   k       SPLIT CTAs of a cluster cut k into runs of steps; in each, WARPS_K warps take its steps in turn. Where there are no clusters,
//           PARTS CTAs cut it, and leave their sums in memory for reduce.cu
//   rows    groups of WARPS_K warps, and clusters, take tiles in turn; more than TOKENS rows of A are cut among clusters
//   ring    each warp copies what it will read itself, STAGES - 1 steps ahead and across tiles: no barrier in the main loop
//   sums    of a tile meet in shared memory, in one order: those of warps behind a barrier of their group, those of CTAs in the one of
//           them whose turn it is, SPLIT tiles later
//   launch  may begin before its predecessor has ended: weights are prefetched or loaded then, everything else waits
//
// Not handled: B contiguous along n or not in 16-byte pieces, floats of 32 or 64 k, zero points, fp16 beside bf16.
#include "common/rows.cuh"

constexpr int kThreads = 32 * WARPS, kGroups = WARPS / WARPS_K, kCuts = SPLIT * PARTS;
constexpr int kUnitBytes = kTokenBlocks * kTokens * 4 * 16;  // of A: 8 values of each token for each of 4 lanes
constexpr int kStepBytes = 2 * kUnits * kUnitBytes;
static_assert(WARPS % WARPS_K == 0 && (SPLIT == 1 || PARTS == 1));

// Activations ---------------------------------------------------------------------------------------------------------------------

// All of A that this CTA multiplies, in the order of the units, 16 bytes for 8 values; the rest is zeros. A thread has pieces of one row.
struct Activations {
    static constexpr int kApart = kThreads / (4 * kTokens * kTokenBlocks);  // units from one piece of a thread to its next
    static_assert(kThreads % (4 * kTokens * kTokenBlocks) == 0, "threads take whole units");
    u32 first, end;

    __device__ __forceinline__ Activations(const Place& at, u32 shared)
        : first(shared + threadIdx.x * 16), end(shared + at.steps * kStepBytes) {}

    // Asynchronously, as they are stored, where they can be read in pieces of 8 values.
    __device__ __forceinline__ void fetch(const Args& args, const Place& at) const {
        const int t = threadIdx.x % 4, token = threadIdx.x / 4 % kTokens + threadIdx.x / (4 * kTokens) % kTokenBlocks * 8;
        const i32 row = token < tokens_of(at.work) ? source_row(args, result_row(args, at.work, token)) : -1;
        const u8* a = reinterpret_cast<const u8*>(args.a) + (at.work.batch * args.a_batch + row * args.a_row) * kRowValueBytes;
        const bool pieces = args.a_k == 1 && args.k % 8 == 0 && reinterpret_cast<u64>(a) % 16 == 0;
        int unit = threadIdx.x / (4 * kTokens * kTokenBlocks);
#pragma unroll 1
        for (u32 to = first; to < end; to += kThreads * 16, unit += kApart) {
            const i32 k = ((at.first_step * 2 + unit / kUnits) * 4 + t) * kValues + unit % kUnits * 8;
            const i32 count = row < 0 ? 0 : smaller(args.k - k, 8);
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
#pragma unroll 1
        for (u32 at = first; at < end; at += kThreads * 16) {
            const Chunk c = pair_up(load_shared_16(at));
            store_shared_16(at, c.word[0], c.word[1], c.word[2], c.word[3]);
        }
    }
};

// Main loop -----------------------------------------------------------------------------------------------------------------------

template <int kUnit>
__device__ __forceinline__ void multiply_units(Sums& sum, const Chunk (&raw)[ROW_BLOCKS * 2], const u32 (&scale)[ROW_BLOCKS * 2][2], u32 a,
                                               bool there) {
    Chunk x[kTokenBlocks] = {};
#pragma unroll
    for (int j = 0; j < kTokenBlocks; ++j)
        if (there) x[j] = load_shared_16(a + kUnit * kUnitBytes + j * (kTokens * 64));
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
    if constexpr (kUnit + 1 < kUnits) multiply_units<kUnit + 1>(sum, raw, scale, a, there);
}

// Sums of one tile over this warp's steps.
__device__ __forceinline__ void multiply_tile(Sums& sum, const Place& at, Fetch& fetch, i32 tile, u32& stage, u32 activations) {
    u32 nan[ROW_BLOCKS * 2] = {};
    BlockScales block(fetch.args, at, tile);
    const bool there = at.g < kTokens;  // lanes of tokens that nobody asked for multiply zeros
#pragma unroll 1
    for (i32 round = 0; round < at.rounds; ++round) {
        copy_async_wait<STAGES - 2>();
        delay();
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
    delay();
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
    const int warp = threadIdx.x / 32, rank = SPLIT > 1 ? cluster_rank() : blockIdx.x % PARTS;
    const i32 number = blockIdx.x / kCuts;
    const bool one = gridDim.x == args.clusters * kCuts && args.grouped == 0;  // matrix and piece: no divisions then
    const i32 cluster = one ? number : number % args.clusters;
    const i32 all = ceil_div(args.k, kStepValues), each = ceil_div(all, kCuts);  // steps of a row; of a CTA
    Place at;
    at.lane = threadIdx.x % 32, at.g = at.lane / 4, at.t = at.lane % 4, at.warp_k = warp % WARPS_K, at.group = warp / WARPS_K;
    at.first_step = rank * each, at.steps = larger(smaller(each, all - at.first_step), 0), at.rounds = ceil_div(each, WARPS_K);
    at.work = one ? Work{0, args.m, 0, 0, 0, 0, 0, true} : rows_of(args, number / args.clusters);
    at.tile = cluster * kGroups + at.group, at.tiles = at.work.any ? ceil_div(args.n, kRows) : 0, at.stride = args.clusters * kGroups;

    // Shared memory: A, sums of warps [2][WARPS], sums of CTAs [2][SPLIT][groups], the rings.
    const u32 activations = shared_address(shared_bytes), sums = activations + each * kStepBytes,
              mail = sums + (WARPS_K > 1 ? 2 * WARPS * kSumBytes : 0), rings = mail + (SPLIT > 1 ? 2 * SPLIT * kGroups * kSumBytes : 0);
    Fetch fetch(args, at, rings + warp * STAGES * kStageBytes);
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
            delay();
            barrier_sync(1 + at.group, 32 * WARPS_K);
            delay();
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
            delay();
            store_remote_16(letters(mail, at, turn / SPLIT, rank) + part * 512, turn % SPLIT, total);
#else
            if (part >= WARPS_K) factors.load(args, at, tile, part);
            factors.store(args, at, tile, part, total, PARTS > 1 ? rank * sums_of_part(args) : 0);
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
