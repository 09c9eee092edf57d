// D = epilogue(A @ B): every pair of formats, every layout and alignment, dense, batched or grouped, sm_80 and up.
//
// Formats are decoded between global and shared memory; shared memory holds 16-bit tiles; the MMA loop knows no format.
// 16-bit values are bf16 if either operand is bf16 or has power-of-two block scales, else fp16, which holds every fp8, nvfp4 and integer
// value exactly. fp16 beside bf16 is split into two bf16 planes whose sum is exact. Products are exact, sums are fp32 on mma.sync.
//
//   scales  bytes (e4m3 of 16 values, e8m0 of 32) go into the values as they are decoded, and zero points leave them; floats that vary
//           along k multiply the sums of SCALE_BLOCK values; what does not vary along k waits for the epilogue
//   warps   WARPS_M x WARPS_N cut the tile; WARPS_K cut each k-step, their sums meet in shared memory at the end, on the way out
//   k       SPLIT CTAs of a cluster cut k where tiles are few (sm_90 and up); each stores some rows of the sums of all
//   shared  STAGES x (planes of A [BLOCK_M x BLOCK_K], planes of B [BLOCK_N x BLOCK_K]), stored along the operand's contiguous axis,
//           16-byte chunks swizzled so that ldmatrix and every store are free of bank conflicts
//   loads   16-bit operands by cp.async, STAGES - 1 tiles ahead; others through registers (decode, st.shared), two tiles ahead, value by
//           value one ahead
//
// Not handled: wgmma and TMA, packed values contiguous along m or n, grouped A contiguous along m with VECTOR
// (its segments start unaligned), block bytes beside values contiguous along m or n with VECTOR, blocks of fewer than 32 k with floats.
// Learned from: the multistage pipeline of CUTLASS's sm_80 mainloop, gau-nernst's learn-cuda (swizzle, register double buffer).
#include "common/args.cuh"
#include "common/delay.cuh"
#include "common/epilogue.cuh"
#include "common/loaders.cuh"
#include "common/numbers.cuh"
#include "common/ptx.cuh"
#include "common/schedule.cuh"

constexpr int kPlanesA = kComputeBf16 && A_ELEMENT == kFp16 ? 2 : 1;
constexpr int kPlanesB = kComputeBf16 && B_ELEMENT == kFp16 ? 2 : 1;

constexpr int kWarpM = BLOCK_M / WARPS_M, kWarpN = BLOCK_N / WARPS_N, kWarpK = BLOCK_K / WARPS_K;
constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 16, kSteps = kWarpK / 16;
constexpr int kAccumulators = kWarpM * kWarpN / 32;  // per thread
static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kWarpK % 16 == 0, "warps compute 16x16x16 fragments");
static_assert(STAGES >= 2, "one tile is read while another is filled");
static_assert(SCALE_BLOCK == 0 || SCALE_BLOCK % kWarpK == 0 || kWarpK % SCALE_BLOCK == 0, "slices of k and blocks cut each other evenly");
static_assert(SCALE_BLOCK % 16 == 0, "whole MMAs share a scale");
static_assert(VECTOR || (A_MAJOR == 0 && B_MAJOR == 0), "element-wise loads always fill k-major tiles");
static_assert(VECTOR || kAccumulators <= 64, "element-wise loads need the registers: choose a smaller tile");
static_assert((!kPacked<A_ELEMENT> || A_MAJOR == 0) && (!kPacked<B_ELEMENT> || B_MAJOR == 0), "packed values are packed along k");

// Shared memory --------------------------------------------------------------------------------------------------------------------

struct alignas(1024) Smem {
    struct Stage {
        u16 a[kPlanesA][BLOCK_M * BLOCK_K];
        u16 b[kPlanesB][BLOCK_N * BLOCK_K];
    } stage[STAGES];
};
static_assert(sizeof(Smem) == SMEM_BYTES, "the host plans shared memory");
static_assert(WARPS_K * BLOCK_M * BLOCK_N * 4 <= SMEM_BYTES, "the sums reuse the stages");

