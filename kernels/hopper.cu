// D = epilogue(A @ B) by warpgroup products of tiles that TMA brings to shared memory: 16-bit or fp8 operands, dense, batched, masked, or in
// segments of successive rows. sm_90a.
//
//   roles     one thread asks TMA for steps of 128 bytes along k, up to STAGES ahead and across tiles; WARPGROUPS multiply them, 64 WAVES
//             rows each, and store
//   tiles     CTAs stay on their SMs and take tiles of BLOCK_M x BLOCK_N one after the other, in patches that share operands (schedule.cuh)
//   clusters  SHARE_B CTAs have successive row tiles and the same columns of B, or SHARE_A successive column tiles and the same rows of A:
//             each brings a part of the shared tile, for all of them
//   k         or SPLIT CTAs of a cluster cut k, where tiles are few; then each stores some columns, and has one tile
//   lead      of two warpgroups the first is LEAD steps ahead, so that one multiplies while the other stores
//   sums      stay in the tensor cores, or with PROMOTE those of 128 bytes along k are added up outside; SCALE_BLOCK: scaled by floats then
//   shared    STAGES x (tile of A, tile of B), swizzled | barriers | lines of results, for each warp | what scales columns, and is added
//   launch    everything waits for the kernel ahead
//
// Not handled: operands of different sizes, scales inside of values, gathered rows, fp8 contiguous along m or n (wgmma has none;
// transpose.cu comes first).
// Learned from: fast.cu (roles, patches), DeepGEMM (promotion of block-scaled sums), CUTLASS (descriptors, multicast).
#include "common/args.cuh"
#include "common/delay.cuh"
#include "common/epilogue.cuh"
#include "common/hopper.cuh"
#include "common/scales.cuh"
#include "common/schedule.cuh"

constexpr int kConsumers = 4 * WARPGROUPS, kThreads = 128 * (WARPGROUPS + 1);  // warps; the first warpgroup brings
constexpr int kBlockM = 64 * WARPGROUPS * WAVES, kBlocks = BLOCK_N / 8;        // blocks: of 8 columns, as fragments have them
constexpr int kValueBytes = A_ELEMENT == kBf16 || A_ELEMENT == kFp16 ? 2 : 1, kStepValues = 128 / kValueBytes;
constexpr int kSharing = SHARE_A * SHARE_B, kCluster = kSharing * SPLIT;
// Of a thread: what producers do not need is given to those who multiply.
constexpr bool kShift = WARPGROUPS > 1;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(SCALE_BLOCK == 0 || (PROMOTE && SCALE_BLOCK == kStepValues), "block scales multiply the sums of a step");
static_assert(BLOCK_N % (16 * SPLIT) == 0 && BLOCK_N <= 256 && STAGES > 1);
static_assert(kValueBytes == 2 || (A_MAJOR == 0 && B_MAJOR == 0));
static_assert((SHARE_A == 1 || SHARE_B == 1) && (kSharing == 1 || SPLIT == 1), "clusters have one purpose");

// Python packs the maps behind `Args`.
struct TensorArgs : Args {
    TensorMap a_map, b_map;
};
static_assert(sizeof(TensorArgs) == sizeof(Args) + 256, "the host packs this layout");

// Where a thread is among those that multiply.
struct Place {
    int warp, lane, g, t;  // warp: of those; g, t: as in fragments
};

// Shared memory -------------------------------------------------------------------------------------------------------------------

// A tile is rows of 128 bytes along k, or for each 64 of m or n such a panel of 64 k.
constexpr int kBytesA = kBlockM * 128, kBytesB = (B_MAJOR ? (BLOCK_N + 63) / 64 * 64 : BLOCK_N) * 128, kStage = kBytesA + kBytesB;
constexpr int kPanel = 64 * 128;

// The steps in shared memory. All that a CTA goes through are numbered; here are the slot and the phase of one of them.
struct Ring {
    u32 first, slot = 0, phase = 0;

