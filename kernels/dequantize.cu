// x = ((stored - zero) * scale) * tensor scale in fp32, each product rounded on its own, rounded once more to the dtype of x. Every format.
//
// A thread takes four pieces of 8 values of a row, which share a scale each; neighbours take neighbouring pieces. Scales are fp32, or e4m3 or e8m0 bytes in any layout (scale_layout.py).
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
    i32 block_rows, log_columns;  // values that share a scale; 31: the whole row
    i32 scale_blocks, layout;     // tiled: padded
    i32 unused;
};
static_assert(sizeof(Args) == 128, "the host packs this layout");

constexpr int kValues = 8, kPieces = 4;
constexpr int kCodeWords = kPacked<ELEMENT> ? 1 : 2;

// Every element is exact in fp16.
__device__ __forceinline__ void decode(const u32 (&codes)[kCodeWords], float (&v)[kValues]) {
    u32 pairs[kValues / 2];
    if constexpr (kPacked<ELEMENT>) {
        const u32 even = codes[0] << 4;  // nibbles of even k move to where those of odd k are
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = decode_spread<ELEMENT, false>(permute_bytes(codes[0], even, i << 12 | (4 + i) << 4));
    } else {
        decode_bytes<ELEMENT, false>(codes[0], pairs[0], pairs[1]);
        decode_bytes<ELEMENT, false>(codes[kCodeWords - 1], pairs[2], pairs[3]);
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = fp16_to_float(pairs[i / 2] >> (i % 2 * 16));
}

__device__ __forceinline__ void store_values(const float (&v)[kValues], u64 p, int count) {
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

extern "C" __global__ void __launch_bounds__(kPieceThreads, 4) dequantize(const __grid_constant__ Args args) {
    const Place at = place_of_thread(args.tiles_down, args.tiles_across, args.log_pieces);
    if (at.row >= args.rows) return;
    const i32 lane = at.piece & ((1 << args.log_pieces) - 1), first = ((at.piece - lane) * kPieces + lane) * kValues;
    const i32 step = kValues << args.log_pieces;  // from piece to piece; those of a tile are kPieces times as many
    const i64 index = (static_cast<i64>(at.batch) * args.rows + at.row) * args.columns;

    i32 matrix = at.batch, row = at.row, block_row = at.row;
    if (args.matrix_rows != args.rows) matrix = at.row / args.matrix_rows, row = at.row % args.matrix_rows;
    if (args.block_rows != 1) block_row /= args.block_rows;
    float tensor = args.tensor_value;
    if (args.tensor_scale) tensor = reinterpret_cast<const float*>(args.tensor_scale)[matrix * args.tensor_matrix + row * args.tensor_row];

    // Loads first, all of them.
    u32 codes[kPieces][kCodeWords], scales[kPieces], zeros[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const i32 column = first + i * step, block = column >> args.log_columns;
        if (column >= args.columns) break;
        load_bytes(codes[i], args.data + (index + column) * kCodeWords / 2, smaller(kValues, args.columns - column) * kCodeWords / 2);
        i64 place = at.batch * args.scale_matrix;
        if (args.layout == kLinear)
            place += block_row * args.scale_row + block * args.scale_block;
        else
            place += scale_place(block_row, block, args.scale_blocks, args.layout);
        if constexpr (SCALE == kFp32)
            scales[i] = load_global_u32(reinterpret_cast<const u32*>(args.scale) + place);
        else
            scales[i] = load_global_u8(reinterpret_cast<const u8*>(args.scale) + place);
        if constexpr (ELEMENT == kUint4x2) zeros[i] = load_global_u8(reinterpret_cast<const u8*>(args.zero) + place);
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const i32 column = first + i * step;
        if (column >= args.columns) break;
        const float scale = SCALE == kFp32   ? __uint_as_float(scales[i])
                            : SCALE == kE8m0 ? decode_e8m0(scales[i])
                                             : decode_fp8<kE4m3>(scales[i]);
        float v[kValues];
        decode(codes[i], v);
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            if constexpr (ELEMENT == kUint4x2) v[j] = add(v[j], -static_cast<float>(zeros[i]));
            v[j] = multiply(multiply(v[j], scale), tensor);
        }
        store_values(v, args.x + (index + column) * kFloatBytes<X_ELEMENT>, smaller(kValues, args.columns - column));
    }
}
