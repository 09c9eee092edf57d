// D = epilogue(sum over parts of k): what CTAs that cut k and are no cluster leave behind, below sm_90.
//
// skinny writes sums [PARTS][rows of D][n] in fp32, to which `args.a` points here. They are added up in the order of k. A warp takes 16
// columns of one of skinny's row tiles as its lanes held them, and so shares its epilogue; four warps a CTA.
#define A_ELEMENT   kBf16  // NOTE: what rows.cuh asks for, and no epilogue depends on
#define A_SCALE     0
#define B_ELEMENT   kBf16
#define B_SCALE     0
#define SCALE_BLOCK 0
#define ROW_BLOCKS  1
#define STAGES      2
#define STEPS_APART 1
#include "common/rows.cuh"

constexpr int kWarps = 4;

extern "C" __global__ void __launch_bounds__(32 * kWarps) reduce(const __grid_constant__ Args args) {
    const i32 tiles = ceil_div(args.n, kRows), groups = ceil_div(tiles, kWarps);
    Place at = {};
    at.lane = threadIdx.x % 32, at.g = at.lane / 4, at.t = at.lane % 4;
    at.work = rows_of(args, blockIdx.x / groups);
    const i32 tile = blockIdx.x % groups * kWarps + threadIdx.x / 32;
    if (!at.work.any || tile >= tiles) return;
#pragma unroll 1
    for (int block = 0; block < kTokenBlocks; ++block) {
        Factors factors;
        factors.load(args, at, tile, block);
        float total[4] = {};
        const float* sums = reinterpret_cast<const float*>(args.a) + static_cast<i64>(at.work.batch) * args.m * args.n;
#pragma unroll 2
        for (int part = 0; part < PARTS; ++part, sums += sums_of_part(args)) {
#pragma unroll
            for (int v = 0; v < 4; ++v)
                total[v] += sums[static_cast<i64>(factors.to[v % 2]) * args.n + smaller(tile * kRows + v / 2 * 8 + at.g, args.n - 1)];
        }
        factors.store(args, at, tile, block, total);
    }
}
