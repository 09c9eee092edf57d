// D = epilogue(A @ B) by warpgroup products of tiles that TMA brings to shared memory: 16-bit or fp8 operands, dense, batched, masked, or in
// segments of successive rows. sm_90a.
//
//   roles     one thread asks TMA for steps of 128 bytes along k, up to STAGES ahead and across tiles; warps beside it bring scales;
//             WARPGROUPS multiply, 64 rows each, and store
//   tiles     CTAs stay on their SMs and take tiles of BLOCK_M x BLOCK_N one after the other, in patches that share operands (schedule.cuh)
//   apart     two warpgroups work together at a tile, or, APART, each at its own of 128 rows, in turns
//   clusters  SHARE CTAs have successive row tiles and the same columns of B: each brings a part of those, for all of them
//   k         or SPLIT CTAs of a cluster cut k, where tiles are few; then each stores some columns, and has one tile
//   sums      stay in the tensor cores, or with PROMOTE those of 128 bytes along k are added up outside, in fp32; SCALE_BLOCK: scaled first
//   shared    STAGES x (tile of A, tile of B), swizzled | LINES x 16 lines of results for each warp, which TMA stores | what scales columns,
//             and is added; what scales rows; STAGES x scales of a step | barriers
//   launch    B of the first steps comes, or is prefetched, before the kernel ahead has ended, if the host says so
//
// Not handled: operands of different sizes, scales inside of values, gathered rows, fp8 contiguous along m or n (wgmma has none;
// transpose.cu comes first), A that TMA cannot read (align.cu).
// Learned from: DeepGEMM (roles, promotion of block-scaled sums), CUTLASS (descriptors, multicast).
#include "common/args.cuh"
#include "common/delay.cuh"
#include "common/epilogue.cuh"
#include "common/hopper.cuh"
#include "common/scales.cuh"
#include "common/schedule.cuh"

constexpr int kConsumers = 4 * WARPGROUPS, kThreads = 128 * (WARPGROUPS + 1);       // warps; the first warpgroup brings
constexpr int kWaves = APART ? 2 : 1;                                               // times 64 rows of a warpgroup
constexpr int kTogether = APART ? 1 : WARPGROUPS, kTiles = WARPGROUPS / kTogether;  // warpgroups at one tile; tiles under way
constexpr int kBlockM = 64 * kTogether * kWaves, kBlocks = BLOCK_N / 8;             // blocks: of 8 columns, as fragments have them
constexpr int kValueBytes = A_ELEMENT == kBf16 || A_ELEMENT == kFp16 ? 2 : 1, kStepValues = 128 / kValueBytes;
constexpr int kCluster = SHARE * SPLIT;
// Of a thread: what producers do not need is given to those who multiply.
constexpr bool kShift = WARPGROUPS > 1;
constexpr int kProducerRegisters = SCALE_BLOCK == 0 ? 40 : 56, kConsumerRegisters = SCALE_BLOCK == 0 ? 232 : 224;
static_assert(SCALE_BLOCK == 0 || (PROMOTE && SCALE_BLOCK == kStepValues), "block scales multiply the sums of a step");
static_assert(BLOCK_N % (16 * SPLIT) == 0 && BLOCK_N <= 256 && STAGES > 1);
static_assert(kValueBytes == 2 || (A_MAJOR == 0 && B_MAJOR == 0));
static_assert(!APART || (WARPGROUPS == 2 && SPLIT == 1 && !PROMOTE), "while one stores, the other one multiplies");
static_assert(SHARE == 1 || SPLIT == 1, "clusters have one purpose");

// Python packs the maps behind `Args`.
struct TensorArgs : Args {
    TensorMap a_map, b_map, out_map;
};
static_assert(sizeof(TensorArgs) == sizeof(Args) + 384, "the host packs this layout");

// Where a thread is among those that multiply.
struct Place {
    int warp, lane, g, t;  // warp: of those; g, t: as in fragments

    __device__ __forceinline__ int warpgroup() const { return warp / 4; }
    __device__ __forceinline__ int row_in_tile(int wave) const {
        return (warpgroup() % kTogether * kWaves + wave) * 64 + warp % 4 * 16 + g;
    }
};

// Shared memory -------------------------------------------------------------------------------------------------------------------

// A tile is rows of 128 bytes along k, or for each 64 of m or n such a panel of 64 k.
constexpr int kBytesA = kBlockM * 128, kBytesB = (B_MAJOR ? (BLOCK_N + 63) / 64 * 64 : BLOCK_N) * 128, kStage = kBytesA + kBytesB;
constexpr int kPanel = 64 * 128;
constexpr int kFactors = BLOCK_N * 8 + kBlockM * 4;                // of a tile
constexpr int kLines = LINES * 2048;                               // of a warp
constexpr int kScales = SCALE_BLOCK == 0 ? 0 : (kBlockM + 4) * 4;  // of a step: of rows, and of two blocks of columns

