// target = source as fp16, exactly: fp8 operands of products whose sums are to be fp32, which Hopper's tensor cores keep for 16-bit values.
//
//   ELEMENT   2 e4m3, 3 e5m2
//
// A thread takes 16 values of a line: 16 bytes in, 32 out. Sources begin at multiples of 16 bytes, and so do lines, of both.
#include "common/numbers.cuh"

// Python packs this struct as "<2Q5q4I".
struct Args {
    u64 source, target;
    i64 source_line, source_matrix, target_line, target_matrix, offset;  // bytes; offset: of the target
    u32 lines, length, pieces, all;                                      // of a matrix; pieces of a line, and of all
};
static_assert(sizeof(Args) == 72, "the host packs this layout");

constexpr int kThreads = 256;

extern "C" __global__ void __launch_bounds__(kThreads) widen(const __grid_constant__ Args args) {
    const u32 number = blockIdx.x * kThreads + threadIdx.x;
    if (number >= args.all) return;
    const i64 piece = number % args.pieces, line = number / args.pieces % args.lines, matrix = number / args.pieces / args.lines;
    const u8* source = reinterpret_cast<const u8*>(args.source) + matrix * args.source_matrix + line * args.source_line + piece * 16;
    u8* target = reinterpret_cast<u8*>(args.target) + args.offset + matrix * args.target_matrix + line * args.target_line + piece * 32;
    const i32 count = static_cast<i32>(args.length - piece * 16);
    u32 values[8];
    decode_chunk<ELEMENT, false>(count >= 16 ? load_global_16(source) : load_partial(source, count), values);
    Chunk* to = reinterpret_cast<Chunk*>(target);
    to[0] = {{values[0], values[1], values[2], values[3]}};
    if (count > 8) to[1] = {{values[4], values[5], values[6], values[7]}};
}
