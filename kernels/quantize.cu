// fp8 quantisation with a scale per block: scale = max(amax, 1e-12) / element max, data = fp8(clamp(x / scale)), and back.
//
//   MODE 0  amax of the whole array -> *amax as fp32 bits (the host zeroes it first)
//   MODE 1  x -> data, scale
//   MODE 2  data, scale -> x
//
// Bit for bit what NumPy computes: IEEE division, no flushing of subnormals, rounding to nearest even, a NaN is ignored by amax and stays
// NaN in data (its sign and payload are the hardware's). THREADS_PER_BLOCK threads (32 or 256 of a CTA's 256) share one block; the second
// reading of x comes from cache. With `amax` given to MODE 1 one scale serves the whole array and blocks only divide the work; without
// `scale` it only casts.
#include "common/numbers.cuh"
#include "common/ptx.cuh"

// Python packs this struct as "<4Q6q6i".
struct Args {
    u64 x, data, scale, amax;      // data is contiguous [batch, rows, columns]; scale is fp32 in MODE 1
    i64 x_row, x_column, x_batch;  // strides in values
    i64 scale_row, scale_column, scale_batch;
    i32 rows, columns, batch;
    i32 block_rows, block_columns;  // values that share a scale, at least 1 each
    i32 scale_type;                 // MODE 2: element code of scale
};
static_assert(sizeof(Args) == 104, "the host packs this layout");
static_assert(THREADS_PER_BLOCK == 32 || THREADS_PER_BLOCK == 256, "a warp or a CTA");

constexpr int kThreads = 256;
constexpr int kValues = 4;  // neighbouring columns a thread handles at once
constexpr int kBytes = X_ELEMENT == kFp32 ? 4 : 2;

struct Block {
    i64 batch;
    i32 row, column;          // first of the block
    i32 rows, chunks, width;  // rows, chunks of kValues columns, columns; the array's edge cuts them
};

// Four columns of x, or fewer at the edge (`count`), as fp32. Vector access where the address allows it.
__device__ __forceinline__ bool is_vector(u64 p, i64 column_stride, int count) {
    return count == kValues && column_stride == 1 && p % (kValues * kBytes) == 0;
}

__device__ __forceinline__ float from_bits(u32 bits) {
    if constexpr (X_ELEMENT == kFp32) return __uint_as_float(bits);
    return X_ELEMENT == kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

__device__ __forceinline__ void load_x(float (&v)[kValues], u64 p, i64 stride, int count) {
    if (is_vector(p, stride, count)) {
        if constexpr (X_ELEMENT == kFp32) {
            const Chunk c = load_global_16(reinterpret_cast<const void*>(p));
#pragma unroll
            for (int i = 0; i < kValues; ++i) v[i] = __uint_as_float(c.word[i]);
        } else {
            const uint2 c = *reinterpret_cast<const uint2*>(p);
            v[0] = from_bits(c.x & 0xFFFF), v[1] = from_bits(c.x >> 16), v[2] = from_bits(c.y & 0xFFFF), v[3] = from_bits(c.y >> 16);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
        const void* at = reinterpret_cast<const void*>(p + i * stride * kBytes);
        v[i] = i >= count ? 0.f : from_bits(kBytes == 4 ? load_global_u32(at) : load_global_u16(at));
    }
}

__device__ __forceinline__ void store_x(const float (&v)[kValues], u64 p, i64 stride, int count) {
    if constexpr (X_ELEMENT == kFp32) {
        if (is_vector(p, stride, count)) {
            *reinterpret_cast<float4*>(p) = {v[0], v[1], v[2], v[3]};
            return;
        }
#pragma unroll
        for (int i = 0; i < kValues; ++i)
            if (i < count) *reinterpret_cast<float*>(p + i * stride * kBytes) = v[i];
    } else {
        const u32 low = X_ELEMENT == kBf16 ? pack_bf16(v[0], v[1]) : pack_fp16(v[0], v[1]);
        const u32 high = X_ELEMENT == kBf16 ? pack_bf16(v[2], v[3]) : pack_fp16(v[2], v[3]);
        if (is_vector(p, stride, count)) {
            *reinterpret_cast<uint2*>(p) = {low, high};
            return;
        }
#pragma unroll
        for (int i = 0; i < kValues; ++i)
            if (i < count) *reinterpret_cast<u16*>(p + i * stride * kBytes) = static_cast<u16>((i < 2 ? low : high) >> (i % 2 * 16));
    }
}

__device__ __forceinline__ u32 load_codes(u64 p, int count) {
    if (count == kValues && p % kValues == 0) return *reinterpret_cast<const u32*>(p);
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i)
        if (i < count) codes |= load_global_u8(reinterpret_cast<const u8*>(p) + i) << (8 * i);
    return codes;
}

__device__ __forceinline__ void store_codes(u32 codes, u64 p, int count) {
    if (count == kValues && p % kValues == 0) {
        *reinterpret_cast<u32*>(p) = codes;
        return;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i)
        if (i < count) reinterpret_cast<u8*>(p)[i] = static_cast<u8>(codes >> (8 * i));
}

// Calls visit(address of x, address of data, count) for this thread's chunks of the block.
template <class Visit>
__device__ __forceinline__ void for_each_chunk(const Args& args, const Block& block, Visit visit) {
    const i64 chunks = static_cast<i64>(block.rows) * block.chunks;
    for (i64 i = threadIdx.x % THREADS_PER_BLOCK; i < chunks; i += THREADS_PER_BLOCK) {
        const i64 row = block.rows == 1 ? 0 : i / block.chunks;
        const i32 inside = static_cast<i32>(i - row * block.chunks) * kValues;
        const i64 y = block.row + row, column = block.column + inside;
        const u64 x = args.x + (block.batch * args.x_batch + y * args.x_row + column * args.x_column) * kBytes;
        const u64 data = args.data + (block.batch * args.rows + y) * args.columns + column;
        visit(x, data, smaller(kValues, block.width - inside));
    }
}

// The largest over the threads that share a block, in every one of them.
__device__ __forceinline__ float reduce_max(float v) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v = maximum(v, __shfl_xor_sync(~0u, v, distance));
    if constexpr (THREADS_PER_BLOCK > 32) {
        __shared__ float warp_max[kThreads / 32];
        if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = v;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kThreads / 32; ++i) v = maximum(v, warp_max[i]);
    }
    return v;
}