// The steps in shared memory. All that a CTA goes through are numbered; here are the slot and the phase of one of them.
struct Ring {
    u32 first, slot = 0, phase = 0;

    __device__ __forceinline__ explicit Ring(u32 first) : first(first) {}
    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
    __device__ __forceinline__ void skip(u32 steps) {
        slot += steps % STAGES, phase ^= steps / STAGES & 1;
        if (slot >= STAGES) slot -= STAGES, phase ^= 1;
    }
    __device__ __forceinline__ u32 a() const { return first + slot * kStage; }
    __device__ __forceinline__ u32 b() const { return a() + kBytesA; }
    __device__ __forceinline__ u32 lines(int warp) const { return first + STAGES * kStage + warp * kLines; }
    __device__ __forceinline__ u32 columns(u32 tile) const { return lines(kConsumers) + tile * kFactors; }
    __device__ __forceinline__ u32 rows(u32 tile) const { return columns(tile) + BLOCK_N * 8; }
    __device__ __forceinline__ u32 scales() const { return columns(kTiles) + slot * kScales; }
    __device__ __forceinline__ u32 barriers() const { return columns(kTiles) + STAGES * kScales; }
    __device__ __forceinline__ u32 full(u32 slot) const { return barriers() + 16 * slot; }
    __device__ __forceinline__ u32 empty(u32 slot) const { return barriers() + 16 * slot + 8; }
    __device__ __forceinline__ u32 factors_full(u32 tile) const { return full(STAGES + tile); }
    __device__ __forceinline__ u32 factors_empty(u32 tile) const { return empty(STAGES + tile); }
};
static_assert(SPLIT == 1 || kBlockM * BLOCK_N * 4 <= STAGES * kStage, "sums take the place of the ring");

// Work ----------------------------------------------------------------------------------------------------------------------------

constexpr int kClusterM = kBlockM * SHARE;

// Tiles of clusters; of segments, as many as any lengths need.
__device__ __forceinline__ u32 tiles_of(const Args& args) {
    const u32 columns = ceil_div(args.n, BLOCK_N);
    const u32 rows = GROUPED ? args.m / kClusterM + smaller(args.batch, args.m) : args.batch * ceil_div(args.m, kClusterM);
    return rows * columns;
}
__device__ __forceinline__ Work work_of(const Args& args, u32 number, int rank) {
    Work work;
    if constexpr (GROUPED)
        work = grouped_work<kClusterM, BLOCK_N>(args, number);
    else
        work = args.grouped == 0 ? dense_work<kClusterM, BLOCK_N>(args, number) : masked_work<kClusterM, BLOCK_N>(args, number);
    if (SHARE > 1) work.row_begin += rank * kBlockM;
    // The last tiles lie inside, if they can, and do again what their neighbours do: TMA is slow with rows that are not there. NOTE: along a
    // line, boxes begin at multiples of 16 bytes (an H100 calls anything else an illegal instruction).
    if (!GROUPED && !A_MAJOR && args.grouped == 0) work.row_begin = smaller(work.row_begin, larger(args.m - kBlockM, 0));
    return work;
}

// Steps of k that a CTA takes.
struct Steps {
    i32 first, count;

    __device__ __forceinline__ Steps(const Args& args, int rank) {
        const i32 all = ceil_div(args.k, kStepValues), each = ceil_div(all, SPLIT);
        first = SPLIT > 1 ? rank * each : 0;
        count = SPLIT > 1 ? smaller(each, all - first) : all;
    }
};

// Whether columns have factors of their own, or bias; a tensor's scale goes with the rows'.
__device__ __forceinline__ bool scaled_by_column(const Args& args) {
    return (args.b_outer != 0 && args.b_outers.row != 0) || (args.bias != 0 && args.bias_row == 0);
}

// Producer ------------------------------------------------------------------------------------------------------------------------

// One operand's tile of a step. kSharers CTAs need it, of which this one brings part `rank`, to all; or kPrefetch, to L2.
template <int kMajor, int kRows, int kSharers, bool kPrefetch = false>
__device__ __forceinline__ void bring(const TensorMap& map, u32 to, i32 row, i32 k, i32 matrix, u32 full, int rank) {
    constexpr int kPanels = kMajor ? (kRows + 63) / 64 : 1, kPart = (kMajor ? 64 : kRows) / kSharers;  // a part: lines of 128 bytes
    static_assert(kPart % 8 == 0, "parts are whole patterns of the swizzle");
    const i32 from = kSharers > 1 ? rank * kPart : 0;
    to += from * 128;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
        const i32 x = kMajor ? row + panel * 64 : k, y = kMajor ? k + from : row + from;
        if constexpr (kPrefetch)
            prefetch_box(map, x, y, matrix);
        else if constexpr (kSharers > 1)
            copy_box_to((1 << kSharers) - 1, to + panel * kPanel, map, x, y, matrix, full);
        else
            copy_box(to + panel * kPanel, map, x, y, matrix, full);
    }
}

