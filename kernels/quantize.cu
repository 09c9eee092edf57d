// Quantisation with a float scale for the whole array, each row, or each block of several rows: fp8, int8, int4 and e2m1.
//
//   MODE 0  amax of the whole array -> *amax as fp32 bits (the host zeroes it first)
//   MODE 1  x -> data, scale
//
// scale = max(amax, eps) / element max, data = round(x / scale). Bit for bit what NumPy computes (quantize_reference.py has the rules): IEEE
// quotients, no flushing of subnormals, rounding to nearest even. A CTA takes a block of values: it reads all that its registers hold, finds
// the maximum, and writes; what is left of a longer block is read a second time, from cache. With `amax` given to MODE 1 one scale serves the
// whole array and blocks only divide the work, the last ones first, as MODE 0 has left them in the cache; without `scale` it only casts.
#include "common/encode.cuh"
#include "common/pieces.cuh"

// Python packs this struct as "<4Q6q5if".
struct Args {
    u64 x, data, scale, amax;      // data is contiguous [batch, rows, columns]; scale is fp32
    i64 x_row, x_column, x_batch;  // strides in values
    i64 scale_row, scale_column, scale_batch;
    i32 rows, columns, batch;
    i32 block_rows, block_columns;  // values that share a scale, at least 1 each
    float eps;
};
static_assert(sizeof(Args) == 104, "the host packs this layout");

constexpr int kThreads = 256;
constexpr int kValues = 8;                            // neighbouring columns a thread handles at once
constexpr int kKept = X_ELEMENT == kFp32 ? 4 : 8;     // pieces that stay in a thread's registers
constexpr int kCodeWords = kPacked<ELEMENT> ? 1 : 2;  // of a piece
constexpr bool kLeaveNan = kIsFp8<ELEMENT>;
using Piece = Floats<X_ELEMENT, kValues>;

struct Block {
    i64 batch;
    i32 row, column;          // first of the block
    i32 rows, pieces, width;  // rows, pieces of kValues columns, columns; the array's edge cuts them
};

// One piece of the block: addresses of its first value and code, and how many there are.
struct Spot {
    u64 x, data;
    int count;
};

__device__ __forceinline__ Spot find_spot(const Args& args, const Block& block, i64 piece) {
    const i64 row = block.rows == 1 ? 0 : static_cast<u32>(piece) / static_cast<u32>(block.pieces);
    const i32 inside = static_cast<i32>(piece - row * block.pieces) * kValues;
    const i64 y = block.row + row, column = block.column + inside;
    const i64 index = (block.batch * args.rows + y) * args.columns + column;
    return {args.x + (block.batch * args.x_batch + y * args.x_row + column * args.x_column) * kFloatBytes<X_ELEMENT>,
            args.data + (kPacked<ELEMENT> ? index / 2 : index), smaller(kValues, block.width - inside)};
}

// The largest over the CTA, in every thread: the order of non-negative floats, infinities and NaN is that of their bits.
__device__ __forceinline__ float largest_of_all(float v) {
    __shared__ u32 warp_max[kThreads / 32];
    u32 bits = __float_as_uint(v);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) bits = larger(bits, __shfl_xor_sync(~0u, bits, distance));
    if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = bits;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) bits = larger(bits, warp_max[i]);
    return __uint_as_float(bits);
}

__device__ __forceinline__ void encode_piece(const Args& args, const Piece& piece, const Divisor& divisor, bool keep, const Spot& spot) {
    u32 codes[kCodeWords];
#pragma unroll
    for (int word = 0; word < kCodeWords; ++word) {
        float v[kCodes<ELEMENT>];
#pragma unroll
        for (int i = 0; i < kCodes<ELEMENT>; ++i) {
            const float x = piece.value(word * kCodes<ELEMENT> + i);
            v[i] = args.scale ? quotient(x, divisor) : x;
        }
        codes[word] = keep ? encode_word<ELEMENT>(v) : 0;
    }
    store_bytes(codes, spot.data, kPacked<ELEMENT> ? spot.count / 2 : spot.count);
}

extern "C" __global__ void __launch_bounds__(kThreads) quantize(const __grid_constant__ Args args) {
    const bool one_scale = MODE == 1 && args.amax != 0;
    const u32 number = one_scale ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const u32 down = larger(1, ceil_div(args.rows, args.block_rows)), across = larger(1, ceil_div(args.columns, args.block_columns));
    const u32 line = number / across, block_column = number - line * across, batch = line / down, block_row = line - batch * down;
    const i32 row = static_cast<i32>(block_row) * args.block_rows, column = static_cast<i32>(block_column) * args.block_columns;
    const i32 width = smaller(args.block_columns, args.columns - column);
    const Block block{batch, row, column, smaller(args.block_rows, args.rows - row), ceil_div(width, kValues), width};
    const i64 pieces = static_cast<i64>(block.rows) * block.pieces;

    float amax = 0.f;
    Piece kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const i64 piece = i * kThreads + threadIdx.x;
        if (piece < pieces) {
            const Spot spot = find_spot(args, block, piece);
            kept[i].load(spot.x, args.x_column, spot.count);
        }
    }
    const bool search = MODE == 0 || (args.scale && !one_scale);
    if (search) {
#pragma unroll
        for (int i = 0; i < kKept; ++i)
            if (i * kThreads + threadIdx.x < pieces) {
#pragma unroll
                for (int j = 0; j < kValues; ++j) amax = larger_size<kLeaveNan>(amax, kept[i].value(j));
            }
        for (i64 piece = kKept * kThreads + threadIdx.x; piece < pieces; piece += kThreads) {
            const Spot spot = find_spot(args, block, piece);
            Piece p;
            p.load(spot.x, args.x_column, spot.count);
#pragma unroll
            for (int j = 0; j < kValues; ++j) amax = larger_size<kLeaveNan>(amax, p.value(j));
        }
        amax = largest_of_all(amax);
    }

    if constexpr (MODE == 0) {
        if (threadIdx.x == 0) atomicMax(reinterpret_cast<u32*>(args.amax), __float_as_uint(amax));
    } else {
        float scale = 1.f;
        bool keep = true;  // else codes are zeros
        if (args.scale) {
            if (one_scale) amax = *reinterpret_cast<const float*>(args.amax);
            scale = float_scale(amax, args.eps, kElementMax<ELEMENT>, false);
            if constexpr (!kLeaveNan) {
                keep = amax <= kLargest;
                if (!keep) scale = __uint_as_float(kNan);
            }
            if (threadIdx.x == 0 && (!one_scale || number == 0)) {
                const i64 index = batch * args.scale_batch + block_row * args.scale_row + block_column * args.scale_column;
                reinterpret_cast<float*>(args.scale)[one_scale ? 0 : index] = scale;
            }
        }
        const Divisor divisor = divide_by(scale);
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
            const i64 piece = i * kThreads + threadIdx.x;
            if (piece < pieces) encode_piece(args, kept[i], divisor, keep, find_spot(args, block, piece));
        }
        for (i64 piece = kKept * kThreads + threadIdx.x; piece < pieces; piece += kThreads) {
            const Spot spot = find_spot(args, block, piece);
            Piece p;
            p.load(spot.x, args.x_column, spot.count);
            encode_piece(args, p, divisor, keep, spot);
        }
    }
}