    __device__ __forceinline__ explicit Ring(u32 first) : first(first) {}
    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
    __device__ __forceinline__ u32 a() const { return first + slot * kStage; }
    __device__ __forceinline__ u32 b() const { return a() + kBytesA; }
    __device__ __forceinline__ u32 barriers() const { return first + STAGES * kStage; }
    __device__ __forceinline__ u32 full(u32 slot) const { return barriers() + 16 * slot; }
    __device__ __forceinline__ u32 empty(u32 slot) const { return barriers() + 16 * slot + 8; }
    __device__ __forceinline__ u32 lines(int warp) const { return barriers() + (STAGES * 16 + 127) / 128 * 128 + warp * 2048; }
    __device__ __forceinline__ u32 columns(int warp) const { return lines(kConsumers) + warp * BLOCK_N * 8; }
};
static_assert(SPLIT == 1 || kBlockM * BLOCK_N * 4 <= STAGES * kStage, "sums take the place of the ring");

// Work ----------------------------------------------------------------------------------------------------------------------------

constexpr int kClusterM = kBlockM * SHARE_B, kClusterN = BLOCK_N * SHARE_A;

// Tiles of clusters; of segments, as many as any lengths need.
__device__ __forceinline__ u32 tiles_of(const Args& args) {
    const u32 columns = ceil_div(args.n, kClusterN);
    const u32 rows = GROUPED ? args.m / kClusterM + smaller(args.batch, args.m) : args.batch * ceil_div(args.m, kClusterM);
    return rows * columns;
}
__device__ __forceinline__ Work work_of(const Args& args, u32 number, int rank) {
    Work work;
    if constexpr (GROUPED)
        work = grouped_work<kClusterM, kClusterN>(args, number);
    else
        work = args.grouped == 0 ? dense_work<kClusterM, kClusterN>(args, number) : masked_work<kClusterM, kClusterN>(args, number);
    if (SHARE_B > 1) work.row_begin += rank * kBlockM;
    if (SHARE_A > 1) work.column_begin += rank * BLOCK_N;
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

// Producer ------------------------------------------------------------------------------------------------------------------------

// One operand's tile of a step. kSharers CTAs need it, of which this one brings part `rank`, to all.
template <int kMajor, int kRows, int kSharers>
__device__ __forceinline__ void bring(const TensorMap& map, u32 to, i32 row, i32 k, i32 matrix, u32 full, int rank) {
    constexpr int kPanels = kMajor ? (kRows + 63) / 64 : 1, kPart = (kMajor ? 64 : kRows) / kSharers;  // a part: lines of 128 bytes
    static_assert(kPart % 8 == 0, "parts are whole patterns of the swizzle");
    const i32 from = kSharers > 1 ? rank * kPart : 0;
    to += from * 128;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
        const i32 x = kMajor ? row + panel * 64 : k, y = kMajor ? k + from : row + from;
        if constexpr (kSharers > 1)
            copy_box_to((1 << kSharers) - 1, to + panel * kPanel, map, x, y, matrix, full);
        else
            copy_box(to + panel * kPanel, map, x, y, matrix, full);
    }
}

// By one warp, whose first lane brings.
__device__ __forceinline__ void produce(const TensorArgs& args, Ring ring, int lane, int rank) {
    const u32 tiles = tiles_of(args), clusters = gridDim.x / kCluster;
    const Steps steps(args, rank);
    bool around = false;  // the ring has been filled once
    const auto wait_for_slot = [&] {
        delay();
        if (around) mbarrier_wait(ring.empty(ring.slot), ring.phase ^ 1);
    };
    const auto advance = [&] {
        ring.advance();
        around |= ring.slot == 0;
    };
#pragma unroll 1
    for (u32 number = blockIdx.x / kCluster; number < tiles; number += clusters) {
        const Work work = work_of(args, number, rank);
        if (!work.any) continue;
        const i32 batch = args.a_batch ? work.batch : 0, expert = args.b_batch ? work.expert : 0;
        if (lane == 0) {
#pragma unroll 1
            for (i32 step = 0; step < steps.count; ++step) {
                const u32 full = ring.full(ring.slot);
                const i32 k = (steps.first + step) * kStepValues;
                wait_for_slot();
                mbarrier_arrive_expecting(full, kStage);
                bring<A_MAJOR, kBlockM, SHARE_A>(args.a_map, ring.a(), work.row_begin, k, batch, full, rank);
                bring<B_MAJOR, BLOCK_N, SHARE_B>(args.b_map, ring.b(), work.column_begin, k, expert, full, rank);
                advance();
            }
        }
        __syncwarp();
    }
    // Nobody leaves before all arrivals at its barriers have come.
    for (int i = 0; kSharing > 1 && lane == 0 && i < STAGES; ++i) {
        wait_for_slot();
        advance();
    }
}

