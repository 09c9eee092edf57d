// From operands in global memory, in any format and layout, to 16-bit tiles in shared memory.
//
// The including kernel is configured by the macros A_ELEMENT, A_SCALE, B_ELEMENT, B_SCALE, VECTOR, BLOCK_K and WARPS_*, which this header
// reads. A_SCALE, B_SCALE: what the byte of each block does to the values on their way (see `decode_scale`).
#pragma once
#include "common/args.cuh"

constexpr int kThreads = 32 * WARPS_M * WARPS_N * WARPS_K;
static_assert(BLOCK_K % 64 == 0, "the swizzle permutes eight chunks");

// Tiles ----------------------------------------------------------------------------------------------------------------------------

// A 16-bit tile: kMajor 0 holds [rows][BLOCK_K], kMajor 1 holds [BLOCK_K][rows]. Chunk c of a line sits at c ^ (line's place among
// the lines that share 128 bytes): eight chunks in a column, or in a row, then cover all banks once.
template <int kMajor, int kRows>
struct Tile {
    static constexpr int kPitch = kMajor == 0 ? BLOCK_K * 2 : kRows * 2;
    static constexpr int kChunks = kPitch / 16;
    static constexpr int kBytes = kRows * BLOCK_K * 2;

    static __device__ __forceinline__ u32 offset(int line, int chunk) {
        return line * kPitch + ((chunk ^ (line / larger(1, 128 / kPitch) & (smaller(8, kChunks) - 1))) * 16);
    }

    // Four 8x8 matrices. kOfA: (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15), the MMA's fragment of A.
    // Else the middle two change places: registers 0, 1 and 2, 3 are the fragments of two times eight columns of B.
    // NOTE: the MMA takes B from neighbouring registers; any other order costs two moves per MMA.
    template <bool kOfA>
    static __device__ __forceinline__ void load_16x16(u32 (&r)[4], u32 tile, int row, int k) {
        const int lane = threadIdx.x % 32, near = lane / 8 % 2 * 8, far = lane / 16 * 8;
        const int matrix_row = kOfA ? near : far, matrix_k = kOfA ? far : near;
        if constexpr (kMajor == 0)
            load_matrix_x4(r, tile + offset(row + matrix_row + lane % 8, (k + matrix_k) / 8));
        else
            load_matrix_x4_transposed(r, tile + offset(k + matrix_k + lane % 8, (row + matrix_row) / 8));
    }
};

// Operands in global memory --------------------------------------------------------------------------------------------------------

template <int kElement>
constexpr int kValueBytes = kElement == kBf16 || kElement == kFp16 ? 2 : 1;  // packed: bytes of a stored pair

// The bytes that belong to blocks of one operand's values: scales or zero points, row-major or in tiles of 128 (or 8) rows x 4 blocks.
struct BlockBytes {
    const u8* base;
    i64 row, block;  // row-major: bytes from one row, one block to the next; tiled: from one row of tiles, one tile to the next
    i32 tile_rows;   // 1, 128 or 8
    i32 shift;       // log2 of the values along k in a block
    i32 begin;       // row of the operand's first row here, -1 where rows are the operand's own

    __device__ __forceinline__ u32 row_offset(i32 r) const {
        if (tile_rows == 1) return static_cast<u32>(r * row);
        const i32 inside = tile_rows == 128 ? r % 32 * 16 + r % 128 / 32 * 4 : r % 8 * 4;
        return static_cast<u32>(r / tile_rows * row) + inside;
    }
    __device__ __forceinline__ u32 load(u32 row_offset, i32 at) const {
        const i64 offset = tile_rows == 1 ? at * block : (at >> 2) * block + (at & 3);
        return load_global_u8(base + row_offset + offset);
    }
};