__device__ __forceinline__ float block_max(const Args& args, const Block& block) {
    float amax = 0.f;
    for_each_chunk(args, block, [&](u64 x, u64, int count) {
        float v[kValues];
        load_x(v, x, args.x_column, count);
#pragma unroll
        for (int i = 0; i < kValues; ++i) amax = maximum(amax, fabsf(v[i]));
    });
    return reduce_max(amax);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) quantize(const __grid_constant__ Args args) {
    const i64 number = static_cast<i64>(blockIdx.x) * (kThreads / THREADS_PER_BLOCK) + threadIdx.x / THREADS_PER_BLOCK;
    const i64 down = larger(1, ceil_div(args.rows, args.block_rows)), across = larger(1, ceil_div(args.columns, args.block_columns));
    const i64 batch = number / (down * across), inside = number % (down * across);
    if (batch >= args.batch) return;  // the whole warp, or CTA, that shares the block
    const i64 block_row = inside / across, block_column = inside % across;
    const i32 row = static_cast<i32>(block_row * args.block_rows), column = static_cast<i32>(block_column * args.block_columns);
    const i32 width = smaller(args.block_columns, args.columns - column);
    const Block block{batch, row, column, smaller(args.block_rows, args.rows - row), ceil_div(width, kValues), width};
    const i64 scale_index = batch * args.scale_batch + block_row * args.scale_row + block_column * args.scale_column;
    const bool first_thread = threadIdx.x % THREADS_PER_BLOCK == 0;

    if constexpr (MODE == 0) {
        const float amax = block_max(args, block);
        // Non-negative floats order like their bits, and an integer maximum does not depend on the order of the CTAs.
        if (first_thread) atomicMax(reinterpret_cast<u32*>(args.amax), __float_as_uint(amax));
    } else if constexpr (MODE == 1) {
        float scale = 1.f;
        if (args.scale) {
            const float amax = args.amax ? *reinterpret_cast<const float*>(args.amax) : block_max(args, block);
            scale = divide(maximum(amax, 1e-12f), kElementMax<ELEMENT>);
            if (first_thread && (!args.amax || number == 0)) reinterpret_cast<float*>(args.scale)[args.amax ? 0 : scale_index] = scale;
        }
        for_each_chunk(args, block, [&](u64 x, u64 data, int count) {
            float v[kValues];
            load_x(v, x, args.x_column, count);
            u32 codes = 0;
#pragma unroll
            for (int i = 0; i < kValues; ++i) codes |= encode_fp8<ELEMENT>(divide(v[i], scale)) << (8 * i);
            store_codes(codes, data, count);
        });
    } else {
        const float scale = load_float(args.scale, scale_index, args.scale_type);
        for_each_chunk(args, block, [&](u64 x, u64 data, int count) {
            const u32 codes = load_codes(data, count);
            float v[kValues];
#pragma unroll
            for (int i = 0; i < kValues; ++i) v[i] = multiply(decode_fp8<ELEMENT>(codes >> (8 * i) & 0xFF), scale);
            store_x(v, x, args.x_column, count);
        });
    }
}