// Main loop -----------------------------------------------------------------------------------------------------------------------

using Sums = float[WAVES][kBlocks][4];  // [..][2 r + c]: row g + 8 r of the warp's 16, column 2 t + c of the block

// Products of 32 bytes along k.
__device__ __forceinline__ void multiply_async(float (&sum)[kBlocks][4], u64 a, u64 b, bool add) {
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
template <int kCount>
__device__ __forceinline__ void keep(float (&sum)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount * 4; ++i) wgmma_keep(sum[i / 4][i % 4]);
}

// Descriptors of a step's tiles, for the rows of this warpgroup.
struct Tiles {
    u64 a, b;

    __device__ __forceinline__ Tiles(const Ring& ring, int warpgroup)
        : a(swizzled_descriptor(ring.a(), kPanel) + warpgroup * (WAVES * 64 * 128 / 16)), b(swizzled_descriptor(ring.b(), kPanel)) {}
    // Begins the products of a step; unless `add`, sums begin again.
    __device__ __forceinline__ void multiply(float (&sum)[kBlocks][4], int wave, bool add) const {
        constexpr int kNextA = (A_MAJOR ? 16 * 128 : 32) / 16, kNextB = (B_MAJOR ? 16 * 128 : 32) / 16;
#pragma unroll
        for (int p = 0; p < 4; ++p) multiply_async(sum, a + wave * (64 * 128 / 16) + p * kNextA, b + p * kNextB, p > 0 || add);
    }
};

// What was read from a slot may be overwritten, here and where this CTA's parts go.
__device__ __forceinline__ void release(const Ring& ring, u32 slot, const Place& at) {
    delay();
    if constexpr (kSharing > 1) {
        if (at.lane < kSharing) mbarrier_return_remote(ring.empty(slot), at.lane);
    } else if (at.lane == 0) {
        mbarrier_arrive(ring.empty(slot));
    }
}

// The first of two warpgroups begins a tile; the other one does when LEAD steps of it have been asked for. With fewer steps than slots, the
// first could be a whole tile ahead, and nobody leads.
struct Lead {
    bool leads, follows;

    __device__ __forceinline__ Lead(const Place& at, i32 steps)
        : leads(LEAD > 0 && steps > STAGES && at.warp < 4), follows(LEAD > 0 && steps > STAGES && at.warp >= 4) {}
    __device__ __forceinline__ void begin() const {
        if (follows) barrier_wait<1, kConsumers * 32>();
    }
    __device__ __forceinline__ void at_step(i32 step) const {
        if (step == LEAD && leads) barrier_arrive<1, kConsumers * 32>();
    }
};
static_assert(LEAD == 0 || (WARPGROUPS == 2 && LEAD < STAGES));

// Sums stay in the tensor cores: the products of a step begin before those of the one before it have ended.
template <class Meanwhile>
__device__ __forceinline__ void multiply_all(Sums& sum, Ring& ring, const Place& at, i32 steps, Meanwhile meanwhile) {
    const Lead lead(at, steps);
    lead.begin();
    u32 before = 0;
#pragma unroll 1
    for (i32 step = 0; step < steps; ++step) {
        mbarrier_wait(ring.full(ring.slot), ring.phase);
        const Tiles tiles(ring, at.warp / 4);
        wgmma_fence();
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave) tiles.multiply(sum[wave], wave, true);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(ring, before, at);
        lead.at_step(step);
        before = ring.slot;
        ring.advance();
    }
    meanwhile();  // the last step is being multiplied
    wgmma_wait<0>();
#pragma unroll
    for (int wave = 0; wave < WAVES; ++wave) keep(sum[wave]);
    release(ring, before, at);
}