// Where a producer is in the ring: the slots it fills, once they are given back.
struct Filling {
    Ring ring;
    bool around = false;  // the ring has been filled once

    __device__ __forceinline__ void wait_for_slot() const {
        delay();
        if (around) mbarrier_wait(ring.empty(ring.slot), ring.phase ^ 1);
    }
    __device__ __forceinline__ void advance() {
        ring.advance();
        around |= ring.slot == 0;
    }
};

// The tiles of a CTA, one after the other.
template <class Each>
__device__ __forceinline__ void for_tiles(const Args& args, int rank, Each each) {
    const u32 tiles = tiles_of(args), clusters = gridDim.x / kCluster;
#pragma unroll 1
    for (u32 number = blockIdx.x / kCluster; number < tiles; number += clusters) each(work_of(args, number, rank));
}

// Rows of A that TMA brings: of those past the last one, which it would fill with zeros, slowly, none where a tile is higher than A.
__device__ __forceinline__ i32 rows_of_a(const Args& args) { return A_MAJOR ? kBlockM : smaller(kBlockM, ceil_div(args.m, 8) * 8); }

// Columns of B from k on, the first that a slot gets, or to L2.
template <bool kPrefetch>
__device__ __forceinline__ void bring_columns(const TensorArgs& args, const Ring& to, const Work& work, i32 k, int rank) {
    if constexpr (!kPrefetch) mbarrier_arrive_expecting(to.full(to.slot), kBytesB + rows_of_a(args) * 128);
    const i32 expert = args.b_batch ? work.expert : 0;
    bring<B_MAJOR, BLOCK_N, SHARE, kPrefetch>(args.b_map, to.b(), work.column_begin, k, expert, to.full(to.slot), rank);
}

// By one warp, whose first lane brings.
__device__ __forceinline__ void produce(const TensorArgs& args, Ring ring, int lane, int rank) {
    const Steps steps(args, rank);
    Filling at{ring};
    i32 early = 0;                                                        // steps whose columns have been asked for
    if (args.early != 0 && !GROUPED && args.grouped == 0 && lane == 0) {  // which do not depend on the kernel ahead; counts may
        const Work work = work_of(args, blockIdx.x / kCluster, rank);
        const i32 first = smaller(steps.count, STAGES);
        Ring to = ring;
        for (i32 step = 0; step < first; ++step, to.advance()) {
            const i32 k = (steps.first + step) * kStepValues;
            if (args.early == 2)
                bring_columns<false>(args, to, work, k, rank);
            else
                bring_columns<true>(args, to, work, k, rank);
        }
        if (args.early == 2) early = first;
    }
    __syncwarp();
    wait_for_predecessor();
    for_tiles(args, rank, [&](const Work& work) {
        const i32 batch = args.a_batch ? work.batch : 0;
        if (lane == 0 && work.any) {
#pragma unroll 1
            for (i32 step = 0; step < steps.count; ++step) {
                const i32 k = (steps.first + step) * kStepValues;
                at.wait_for_slot();
                if (step >= early) bring_columns<false>(args, at.ring, work, k, rank);
                bring<A_MAJOR, kBlockM, 1>(args.a_map, at.ring.a(), work.row_begin, k, batch, at.ring.full(at.ring.slot), rank);
                at.advance();
            }
            early = 0;
        }
        __syncwarp();
    });
    // Nobody leaves before all arrivals at its barriers have come.
    for (int i = 0; SHARE > 1 && lane == 0 && i < STAGES; ++i) {
        at.wait_for_slot();
        at.advance();
    }
    __syncwarp();
}

