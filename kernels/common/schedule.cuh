// Which part of the problem a CTA, or a cluster, computes: its number -> (batch or segment, row tile, column tile).
#pragma once
#include "common/ptx.cuh"

struct Work {
    i32 row_begin, row_end;  // positions of this tile's first row and of the end of its batch or segment
    i32 column_begin;
    i32 batch;                   // index of A, out and their scales (0 when grouped: all segments share them)
    i32 expert;                  // index of B, its scales and the bias
    i32 segment, segment_begin;  // grouped: which, and the position of its first row
    bool any;
};

// Row tiles in groups of 8: a wave of CTAs then covers a near-square patch of the result, which its operands cross L2 least for.
__device__ __forceinline__ void raster(u32 tile, u32 row_tiles, u32 column_tiles, u32& row_tile, u32& column_tile) {
    const u32 group_tiles = 8 * column_tiles;
    const u32 group = tile / group_tiles, inside = tile % group_tiles;
    const u32 height = smaller(8u, row_tiles - 8 * group);
    row_tile = 8 * group + inside % height;
    column_tile = inside / height;
}

// Walks the segments of an indptr and says how many rows each has. Device values are never trusted: a segment has no rows where its ends
// are out of order or outside [0, m], nor where indptr has been higher before, so that no row belongs to two segments.
struct SegmentWalk {
    const i32* indptr;
    i32 m, highest;  // of indptr[0 .. s - 1]

    __device__ __forceinline__ i32 rows(i32 s) {
        const i32 start = indptr[s], end = indptr[s + 1];
        const bool sound = start >= larger(highest, 0) && end >= start && end <= m;
        highest = larger(highest, start);
        return sound ? end - start : 0;
    }
};

// The segment that holds row tile number `row_tile` when every segment is cut into tiles of kBlockM rows. All lanes of a warp call it.
// Each lane counts the tiles of a contiguous run of segments; a prefix sum over lanes finds the run, its lane then walks it.
template <int kBlockM>
__device__ __forceinline__ bool find_segment(const i32* indptr, i32 segments, i32 m, i32& row_tile, i32& segment) {
    const i32 lane = threadIdx.x % 32;
    const i32 run = ceil_div(segments, 32);
    const i32 first = static_cast<i32>(smaller<i64>(static_cast<i64>(lane) * run, segments));
    const i32 last = static_cast<i32>(smaller<i64>(static_cast<i64>(first) + run, segments));
    constexpr i32 kLowest = -0x7FFFFFFF - 1;
    i32 highest = kLowest;
#pragma unroll 4
    for (i32 s = first; s < last; ++s) highest = larger(highest, indptr[s]);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const i32 below = __shfl_up_sync(~0u, highest, distance);
        if (lane >= distance) highest = larger(highest, below);
    }
    highest = __shfl_up_sync(~0u, highest, 1);
    if (lane == 0) highest = kLowest;

    i32 tiles = 0;
    SegmentWalk walk{indptr, m, highest};
#pragma unroll 4
    for (i32 s = first; s < last; ++s) tiles += ceil_div(walk.rows(s), kBlockM);
    i32 end = tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const i32 below = __shfl_up_sync(~0u, end, distance);
        if (lane >= distance) end += below;
    }
    const u32 owners = __ballot_sync(~0u, row_tile >= end - tiles && row_tile < end);
    if (owners == 0) return false;
    const int owner = __ffs(owners) - 1;
    i32 inside = row_tile - (end - tiles), found = first;
    if (lane == owner) {
        walk.highest = highest;
        for (;; ++found) {
            const i32 here = ceil_div(walk.rows(found), kBlockM);
            if (inside < here) break;
            inside -= here;
        }
    }
    row_tile = __shfl_sync(~0u, inside, owner);
    segment = __shfl_sync(~0u, found, owner);
    return true;
}

template <int kBlockM, int kBlockN, class Args>
__device__ __forceinline__ Work dense_work(const Args& args, u32 number) {
    const u32 row_tiles = ceil_div(args.m, kBlockM), column_tiles = ceil_div(args.n, kBlockN), per_batch = row_tiles * column_tiles;
    u32 row_tile, column_tile;
    const i32 batch = number / per_batch;
    raster(number % per_batch, row_tiles, column_tiles, row_tile, column_tile);
    return {static_cast<i32>(row_tile) * kBlockM, args.m, static_cast<i32>(column_tile) * kBlockN, batch, batch, 0, 0, true};
}

// Batches of which only the first indptr[batch] rows count.
template <int kBlockM, int kBlockN, class Args>
__device__ __forceinline__ Work masked_work(const Args& args, u32 number) {
    Work work = dense_work<kBlockM, kBlockN>(args, number);
    work.row_end = larger(0, smaller(args.m, reinterpret_cast<const i32*>(args.indptr)[work.batch]));
    work.any = work.row_begin < work.row_end;
    return work;
}

// The host launches m / kBlockM + min(segments, m) row tiles, the most that any segmentation needs; CTAs past the last tile find nothing.
template <int kBlockM, int kBlockN, class Args>
__device__ __forceinline__ Work grouped_work(const Args& args, u32 number) {
    const i32* indptr = reinterpret_cast<const i32*>(args.indptr);
    const u32 row_tiles = args.m / kBlockM + smaller(args.batch, args.m), column_tiles = ceil_div(args.n, kBlockN);
    u32 row_tile, column_tile;
    raster(number, row_tiles, column_tiles, row_tile, column_tile);
    i32 tile = row_tile, segment = 0;
    if (!find_segment<kBlockM>(indptr, args.batch, args.m, tile, segment)) return {};
    const i32 expert = args.expert_map ? reinterpret_cast<const i32*>(args.expert_map)[segment] : segment;
    const i32 begin = indptr[segment] + tile * kBlockM, end = indptr[segment + 1];
    const bool any = expert >= 0 && expert < args.experts;
    return {begin, end, static_cast<i32>(column_tile) * kBlockN, 0, expert, segment, indptr[segment], any};
}

// Row of the scales that belongs to row `begin` of a tile; -1 where scales follow the rows of their operand. `rows`: of one matrix.
template <class ScaleArgs>
__device__ __forceinline__ i32 first_scale_row(const ScaleArgs& scales, const Work& work, i32 begin, i32 rows) {
    if (scales.place == 0) return -1;
    if (scales.place == 1) return work.batch * rows + begin;
    return (work.segment_begin + work.segment * (scales.place - 1)) / scales.place * scales.place + begin - work.segment_begin;
}
