// Quantisation with a scale for every 16 to 512 values of a row: mx formats, nvfp4, int4 and uint4 groups, int8 and fp8 groups.
//
//   MODE 0  amax of the finite values -> *amax as fp32 bits, of the array or of each row (the host zeroes them first); nvfp4 only
//   MODE 1  x -> data, scale, and where asked the tensor scale and the zero points
//
// Bit for bit what NumPy computes (quantize_reference.py has the rules): IEEE division, no flushing of subnormals, nothing fused.
// 1 << LOG_THREADS threads share a scale. With PREPARE x may become silu(first half) * second half and be multiplied by pre_scale first. Rows from counts[b] on count as zeros.
// A thread takes two pieces of 16 values of a row: of 16-bit x it has four 16-byte loads in flight. It stores the codes of a piece as one
// word of 8 or 16 bytes; the threads of one scale are neighbours and find its maximum by shuffles. Scales go where their layout has them,
// zeros where it pads. Other strides and edges: value by value. Memory is read and written once.
#include "common/encode.cuh"
#include "common/exp.cuh"
#include "common/pieces.cuh"

// Python packs this struct as "<9Qf5i12q11ifi4x".
struct Args {
    u64 x, tensor_scale, pre_scale, counts, data, scale, tensor_out, zero, amax;  // any but x, data, scale may be null
    float tensor_value;                                                           // the tensor scale where it comes by value
    i32 rows, columns, width, matrices,
        matrix_rows;                           // of a matrix of scales; `width` of data, padded; x is [matrices, matrix_rows, columns]
    i64 x_matrix, x_row, x_column;             // strides in values
    i64 scale_matrix, scale_row, scale_block;  // linear scales; tiled ones have the first only
    i64 tensor_matrix, tensor_row, pre_stride, counts_stride;
    i64 out_matrix, out_row;  // of tensor_out and amax
    i32 log_pieces, tiles_down, tiles_across;
    i32 scale_rows, scale_blocks;  // with padding
    i32 layout, encode_scale, ceil_scale, pre_type, count_bytes, per_row;
    float eps;
    i32 silu;
};
static_assert(sizeof(Args) == 248, "the host packs this layout");

constexpr int kValues = 16, kPieces = 2;
using Piece = Floats<X_ELEMENT, kValues>;
constexpr bool kLeaveNan = kIsFp8<ELEMENT>;
constexpr int kCodeWords = kValues / kCodes<ELEMENT>;

// One thread's row and the first of its pieces; the next is 1 << log_pieces further on.
struct Item {
    i64 matrix, matrix_row;  // of x
    Place at;
    bool exists, live;  // whether there is such a row, and whether counts leaves it
};

__device__ __forceinline__ Item find_item(const Args& args) {
    Item item;
    item.at = place_of_thread(args.tiles_down, args.tiles_across, args.log_pieces);
    item.at.piece += item.at.piece >> args.log_pieces << args.log_pieces;  // tiles are kPieces times as wide
    item.matrix = item.at.batch, item.matrix_row = item.at.row;
    if (args.matrix_rows != args.rows) {  // the matrices of x follow each other in one matrix of scales
        const u32 rows = larger(1, args.matrix_rows), row = item.at.row;
        item.matrix = row / rows, item.matrix_row = row % rows;
    }
    item.exists = item.live = item.at.row < args.rows;
    if (args.counts && item.live) {
        const i64 index = item.matrix * args.counts_stride;
        const i64 count =
            args.count_bytes == 8 ? reinterpret_cast<const i64*>(args.counts)[index] : reinterpret_cast<const i32*>(args.counts)[index];
        item.live = item.matrix_row < count;
    }
    return item;
}

__device__ __forceinline__ i32 first_value(const Args& args, const Item& item, int piece) {
    return (item.at.piece + (piece << args.log_pieces)) * kValues;
}

// Starts all loads of the thread. `half`: 1 for the second half of x.
__device__ __forceinline__ void load_pieces(const Args& args, const Item& item, int half, Piece (&pieces)[kPieces]) {
    const i64 row = item.matrix * args.x_matrix + item.matrix_row * args.x_row + half * args.columns * args.x_column;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const i32 first = first_value(args, item, i);
        const int count = item.live ? larger(0, smaller(kValues, args.columns - first)) : 0;
        pieces[i].load(args.x + (row + first * args.x_column) * kFloatBytes<X_ELEMENT>, args.x_column, count);
    }
}

// What is quantised: x, or what silu and pre_scale make of it, each product rounded to the dtype of x.
__device__ __forceinline__ void prepare(const Args& args, i32 first, Piece& piece, const Piece& second) {
    float v[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
        v[i] = piece.value(i);
        if (args.silu) v[i] = rounded<X_ELEMENT>(multiply(silu(v[i]), second.value(i)));
        if (args.pre_scale && first + i < args.columns)
            v[i] = rounded<X_ELEMENT>(multiply(v[i], load_float(args.pre_scale, (first + i) * args.pre_stride, args.pre_type)));
    }
    piece.keep(v);
}