// By one warp: what scales the rows and columns of a tile, and is added, when those of the tile before have been used.
__device__ __forceinline__ void produce_factors(const Args& args, const Ring& ring, int lane, int rank) {
    const float alpha = args.alpha ? load_float(args.alpha, 0, args.alpha_type) : args.alpha_value;
    const bool by_column = scaled_by_column(args);
    u32 phase = 1, tile = 0;  // the first wait ends at once
    for_tiles(args, rank, [&](const Work& work) {
        if (!work.any) return;
        const float whole = by_column ? alpha : alpha * outer_scale(args.b_outer, args.b_outers, work.expert, 0, args.b_outer_value);
        const i32 from = first_scale_row(args.a_outers, work, work.row_begin, args.m);
        delay();
        mbarrier_wait(ring.factors_empty(tile), phase);
#pragma unroll 2
        for (int r = lane; r < kBlockM; r += 32) {
            const i32 m = larger(0, smaller(work.row_begin + r, work.row_end - 1));
            const i32 row = from < 0 ? m : from + m - work.row_begin;
            store_shared_u32(ring.rows(tile) + r * 4,
                             __float_as_uint(outer_scale(args.a_outer, args.a_outers, work.batch, row, args.a_outer_value) * whole));
        }
#pragma unroll 2
        for (int c = lane; by_column && c < BLOCK_N; c += 32) {
            const i32 n = smaller(work.column_begin + c, args.n - 1);
            const float factor = outer_scale(args.b_outer, args.b_outers, work.expert, n, args.b_outer_value);
            const bool own = args.bias != 0 && args.bias_row == 0;
            const float bias = own ? load_float(args.bias, work.expert * args.bias_expert + n, args.bias_type) : 0.f;
            store_shared_8(ring.columns(tile) + c * 8, __float_as_uint(factor), __float_as_uint(bias));
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(ring.factors_full(tile));
        if (++tile == kTiles) tile = 0, phase ^= 1;
    });
}

// By two warps: the floats that scale the sums of each step.
__device__ __forceinline__ void produce_scales(const Args& args, Ring ring, int thread, int rank) {
    constexpr int kRows = kBlockM / 64;  // of a thread
    const Steps steps(args, rank);
    Filling at{ring};
    for_tiles(args, rank, [&](const Work& work) {
        if (!work.any) return;
        RowScales<kRows> of_a;
        RowScales<1> of_b;
        of_a.begin(args.a_scales, args.a_scale, work.batch);
        of_b.begin(args.b_scales, args.b_scale, work.expert);
        const i32 from = first_scale_row(args.a_scales, work, work.row_begin, args.m);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const i32 row = larger(0, smaller(work.row_begin + thread + 64 * i, work.row_end - 1));
            of_a.row[i] = (from < 0 ? row : from + row - work.row_begin) / args.a_scales.rows * static_cast<i32>(args.a_scales.row);
        }
        const i32 block = work.column_begin / args.b_scales.rows + thread;  // of columns
        of_b.row[0] = smaller(block, (args.n - 1) / args.b_scales.rows) * static_cast<i32>(args.b_scales.row);
        float a[2][kRows], b[2][1];  // of this step and the next one
        const auto load = [&](i32 step, int i) {
            const i32 k = (steps.first + smaller(step, steps.count - 1)) * SCALE_BLOCK;
            of_a.load(args.a_scales, k >> args.a_scales.shift, a[i]);
            if (thread < 2) of_b.load(args.b_scales, k >> args.b_scales.shift, b[i]);
        };
        load(0, 0);
        load(1, 1);
#pragma unroll 1
        for (i32 step = 0; step < steps.count; step += 2)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (step + i >= steps.count) return;
                at.wait_for_slot();
#pragma unroll
                for (int r = 0; r < kRows; ++r) store_shared_u32(at.ring.scales() + (thread + 64 * r) * 4, __float_as_uint(a[i][r]));
                if (thread < 2) store_shared_u32(at.ring.scales() + (kBlockM + thread) * 4, __float_as_uint(b[i][0]));
                __syncwarp();
                if (thread % 32 == 0) mbarrier_arrive(at.ring.full(at.ring.slot));
                load(step + i + 2, i);
                at.advance();
            }
    });
}

// Main loop -----------------------------------------------------------------------------------------------------------------------

using Sums = float[kWaves][kBlocks][4];  // [..][2 r + c]: row g + 8 r of the warp's 16, column 2 t + c of the block

// Products of 32 bytes along k.
template <int kMany>
__device__ __forceinline__ void multiply_async(float (&sum)[kMany][4], u64 a, u64 b, bool add) {
    if constexpr (A_ELEMENT == kBf16)
        wgmma_bf16<A_MAJOR, B_MAJOR>(sum, a, b, add);
    else if constexpr (A_ELEMENT == kFp16)
        wgmma_fp16<A_MAJOR, B_MAJOR>(sum, a, b, add);
    else if constexpr (A_ELEMENT == kE4m3 && B_ELEMENT == kE4m3)
        wgmma_e4m3_e4m3(sum, a, b, add);
    else if constexpr (A_ELEMENT == kE4m3)
        wgmma_e4m3_e5m2(sum, a, b, add);
    else if constexpr (B_ELEMENT == kE4m3)
        wgmma_e5m2_e4m3(sum, a, b, add);
    else
        wgmma_e5m2_e5m2(sum, a, b, add);
}

// NOTE: the compiler takes sums for settled as soon as the product is asked for, unless they are used behind the wait.
template <int kMany>
__device__ __forceinline__ void keep(float (&sum)[kMany][4]) {
#pragma unroll
    for (int i = 0; i < kMany * 4; ++i) wgmma_keep(sum[i / 4][i % 4]);
}

// Where a step's tiles are, for the rows of this warpgroup, in pieces of 16 bytes.
struct Tiles {
    u32 a, b;