// One operand of this CTA: rows of A, or columns of B, by k. Its row i belongs to row result_row(i) of the result and lies at row(i):
// the row that `gather` names, where there is one, else the same, or one row for every `repeat` of the result.
struct Operand {
    const u8* base;
    i64 row_bytes, k_bytes;  // from one row, one stored value along k to the next
    i64 panel_bytes;         // 8-bit values: what a step of 128 along k adds to 128 * k_bytes
    const i32 *map, *gather;
    i32 repeat, rows;  // `rows` exist
    i32 begin, end, k;
    BlockBytes blocks;

    __device__ __forceinline__ i32 result_row(int i) const {  // -1 past the end
        if (i >= end - begin) return -1;
        return map ? map[begin + i] : begin + i;
    }
    __device__ __forceinline__ i32 row(int i) const {  // -1 past the end, and where `gather` names no row
        const i32 r = result_row(i);
        if (r < 0 || in_order()) return r;
        if (!gather) return repeat == 1 ? r : r / repeat;
        const i32 source = gather[r];
        return source >= 0 && source < rows ? source : -1;
    }
    __device__ __forceinline__ bool in_order() const { return !map && !gather && repeat == 1; }
    __device__ __forceinline__ u32 block_row(int i, i32 row) const { return blocks.row_offset(blocks.begin < 0 ? row : blocks.begin + i); }
};

// Loaders --------------------------------------------------------------------------------------------------------------------------
// fetch(k, tile) starts loading the k-step at k; put(tile) finishes it. An asynchronous loader needs the tile in fetch and no put;
// the others hold the step in registers between the two. fetch_partial(k, tile) comes before fetch.

// Which 16-byte global chunks of a tile a thread moves: chunk `chunk` of lines line(0), line(1), ... Eight neighbouring lanes write
// shared chunks of eight different swizzle positions, and touch whole 32-byte sectors of global memory.
template <int kElement, int kMajor, int kRows>
struct Share {
    static constexpr int kValues = kChunkValues<kElement>;
    static constexpr int kLines = kMajor == 0 ? kRows : BLOCK_K;
    static constexpr int kChunks = (kMajor == 0 ? BLOCK_K : kRows) / kValues;
    static constexpr int kWritten = kValues / 8;  // shared chunks per global chunk
    static constexpr int kNear = smaller(kChunks, 8 / kWritten);
    static constexpr int kItems = kLines * kChunks / kThreads;
    static_assert(kItems * kThreads == kLines * kChunks && kThreads % (8 * kChunks / kNear) == 0, "threads share a tile evenly");

    int chunk, first_line;
    __device__ __forceinline__ Share() {
        const int near_lines = 8 / kNear, octet = threadIdx.x / 8;
        chunk = octet % (kChunks / kNear) * kNear + threadIdx.x % kNear;
        first_line = octet / (kChunks / kNear) * near_lines + threadIdx.x / kNear % near_lines;
    }
    __device__ __forceinline__ int line(int i) const { return first_line + i * (kThreads / kChunks); }
};

// The same chunks in global memory: where each starts and how many of its bytes exist.
template <int kElement, int kMajor, int kRows>
struct Chunks : Share<kElement, kMajor, kRows> {
    using Base = Share<kElement, kMajor, kRows>;
    static constexpr int kFixed = kMajor == 0 ? Base::kItems : 1;

    const u8* base;
    i64 step_bytes;     // kMajor 1: from one k to the next
    u32 start[kFixed];  // kMajor 0: start of each line in units of 16 bytes (the pitch is a multiple)
    i64 panel_bytes;    // kMajor 0, see Operand
    i32 valid;          // kMajor 0: bit i = line i exists; 1: bytes of every chunk that exist
    i32 k_end;

