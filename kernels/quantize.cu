// Quantisation with a float scale for the whole array, each row, or each block of several rows: fp8, int8, int4 and e2m1.
//
//   MODE 0  amax of the whole array -> *amax as fp32 bits (the host zeroes it first)
//   MODE 1  x -> data, scale
//
// scale = max(amax, eps) / element max, data = round(x / scale). Bit for bit what NumPy computes (quantize_reference.py has the rules): IEEE
// quotients, no flushing of subnormals, rounding to nearest even. A CTA takes a block of values: it reads all that its registers hold, finds
// the maximum, and writes, with other CTAs beside it in another phase; what is left of a longer block is read a second time, from cache.
// A block of whole and aligned pieces takes its own path, without a check or a byte on its own. With `amax` given to MODE 1 one scale serves the
// whole array and blocks only divide the work, the last ones first, as MODE 0 has left them in the cache; without `scale` it only casts.
#include "common/encode.cuh"
#include "common/pieces.cuh"

// Python packs this struct as "<4Q6q6if4x".
struct Args {
    u64 x, data, scale, amax;      // data is contiguous [batch, rows, columns]; scale is fp32
    i64 x_row, x_column, x_batch;  // strides in values
    i64 scale_row, scale_column, scale_batch;
    i32 rows, columns, down, across;  // values, blocks of a matrix
    i32 block_rows, block_columns;    // values that share a scale, at least 1 each
    float eps;
};
static_assert(sizeof(Args) == 112, "the host packs this layout");

constexpr int kMaxThreads = 512;                      // the host starts as many as hold a block in their registers
constexpr int kValues = 8;                            // neighbouring columns a thread handles at once: a piece
constexpr int kKept = X_ELEMENT == kFp32 ? 2 : 4;     // pieces that stay in a thread's registers
constexpr int kCodeWords = kPacked<ELEMENT> ? 1 : 2;  // of a piece
constexpr bool kLeaveNan = kIsFp8<ELEMENT>;
using Piece = Floats<X_ELEMENT, kValues>;

struct Block {
    u64 x, data;              // addresses of its first value and code
    i64 x_row, data_row;      // from row to row, in bytes and in codes
    i64 x_column;             // stride in values
    i32 rows, width, pieces;  // columns, and the pieces that cover them; the array's edge cuts rows and columns
};

// The pieces of a thread: one in blockDim.x, counted row by row. It steps along, as a division for each would cost more than the piece.
struct Walk {
    i32 row, column;    // of the first value, in the block
    i32 rows, columns;  // of a step

    __device__ __forceinline__ explicit Walk(const Block& block) {
        const i32 threads = blockDim.x;
        row = rows = 0;
        if (block.pieces <= threads) row = threadIdx.x / block.pieces, rows = threads / block.pieces;
        column = (static_cast<i32>(threadIdx.x) - row * block.pieces) * kValues, columns = (threads - rows * block.pieces) * kValues;
    }

    __device__ __forceinline__ void step(const Block& block) {
        row += rows, column += columns;
        if (column >= block.pieces * kValues) ++row, column -= block.pieces * kValues;
    }
};

template <bool kWhole>
__device__ __forceinline__ Piece load_piece(const Block& block, const Walk& at) {
    Piece piece;
    if constexpr (kWhole) {
        piece.load_whole(block.x + (at.row * static_cast<i32>(block.x_row) + at.column * kFloatBytes<X_ELEMENT>));
    } else {
        const i64 offset = at.row * block.x_row + at.column * block.x_column * kFloatBytes<X_ELEMENT>;
        piece.load(block.x + offset, block.x_column, smaller(kValues, block.width - at.column));
    }
    return piece;
}

// The largest over the CTA, in every thread: the order of non-negative floats, infinities and NaN is that of their bits.
__device__ __forceinline__ float largest_of_all(float v) {
    __shared__ u32 warp_max[kMaxThreads / 32];
    const u32 bits = largest_of_warp(__float_as_uint(v)), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) warp_max[warp] = bits;
    __syncthreads();
    return __uint_as_float(largest_of_warp(lane < blockDim.x / 32 ? warp_max[lane] : 0));
}

template <bool kWhole>
__device__ __forceinline__ void encode_piece(const Args& args, const Block& block, const Walk& at, const Piece& piece,
                                             const Divisor& divisor, bool keep) {
    u32 codes[kCodeWords];
#pragma unroll
    for (int word = 0; word < kCodeWords; ++word) {
        float v[kCodes<ELEMENT>];
#pragma unroll
        for (int i = 0; i < kCodes<ELEMENT>; ++i) v[i] = piece.value(word * kCodes<ELEMENT> + i);
        const u32 signs = encode_signs<ELEMENT>(v);
        if (args.scale) divide_all<ELEMENT>(v, divisor);
        if constexpr (ELEMENT == kE2m1x2) {
#pragma unroll
            for (int i = 0; i < kCodes<ELEMENT>; ++i) v[i] *= 0.5f;
        }
        codes[word] = keep ? encode_word<ELEMENT>(v) | signs : 0;
    }
    if constexpr (kWhole) {
        const i32 code = at.row * static_cast<i32>(block.data_row) + at.column;
        store_words(codes, block.data + (kPacked<ELEMENT> ? code >> 1 : code));
    } else {
        const i64 code = at.row * block.data_row + at.column;
        store_bytes(codes, block.data + (kPacked<ELEMENT> ? code >> 1 : code), smaller(kValues, block.width - at.column) * kCodeWords / 2);
    }
}