    __device__ __forceinline__ Tiles(const Ring& ring, int warpgroup)
        : a(pieces_of(ring.first) + ring.slot * (kStage / 16) + warpgroup * (kWaves * 64 * 128 / 16)),
          b(pieces_of(ring.first + kBytesA) + ring.slot * (kStage / 16)) {}
    // Begins the products of a step with these columns, from block `first` on; unless `add`, sums begin again.
    template <int kMany>
    __device__ __forceinline__ void multiply(float (&sum)[kMany][4], int wave, int first, bool add) const {
        constexpr int kNextA = (A_MAJOR ? 16 * 128 : 32) / 16, kNextB = (B_MAJOR ? 16 * 128 : 32) / 16;
        constexpr int kBlockB = 8 * 128 / 16;  // MN: of a panel 8
#pragma unroll
        for (int p = 0; p < 4; ++p)
            multiply_async(sum, swizzled_descriptor(a + wave * (64 * 128 / 16) + p * kNextA, kPanel),
                           swizzled_descriptor(b + first * kBlockB + p * kNextB, kPanel), p > 0 || add);
        wgmma_commit();
    }
};

// What was read from a slot may be overwritten, here and where this CTA's parts go.
__device__ __forceinline__ void release(const Ring& ring, u32 slot, const Place& at) {
    delay();
    if constexpr (SCALE_BLOCK != 0) __syncwarp();  // all lanes have read scales
    if constexpr (SHARE > 1) {
        if (at.lane < SHARE) mbarrier_return_remote(ring.empty(slot), at.lane);
    } else if (at.lane == 0) {
        mbarrier_arrive(ring.empty(slot));
    }
}

// Two warpgroups with a tile each multiply in turns, so that one stores while the other multiplies. Products asked for at the same time would
// share the tensor cores, and end at the same time.
struct Turns {
    u32 own, other;  // barriers

    __device__ __forceinline__ explicit Turns(const Place& at) : own(1 + at.warpgroup()), other(2 - at.warpgroup()) {
        if (APART && own == 2) barrier_arrive<kConsumers * 32>(other);  // the first one begins
    }
    __device__ __forceinline__ void take() const {
        if (APART) barrier_wait<kConsumers * 32>(own);
    }
    __device__ __forceinline__ void pass() const {
        if (APART) barrier_arrive<kConsumers * 32>(other);
    }
    __device__ __forceinline__ void end(u32 turn) const {  // somebody takes the turn that nobody needs
        if (APART && own == 1 + turn % 2) barrier_wait<kConsumers * 32>(own);
    }
};

// Sums stay in the tensor cores: the products of a step begin before those of the one before it have ended.
__device__ __forceinline__ void multiply_all(Sums& sum, Ring& ring, const Place& at, i32 steps, const Turns& turns) {
    u32 before = 0;
    turns.take();
#pragma unroll 1
    for (i32 step = 0; step < steps; ++step) {
        mbarrier_wait(ring.full(ring.slot), ring.phase);
        const Tiles tiles(ring, at.warpgroup() % kTogether);
        wgmma_fence();
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) tiles.multiply(sum[wave], wave, 0, true);
        wgmma_wait<kWaves>();
        if (step > 0) release(ring, before, at);
        before = ring.slot;
        ring.advance();
    }
    turns.pass();  // the other one's products follow these
    wgmma_wait<0>();
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) keep(sum[wave]);
    release(ring, before, at);
}

// What scales the sums of a step: [row g, row g + 8][of the first block of columns, of the second].
struct Factors {
    float of[2][2];
};
struct StepScales {
    static constexpr int kAlike = smaller(128, BLOCK_N & -BLOCK_N);  // columns that are in one block in any tile
    static constexpr bool kOne = kAlike == BLOCK_N;                  // block in a tile, else up to two
    i32 border;                                                      // columns of the first block

    __device__ __forceinline__ StepScales(const Args& args, const Work& work) {
        const i32 rows = SCALE_BLOCK == 0 ? 1 : args.b_scales.rows;
        border = (work.column_begin / rows + 1) * rows - work.column_begin;
    }
    static __device__ __forceinline__ Factors read(u32 scales, const Place& at) {
        Factors factors;
#pragma unroll
        for (int i = 0; i < 4 && SCALE_BLOCK != 0; ++i)
            factors.of[i / 2][i % 2] =
                load_shared_float(scales + (at.row_in_tile(0) + i / 2 * 8) * 4) * load_shared_float(scales + (kBlockM + i % 2) * 4);
        return factors;
    }
    // To the sums of these columns, from block `first` on.
    template <int kMany>
    __device__ __forceinline__ void add(float (&sum)[kBlocks][4], int first, const float (&part)[kMany][4], const Factors& factors) const {
        float f[2];
#pragma unroll
        for (int i = 0; i < kMany; ++i) {
            const int j = first + i;
            if (i == 0 || j * 8 % kAlike == 0) {
                const bool second = !kOne && j * 8 >= border;
                f[0] = second ? factors.of[0][1] : factors.of[0][0], f[1] = second ? factors.of[1][1] : factors.of[1][0];
            }
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                if constexpr (SCALE_BLOCK != 0)
                    sum[j][v] += f[v / 2] * part[i][v];
                else
                    sum[j][v] += part[i][v];
            }
        }
    }
};