// Floats that scale the sums of a step.
struct StepScales {
    static constexpr int kTogether = smaller(128, BLOCK_N & -BLOCK_N);  // columns that are in one block in any tile
    static constexpr bool kOne = kTogether == BLOCK_N;                  // block in a tile, else up to two
    RowScales<WAVES * 2> of_a;
    RowScales<2> of_b;
    i32 border;  // columns of the first block
    float a[WAVES * 2], b[2], next_a[WAVES * 2], next_b[2];

    __device__ __forceinline__ StepScales(const Args& args, const Work& work, const Place& at) {
        if constexpr (SCALE_BLOCK == 0) return;
        of_a.begin(args.a_scales, args.a_scale, work.batch);
        const i32 from = first_scale_row(args.a_scales, work, work.row_begin, args.m);
#pragma unroll
        for (int i = 0; i < WAVES * 2; ++i) {
            const i32 row = larger(0, smaller(work.row_begin + row_in_tile(at, i / 2) + i % 2 * 8, work.row_end - 1));
            of_a.row[i] = (from < 0 ? row : from + row - work.row_begin) / args.a_scales.rows * static_cast<i32>(args.a_scales.row);
        }
        of_b.begin(args.b_scales, args.b_scale, work.expert);
        const i32 rows = args.b_scales.rows, first = work.column_begin / rows, last = (args.n - 1) / rows;
        border = (first + 1) * rows - work.column_begin;
        of_b.row[0] = smaller(first, last) * static_cast<i32>(args.b_scales.row);
        of_b.row[1] = smaller(first + 1, last) * static_cast<i32>(args.b_scales.row);
    }
    static __device__ __forceinline__ int row_in_tile(const Place& at, int wave) {
        return (at.warp / 4 * WAVES + wave) * 64 + at.warp % 4 * 16 + at.g;
    }
    // Of a step that comes later; `take` when it has come.
    __device__ __forceinline__ void load(const Args& args, i32 step) {
        of_a.load(args.a_scales, step * SCALE_BLOCK >> args.a_scales.shift, next_a);
        of_b.load(args.b_scales, step * SCALE_BLOCK >> args.b_scales.shift, next_b);
    }
    __device__ __forceinline__ void take() {
#pragma unroll
        for (int i = 0; i < WAVES * 2; ++i) a[i] = next_a[i];
        b[0] = next_b[0], b[1] = next_b[1];
    }
    __device__ __forceinline__ void add(float (&sum)[kBlocks][4], const float (&part)[kBlocks][4], int wave) const {
        float factor[2][2], f[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) factor[i / 2][i % 2] = a[wave * 2 + i / 2] * b[i % 2];
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            if (j * 8 % kTogether == 0) {
                const bool second = !kOne && j * 8 >= border;
                f[0] = second ? factor[0][1] : factor[0][0], f[1] = second ? factor[1][1] : factor[1][0];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[j][i] += f[i / 2] * part[j][i];
        }
    }
};

// Sums leave the tensor cores after each step. While those of one warpgroup are added up, another one multiplies.
__device__ __forceinline__ void multiply_promoted(Sums& sum, Ring& ring, const Args& args, const Work& work, const Place& at,
                                                  const Steps& steps) {
    StepScales scales(args, work, at);
    float part[kBlocks][4];
    if constexpr (SCALE_BLOCK != 0) scales.load(args, steps.first);
    const Lead lead(at, steps.count);
    lead.begin();
#pragma unroll 1
    for (i32 step = 0; step < steps.count; ++step) {
        if constexpr (SCALE_BLOCK != 0) {  // NOTE: a step ahead, or products would wait for scales
            scales.take();
            scales.load(args, steps.first + smaller(step + 1, steps.count - 1));
        }
        mbarrier_wait(ring.full(ring.slot), ring.phase);
        const Tiles tiles(ring, at.warp / 4);
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave) {
            wgmma_fence();
            tiles.multiply(part, wave, false);
            wgmma_commit();
            wgmma_wait<0>();
            keep(part);
            if (wave == WAVES - 1) release(ring, ring.slot, at);
            if (wave == WAVES - 1) lead.at_step(step);
            if constexpr (SCALE_BLOCK != 0) {
                scales.add(sum[wave], part, wave);
            } else {
#pragma unroll
                for (int i = 0; i < kBlocks * 4; ++i) sum[wave][i / 4][i % 4] += part[i / 4][i % 4];
            }
        }
        ring.advance();
    }
}

