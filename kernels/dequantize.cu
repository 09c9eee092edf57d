// x = ((stored - zero) * scale) * tensor scale in fp32, each product rounded on its own, rounded once more to the dtype of x. Every format.
//
// A thread takes 8 values of a row, which share a scale. Scales are fp32, or e4m3 or e8m0 bytes in any layout (scale_layout.py).
#include "common/encode.cuh"
#include "common/pieces.cuh"

// Python packs this struct as "<5Qf3i5q8i".
struct Args {
    u64 data, scale, tensor_scale, zero, x;    // data and x contiguous; tensor_scale and zero may be null
    float tensor_value;                        // the tensor scale where it comes by value
    i32 rows, columns, matrix_rows;            // of a matrix of scales; of one of data
    i64 scale_matrix, scale_row, scale_block;  // linear scales; tiled ones have the first only
    i64 tensor_matrix, tensor_row;
    i32 log_pieces, tiles_down, tiles_across;
    i32 block_rows, block_columns;  // values that share a scale
    i32 scale_blocks, layout;       // tiled: padded
    i32 unused;
};
static_assert(sizeof(Args) == 128, "the host packs this layout");

constexpr int kValues = 8;
constexpr int kCodeWords = kPacked<ELEMENT> ? 1 : 2;

__device__ __forceinline__ float decode(u32 code) {
    if constexpr (ELEMENT == kInt8)
        return static_cast<float>(static_cast<i8>(code));
    else if constexpr (ELEMENT == kInt4x2)
        return static_cast<float>(static_cast<i32>(code ^ 8) - 8);
    else if constexpr (ELEMENT == kUint4x2)
        return static_cast<float>(code);
    else if constexpr (ELEMENT == kE2m1x2)
        return bf16_to_float(decode_spread<kE2m1x2, true>(code << 12) & 0xFFFFu);
    else
        return decode_fp8<ELEMENT>(code);
}

extern "C" __global__ void __launch_bounds__(kPieceThreads) dequantize(const __grid_constant__ Args args) {
    const Place at = place_of_thread(args.tiles_down, args.tiles_across, args.log_pieces);
    const i64 first = static_cast<i64>(at.piece) * kValues;
    if (at.row >= args.rows || first >= args.columns) return;
    const int count = static_cast<int>(smaller<i64>(kValues, args.columns - first));
    const i64 index = (static_cast<i64>(at.batch) * args.rows + at.row) * args.columns + first;
    u32 codes[kCodeWords];
    load_bytes(codes, args.data + index * kCodeWords / 2, count * kCodeWords / 2);

    i64 matrix = at.batch, row = at.row;
    if (args.matrix_rows != args.rows) matrix = at.row / args.matrix_rows, row = at.row % args.matrix_rows;
    const i32 block_row = at.row / args.block_rows,
              block = static_cast<i32>(static_cast<u32>(first) / static_cast<u32>(args.block_columns));
    i64 place = at.batch * args.scale_matrix;
    if (args.layout == kLinear)
        place += block_row * args.scale_row + block * args.scale_block;
    else
        place += scale_place(block_row, block, args.scale_blocks, args.layout);
    float scale;
    if constexpr (SCALE == kFp32) {
        scale = __uint_as_float(load_global_u32(reinterpret_cast<const float*>(args.scale) + place));
    } else {
        const u32 code = load_global_u8(reinterpret_cast<const u8*>(args.scale) + place);
        scale = SCALE == kE8m0 ? decode_e8m0(code) : decode_fp8<kE4m3>(code);
    }
    float tensor = args.tensor_value;
    if (args.tensor_scale) tensor = reinterpret_cast<const float*>(args.tensor_scale)[matrix * args.tensor_matrix + row * args.tensor_row];
    const float zero = args.zero ? static_cast<float>(load_global_u8(reinterpret_cast<const u8*>(args.zero) + place)) : 0.f;

    float v[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
        const u32 code = kPacked<ELEMENT> ? codes[0] >> (4 * i) & 15 : codes[i / 4 % kCodeWords] >> (i % 4 * 8) & 0xFF;
        float stored = decode(code);
        if constexpr (ELEMENT == kUint4x2) stored = add(stored, -zero);
        v[i] = multiply(multiply(stored, scale), tensor);
    }
    const u64 p = args.x + index * kFloatBytes<X_ELEMENT>;
    if constexpr (X_ELEMENT == kFp32) {
        if (count == kValues && p % 16 == 0) {
            reinterpret_cast<float4*>(p)[0] = {v[0], v[1], v[2], v[3]};
            reinterpret_cast<float4*>(p)[1] = {v[4], v[5], v[6], v[7]};
            return;
        }
#pragma unroll
        for (int i = 0; i < kValues; ++i)
            if (i < count) reinterpret_cast<float*>(p)[i] = v[i];
    } else {
        u32 word[kValues / 2];
#pragma unroll
        for (int i = 0; i < kValues / 2; ++i)
            word[i] = X_ELEMENT == kBf16 ? pack_bf16(v[2 * i], v[2 * i + 1]) : pack_fp16(v[2 * i], v[2 * i + 1]);
        store_bytes(word, p, 2 * count);
    }
}