// The largest over 1 << log_threads neighbours, in each of them. Only for what is not negative and no NaN, or ordered like its bits.
__device__ __forceinline__ float largest_of(float v, int log_threads) {
#pragma unroll
    for (int i = 0; i < log_threads; ++i) v = __uint_as_float(larger(__float_as_uint(v), __float_as_uint(__shfl_xor_sync(~0u, v, 1 << i))));
    return v;
}

// g / 6 and 1/g of the row's tensor scale; the thread that has the first piece hands 1/g back where that is asked for.
struct TensorScale {
    float encode, decode;
};
__device__ __forceinline__ TensorScale find_tensor_scale(const Args& args, const Item& item) {
    const i64 out = item.matrix * args.out_matrix + item.matrix_row * args.out_row;
    const bool exists = args.per_row ? item.exists : item.matrix < args.matrices;
    float encode, decode;
    if (args.amax) {
        const float amax = reinterpret_cast<const float*>(args.amax)[exists ? out : 0];
        encode = amax == 0.f ? 1.f : minimum(divide(2688.f, amax), kLargest);  // 448 * 6
        decode = divide(1.f, encode);
    } else {
        float given = args.tensor_value;
        if (args.tensor_scale && exists)
            given = reinterpret_cast<const float*>(args.tensor_scale)[item.matrix * args.tensor_matrix + item.matrix_row * args.tensor_row];
        const float inverse = divide(1.f, given);
        encode = args.encode_scale ? given : inverse, decode = args.encode_scale ? inverse : given;
    }
    if (args.tensor_out && exists && item.at.piece == 0 && (args.per_row || item.matrix_row == 0))
        reinterpret_cast<float*>(args.tensor_out)[out] = decode;
    return {multiply(encode, 1.f / 6.f), decode};
}

// What a block's scale is: its bits as stored, its zero point, and whether its codes are those of its values, not zeros.
struct Scale {
    u32 bits;
    float zero;
    bool keep;
};

// Finds the scale of the block that the piece belongs to, and its values divided by it.
__device__ __forceinline__ Scale scale_values(const Args& args, const TensorScale& tensor, const Piece& piece, float (&v)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = piece.value(i);

    if constexpr (ELEMENT == kUint4x2) {
        u32 above = 0, below = 0;  // the largest values and their largest negatives; a NaN is in both
#pragma unroll
        for (int i = 0; i < Piece::kWords; ++i) {
            above = larger_values<X_ELEMENT, false>(above, piece.word(i));
            below = larger_values<X_ELEMENT, false>(below, piece.word(i) ^ ~kSizeBits<X_ELEMENT>);
        }
        // Without the sign of a -0, whose bits are large.
        const float high = largest_of(largest_size<X_ELEMENT>(above & kSizeBits<X_ELEMENT>), LOG_THREADS);
        const float low = largest_of(largest_size<X_ELEMENT>(below & kSizeBits<X_ELEMENT>), LOG_THREADS);  // of size
        if (!(high <= kLargest && low <= kLargest)) return {kNan, 0.f, false};
        const float scale = float_scale(add(high, low), args.eps, kElementMax<ELEMENT>, false);
        divide_all<ELEMENT>(v, divide_by(scale, false));
        return {__float_as_uint(scale), static_cast<float>(encode_integer(divide(low, scale)) & 15), true};
    }

    u32 sizes = 0;
#pragma unroll
    for (int i = 0; i < Piece::kWords; ++i) sizes = larger_sizes<X_ELEMENT, kLeaveNan>(sizes, piece.word(i));
    const float amax = largest_of(largest_size<X_ELEMENT>(sizes), LOG_THREADS);
    const bool finite = amax <= kLargest;
    if constexpr (SCALE == kFp32) {
        const float scale = float_scale(amax, args.eps, kElementMax<ELEMENT>, args.ceil_scale);
        divide_all<ELEMENT>(v, divide_by(scale, X_ELEMENT != kFp32 && amax >= args.eps));
        if constexpr (kLeaveNan) return {__float_as_uint(scale), 0.f, true};  // an infinite scale leaves zeros and NaN
        return {finite ? __float_as_uint(scale) : kNan, 0.f, finite};
    }

    u32 code;
    float factor;
    if constexpr (SCALE == kE8m0) {
        code = encode_e8m0_up(divide(amax, kElementMax<ELEMENT>));
        factor = code == 0 ? 0.f : decode_e8m0(254 - code);  // 2^-e
        if (!finite) code = 0xFF;
    } else {
        code = finite ? encode_fp8x2<kE4m3>(multiply(amax, tensor.encode), 0.f) & 0xFF : kNanCode;
        factor = minimum(divide(1.f, multiply(decode_fp8<kE4m3>(code), tensor.decode)), kLargest);
        if (amax == 0.f || code == kNanCode) factor = 0.f;
    }
    // The encoder of e2m1 takes halves: half of the factor is as good, unless that is a subnormal number.
    const bool halved = ELEMENT == kE2m1x2 && (factor >= 0x1p-100f || factor == 0.f);
    if (halved) factor *= 0.5f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = multiply(v[i], factor);
    if (ELEMENT == kE2m1x2 && !halved) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) v[i] *= 0.5f;
    }
    return {code, 0.f, finite};
}

