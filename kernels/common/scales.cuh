// Float scales: one for the whole operand, for each of its rows, or for blocks along k.
#pragma once
#include "common/args.cuh"

// One that does not vary along k; a null pointer means the value.
__device__ __forceinline__ float outer_scale(u64 pointer, const ScaleArgs& s, i32 matrix, i32 row, float value) {
    return pointer ? load_float(pointer, matrix * s.matrix + (s.rows == 1 ? row : row / s.rows) * s.row, s.type) : value;
}

// Those of kCount rows of a matrix, block by block. They lie within 2^32 bytes (cugemm/scales.py).
template <int kCount>
struct RowScales {
    u64 matrix;       // none: scales are one
    i32 row[kCount];  // elements

    __device__ __forceinline__ void begin(const ScaleArgs& s, u64 pointer, i32 number) {
        matrix = pointer ? pointer + number * s.matrix * (s.type == kFp32 ? 4 : 2) : 0;
    }
    __device__ __forceinline__ void load(const ScaleArgs& s, i32 block, float (&x)[kCount]) const {
        const i32 column = block * static_cast<i32>(s.block);
        if (matrix != 0 && s.type == kFp32) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) x[i] = load_float(matrix, row[i] + column, kFp32);
        } else if (matrix != 0) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) x[i] = load_float(matrix, row[i] + column, s.type == kBf16 ? kBf16 : kFp16);
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) x[i] = 1.f;
        }
    }
};