// Sums leave the tensor cores after each step, as many columns at once as registers hold. While those of one warpgroup are added up, the
// other one multiplies.
__device__ __forceinline__ void multiply_promoted(Sums& sum, Ring& ring, const Args& args, const Work& work, const Place& at, i32 steps) {
    constexpr int kLots = PROMOTE && BLOCK_N > 192 ? 2 : 1, kLot = kBlocks / kLots;
    static_assert(kLots == 1 || BLOCK_N == 256, "lots are of whole panels");
    const StepScales scales(args, work);
#pragma unroll 1
    for (i32 step = 0; step < steps; ++step) {
        Factors factors;
        mbarrier_wait(ring.full(ring.slot), ring.phase);
        const Tiles tiles(ring, at.warpgroup() % kTogether);
#pragma unroll
        for (int lot = 0; lot < kLots; ++lot) {
            float part[kLot][4];
            wgmma_fence();
            tiles.multiply(part, 0, lot * kLot, false);
            if (lot == 0) {
                wgmma_wait<1>();  // NOTE: for nothing, but that the compiler has scales waited for behind the products, not among them
                factors = StepScales::read(ring.scales(), at);
            }
            wgmma_wait<0>();
            keep(part);
            if (lot + 1 == kLots) {
                release(ring, ring.slot, at);
                ring.advance();
            }
            scales.add(sum[0], lot * kLot, part, factors);
        }
    }
}

// Results -------------------------------------------------------------------------------------------------------------------------

// Stores 16 rows of a warp and 8 kCount columns, `first` of the tile's and those behind it: chunk by chunk, through lines in shared memory.
template <int kCount>
struct Store {
    const TensorArgs& args;
    const Work& work;
    const Place& at;
    const float (&sum)[kCount][4];
    i32 row;  // the warp's first. NOTE: of what TMA gets the compiler must see that lanes agree, or it sees it nowhere behind that
    int first;
    u32 columns, &lines, end_of_lines;  // lines: the next 16 of 128 bytes
    float of_row[2];
    bool by_column;

    __device__ __forceinline__ Store(const TensorArgs& args, const Work& work, const Place& at, const float (&sum)[kCount][4], int wave,
                                     int first, const Ring& ring, u32 tile, u32& lines)
        : args(args),
          work(work),
          at(at),
          sum(sum),
          row(work.row_begin + at.row_in_tile(wave) - at.g),
          first(first),
          columns(ring.columns(tile)),
          lines(lines),
          end_of_lines(ring.lines(at.warp + 1)),
          of_row{row_factor(ring, tile, wave, 0), row_factor(ring, tile, wave, 8)},
          by_column(scaled_by_column(args)) {
        const bool whole = args.out_type != kFp32 && args.out_column == 1 && args.out_row > 0 && args.out_batch >= 0 &&
                           args.bias_row == 0 && (args.out | (args.out_row | args.out_batch) * 2) % 16 == 0;
        bool boxes = false;  // TMA does not know where a segment ends, and writes whole 16 bytes of a row
        if constexpr (kCount >= 8) {
            boxes = whole && (work.row_end == args.m || work.row_end >= row + 16) &&
                    (args.n % 8 == 0 || work.column_begin + first + kCount * 8 <= args.n);
            if (boxes) store_boxes();
        }
        if (!boxes) {
            if (at.lane == 0) wait_for_boxes<0>();
            __syncwarp();
            if (whole)
                store_chunks<8>([&](int block) { store_lines(block); });
            else
                store_chunks<4>([&](int block) { store_values(block); });
        }
    }

  private:
    __device__ __forceinline__ float row_factor(const Ring& ring, u32 tile, int wave, int r) const {
        return load_shared_float(ring.rows(tile) + (at.row_in_tile(wave) + r) * 4);
    }
    // 16 bytes of a line, where TMA expects them. Pieces that lanes write, or read, at once are in different banks.
    __device__ __forceinline__ u32 line(int r, int piece) const { return lines + r * 128 + (piece ^ r % 8) * 16; }
    __device__ __forceinline__ i64 place(i32 m, i32 n) const {
        return work.batch * args.out_batch + m * args.out_row + n * args.out_column;
    }

    // 64 columns at a time, the last of them again if they are no multiple; TMA stores what is inside of D.
    __device__ __forceinline__ void store_boxes() {
        const u32 last = end_of_lines - 2048;
#pragma unroll
        for (int chunk = 0; chunk < ceil_div(kCount, 8); ++chunk) {
            const int block = smaller(chunk * 8, kCount - 8);
            if (at.lane == 0) wait_for_boxes<LINES - 1>();
            __syncwarp();
            put_blocks<8, true>(block);
            delay();
            fence_async_proxy();
            __syncwarp();
            if (at.lane == 0) {
                store_box(lines, args.out_map, work.column_begin + first + block * 8, row, work.batch);
                commit_boxes();
            }
            lines = lines == last ? lines - (LINES - 1) * 2048 : lines + 2048;
        }
    }