    __device__ __forceinline__ explicit Chunks(const Operand& operand)
        : base(operand.base), step_bytes(operand.k_bytes), panel_bytes(operand.panel_bytes), valid(0), k_end(operand.k) {
        if constexpr (kMajor == 0) {
            const i32 origin = operand.in_order() ? operand.begin : 0;
            base += origin * operand.row_bytes;
#pragma unroll
            for (int i = 0; i < Base::kItems; ++i) {
                const i32 row = operand.row(this->line(i));
                start[i] = row < 0 ? 0 : static_cast<u32>((row - origin) * operand.row_bytes / 16);
                valid |= (row >= 0) << i;
            }
        } else {
            const i32 row = operand.begin + this->chunk * Base::kValues;
            valid = larger(0, smaller(16, (operand.end - row) * kValueBytes<kElement>));
            base += valid > 0 ? static_cast<i64>(row) * kValueBytes<kElement> : 0;
        }
    }

    __device__ __forceinline__ int bytes(int i, i32 k) const {
        if constexpr (kMajor == 0) {
            const i32 values = k_end - k - this->chunk * Base::kValues;
            const i32 exist = kPacked<kElement> ? (values + 1) / 2 : values * kValueBytes<kElement>;
            return valid >> i & 1 ? larger(0, smaller(16, exist)) : 0;
        } else {
            return k + this->line(i) < k_end ? valid : 0;
        }
    }
    __device__ __forceinline__ const u8* address(int i, i32 k) const {  // meaningful where bytes() is not 0
        if constexpr (kMajor == 0) {
            const i32 along = (kPacked<kElement> ? k / 2 : k * kValueBytes<kElement>)+this->chunk * 16;
            const u8* p = base + static_cast<u64>(start[i]) * 16 + along;
            return Base::kValues == 16 ? p + (along >> 7) * panel_bytes : p;
        } else {
            return base + (k + this->line(i)) * step_bytes;
        }
    }
};

template <int kElement, int kMajor, int kRows, int kPlanes>
struct AsyncLoader {
    static constexpr bool kAsync = true;
    using Target = Tile<kMajor, kRows>;
    const Operand& operand;
    Chunks<kElement, kMajor, kRows> chunks;

    __device__ __forceinline__ explicit AsyncLoader(const Operand& operand) : operand(operand), chunks(operand) {}
    __device__ __forceinline__ void fetch(i32 k, u32 tile) {
#pragma unroll
        for (int i = 0; i < chunks.kItems; ++i) {
            const int bytes = chunks.bytes(i, k);
            const u8* source = bytes ? chunks.address(i, k) : chunks.base;
            copy_async_16_if(bytes % 16 == 0, tile + Target::offset(chunks.line(i), chunks.chunk), source, bytes);
        }
    }
    __device__ __forceinline__ void put(u32) const {}

    // What fetch leaves out: chunks of which only the first values exist, at the end of k or of the rows. One column of chunks at most.
    // NOTE: not a cp.async with fewer source bytes, which compute-sanitizer takes for a read of all 16.
    __device__ __forceinline__ void fetch_partial(i32 k, u32 tile) const {
        const i32 exist = kMajor == 0 ? operand.k - k : operand.end - operand.begin;  // values along the contiguous axis, from the tile on
        if (__builtin_expect(exist % 8 == 0 || exist > (kMajor == 0 ? BLOCK_K : kRows), 1)) return;
#pragma unroll 1
        for (int line = threadIdx.x; line < (kMajor == 0 ? kRows : BLOCK_K); line += kThreads) {
            const i64 row = kMajor == 0 ? operand.row(line) : operand.begin + exist / 8 * 8;
            const i64 depth = kMajor == 0 ? k + exist / 8 * 8 : k + line;
            if (row < 0 || depth >= operand.k) continue;  // fetch has zeros for lines that do not exist at all
            const Chunk c = load_partial(operand.base + row * operand.row_bytes + depth * operand.k_bytes, exist % 8 * 2);
            store_shared_16(tile + Target::offset(line, exist / 8), c.word[0], c.word[1], c.word[2], c.word[3]);
        }
    }
};