using LoaderA = LoaderOf<A_ELEMENT, A_SCALE, A_MAJOR, BLOCK_M, kPlanesA>::Type;
using LoaderB = LoaderOf<B_ELEMENT, B_SCALE, B_MAJOR, BLOCK_N, kPlanesB>::Type;
using TileA = Tile<A_MAJOR, BLOCK_M>;
using TileB = Tile<B_MAJOR, BLOCK_N>;

// Where a thread is ----------------------------------------------------------------------------------------------------------------

struct Place {
    int warp_tile, warp_k;      // which part of the tile, which slice of every k-step
    int warp_row, warp_column;  // first row and column of the part
    int row, column;            // this thread's first; others follow at row + 8 i, column + 8 j and column + 8 j + 1 (the MMA's layout)

    __device__ __forceinline__ Place() {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        warp_k = warp / (WARPS_M * WARPS_N), warp_tile = warp % (WARPS_M * WARPS_N);
        warp_row = warp_tile / WARPS_N * kWarpM, warp_column = warp_tile % WARPS_N * kWarpN;
        row = warp_row + lane / 4, column = warp_column + lane % 4 * 2;
    }
};

// MMA ------------------------------------------------------------------------------------------------------------------------------

using Accumulator = float[kFragmentsM][kFragmentsN * 2][4];

struct Fragments {
    u32 a[kPlanesA][kFragmentsM][4];
    u32 b[kPlanesB][kFragmentsN][4];

    __device__ __forceinline__ void load(u32 stage, int row, int column, int k) {
#pragma unroll
        for (int plane = 0; plane < kPlanesA; ++plane)
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i) TileA::load_16x16<true>(a[plane][i], stage + plane * TileA::kBytes, row + 16 * i, k);
        stage += kPlanesA * TileA::kBytes;
#pragma unroll
        for (int plane = 0; plane < kPlanesB; ++plane)
#pragma unroll
            for (int j = 0; j < kFragmentsN; ++j) TileB::load_16x16<false>(b[plane][j], stage + plane * TileB::kBytes, column + 16 * j, k);
    }
};

