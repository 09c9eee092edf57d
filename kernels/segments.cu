// Turns what callers say about groups into what the grouped kernels read: indptr i32 [groups + 1] and row_map i32 [rows].
//
//   MODE 0  indices [rows] (the group of each row) -> indptr, row_map: a stable counting sort; an index outside [0, groups) is in no group
//   MODE 1  lengths [groups] -> indptr: exclusive prefix sums, saturating at 2^31 - 1; a negative length counts as 0
//   MODE 2  integers -> i32, cut to [-1, 2^31 - 1], which keeps what is out of range so: a 64-bit indptr, masked counts, the expert of each
//           segment, or the row of A that each row of the result comes from
//
// One warp per group scans all rows: no atomics, no scratch, rows of a group stay in order. Rows are few (tokens) and cached, and every
// warp reads the same ones. Grids of 256 threads: MODE 0 ceil((groups + 1) / 8) CTAs, MODE 1 one CTA, MODE 2 ceil(count / 256) CTAs.
#include "common/ptx.cuh"

// Python packs this struct as "<3Qq4i".
struct Args {
    u64 source, indptr, row_map;  // MODE 2 writes to indptr; only MODE 0 writes row_map, at places below indptr[groups]
    i64 stride;                   // from one source value to the next, in values
    i32 count;                    // source values: rows, lengths (= groups), or integers to narrow
    i32 groups;
    i32 width, is_signed;  // of a source value: 1, 2, 4 or 8 bytes
};
static_assert(sizeof(Args) == 48, "the host packs this layout");

constexpr i64 kLargest = 0x7FFFFFFF;
constexpr int kUnroll = 4;  // independent loads in flight per lane

__device__ __forceinline__ i64 source_value(const Args& args, i64 index) {
    const i64 at = index * args.stride;
    if (args.width == 4) {
        const i32 v = reinterpret_cast<const i32*>(args.source)[at];
        return args.is_signed ? v : static_cast<i64>(static_cast<u32>(v));
    }
    if (args.width == 8) {
        const i64 v = reinterpret_cast<const i64*>(args.source)[at];
        return args.is_signed || v >= 0 ? v : kLargest + 1;  // an unsigned value past 2^63 stays too large
    }
    if (args.width == 2) {
        const u16 v = reinterpret_cast<const u16*>(args.source)[at];
        return args.is_signed ? static_cast<i64>(static_cast<i16>(v)) : v;
    }
    const u8 v = reinterpret_cast<const u8*>(args.source)[at];
    return args.is_signed ? static_cast<i64>(static_cast<i8>(v)) : v;
}

// The groups of 32 * kUnroll rows from `first`, one per lane and step; -1 past the end.
__device__ __forceinline__ void load_groups(const Args& args, i64 first, i64 (&group)[kUnroll]) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const i64 row = first + 32 * u + threadIdx.x % 32;
        group[u] = row < args.count ? source_value(args, row) : -1;
    }
}

__device__ __forceinline__ void sort_rows(const Args& args) {
    const i32 mine = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (mine > args.groups) return;
    i64 group[kUnroll];
    i32 below = 0;
    for (i64 first = 0; first < args.count; first += 32 * kUnroll) {
        load_groups(args, first, group);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) below += group[u] >= 0 && group[u] < mine;
    }
    i32 place = __reduce_add_sync(~0u, below);
    if (lane == 0) reinterpret_cast<i32*>(args.indptr)[mine] = place;
    if (mine == args.groups) return;  // the end of the last group
    for (i64 first = 0; first < args.count; first += 32 * kUnroll) {
        load_groups(args, first, group);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const u32 matches = __ballot_sync(~0u, group[u] == mine);
            const i32 earlier = __popc(matches & ((1u << lane) - 1));
            if (group[u] == mine) reinterpret_cast<i32*>(args.row_map)[place + earlier] = static_cast<i32>(first + 32 * u + lane);
            place += __popc(matches);
        }
    }
}

__device__ __forceinline__ void sum_lengths(const Args& args) {
    if (threadIdx.x >= 32 || blockIdx.x > 0) return;
    const i32 lane = threadIdx.x;
    i32* indptr = reinterpret_cast<i32*>(args.indptr);
    i64 total = 0;
    if (lane == 0) indptr[0] = 0;
    for (i64 first = 0; first < args.count; first += 32 * kUnroll) {
        i64 length[kUnroll];
        load_groups(args, first, length);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            i64 end = larger<i64>(0, smaller(length[u], kLargest));
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const i64 before = __shfl_up_sync(~0u, end, distance);
                if (lane >= distance) end += before;
            }
            const i64 index = first + 32 * u + lane;
            if (index < args.count) indptr[index + 1] = static_cast<i32>(smaller(total + end, kLargest));
            total = smaller(total + __shfl_sync(~0u, end, 31), kLargest);
        }
    }
}

__device__ __forceinline__ void narrow(const Args& args) {
    const i64 index = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= args.count) return;
    const i64 value = source_value(args, index);
    reinterpret_cast<i32*>(args.indptr)[index] = static_cast<i32>(larger<i64>(-1, smaller(value, kLargest)));
}

extern "C" __global__ void __launch_bounds__(256, 1) segments(const __grid_constant__ Args args) {
    if constexpr (MODE == 0)
        sort_rows(args);
    else if constexpr (MODE == 1)
        sum_lengths(args);
    else
        narrow(args);
}