// Results -------------------------------------------------------------------------------------------------------------------------

// What scales columns of D, and is added to them, in shared memory: pairs of floats for each of BLOCK_N. Every warp has its own.
__device__ __forceinline__ void load_columns(const Args& args, const Work& work, const Place& at, u32 columns) {
#pragma unroll 4
    for (int c = at.lane; c < BLOCK_N; c += 32) {
        const i32 n = smaller(work.column_begin + c, args.n - 1);
        const float factor = outer_scale(args.b_outer, args.b_outers, work.expert, n, args.b_outer_value);
        const bool own = args.bias != 0 && args.bias_row == 0;
        const float bias = own ? load_float(args.bias, work.expert * args.bias_expert + n, args.bias_type) : 0.f;
        store_shared_8(columns + c * 8, __float_as_uint(factor), __float_as_uint(bias));
    }
    __syncwarp();
}

// Stores 16 rows of a warp and 8 kCount columns, `first` of the tile's and those behind it: chunk by chunk, through lines in shared memory.
template <int kCount>
struct Store {
    const Args& args;
    const Work& work;
    const Place& at;
    const float (&sum)[kCount][4];
    i32 row;  // of lane g; that of its other half is 8 on
    int first;
    u32 columns, lines;  // lines: 16 of 128 bytes
    float of_row[2], alpha;

    __device__ __forceinline__ Store(const Args& args, const Work& work, const Place& at, const float (&sum)[kCount][4], i32 row, int first,
                                     const Ring& ring)
        : args(args),
          work(work),
          at(at),
          sum(sum),
          row(row),
          first(first),
          columns(ring.columns(at.warp)),
          lines(ring.lines(at.warp)),
          of_row{row_scale(row), row_scale(row + 8)},
          alpha(args.alpha ? load_float(args.alpha, 0, args.alpha_type) : args.alpha_value) {
        const bool whole = args.out_type != kFp32 && args.out_column == 1 && args.bias_row == 0 &&
                           (args.out | (args.out_row | args.out_batch) * 2) % 16 == 0;
        if (whole)
            store_chunks<8>([&](int block) { store_lines(block); });
        else
            store_chunks<4>([&](int block) { store_values(block); });
    }