__device__ __forceinline__ void multiply_add(Accumulator& acc, const u32 (&a)[kFragmentsM][4], const u32 (&b)[kFragmentsN][4]) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsN * 2; ++j) {
            if constexpr (kComputeBf16)
                mma_bf16(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            else
                mma_fp16(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
}

template <int kCount>
__device__ __forceinline__ void keep_finite(u32 (&fragments)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) fragments[i / 4][i % 4] = finite_bf16_or_zero(fragments[i / 4][i % 4]);
}

__device__ __forceinline__ void multiply_add(Accumulator& acc, Fragments& f) {
    multiply_add(acc, f.a[0], f.b[0]);
    if constexpr (kPlanesA == 2) {
        keep_finite(f.b[0]);
        multiply_add(acc, f.a[kPlanesA - 1], f.b[0]);
    }
    if constexpr (kPlanesB == 2) {
        keep_finite(f.a[0]);
        multiply_add(acc, f.a[0], f.b[kPlanesB - 1]);
    }
}

// This warp's share of a staged k-step, or of kCount times 16 k of it. The next fragments load while the MMAs of these run.
template <int kFirst, int kCount>
__device__ __forceinline__ void multiply_steps(Accumulator& acc, u32 stage, const Place& place) {
    const int k = place.warp_k * kWarpK + kFirst * 16;
    Fragments fragments[2];
    fragments[0].load(stage, place.warp_row, place.warp_column, k);
#pragma unroll
    for (int step = 0; step < kCount; ++step) {
        if (step + 1 < kCount) fragments[(step + 1) % 2].load(stage, place.warp_row, place.warp_column, k + 16 * (step + 1));
        multiply_add(acc, fragments[step % 2]);
    }
}

// Scales ---------------------------------------------------------------------------------------------------------------------------

constexpr int kRowsPerThread = 2 * kFragmentsM, kColumnsPerThread = 4 * kFragmentsN;

__device__ __forceinline__ u64 advance(u64 pointer, i64 values, i32 type) {  // null stays null
    const int bytes = type == kFp32 ? 4 : type == kBf16 || type == kFp16 ? 2 : 1;
    return pointer ? pointer + values * bytes : 0;
}

// The float scales of this thread's rows and columns, fetched for one block along k at a time.
struct Scales {
    const Args& args;
    u64 a, b;                       // of this batch and expert
    i32 row_block[kRowsPerThread];  // 0 for rows and columns past the edge: any scale will do, the result is not stored
    i32 column_block[kColumnsPerThread];

    __device__ __forceinline__ Scales(const Args& args, const Work& work, const Operand& rows, const Place& place)
        : args(args),
          a(A_SCALE ? 0 : advance(args.a_scale, work.batch * args.a_scales.matrix, args.a_scales.type)),
          b(B_SCALE == kE4m3 || B_SCALE == kE8m0 ? 0 : advance(args.b_scale, work.expert * args.b_scales.matrix, args.b_scales.type)) {
        const i32 begin = first_scale_row(args.a_scales, work, work.row_begin, args.m);
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
            const i32 row = rows.row(place.row + 8 * i);
            row_block[i] = (row < 0 ? 0 : begin < 0 ? row : begin + place.row + 8 * i) / args.a_scales.rows;
        }
#pragma unroll
        for (int j = 0; j < kColumnsPerThread; ++j)
            column_block[j] = smaller(work.column_begin + place.column + j / 2 * 8 + j % 2, args.n - 1) / args.b_scales.rows;
    }
    __device__ __forceinline__ void load(float (&row)[kRowsPerThread], float (&column)[kColumnsPerThread], i32 k) const {
        gather(row, row_block, a, (k >> args.a_scales.shift) * args.a_scales.block, args.a_scales.row, args.a_scales.type, 1.f);
        gather(column, column_block, b, (k >> args.b_scales.shift) * args.b_scales.block, args.b_scales.row, args.b_scales.type, 1.f);
    }

    // NOTE: the type is tested outside the loops, so that all loads of a call are under way together.
    template <int kCount>
    static __device__ __forceinline__ void gather(float (&out)[kCount], const i32 (&block)[kCount], u64 p, i64 origin, i64 step, i32 type,
                                                  float value) {
        if (p == 0) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) out[i] = value;
        } else if (type == kFp32) {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                out[i] = __uint_as_float(load_global_u32(reinterpret_cast<const u32*>(p) + origin + block[i] * step));
        } else {
            u32 bits[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) bits[i] = load_global_u16(reinterpret_cast<const u16*>(p) + origin + block[i] * step);
#pragma unroll
            for (int i = 0; i < kCount; ++i) out[i] = type == kBf16 ? bf16_to_float(bits[i]) : fp16_to_float(bits[i]);
        }
    }
};

// As multiply_steps, with the sums of every SCALE_BLOCK of k scaled. `k`: where this warp's slice of the k-step begins.
template <int kFirst, int kCount>
__device__ __forceinline__ void multiply_blocks(Accumulator& sum, u32 stage, const Place& place, const Scales& scales, i32 k, i32 k_end) {
    if constexpr (SCALE_BLOCK == 0) {
        multiply_steps<kFirst, kCount>(sum, stage, place);
    } else if constexpr (kCount > 0) {
        constexpr int kBlock = SCALE_BLOCK / 16, kHere = smaller(kCount, kBlock - kFirst % kBlock);
        float row_scale[kRowsPerThread], column_scale[kColumnsPerThread];
        scales.load(row_scale, column_scale, smaller(k + kFirst * 16, k_end - 1));  // past the end of k there are zeros, and no scale
        Accumulator part = {};
        multiply_steps<kFirst, kHere>(part, stage, place);
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
            for (int j = 0; j < kFragmentsN * 2; ++j)
#pragma unroll
                for (int v = 0; v < 4; ++v) sum[i][j][v] += row_scale[2 * i + v / 2] * column_scale[2 * j + v % 2] * part[i][j][v];
        multiply_blocks<kFirst + kHere, kCount - kHere>(sum, stage, place, scales, k, k_end);
    }
}

