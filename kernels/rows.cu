// Operations on the rows of a matrix, around grouped products.
//
//   MODE 0  out[t, n] = sum over j of weights[t, j] * y[t, j, n], or of y[indices[t, j], n]; an index outside y adds nothing
//   MODE 1  out[b, r, n] = silu(gate[b, r, n]) * up[b, r, n], the two halves of x[b, r, :]; rows from counts[b] on are zeros, unread
//
// Bit for bit what NumPy computes: every float32 product and sum is rounded on its own, sums run in the order of j, one rounding to nearest
// even gives the output. A thread makes kValues neighbours of one row, and threads of a CTA cross rows freely, so that short rows leave none
// idle. Any strides; 16-byte accesses where a row allows them. Memory is read and written once, which is all there is to it.
#include "common/exp.cuh"
#include "common/pieces.cuh"

// Python packs this struct as "<4Q13q6i". Strides count values.
struct Args {
    u64 x, weights, select, out;     // select: indices (MODE 0) or counts (MODE 1), or null; x: what MODE 0 calls y
    i64 x_outer, x_inner, x_column;  // MODE 0: by t (0 with indices), and by j or by index; MODE 1: by b and r
    i64 weight_row, weight_column, select_row, select_column;
    i64 out_outer, out_inner, out_column;  // MODE 0: out_inner by t
    i64 batch, rows, source_rows;          // MODE 0: 1, tokens, rows of y; MODE 1: b, r, 0
    i32 columns, topk;                     // of out; terms of a sum
    i32 weight_type, select_bytes, out_type;
    i32 gate_second;  // MODE 1: whether the gate is the second half
};
static_assert(sizeof(Args) == 160, "the host packs this layout");

constexpr int kThreads = 256;
constexpr int kValues = 8;                          // neighbouring columns of a thread
constexpr int kTerms = X_ELEMENT == kFp32 ? 2 : 4;  // rows whose loads a thread has in flight: 64 bytes

using Piece = Floats<X_ELEMENT, kValues>;

__device__ __forceinline__ bool is_vector(const void* p, i64 column_stride, int count) {
    return count == kValues && column_stride == 1 && reinterpret_cast<u64>(p) % 16 == 0;
}

__device__ __forceinline__ void store_values(const Args& args, i64 index, const float (&v)[kValues], int count) {
    if (args.out_type == kFp32) {
        float* p = reinterpret_cast<float*>(args.out) + index;
        if (is_vector(p, args.out_column, count)) {
            reinterpret_cast<float4*>(p)[0] = {v[0], v[1], v[2], v[3]};
            reinterpret_cast<float4*>(p)[1] = {v[4], v[5], v[6], v[7]};
            return;
        }
#pragma unroll
        for (int i = 0; i < kValues; ++i)
            if (i < count) p[i * args.out_column] = v[i];
    } else {
        u16* p = reinterpret_cast<u16*>(args.out) + index;
        u32 word[kValues / 2];
#pragma unroll
        for (int i = 0; i < kValues / 2; ++i)
            word[i] = args.out_type == kBf16 ? pack_bf16(v[2 * i], v[2 * i + 1]) : pack_fp16(v[2 * i], v[2 * i + 1]);
        if (is_vector(p, args.out_column, count)) {
            *reinterpret_cast<uint4*>(p) = {word[0], word[1], word[2], word[3]};
            return;
        }
#pragma unroll
        for (int i = 0; i < kValues; ++i)
            if (i < count) p[i * args.out_column] = static_cast<u16>(word[i / 2] >> (i % 2 * 16));
    }
}

__device__ __forceinline__ i64 load_integer(u64 base, i64 index, int bytes) {
    return bytes == 8 ? reinterpret_cast<const i64*>(base)[index] : reinterpret_cast<const i32*>(base)[index];
}

// quotient and rest of two numbers that are not negative; 64-bit divisions take a hundred instructions, and few arrays need them.
__device__ __forceinline__ void divide_whole(i64 a, i64 b, i64& quotient, i64& rest) {
    if (((a | b) >> 32) == 0) {
        quotient = static_cast<u32>(a) / static_cast<u32>(b);
        rest = static_cast<u32>(a) % static_cast<u32>(b);
    } else {
        quotient = a / b;
        rest = a % b;
    }
}

// Indices, then rows, then sums: a step's loads do not wait for each other.
__device__ __forceinline__ void combine(const Args& args, i64 token, i32 column, int count, float (&sum)[kValues]) {
    const u64 y = args.x + (token * args.x_outer + column * args.x_column) * kFloatBytes<X_ELEMENT>;
    for (i32 first = 0; first < args.topk; first += kTerms) {
        i64 row[kTerms];  // -1: none
        float weight[kTerms];
        Piece piece[kTerms];
#pragma unroll
        for (int u = 0; u < kTerms; ++u) {
            const i32 j = first + u;
            row[u] = -1;
            if (j >= args.topk) continue;
            weight[u] = load_float(args.weights, token * args.weight_row + j * args.weight_column, args.weight_type);
            row[u] = j;
            if (args.select) row[u] = load_integer(args.select, token * args.select_row + j * args.select_column, args.select_bytes);
        }
#pragma unroll
        for (int u = 0; u < kTerms; ++u) {
            if (args.select && row[u] >= args.source_rows) row[u] = -1;
            if (row[u] >= 0) piece[u].load(y + row[u] * args.x_inner * kFloatBytes<X_ELEMENT>, args.x_column, count);
        }
#pragma unroll
        for (int u = 0; u < kTerms; ++u)
            if (row[u] >= 0) {
#pragma unroll
                for (int i = 0; i < kValues; ++i) sum[i] = add(sum[i], multiply(weight[u], piece[u].value(i)));
            }
    }
}

__device__ __forceinline__ void silu_and_mul(const Args& args, i64 batch, i64 row, i32 column, int count, float (&v)[kValues]) {
    if (args.select && row >= load_integer(args.select, batch * args.select_row, args.select_bytes)) return;
    const u64 first = args.x + (batch * args.x_outer + row * args.x_inner + column * args.x_column) * kFloatBytes<X_ELEMENT>;
    const u64 second = first + args.columns * args.x_column * kFloatBytes<X_ELEMENT>;
    Piece gate, up;
    gate.load(args.gate_second ? second : first, args.x_column, count);
    up.load(args.gate_second ? first : second, args.x_column, count);
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = multiply(silu(gate.value(i)), up.value(i));
}

extern "C" __global__ void __launch_bounds__(kThreads) rows(const __grid_constant__ Args args) {
    const i64 item = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
    const i32 pieces = ceil_div(args.columns, kValues);
    if (item >= args.batch * args.rows * pieces) return;
    i64 line, piece, batch = 0, row;
    divide_whole(item, pieces, line, piece);
    if (MODE == 1 && args.batch > 1)
        divide_whole(line, args.rows, batch, row);
    else
        row = line;
    const i32 column = static_cast<i32>(piece) * kValues, count = smaller(kValues, args.columns - column);
    float v[kValues] = {};
    if constexpr (MODE == 0)
        combine(args, row, column, count, v);
    else
        silu_and_mul(args, batch, row, column, count, v);
    store_values(args, batch * args.out_outer + row * args.out_inner + column * args.out_column, v, count);
}