  private:
    __device__ __forceinline__ float row_scale(i32 m) const {
        const i32 from = first_scale_row(args.a_outers, work, work.row_begin, args.m), last = smaller(m, work.row_end - 1);
        return outer_scale(args.a_outer, args.a_outers, work.batch, larger(0, from < 0 ? last : from + last - work.row_begin),
                           args.a_outer_value);
    }
    // 16 bytes of a line. Pieces that lanes write, or read, at once are in different banks.
    __device__ __forceinline__ u32 line(int r, int piece) const { return lines + r * 128 + (piece ^ (2 * r + r / 4 % 2) % 8) * 16; }
    __device__ __forceinline__ i64 place(i32 m, i32 n) const {
        return work.batch * args.out_batch + m * args.out_row + n * args.out_column;
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
        if (block == kBlock) {
#pragma unroll
            for (int j = kBlock; j < smaller(kBlock + kEach, kCount); j += 2) put_pair<kEach == 8>(j, j - kBlock);
        } else if constexpr (kBlock + kEach < kCount) {
            put<kEach, kBlock + kEach>(block);
        }
    }
    // Blocks j and j + 1, as 16-bit values or floats. sum * row[m] * column[n] * alpha + bias[n], in this order.
    template <bool k16Bits>
    __device__ __forceinline__ void put_pair(int j, int to) const {
        float x[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Chunk c = load_shared_16(columns + (first + (j + i) * 8 + at.t * 2) * 8);
#pragma unroll
            for (int v = 0; v < 4; ++v)
                x[i][v] =
                    sum[j + i][v] * of_row[v / 2] * __uint_as_float(c.word[v % 2 * 2]) * alpha + __uint_as_float(c.word[v % 2 * 2 + 1]);
        }
        if constexpr (k16Bits) {
            u32 word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float low = x[i / 2][i % 2 * 2], high = x[i / 2][i % 2 * 2 + 1];
                word[i] = args.out_type == kBf16 ? pack_bf16(low, high) : pack_fp16(low, high);
            }
            store_matrix_x4(line(at.lane % 16, to + at.lane / 16), word[0], word[1], word[2], word[3]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                store_shared_8(line(at.g + i % 2 * 8, (to + i / 2) * 2 + at.t / 2) + at.t % 2 * 8, __float_as_uint(x[i / 2][i % 2 * 2]),
                               __float_as_uint(x[i / 2][i % 2 * 2 + 1]));
        }
    }
    // 16-bit results, 8 at a time.
    __device__ __forceinline__ void store_lines(int block) const {
        const int piece = at.lane % 8;
        const i32 n = work.column_begin + first + (block + piece) * 8;
        if (block + piece >= kCount || n >= args.n) return;
#pragma unroll
        for (int r = at.lane / 8; r < 16; r += 4) {
            const i32 m = row - at.g + r;
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
            const i32 m = row - at.g + r;
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
__device__ __forceinline__ void meet(const Sums& sum, const Ring& ring, const Args& args, const Work& work, const Place& at, int rank) {
    constexpr int kOwn = kBlocks / SPLIT, kAtOnce = smaller(SPLIT, larger(1, 16 / kOwn));  // CTAs whose sums are under way
    const auto letter = [&](int wave, int j) {
        return ring.first + ((wave * kBlocks + j) * kConsumers * 32 + at.warp * 32 + at.lane) * 16;
    };
    __syncthreads();  // nobody reads the ring any more
#pragma unroll
    for (int wave = 0; wave < WAVES; ++wave)
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
    for (int wave = 0; wave < WAVES; ++wave) {
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
        const i32 row = work.row_begin + StepScales::row_in_tile(at, wave);
        Store<kOwn>(args, work, at, total, row, rank * kOwn * 8, ring);
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
    const u32 tiles = tiles_of(args), clusters = gridDim.x / kCluster;
    const Steps steps(args, rank);
#pragma unroll 1
    for (u32 number = blockIdx.x / kCluster; number < tiles; number += clusters) {
        const Work work = work_of(args, number, rank);
        if (!work.any) {
            if constexpr (SPLIT > 1) meet_without_sums();
            continue;
        }
        const auto columns = [&] { load_columns(args, work, at, ring.columns(at.warp)); };
        Sums sum = {};  // NOTE: compilers before CUDA 12.9 do products one by one whose sums a first product begins
        if constexpr (PROMOTE) {
            columns();
            multiply_promoted(sum, ring, args, work, at, steps);
        } else {
            multiply_all(sum, ring, at, steps.count, columns);
        }
        delay();
        if constexpr (SPLIT > 1) {
            meet(sum, ring, args, work, at, rank);
        } else {
#pragma unroll
            for (int wave = 0; wave < WAVES; ++wave) {
                const i32 row = work.row_begin + StepScales::row_in_tile(at, wave);
                Store<kBlocks>(args, work, at, sum[wave], row, 0, ring);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(kCluster, 1, 1) hopper(const __grid_constant__ TensorArgs args) {
    extern __shared__ __align__(1024) u8 shared_bytes[];
    const int thread = threadIdx.x, rank = kCluster > 1 ? cluster_rank() : 0;
    const int warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;  // the compiler sees that warps agree
    const Ring ring(shared_address(shared_bytes));
    if (thread == 0) {
        prefetch_tensor_map(args.a_map);
        prefetch_tensor_map(args.b_map);
        for (u32 slot = 0; slot < STAGES; ++slot) {
            mbarrier_init(ring.full(slot), 1);
            mbarrier_init(ring.empty(slot), kConsumers * kSharing);
        }
        mbarrier_init_done();
    }
    __syncthreads();
    if constexpr (kCluster > 1) {  // nobody writes to a CTA that has not begun
        cluster_arrive_relaxed();
        cluster_wait();
    }
    wait_for_predecessor();
    if (warp < 4) {
        if constexpr (kShift) fewer_registers<kProducerRegisters>();
        if (warp == 0) produce(args, ring, lane, rank);
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