// Main loop ------------------------------------------------------------------------------------------------------------------------
// In iteration t tile t is multiplied; cp.async fetches tile t + STAGES - 1; register loaders put t + 1 and fetch t + 2 (without VECTOR
// they fetch and put t + 1).

__device__ __forceinline__ void main_loop(Accumulator& sum, const Args& args, const Work& work, const Operand& a, const Operand& b,
                                          const Place& place, u32 stages, i32 rank) {
    LoaderA load_a(a);
    LoaderB load_b(b);
    const Scales scales(args, work, a, place);  // unused, and gone, unless SCALE_BLOCK
    constexpr u32 kStageBytes = sizeof(Smem::Stage), kOffsetB = kPlanesA * TileA::kBytes;
    const i32 tiles = ceil_div(args.k, BLOCK_K), each = ceil_div(tiles, SPLIT), begin = rank * each, end = smaller(begin + each, tiles);
    const auto fetch = [&](i32 tile, u32 stage, bool async) {
        if (tile >= end) return;
        if (async) load_a.fetch_partial(tile * BLOCK_K, stage);
        if (async) load_b.fetch_partial(tile * BLOCK_K, stage + kOffsetB);
        if (LoaderA::kAsync == async) load_a.fetch(tile * BLOCK_K, stage);
        if (LoaderB::kAsync == async) load_b.fetch(tile * BLOCK_K, stage + kOffsetB);
    };
    const auto put = [&](i32 tile, u32 stage) {
        if (tile >= end) return;
        load_a.put(stage);
        load_b.put(stage + kOffsetB);
    };

#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        fetch(begin + s, stages + s * kStageBytes, true);
        copy_async_commit();
    }
    fetch(begin, 0, false);
    put(begin, stages);
    if (VECTOR) fetch(begin + 1, 0, false);

    int current = 0;
    for (i32 t = begin; t < end; ++t) {
        copy_async_wait<STAGES - 2>();
        delay();
        __syncthreads();  // tile t is complete, and everybody is done with the stage of tile t - 1
        const int next = current + 1 == STAGES ? 0 : current + 1, previous = current == 0 ? STAGES - 1 : current - 1;
        const u32 stage = stages + current * kStageBytes, next_stage = stages + next * kStageBytes;
        const i32 k = t * BLOCK_K + place.warp_k * kWarpK;
        if constexpr (VECTOR) {
            fetch(t + STAGES - 1, stages + previous * kStageBytes, true);
            copy_async_commit();
            put(t + 1, next_stage);
            fetch(t + 2, 0, false);
            multiply_blocks<0, kSteps>(sum, stage, place, scales, k, args.k);
        } else {  // a step gathered value by value takes many registers: one operand at a time, each behind half of the MMAs
            const bool more = t + 1 < end;
            if (more) load_a.fetch((t + 1) * BLOCK_K, 0);
            multiply_blocks<0, kSteps / 2>(sum, stage, place, scales, k, args.k);
            if (more) load_a.put(next_stage);
            if (more) load_b.fetch((t + 1) * BLOCK_K, 0);
            multiply_blocks<kSteps / 2, kSteps - kSteps / 2>(sum, stage, place, scales, k, args.k);
            if (more) load_b.put(next_stage + kOffsetB);
        }
        current = next;
    }
    copy_async_wait<0>();
}