// Eight decoded values into a shared chunk, or, split, into the same chunk of both planes.
template <int kPlanes, int kPlaneBytes>
__device__ __forceinline__ void put_chunk(u32 at, const u32* v) {
    if constexpr (kPlanes == 1) {
        store_shared_16(at, v[0], v[1], v[2], v[3]);
    } else {
        u32 high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) split_fp16(v[i], high[i], low[i]);
        store_shared_16(at, high[0], high[1], high[2], high[3]);
        store_shared_16(at + kPlaneBytes, low[0], low[1], low[2], low[3]);
    }
}

template <int kElement, int kScale, int kMajor, int kRows, int kPlanes>
struct DecodingLoader {
    static constexpr bool kAsync = false;
    using Target = Tile<kMajor, kRows>;
    static_assert(kScale == 0 || kMajor == 0, "a chunk along the rows has a block for each of them");
    static constexpr int kItems = Chunks<kElement, kMajor, kRows>::kItems;
    static constexpr int kBlocks = kScale == kE4m3 ? kChunkValues<kElement> / 16 : 1;  // that a chunk's values belong to
    static constexpr int kBytes = kScale ? kItems : 1;

    Chunks<kElement, kMajor, kRows> chunks;
    const BlockBytes& blocks;
    Chunk raw[kItems];
    u32 block_row[kBytes];
    u32 bytes[kBytes];  // of the blocks of each chunk, first in the low byte

    __device__ __forceinline__ explicit DecodingLoader(const Operand& operand) : chunks(operand), blocks(operand.blocks) {
        if constexpr (kScale != 0) {
#pragma unroll
            for (int i = 0; i < kItems; ++i) block_row[i] = operand.block_row(chunks.line(i), larger(0, operand.row(chunks.line(i))));
        }
    }
    __device__ __forceinline__ void fetch(i32 k, u32) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const int exist = chunks.bytes(i, k);
            raw[i] = {};
            if (exist == 16)
                raw[i] = load_global_16(chunks.address(i, k));
            else if (exist)
                raw[i] = load_partial(chunks.address(i, k), exist);
            if constexpr (kScale != 0) {
                const i32 first = k + chunks.chunk * chunks.kValues;
                bytes[i] = 0;
#pragma unroll
                for (int j = 0; j < kBlocks; ++j)  // an e4m3 block has 16 values, an e8m0 one 32, one with a zero point 2^shift
                    if (exist && first + 16 * j < chunks.k_end)
                        bytes[i] |= blocks.load(block_row[i], (first >> block_shift()) + j) << (8 * j);
            }
        }
    }
    __device__ __forceinline__ int block_shift() const { return kScale == kE4m3 ? 4 : kScale == kE8m0 ? 5 : blocks.shift; }
    __device__ __forceinline__ void fetch_partial(i32, u32) const {}  // fetch does it
    __device__ __forceinline__ void put(u32 tile) const {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            constexpr int kWords = kChunkValues<kElement> / 2;
            u32 values[kWords];
            decode_chunk<kElement, kComputeBf16>(raw[i], values);
            if constexpr (kScale != 0) {
#pragma unroll
                for (int j = 0; j < kBlocks; ++j) {
                    const u32 scale = decode_scale<kScale, kComputeBf16>(bytes[i] >> (8 * j) & 0xFF);
#pragma unroll
                    for (int w = 0; w < kWords / kBlocks; ++w)
                        values[j * (kWords / kBlocks) + w] = apply_scale<kScale, kComputeBf16>(values[j * (kWords / kBlocks) + w], scale);
                }
            }
#pragma unroll
            for (int j = 0; j < chunks.kWritten; ++j)
                put_chunk<kPlanes, Target::kBytes>(tile + Target::offset(chunks.line(i), chunks.chunk * chunks.kWritten + j),
                                                   &values[4 * j]);
        }
    }
};