struct Scale {
    float value;
    bool keep;  // else codes are zeros
};

__device__ __forceinline__ Scale find_scale(const Args& args, float amax) {
    Scale scale{1.f, true};
    if (!args.scale) return scale;
    scale.value = float_scale(amax, args.eps, kElementMax<ELEMENT>, false);
    if constexpr (!kLeaveNan) {
        scale.keep = amax <= kLargest;
        if (!scale.keep) scale.value = __uint_as_float(kNan);
    }
    return scale;
}

// Load, find the maximum, write. `search`: whether the maximum is this block's own.
template <bool kWhole>
__device__ __forceinline__ float quantize_block(const Args& args, const Block& block, bool search) {
    Piece kept[kKept]{};
    Walk at(block);
#pragma unroll
    for (int i = 0; i < kKept; ++i, at.step(block))
        if (at.row < block.rows) kept[i] = load_piece<kWhole>(block, at);

    float amax = 0.f;
    if (search) {
        u32 sizes = 0;
#pragma unroll
        for (int i = 0; i < kKept; ++i)
#pragma unroll
            for (int j = 0; j < Piece::kWords; ++j) sizes = larger_sizes<X_ELEMENT, kLeaveNan>(sizes, kept[i].word(j));
        for (; at.row < block.rows; at.step(block)) {
            const Piece piece = load_piece<kWhole>(block, at);
#pragma unroll
            for (int j = 0; j < Piece::kWords; ++j) sizes = larger_sizes<X_ELEMENT, kLeaveNan>(sizes, piece.word(j));
        }
        amax = largest_of_all(largest_size<X_ELEMENT>(sizes));
    } else if (MODE == 1 && args.amax) {
        amax = *reinterpret_cast<const float*>(args.amax);
    }
    if constexpr (MODE == 0) return amax;

    const Scale scale = find_scale(args, amax);
    const Divisor divisor = divide_by(scale.value, X_ELEMENT != kFp32 && amax >= args.eps);
    at = Walk(block);
#pragma unroll
    for (int i = 0; i < kKept; ++i, at.step(block))
        if (at.row < block.rows) encode_piece<kWhole>(args, block, at, kept[i], divisor, scale.keep);
    for (; at.row < block.rows; at.step(block)) encode_piece<kWhole>(args, block, at, load_piece<kWhole>(block, at), divisor, scale.keep);
    return scale.value;
}

// NOTE: 40 registers of 16-bit x, so that 48 warps with 64 bytes a thread under way keep the memory busy.
extern "C" __global__ void __launch_bounds__(kMaxThreads, X_ELEMENT == kFp32 ? 2 : 3) quantize(const __grid_constant__ Args args) {
    const bool one_scale = MODE == 1 && args.amax != 0, search = MODE == 0 || (args.scale && !one_scale);
    const u32 number = one_scale ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    u32 line = number, block_column = 0;
    if (args.across > 1) line = number / args.across, block_column = number - line * args.across;
    u32 batch = 0, block_row = line;
    if (line >= args.down) batch = line / args.down, block_row = line - batch * args.down;
    const i64 row = static_cast<i64>(block_row) * args.block_rows, column = static_cast<i64>(block_column) * args.block_columns;
    const i32 width = smaller<i64>(args.block_columns, args.columns - column), pieces = ceil_div(width, kValues);
    const i32 rows = width > 0 ? smaller<i64>(args.block_rows, args.rows - row) : 0;
    const i64 first = batch * args.x_batch + row * args.x_row + column * args.x_column;
    const i64 code = (static_cast<i64>(batch) * args.rows + row) * args.columns + column;
    const Block block{args.x + first * kFloatBytes<X_ELEMENT>,
                      args.data + (kPacked<ELEMENT> ? code >> 1 : code),
                      args.x_row * kFloatBytes<X_ELEMENT>,
                      args.columns,
                      args.x_column,
                      rows,
                      width,
                      larger(1, pieces)};
    // Whole pieces: 16 bytes of x, 4 or 8 of codes; with offsets of 32 bits.
    const i64 extent =
        larger<i64>(rows * larger(block.x_row, -block.x_row), static_cast<i64>(rows) * args.columns * kFloatBytes<X_ELEMENT>);
    const bool x_whole =
        extent < 1 << 30 && args.x_column == 1 && width % kValues == 0 && block.x % 16 == 0 && (rows == 1 || block.x_row % 16 == 0);
    const bool whole = x_whole && (MODE == 0 || (block.data % (4 * kCodeWords) == 0 && (rows == 1 || args.columns % kValues == 0)));
    const float result = whole ? quantize_block<true>(args, block, search) : quantize_block<false>(args, block, search);

    if (threadIdx.x != 0) return;
    if constexpr (MODE == 0) {
        atomicMax(reinterpret_cast<u32*>(args.amax), __float_as_uint(result));
    } else if (args.scale && (!one_scale || number == 0)) {
        const i64 index = batch * args.scale_batch + block_row * args.scale_row + block_column * args.scale_column;
        reinterpret_cast<float*>(args.scale)[one_scale ? 0 : index] = result;
    }
}