__device__ __forceinline__ void store_scale(const Args& args, const Item& item, i32 first, const Scale& scale) {
    const u32 piece = static_cast<u32>(first) / kValues;
    const i32 block = static_cast<i32>(piece >> LOG_THREADS);
    if (piece & ((1u << LOG_THREADS) - 1) || item.at.row >= args.scale_rows || block >= args.scale_blocks) return;
    i64 place = item.at.batch * args.scale_matrix;
    if (args.layout == kLinear)
        place += item.at.row * args.scale_row + block * args.scale_block;
    else
        place += scale_place(item.at.row, block, args.scale_blocks, args.layout);
    // Rows past counts and padding have scales of zero, also float ones; rows of zeros within have what the rule gives.
    const u32 bits = item.live && first < args.width ? scale.bits : 0;
    if constexpr (SCALE == kFp32)
        reinterpret_cast<u32*>(args.scale)[place] = bits;
    else
        reinterpret_cast<u8*>(args.scale)[place] = static_cast<u8>(bits);
    if constexpr (ELEMENT == kUint4x2) reinterpret_cast<u8*>(args.zero)[place] = static_cast<u8>(scale.zero);
}

__device__ __forceinline__ void store_codes(const Args& args, const Item& item, i32 first, const Piece& piece, const float (&v)[kValues],
                                            const Scale& scale) {
    if (!item.exists || first >= args.width) return;
    u32 codes[kCodeWords];
#pragma unroll
    for (int word = 0; word < kCodeWords; ++word) {
        float x[kCodes<ELEMENT>], part[kCodes<ELEMENT>];
#pragma unroll
        for (int i = 0; i < kCodes<ELEMENT>; ++i) {
            const int at = word * kCodes<ELEMENT> + i;
            x[i] = piece.value(at), part[i] = v[at];
        }
        codes[word] = scale.keep && item.live ? encode_word<ELEMENT>(part, scale.zero) | encode_signs<ELEMENT>(x) : 0;
    }
    const i64 index = (static_cast<i64>(item.at.batch) * args.rows + item.at.row) * args.width + first;
    store_bytes(codes, args.data + (kPacked<ELEMENT> ? index / 2 : index), smaller(kValues, args.width - first) * 4 / kCodes<ELEMENT>);
}

// The array's amax, or the row's: one atomic of each CTA, or of each warp's part of a row.
__device__ __forceinline__ void store_amax(const Args& args, const Item& item, float amax) {
    __shared__ float warp_max[kPieceThreads / 32];
    u32* place = reinterpret_cast<u32*>(args.amax);
    if (args.per_row) {
        const int log_threads = smaller(5, args.log_pieces);
#pragma unroll 1
        for (int i = 0; i < log_threads; ++i) amax = maximum(amax, __shfl_xor_sync(~0u, amax, 1 << i));
        if (item.live && (threadIdx.x & ((1 << log_threads) - 1)) == 0)
            atomicMax(place + item.matrix * args.out_matrix + item.matrix_row * args.out_row, __float_as_uint(amax));
        return;
    }
    amax = largest_of(amax, 5);
    if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = amax;
    __syncthreads();
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int i = 1; i < kPieceThreads / 32; ++i) amax = maximum(amax, warp_max[i]);
    // Non-negative floats order like their bits, and an integer maximum does not depend on the order of the CTAs.
    atomicMax(place, __float_as_uint(amax));
}

// NOTE: enough CTAs a multiprocessor to keep its memory busy.
extern "C" __global__ void __launch_bounds__(kPieceThreads, PREPARE              ? 2
                                                            : X_ELEMENT == kFp32 ? 3
                                                                                 : 4) block_quantize(const __grid_constant__ Args args) {
    const Item item = find_item(args);
    Piece first[kPieces], second[kPieces];
    load_pieces(args, item, 0, first);
    if (PREPARE && args.silu) load_pieces(args, item, 1, second);

    if constexpr (MODE == 0) {
        float amax = 0.f;
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
            if constexpr (PREPARE != 0) prepare(args, first_value(args, item, p), first[p], second[p]);
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                const float size = fabsf(first[p].value(i));
                amax = maximum(amax, size <= kLargest ? size : 0.f);
            }
        }
        store_amax(args, item, amax);
    } else {
        TensorScale tensor{};
        if constexpr (SCALE == kE4m3) tensor = find_tensor_scale(args, item);
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
            const i32 at = first_value(args, item, p);
            if constexpr (PREPARE != 0) prepare(args, at, first[p], second[p]);
            float v[kValues];
            const Scale scale = scale_values(args, tensor, first[p], v);
            store_codes(args, item, at, first[p], v, scale);
            store_scale(args, item, at, scale);
        }
    }
}