// Any strides: each thread gathers the values of a shared chunk (8 along k) one by one. Neighbouring lanes go along the rows where rows
// are contiguous, else along k; the tile is k-major either way.
template <int kElement, int kScale, int kRows, int kPlanes>
struct GatherLoader {
    static constexpr bool kAsync = false;
    static constexpr int kChunks = BLOCK_K / 8, kItems = kRows * kChunks / kThreads;
    static constexpr int kStored = kPacked<kElement> ? 4 : 8;  // stored values in a shared chunk
    static constexpr int kBytes = kScale ? kItems : 1;
    static_assert(kThreads % kRows == 0 && kThreads % kChunks == 0, "threads share a tile evenly");

    Operand operand;
    int line, chunk, line_step, chunk_step;  // item i is chunk + i * chunk_step of line + i * line_step
    i32 row[kItems];
    u32 raw[kItems][kStored];
    u32 bytes[kBytes];  // of each item's block

    __device__ __forceinline__ explicit GatherLoader(const Operand& operand) : operand(operand) {
        const int thread = threadIdx.x;
        const bool along_rows = operand.row_bytes == kValueBytes<kElement> && operand.k_bytes != kValueBytes<kElement>;
        line = along_rows ? thread % kRows : thread / kChunks;
        chunk = along_rows ? thread / kRows : thread % kChunks;
        line_step = along_rows ? 0 : kThreads / kChunks;
        chunk_step = along_rows ? kThreads / kRows : 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) row[i] = operand.row(line + i * line_step);
    }
    __device__ __forceinline__ void fetch(i32 k, u32) {
        constexpr int kPerStored = 8 / kStored;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const i32 first = k + (chunk + i * chunk_step) * 8;
            const i32 exist = row[i] < 0 ? 0 : (operand.k - first + kPerStored - 1) / kPerStored;
            const u8* p = operand.base + row[i] * operand.row_bytes + first / kPerStored * operand.k_bytes;
            if constexpr (kStored == 8 && kValueBytes<kElement> == 1) p += (first >> 7) * operand.panel_bytes;
#pragma unroll
            for (int j = 0; j < kStored; ++j, p += operand.k_bytes) {
                raw[i][j] = 0;
                if (j < exist) raw[i][j] = kValueBytes<kElement> == 2 ? load_global_u16(p) : load_global_u8(p);
            }
            if constexpr (kScale != 0) {
                const int shift = kScale == kE4m3 ? 4 : kScale == kE8m0 ? 5 : operand.blocks.shift;
                bytes[i] = exist <= 0 ? 0 : operand.blocks.load(operand.block_row(line + i * line_step, row[i]), first >> shift);
            }
        }
    }
    __device__ __forceinline__ void fetch_partial(i32, u32) const {}  // fetch does it
    __device__ __forceinline__ void put(u32 tile) const {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            u32 values[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                values[j] = decode_pair<kElement, kComputeBf16>(raw[i][j * kStored / 4], raw[i][j * kStored / 4 + (kStored == 8)]);
            if constexpr (kScale != 0) {
                const u32 scale = decode_scale<kScale, kComputeBf16>(bytes[i]);
#pragma unroll
                for (int j = 0; j < 4; ++j) values[j] = apply_scale<kScale, kComputeBf16>(values[j], scale);
            }
            const u32 at = tile + Tile<0, kRows>::offset(line + i * line_step, chunk + i * chunk_step);
            put_chunk<kPlanes, Tile<0, kRows>::kBytes>(at, values);
        }
    }
};

template <bool kCondition, class Yes, class No>
struct Select {
    using Type = Yes;
};
template <class Yes, class No>
struct Select<false, Yes, No> {
    using Type = No;
};
template <int kElement, int kScale, int kMajor, int kRows, int kPlanes>
struct LoaderOf {
    static constexpr bool kIdentity = kElement == (kComputeBf16 ? kBf16 : kFp16);
    using Decoding = DecodingLoader<kElement, kScale, kMajor, kRows, kPlanes>;
    using Vector = typename Select<kIdentity, AsyncLoader<kElement, kMajor, kRows, kPlanes>, Decoding>::Type;
    using Type = typename Select<VECTOR != 0, Vector, GatherLoader<kElement, kScale, kRows, kPlanes>>::Type;
};