    // kEach blocks fill the lines. NOTE: a loop, so that what stores them is there once; nothing is to be computed ahead of it.
    template <int kEach, class StoreChunk>
    __device__ __forceinline__ void store_chunks(StoreChunk store) {
#pragma unroll 1
        for (int block = 0; block < kCount; block += kEach) {
            hold(of_row[0]);
            hold(of_row[1]);
            put<kEach, 0>(block);
            __syncwarp();
            store(block);
            __syncwarp();
        }
    }
    template <int kEach, int kBlock>
    __device__ __forceinline__ void put(int block) const {
        if (block == kBlock)
            put_blocks<smaller(kEach, kCount - kBlock), kEach == 8>(kBlock);
        else if constexpr (kBlock + kEach < kCount)
            put<kEach, kBlock + kEach>(block);
    }
    // Blocks `from` and those behind it, as 16-bit values or floats: sum * row[m] * column[n] + bias[n].
    template <int kMany, bool k16Bits>
    __device__ __forceinline__ void put_blocks(int from) const {
        float x[kMany][4];
#pragma unroll
        for (int i = 0; i < kMany * 4; ++i) x[i / 4][i % 4] = sum[from + i / 4][i % 4] * of_row[i % 4 / 2];
        if (by_column) {
#pragma unroll
            for (int i = 0; i < kMany; ++i) {
                const Chunk c = load_shared_16(columns + (first + (from + i) * 8 + at.t * 2) * 8);
#pragma unroll
                for (int v = 0; v < 4; ++v) x[i][v] = x[i][v] * __uint_as_float(c.word[v % 2 * 2]) + __uint_as_float(c.word[v % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (int j = 0; j < kMany; j += 2) {
            if constexpr (k16Bits) {
                u32 word[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float low = x[j + i / 2][i % 2 * 2], high = x[j + i / 2][i % 2 * 2 + 1];
                    word[i] = args.out_type == kBf16 ? pack_bf16(low, high) : pack_fp16(low, high);
                }
                store_matrix_x4(line(at.lane % 16, j + at.lane / 16), word[0], word[1], word[2], word[3]);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    store_shared_8(line(at.g + i % 2 * 8, (j + i / 2) * 2 + at.t / 2) + at.t % 2 * 8,
                                   __float_as_uint(x[j + i / 2][i % 2 * 2]), __float_as_uint(x[j + i / 2][i % 2 * 2 + 1]));
            }
        }
    }
    // 16-bit results, 8 at a time.
    __device__ __forceinline__ void store_lines(int block) const {
        const int piece = at.lane % 8;
        const i32 n = work.column_begin + first + (block + piece) * 8;
        if (block + piece >= kCount || n >= args.n) return;
#pragma unroll
        for (int r = at.lane / 8; r < 16; r += 4) {
            const i32 m = row + r;
            if (m >= work.row_end) return;
            u16* to = reinterpret_cast<u16*>(args.out) + place(m, n);
            if (n + 8 <= args.n) {
                *reinterpret_cast<Chunk*>(to) = load_shared_16(line(r, piece));
                continue;
            }
#pragma unroll 1
            for (int v = 0; n + v < args.n; ++v) to[v] = static_cast<u16>(load_shared_u16(line(r, piece) + 2 * v));
        }
    }
    // Floats, 4 at a time.
    __device__ __forceinline__ void store_values(int block) const {
        const i32 n = work.column_begin + first + block * 8 + at.lane % 8 * 4;
        const i32 count = smaller(4, smaller(args.n, work.column_begin + first + kCount * 8) - n);
#pragma unroll 1
        for (int r = at.lane / 8; r < 16; r += 4) {
            const i32 m = row + r;
            if (m >= work.row_end || count <= 0) return;
            const Chunk c = load_shared_16(line(r, at.lane % 8));
            float x[4];
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                x[v] = __uint_as_float(c.word[v]);
                if (args.bias_row != 0 && v < count) x[v] += load_float(args.bias, m * args.bias_row + n + v, args.bias_type);
            }
            store_four(args.out, place(m, n), args.out_column, args.out_type, x, count);
        }
    }
};

// Adds up what CTAs of the cluster have, in the order of k, of some columns each.
__device__ __forceinline__ void meet(const Sums& sum, const Ring& ring, const TensorArgs& args, const Work& work, const Place& at, int rank,
                                     u32& lines) {
    constexpr int kOwn = kBlocks / SPLIT, kAtOnce = smaller(SPLIT, larger(1, 16 / kOwn));  // CTAs whose sums are under way
    const auto letter = [&](int wave, int j) {
        return ring.first + ((wave * kBlocks + j) * kConsumers * 32 + at.warp * 32 + at.lane) * 16;
    };
    __syncthreads();  // nobody reads the ring any more
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave)
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const float (&s)[4] = sum[wave][j];
            store_shared_16(letter(wave, j), __float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]), __float_as_uint(s[3]));
        }
    delay();
    cluster_arrive();
    cluster_wait();
    delay();
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
        float total[kOwn][4] = {};
