// target = source, contiguous along k from a multiple of 16 bytes on: what TMA cannot read as it lies.
//
//   BYTES   of a value: 1, 2
//
// A thread makes 16 bytes of a line. Sources may lie in any way.
#include "common/ptx.cuh"

// Python packs this struct as "<2Q6q4I".
struct Args {
    u64 source, target;
    i64 source_step, source_line, source_matrix, target_line, target_matrix, offset;  // bytes; offset: of the target
    u32 lines, length, pieces, all;                                                   // of a matrix; pieces of a line, and of all
};
static_assert(sizeof(Args) == 80, "the host packs this layout");

constexpr int kThreads = 256, kValues = 16 / BYTES, kOfWord = 4 / BYTES;

extern "C" __global__ void __launch_bounds__(kThreads) align(const __grid_constant__ Args args) {
    const u32 number = blockIdx.x * kThreads + threadIdx.x;
    if (number >= args.all) return;
    const i64 piece = number % args.pieces, line = number / args.pieces % args.lines, matrix = number / args.pieces / args.lines;
    const i64 first = piece * kValues;
    const u8* source = reinterpret_cast<const u8*>(args.source) + matrix * args.source_matrix + line * args.source_line;
    Chunk c = {};
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
        if (first + i >= args.length) break;
        const u8* p = source + (first + i) * args.source_step;
        c.word[i / kOfWord] |= (BYTES == 1 ? load_global_u8(p) : load_global_u16(p)) << i % kOfWord * 8 * BYTES;
    }
    u8* target = reinterpret_cast<u8*>(args.target) + args.offset + matrix * args.target_matrix + line * args.target_line;
    reinterpret_cast<Chunk*>(target)[piece] = c;
}