// Epilogue -------------------------------------------------------------------------------------------------------------------------
// Sums go through shared memory: a warp then stores whole rows, and a short loop serves every tile and type.

// [WARPS_K][BLOCK_M][BLOCK_N] fp32. The swizzle spreads the eight rows that a warp writes at once over the banks.
__device__ __forceinline__ int sum_offset(int row, int column) { return row * BLOCK_N + (column ^ (row % 4 * 8)); }

__device__ __forceinline__ void put_sums(const Accumulator& sum, const Place& place, float* sums) {
    sums += place.warp_k * BLOCK_M * BLOCK_N;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsN * 2; ++j) {
            const float (&four)[4] = sum[i / 2][j];
            const int at = sum_offset(place.row + 8 * i, place.column + 8 * j);
            *reinterpret_cast<float2*>(sums + at) = {four[i % 2 * 2], four[i % 2 * 2 + 1]};
        }
}

// sum * row[m] * column[n] * alpha + bias[n] (or bias[m, n]), in this order; partial sums over k add up in the order of k.
__device__ __forceinline__ void store_result(const Args& args, const Work& work, const Operand& a, u32 sums, i32 rank) {
    constexpr int kLanes = BLOCK_N / 4, kRowStep = kThreads / kLanes, kRows = BLOCK_M / SPLIT, kBatch = smaller(4, kRows / kRowStep);
    static_assert(kThreads % kLanes == 0 && kRows % (kRowStep * kBatch) == 0, "threads share the result evenly");
    const int tile_column = threadIdx.x % kLanes * 4;
    const i32 column = work.column_begin + tile_column, columns = smaller(4, args.n - column);
    if (columns <= 0) return;

    const u64 a_scale = advance(args.a_outer, work.batch * args.a_outers.matrix, args.a_outers.type);
    const u64 b_scale = advance(args.b_outer, work.expert * args.b_outers.matrix, args.b_outers.type);
    const u64 bias = advance(args.bias, work.expert * args.bias_expert, args.bias_type);
    const bool own_bias = args.bias_row != 0;  // of each row
    const float alpha = args.alpha ? load_float(args.alpha, 0, args.alpha_type) : args.alpha_value;
    float column_scale[4], bias_value[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const i32 at = smaller(column + c, args.n - 1);
        const i64 block = at / args.b_outers.rows;
        column_scale[c] = b_scale ? load_float(b_scale, block * args.b_outers.row, args.b_outers.type) : args.b_outer_value;
        bias_value[c] = bias && !own_bias ? load_float(bias, at, args.bias_type) : 0.f;
    }
    const i32 begin = first_scale_row(args.a_outers, work, work.row_begin, args.m);
#pragma unroll 1
    for (int first = rank * kRows + threadIdx.x / kLanes; first < (rank + 1) * kRows; first += kRowStep * kBatch) {
        i32 row[kBatch];
        float row_scale[kBatch];
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
            const i32 source = a.row(first + r * kRowStep);
            row[r] = source < 0 ? -1 : a.result_row(first + r * kRowStep);
            row_scale[r] = args.a_outer_value;
            if (a_scale) {
                const i64 block = (source < 0 ? 0 : begin < 0 ? source : begin + first + r * kRowStep) / args.a_outers.rows;
                row_scale[r] = load_float(a_scale, block * args.a_outers.row, args.a_outers.type);
            }
        }
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
            if (row[r] < 0) continue;
            float x[4] = {};
#pragma unroll
            for (int part = 0; part < SPLIT * WARPS_K; ++part) {
                const u32 at = sums + 4 * (part % WARPS_K * BLOCK_M * BLOCK_N + sum_offset(first + r * kRowStep, tile_column));
                const Chunk c = SPLIT > 1 ? load_remote_16(at, part / WARPS_K) : load_shared_16(at);
#pragma unroll
                for (int v = 0; v < 4; ++v) x[v] += __uint_as_float(c.word[v]);
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) x[c] = x[c] * row_scale[r] * column_scale[c] * alpha + bias_value[c];
            if (own_bias) {
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (c < columns) x[c] += load_float(bias, row[r] * args.bias_row + column + c, args.bias_type);
            }
            const i64 index = work.batch * args.out_batch + row[r] * args.out_row + column * args.out_column;
            store_four(args.out, index, args.out_column, args.out_type, x, columns);
        }
    }
}

