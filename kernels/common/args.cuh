// The argument struct of every product kernel: what the host knows of a call. `cugemm/catalog/gemm.py` packs it.
#pragma once
#include "common/numbers.cuh"

// What all of them multiply as: bf16 where an operand is, or where powers of two scale it; else fp16.
constexpr bool kComputeBf16 = A_ELEMENT == kBf16 || B_ELEMENT == kBf16 || A_SCALE == kE8m0 || B_SCALE == kE8m0;

// How one array of scales (or zero points) covers its operand: "<3q6i".
struct ScaleArgs {
    i64 row, block, matrix;  // elements from one row block, one k block (tiled: one tile of rows, one tile) and one matrix to the next
    i32 shift, rows;         // log2 of the values along k, and rows, that share a scale
    i32 type, tile_rows;     // element code; 1 row-major, 128 or 8 tiled
    i32 place, unused;       // whose rows: 0 the operand's own, 1 those of all matrices in a row, 4 or 128 segments begin at multiples
};

// Python packs this struct as "<14Q3f7i10q" + 5 ScaleArgs + "2q6i". Strides count stored values (bytes for packed ones); null pointers say
// "not there".
struct Args {
    u64 a, b, out;
    u64 a_scale, b_scale;             // of blocks along k: bytes, or floats if SCALE_BLOCK
    u64 a_outer, b_outer, b_zero;     // floats that wait for the epilogue (null: the values below); zero points
    u64 alpha, bias;                  // alpha null: the value below
    u64 indptr, row_map, expert_map;  // grouped: i32 [batch + 1] (masked: rows of each batch), i32 [m] or null, i32 [batch] or null
    u64 gather;                       // i32 [m] or null: row of A for each row of the result
    float a_outer_value, b_outer_value, alpha_value;
    i32 m, n, k;
    i32 batch;             // products, or segments when grouped
    i32 experts;           // grouped: matrices in B
    i32 a_rows, a_repeat;  // rows of A; rows of the result that one of them gives
    i64 a_row, a_k, a_batch;
    i64 b_column, b_k, b_batch;  // grouped: b_batch, the matrix strides of B's scales and bias_expert step from expert to expert
    i64 b_panel;                 // what a step of 128 along k adds to 128 * b_k
    i64 out_row, out_column, out_batch;
    ScaleArgs a_scales, b_scales, a_outers, b_outers, b_zeros;
    i64 bias_expert, bias_row;
    i32 alpha_type, bias_type, out_type;
    i32 grouped;   // 0 dense, 1 segments, 2 masked
    i32 early;     // what may happen to weights before the kernel ahead has ended: 0 nothing, 1 prefetches to L2, 2 loads
    i32 clusters;  // of each matrix and piece of A, where there are clusters
};
static_assert(sizeof(Args) == 512, "the host packs this layout");
