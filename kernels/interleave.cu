// Linear scales [batch, rows, blocks] -> tiles of 128 (or 8) rows x 4 blocks, zeros where padded (scale_layout.py).
//
// A thread takes four neighbouring blocks of a row, which stay neighbours. VALUE_BYTES is 1 or 2.
#include "common/pieces.cuh"

// Python packs this struct as "<2Q4q10i".
struct Args {
    u64 source, target;
    i64 batch_stride, row_stride, block_stride;  // of source, in values
    i64 target_matrix;                           // values of a padded matrix
    i32 rows, blocks, matrix_rows;               // of a target matrix; rows of a source matrix
    i32 padded_rows, padded_blocks, layout;
    i32 tiles_down, tiles_across;
    i32 log_pieces, unused;
};
static_assert(sizeof(Args) == 88, "the host packs this layout");

extern "C" __global__ void __launch_bounds__(kPieceThreads) interleave(const __grid_constant__ Args args) {
    const Place at = place_of_thread(args.tiles_down, args.tiles_across, args.log_pieces);
    const i32 block = 4 * at.piece;
    if (at.row >= args.padded_rows || block >= args.padded_blocks) return;
    i64 matrix = at.batch, row = at.row;
    if (args.matrix_rows != args.rows) matrix = at.row / larger(1, args.matrix_rows), row = at.row % larger(1, args.matrix_rows);
    u32 value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const i64 index = matrix * args.batch_stride + row * args.row_stride + (block + i) * args.block_stride;
        const bool exists = at.row < args.rows && block + i < args.blocks;
        const u8* p = reinterpret_cast<const u8*>(args.source) + index * VALUE_BYTES;
        value[i] = !exists ? 0 : VALUE_BYTES == 1 ? load_global_u8(p) : load_global_u16(p);
    }
    const i64 place = at.batch * args.target_matrix + scale_place(at.row, block, args.padded_blocks, args.layout);
    u8* p = reinterpret_cast<u8*>(args.target) + place * VALUE_BYTES;
    if constexpr (VALUE_BYTES == 1)
        *reinterpret_cast<u32*>(p) = value[0] | value[1] << 8 | value[2] << 16 | value[3] << 24;
    else
        *reinterpret_cast<uint2*>(p) = {value[0] | value[1] << 16, value[2] | value[3] << 16};
}