// Kernel ---------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ BlockBytes block_bytes(u64 pointer, const ScaleArgs& scales, i32 matrix, i32 begin) {
    return {reinterpret_cast<const u8*>(pointer) + matrix * scales.matrix, scales.row, scales.block, scales.tile_rows, scales.shift, begin};
}

// CTAs per SM that registers allow without spills: 128 accumulators a thread leave room for two CTAs of 128 threads, 32 for three, but not
// where several blocks in a k-step keep fragments alive beside two sets of sums.
constexpr bool kSmall = VECTOR && kAccumulators <= 32 && !(SCALE_BLOCK > 0 && SCALE_BLOCK < kWarpK);
constexpr int kMinCtas = kThreads > 128 ? 1 : kSmall ? 3 : 2;

extern "C" __global__ void __launch_bounds__(kThreads, kMinCtas)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        portable(const __grid_constant__ Args args) {
    extern __shared__ u8 shared_bytes[];
    const i32 rank = SPLIT > 1 ? cluster_rank() : 0;
    const u32 number = blockIdx.x / SPLIT;
    const Work work = args.grouped == 0   ? dense_work<BLOCK_M, BLOCK_N>(args, number)
                      : args.grouped == 1 ? grouped_work<BLOCK_M, BLOCK_N>(args, number)
                                          : masked_work<BLOCK_M, BLOCK_N>(args, number);
    if (!work.any) return;

    constexpr int kA = kValueBytes<A_ELEMENT>, kB = kValueBytes<B_ELEMENT>;
    const u8* a_start = reinterpret_cast<const u8*>(args.a) + work.batch * args.a_batch * kA;
    const u8* b_start = reinterpret_cast<const u8*>(args.b) + work.expert * args.b_batch * kB;
    const bool segments = args.grouped == 1;
    const i32 *row_map = segments ? reinterpret_cast<const i32*>(args.row_map) : nullptr,
              *gather = reinterpret_cast<const i32*>(args.gather);
    const Operand a{
        a_start,        args.a_row * kA,
        args.a_k * kA,  0,
        row_map,        gather,
        args.a_repeat,  args.a_rows,
        work.row_begin, work.row_end,
        args.k,         block_bytes(args.a_scale, args.a_scales, work.batch, first_scale_row(args.a_scales, work, work.row_begin, args.m))};
    const bool zero = B_SCALE == kZero;
    const ScaleArgs& b_bytes = zero ? args.b_zeros : args.b_scales;
    const Operand b{
        b_start,
        args.b_column * kB,
        args.b_k * kB,
        args.b_panel,
        nullptr,
        nullptr,
        1,
        args.n,
        work.column_begin,
        args.n,
        args.k,
        block_bytes(zero ? args.b_zero : args.b_scale, b_bytes, work.expert, b_bytes.place ? work.batch * args.n + work.column_begin : -1)};

    const Place place;
    Accumulator sum = {};
    main_loop(sum, args, work, a, b, place, shared_address(shared_bytes), rank);
    delay();
    __syncthreads();  // every warp has read its last stage
    delay();
    put_sums(sum, place, reinterpret_cast<float*>(shared_bytes));
#if SPLIT > 1
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
    delay();
    store_result(args, work, a, shared_address(shared_bytes), rank);
#if SPLIT > 1
    cluster_arrive();  // the others still read
    cluster_wait();
#endif
}