#pragma unroll 1
        for (int sender = 0; sender < SPLIT; sender += kAtOnce) {
            Chunk c[kAtOnce][kOwn];
#pragma unroll
            for (int i = 0; i < kAtOnce * kOwn; ++i)
                c[i / kOwn][i % kOwn] = load_remote_16(letter(wave, rank * kOwn + i % kOwn), sender + i / kOwn);
#pragma unroll
            for (int i = 0; i < kAtOnce * kOwn * 4; ++i)
                total[i / 4 % kOwn][i % 4] += __uint_as_float(c[i / 4 / kOwn][i / 4 % kOwn].word[i % 4]);
        }
        Store<kOwn>(args, work, at, total, wave, rank * kOwn * 8, ring, 0, lines);
    }
}

// The same of threads without any.
__device__ __forceinline__ void meet_without_sums() {
    __syncthreads();
    cluster_arrive();
    cluster_wait();
}

// Kernel --------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void consume(const TensorArgs& args, Ring ring, const Place& at, int rank) {
    const Steps steps(args, rank);
    const Turns turns(at);
    u32 lines = ring.lines(at.warp), phase = 0, turn = 0;
    const u32 tile = APART ? at.warpgroup() : 0;
    const u32 tiles = tiles_of(args), clusters = gridDim.x / kCluster;
    u32 number = blockIdx.x / kCluster;
    Work work, next = number < tiles ? work_of(args, number, rank) : Work{};
#pragma unroll 1
    for (; number < tiles; number += clusters) {
        work = next;
        const auto find_next = [&] {  // NOTE: among what stores, which hides how long it takes
            next = SPLIT == 1 && number + clusters < tiles ? work_of(args, number + clusters, rank) : Work{};
        };
        if (!work.any) {
            if constexpr (SPLIT > 1) meet_without_sums();
            find_next();
            continue;
        }
        if (APART && turn++ % 2 != tile) {
            ring.skip(steps.count);
            find_next();
            continue;
        }
        Sums sum = {};  // NOTE: compilers before CUDA 12.9 do products one by one whose sums a first product begins
        if constexpr (PROMOTE)
            multiply_promoted(sum, ring, args, work, at, steps.count);
        else
            multiply_all(sum, ring, at, steps.count, turns);
        find_next();
        mbarrier_wait(ring.factors_full(tile), phase);
        phase ^= 1;
        delay();
        if constexpr (SPLIT > 1) {
            meet(sum, ring, args, work, at, rank, lines);
        } else {
#pragma unroll
            for (int wave = 0; wave < kWaves; ++wave) Store<kBlocks>(args, work, at, sum[wave], wave, 0, ring, tile, lines);
        }
        __syncwarp();
        if (at.lane == 0) mbarrier_arrive(ring.factors_empty(tile));
    }
    turns.end(turn);
    if (at.lane == 0) wait_for_boxes<0>();  // lines must be there until they have been read
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(kCluster, 1, 1) hopper(const __grid_constant__ TensorArgs args) {
    extern __shared__ __align__(1024) u8 shared_bytes[];
    const int thread = threadIdx.x, rank = kCluster > 1 ? cluster_rank() : 0;
    const int warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;  // the compiler sees that warps agree
    const Ring ring(shared_address(shared_bytes));
    if (thread == 0) {
        prefetch_tensor_map(args.a_map);
        prefetch_tensor_map(args.b_map);
        if (args.out % 16 == 0) prefetch_tensor_map(args.out_map);  // or there is none
        for (u32 slot = 0; slot < STAGES; ++slot) {
            mbarrier_init(ring.full(slot), 1 + (SCALE_BLOCK != 0) * 2);
            mbarrier_init(ring.empty(slot), 4 * kTogether * SHARE);
        }
        for (u32 tile = 0; tile < kTiles; ++tile) {
            mbarrier_init(ring.factors_full(tile), 1);
            mbarrier_init(ring.factors_empty(tile), 4 * kTogether);
        }
        mbarrier_init_done();
    }
    __syncthreads();
    if constexpr (SHARE > 1) {  // nobody writes to a CTA that has not begun
        cluster_arrive_relaxed();
        cluster_wait();
    }
    if (warp != 0) wait_for_predecessor();
    if (warp < 4) {
        if constexpr (kShift) fewer_registers<kProducerRegisters>();
        if (warp == 0) produce(args, ring, lane, rank);
        if (warp == 1) produce_factors(args, ring, lane, rank);
        if (SCALE_BLOCK != 0 && warp >= 2) produce_scales(args, ring, thread - 64, rank);
        if constexpr (SPLIT > 1) meet_without_sums();
    } else {
        if constexpr (kShift) more_registers<kConsumerRegisters>();
        const Place at{warp - 4, lane, lane / 4, lane % 4};
        consume(args, ring, at, rank);
    }
    if constexpr (kCluster > 1) {  // nobody leaves while others read its sums, or have not begun
        cluster_arrive_relaxed();
        cluster_wait();
    }
}
