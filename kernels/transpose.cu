// target[c][r] = source[r][c] for bytes of a batch of matrices: what fp8 operands need that are contiguous along m or n, for which Hopper's
// tensor cores have no read.
//
// A CTA turns a tile of 128 x 128. Each thread brings pieces of 16 bytes, then has 4 columns of 16 lines, of which it makes 4 pieces.
// Lines of the target are filled up to a multiple of 16 bytes, with zeros. Sources begin at multiples of 16 bytes, and so do their lines.
#include "common/numbers.cuh"

// Python packs this struct as "<2Q5q4i".
struct Args {
    u64 source, target;
    i64 source_line, source_matrix, target_line, target_matrix, offset;  // bytes; offset: of the target
    i32 lines, length;                                                   // of a source matrix
    i32 down, across;                                                    // tiles of it
};
static_assert(sizeof(Args) == 72, "the host packs this layout");

constexpr int kTile = 128, kThreads = 256;

// Where a line of the tile lies: the words of one column in 8 lines, 16 apart, are in different banks.
__device__ __forceinline__ u32 line(int r) { return r * kTile + r / 16 * 16; }

extern "C" __global__ void __launch_bounds__(kThreads) transpose(const __grid_constant__ Args args) {
    extern __shared__ u8 shared_bytes[];
    const u32 tile = shared_address(shared_bytes);
    const int thread = threadIdx.x;
    const i32 number = blockIdx.x / args.across, first_column = blockIdx.x % args.across * kTile;
    const i32 matrix = number / args.down, first_line = number % args.down * kTile;
    const u8* source = reinterpret_cast<const u8*>(args.source) + matrix * args.source_matrix;
#pragma unroll
    for (int i = 0; i < kTile * kTile / 16 / kThreads; ++i) {
        const int r = (i * kThreads + thread) / 8, piece = thread % 8;
        const i32 count = first_line + r < args.lines ? args.length - first_column - piece * 16 : 0;
        const u8* p = source + (first_line + r) * args.source_line + first_column + piece * 16;
        Chunk c = {};
        if (count >= 16) {
            c = load_global_16(p);
        } else {
#pragma unroll 1
            for (int v = count - 1; v >= 0; --v) {  // the last first
                c.word[3] = c.word[3] << 8 | c.word[2] >> 24, c.word[2] = c.word[2] << 8 | c.word[1] >> 24;
                c.word[1] = c.word[1] << 8 | c.word[0] >> 24, c.word[0] = c.word[0] << 8 | load_global_u8(p + v);
            }
        }
        store_shared_16(tile + line(r) + piece * 16, c.word[0], c.word[1], c.word[2], c.word[3]);
    }
    __syncthreads();
    const int r = thread % 8 * 16, column = thread / 8 * 4;
    if (first_line + r >= args.lines) return;
    Chunk turned[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = __float_as_uint(load_shared_float(tile + line(r + 4 * w + i) + column));
        const u32 low[2] = {permute_bytes(x[0], x[1], 0x5140), permute_bytes(x[2], x[3], 0x5140)};   // columns 0 and 1 of two lines each
        const u32 high[2] = {permute_bytes(x[0], x[1], 0x7362), permute_bytes(x[2], x[3], 0x7362)};  // columns 2 and 3
        turned[0].word[w] = permute_bytes(low[0], low[1], 0x5410);
        turned[1].word[w] = permute_bytes(low[0], low[1], 0x7632);
        turned[2].word[w] = permute_bytes(high[0], high[1], 0x5410);
        turned[3].word[w] = permute_bytes(high[0], high[1], 0x7632);
    }
    u8* target = reinterpret_cast<u8*>(args.target) + args.offset + matrix * args.target_matrix + first_line + r;
#pragma unroll
    for (int c = 0; c < 4; ++c)
        if (first_column + column + c < args.length)
            *reinterpret_cast<Chunk*>(target + (first_column + column + c) * args.target_line) = turned[c];
}
