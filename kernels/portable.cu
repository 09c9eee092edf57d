// D = epilogue(A @ B): every pair of formats, every layout and alignment, dense, batched or grouped, sm_80 and up.
//
// Formats are decoded between global and shared memory; shared memory holds 16-bit tiles; the MMA loop knows no format.
// 16-bit values are bf16 if either operand is bf16, else fp16, which holds every fp8 and fp4 value exactly. fp16 beside bf16 is split
// into two bf16 planes whose sum is exact. Products are exact, sums are fp32 on mma.sync.
//
//   warps   WARPS_M x WARPS_N cut the tile; WARPS_K cut each k-step, their sums meet in shared memory at the end
//   shared  STAGES x (planes of A [BLOCK_M x BLOCK_K], planes of B [BLOCK_N x BLOCK_K]), stored along the operand's contiguous axis,
//           16-byte chunks swizzled so that ldmatrix and every store are free of bank conflicts
//   loads   16-bit operands by cp.async, STAGES - 1 tiles ahead; others through registers (decode, st.shared), two tiles ahead
//
// Not handled: wgmma and TMA (see the hopper kernels), packed e2m1 contiguous along m or n, grouped A contiguous along m with VECTOR
// (its segments start unaligned), block scales that change inside BLOCK_K / WARPS_K.
// Learned from: the multistage pipeline of CUTLASS's sm_80 mainloop, gau-nernst's learn-cuda (swizzle, register double buffer).
#include "common/epilogue.cuh"
#include "common/numbers.cuh"
#include "common/ptx.cuh"
#include "common/schedule.cuh"

// Python packs this struct as "<10Q3f5i16q8i". Strides count stored values (bytes for packed e2m1); null pointers say "not there".
struct Args {
    u64 a, b, out, a_scale, b_scale, alpha, bias;  // a scale or alpha that is null is the value below instead
    u64 indptr, row_map, expert_map;               // grouped: i32 [batch + 1], i32 [m] or null, i32 [batch] or null
    float a_scale_value, b_scale_value, alpha_value;
    i32 m, n, k;
    i32 batch;    // products, or segments when grouped
    i32 experts;  // grouped: matrices in B
    i64 a_row, a_k, a_batch;
    i64 b_column, b_k, b_batch;  // grouped: b_batch, b_scale_batch and bias_batch step from expert to expert
    i64 out_row, out_column, out_batch;
    i64 a_scale_row, a_scale_k, a_scale_batch;  // *_scale_k: from one block of 128 k to the next, used when SCALE_MODE is 1
    i64 b_scale_column, b_scale_k, b_scale_batch;
    i64 bias_batch;
    i32 a_scale_rows, b_scale_columns;  // rows of A, columns of B that share a scale (at least 1)
    i32 a_scale_type, b_scale_type, alpha_type, bias_type, out_type;
    i32 grouped;
};
static_assert(sizeof(Args) == 272, "the host packs this layout");

constexpr int kThreads = 32 * WARPS_M * WARPS_N * WARPS_K;
constexpr bool kComputeBf16 = A_ELEMENT == kBf16 || B_ELEMENT == kBf16;
constexpr int kPlanesA = kComputeBf16 && A_ELEMENT == kFp16 ? 2 : 1;
constexpr int kPlanesB = kComputeBf16 && B_ELEMENT == kFp16 ? 2 : 1;

constexpr int kWarpM = BLOCK_M / WARPS_M, kWarpN = BLOCK_N / WARPS_N, kWarpK = BLOCK_K / WARPS_K;
constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 16, kSteps = kWarpK / 16;
constexpr int kAccumulators = kWarpM * kWarpN / 32;  // per thread
constexpr int kScaleBlockK = 128;
static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kWarpK % 16 == 0, "warps compute 16x16x16 fragments");
static_assert(BLOCK_K % 64 == 0 && STAGES >= 2, "swizzle and pipeline");
static_assert(SCALE_MODE == 0 || kScaleBlockK % kWarpK == 0, "a warp's slice of k must lie in one scale block");
static_assert(VECTOR || (A_MAJOR == 0 && B_MAJOR == 0), "element-wise loads always fill k-major tiles");
static_assert(VECTOR || kAccumulators <= (SCALE_MODE == 0 ? 64 : 32), "element-wise loads need the registers: choose a smaller tile");
static_assert((A_ELEMENT != kE2m1x2 || A_MAJOR == 0) && (B_ELEMENT != kE2m1x2 || B_MAJOR == 0), "packed e2m1 is packed along k");

// Shared memory --------------------------------------------------------------------------------------------------------------------

struct alignas(1024) Smem {
    struct Stage {
        u16 a[kPlanesA][BLOCK_M * BLOCK_K];
        u16 b[kPlanesB][BLOCK_N * BLOCK_K];
    } stage[STAGES];
};
static_assert(sizeof(Smem) == SMEM_BYTES, "the host plans shared memory");
static_assert((WARPS_K - 1) * BLOCK_M * BLOCK_N * 4 <= SMEM_BYTES, "partial sums reuse the stages");

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
constexpr int kValueBytes = kElement == kBf16 || kElement == kFp16 ? 2 : 1;  // e2m1x2: bytes of a stored pair

// One operand of this CTA: rows of A, or columns of B, by k. Row i is at position begin + i, or at map[begin + i].
struct Operand {
    const u8* base;
    i64 row_bytes, k_bytes;  // from one row, one stored value along k to the next
    const i32* map;
    i32 begin, end, k;

    __device__ __forceinline__ i32 row(int i) const {  // -1 past the end
        if (i >= end - begin) return -1;
        return map ? map[begin + i] : begin + i;
    }
};

// The first `bytes` of 16, zeros behind: the end of an operand, where a 16-byte load would read past it.
__device__ __forceinline__ Chunk load_partial(const u8* p, int bytes) {
    u64 low = 0, high = 0;
#pragma unroll 1
    for (int i = bytes - 1; i >= 0; --i) {
        high = high << 8 | low >> 56;
        low = low << 8 | load_global_u8(p + i);
    }
    return {{static_cast<u32>(low), static_cast<u32>(low >> 32), static_cast<u32>(high), static_cast<u32>(high >> 32)}};
}

// Loaders --------------------------------------------------------------------------------------------------------------------------
// fetch(k, tile) starts loading the k-step at k; put(tile) finishes it. An asynchronous loader needs the tile in fetch and no put;
// the others hold the step in registers between the two.

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
    i64 step_bytes;      // kMajor 1: from one k to the next
    u32 start[kFixed];   // kMajor 0: start of each line in units of 16 bytes (the pitch is a multiple)
    i32 valid;           // kMajor 0: bit i = line i exists; 1: bytes of every chunk that exist
    i32 k_end;

    __device__ __forceinline__ explicit Chunks(const Operand& operand) : base(operand.base), step_bytes(operand.k_bytes), valid(0), k_end(operand.k) {
        if constexpr (kMajor == 0) {
            const i32 origin = operand.map ? 0 : operand.begin;
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
            const i32 exist = kElement == kE2m1x2 ? (values + 1) / 2 : values * kValueBytes<kElement>;
            return valid >> i & 1 ? larger(0, smaller(16, exist)) : 0;
        } else {
            return k + this->line(i) < k_end ? valid : 0;
        }
    }
    __device__ __forceinline__ const u8* address(int i, i32 k) const {  // meaningful where bytes() is not 0
        if constexpr (kMajor == 0) {
            const i32 along = kElement == kE2m1x2 ? k / 2 : k * kValueBytes<kElement>;
            return base + static_cast<u64>(start[i]) * 16 + (along + this->chunk * 16);
        } else {
            return base + (k + this->line(i)) * step_bytes;
        }
    }
};

template <int kElement, int kMajor, int kRows, int kPlanes>
struct AsyncLoader {
    static constexpr bool kAsync = true;
    Chunks<kElement, kMajor, kRows> chunks;

    __device__ __forceinline__ explicit AsyncLoader(const Operand& operand) : chunks(operand) {}
    __device__ __forceinline__ void fetch(i32 k, u32 tile) {
#pragma unroll
        for (int i = 0; i < chunks.kItems; ++i) {
            const int bytes = chunks.bytes(i, k);
            const u8* source = bytes ? chunks.address(i, k) : chunks.base;
            copy_async_16(tile + Tile<kMajor, kRows>::offset(chunks.line(i), chunks.chunk), source, bytes);
        }
    }
    __device__ __forceinline__ void put(u32) const {}
};

template <int kElement, int kMajor, int kRows, int kPlanes>
struct DecodingLoader {
    static constexpr bool kAsync = false;
    using Target = Tile<kMajor, kRows>;
    Chunks<kElement, kMajor, kRows> chunks;
    Chunk raw[Chunks<kElement, kMajor, kRows>::kItems];

    __device__ __forceinline__ explicit DecodingLoader(const Operand& operand) : chunks(operand) {}
    __device__ __forceinline__ void fetch(i32 k, u32) {
#pragma unroll
        for (int i = 0; i < chunks.kItems; ++i) {
            const int bytes = chunks.bytes(i, k);
            raw[i] = {};
            if (bytes == 16)
                raw[i] = load_global_16(chunks.address(i, k));
            else if (bytes)
                raw[i] = load_partial(chunks.address(i, k), bytes);
        }
    }
    __device__ __forceinline__ void put(u32 tile) const {
#pragma unroll
        for (int i = 0; i < chunks.kItems; ++i) {
            u32 values[kChunkValues<kElement> / 2];
            decode_chunk<kElement, kComputeBf16>(raw[i], values);
#pragma unroll
            for (int j = 0; j < chunks.kWritten; ++j)
                put_chunk(tile + Target::offset(chunks.line(i), chunks.chunk * chunks.kWritten + j), &values[4 * j]);
        }
    }

    static __device__ __forceinline__ void put_chunk(u32 at, const u32* v) {
        if constexpr (kPlanes == 1) {
            store_shared_16(at, v[0], v[1], v[2], v[3]);
        } else {
            u32 high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) split_fp16(v[i], high[i], low[i]);
            store_shared_16(at, high[0], high[1], high[2], high[3]);
            store_shared_16(at + Target::kBytes, low[0], low[1], low[2], low[3]);
        }
    }
};

// Any strides: each thread gathers the values of a shared chunk (8 along k) one by one. Neighbouring lanes go along the rows where rows
// are contiguous, else along k; the tile is k-major either way.
template <int kElement, int kRows, int kPlanes>
struct GatherLoader {
    static constexpr bool kAsync = false;
    static constexpr int kChunks = BLOCK_K / 8, kItems = kRows * kChunks / kThreads;
    static constexpr int kStored = kElement == kE2m1x2 ? 4 : 8;  // stored values in a shared chunk
    static_assert(kThreads % kRows == 0 && kThreads % kChunks == 0, "threads share a tile evenly");

    Operand operand;
    int line, chunk, line_step, chunk_step;  // item i is chunk + i * chunk_step of line + i * line_step
    i32 row[kItems];
    u32 raw[kItems][kStored];

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
#pragma unroll
            for (int j = 0; j < kStored; ++j, p += operand.k_bytes) {
                raw[i][j] = 0;
                if (j < exist) raw[i][j] = kValueBytes<kElement> == 2 ? load_global_u16(p) : load_global_u8(p);
            }
        }
    }
    __device__ __forceinline__ void put(u32 tile) const {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            u32 values[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                values[j] = decode_pair<kElement, kComputeBf16>(raw[i][j * kStored / 4], raw[i][j * kStored / 4 + (kStored == 8)]);
            const u32 at = tile + Tile<0, kRows>::offset(line + i * line_step, chunk + i * chunk_step);
            DecodingLoader<kElement, 0, kRows, kPlanes>::put_chunk(at, values);
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
template <int kElement, int kMajor, int kRows, int kPlanes>
struct LoaderOf {
    static constexpr bool kIdentity = kElement == (kComputeBf16 ? kBf16 : kFp16);
    using Vector = typename Select<kIdentity, AsyncLoader<kElement, kMajor, kRows, kPlanes>, DecodingLoader<kElement, kMajor, kRows, kPlanes>>::Type;
    using Type = typename Select<VECTOR != 0, Vector, GatherLoader<kElement, kRows, kPlanes>>::Type;
};
using LoaderA = LoaderOf<A_ELEMENT, A_MAJOR, BLOCK_M, kPlanesA>::Type;
using LoaderB = LoaderOf<B_ELEMENT, B_MAJOR, BLOCK_N, kPlanesB>::Type;
using TileA = Tile<A_MAJOR, BLOCK_M>;
using TileB = Tile<B_MAJOR, BLOCK_N>;

// MMA ------------------------------------------------------------------------------------------------------------------------------

using Accumulator = float[kFragmentsM][kFragmentsN * 2][4];

struct Fragments {
    u32 a[kPlanesA][kFragmentsM][4];
    u32 b[kPlanesB][kFragmentsN][4];

    __device__ __forceinline__ void load(u32 stage, int row, int column, int k) {
#pragma unroll
        for (int plane = 0; plane < kPlanesA; ++plane)
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i) TileA::load_16x16<true>(a[plane][i], stage + plane * TileA::kBytes, row + 16 * i, k);
        stage += kPlanesA * TileA::kBytes;
#pragma unroll
        for (int plane = 0; plane < kPlanesB; ++plane)
#pragma unroll
            for (int j = 0; j < kFragmentsN; ++j) TileB::load_16x16<false>(b[plane][j], stage + plane * TileB::kBytes, column + 16 * j, k);
    }
};

__device__ __forceinline__ void multiply_add(Accumulator& acc, const u32 (&a)[kFragmentsM][4], const u32 (&b)[kFragmentsN][4]) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsN * 2; ++j) {
            if constexpr (kComputeBf16)
                mma_bf16(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            else
                mma_fp16(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
}

template <int kCount>
__device__ __forceinline__ void keep_finite(u32 (&fragments)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) fragments[i / 4][i % 4] = finite_bf16_or_zero(fragments[i / 4][i % 4]);
}

__device__ __forceinline__ void multiply_add(Accumulator& acc, Fragments& f) {
    multiply_add(acc, f.a[0], f.b[0]);
    if constexpr (kPlanesA == 2) {
        keep_finite(f.b[0]);
        multiply_add(acc, f.a[kPlanesA - 1], f.b[0]);
    }
    if constexpr (kPlanesB == 2) {
        keep_finite(f.a[0]);
        multiply_add(acc, f.a[0], f.b[kPlanesB - 1]);
    }
}

// This warp's share of a staged k-step. The fragments of the next 16 k load while the MMAs of these run.
__device__ __forceinline__ void multiply_stage(Accumulator& acc, u32 stage, int row, int column, int k) {
    Fragments fragments[2];
    fragments[0].load(stage, row, column, k);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) fragments[(step + 1) % 2].load(stage, row, column, k + 16 * (step + 1));
        multiply_add(acc, fragments[step % 2]);
    }
}

// Where a thread is ----------------------------------------------------------------------------------------------------------------

struct Place {
    int warp_tile, warp_k;      // which part of the tile, which slice of every k-step
    int warp_row, warp_column;  // first row and column of the part
    int row, column;            // this thread's first; others follow at row + 8 i, column + 8 j and column + 8 j + 1 (the MMA's layout)

    __device__ __forceinline__ Place() {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        warp_k = warp / (WARPS_M * WARPS_N), warp_tile = warp % (WARPS_M * WARPS_N);
        warp_row = warp_tile / WARPS_N * kWarpM, warp_column = warp_tile % WARPS_N * kWarpN;
        row = warp_row + lane / 4, column = warp_column + lane % 4 * 2;
    }
};
constexpr int kRowsPerThread = 2 * kFragmentsM, kColumnsPerThread = 4 * kFragmentsN;

__device__ __forceinline__ u64 advance(u64 pointer, i64 values, i32 type) { return pointer ? pointer + values * (type == kFp32 ? 4 : 2) : 0; }

// The scales of this thread's rows and columns, fetched for one block of 128 k at a time.
struct Scales {
    const Args& args;
    u64 a, b;                         // of this batch and expert
    i32 row_block[kRowsPerThread];    // 0 for rows and columns past the edge: any scale will do, the result is not stored
    i32 column_block[kColumnsPerThread];

    __device__ __forceinline__ Scales(const Args& args, const Work& work, const Operand& rows, const Place& place)
        : args(args),
          a(advance(args.a_scale, work.batch * args.a_scale_batch, args.a_scale_type)),
          b(advance(args.b_scale, work.expert * args.b_scale_batch, args.b_scale_type)) {
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) row_block[i] = larger(0, rows.row(place.row + 8 * i)) / args.a_scale_rows;
#pragma unroll
        for (int j = 0; j < kColumnsPerThread; ++j)
            column_block[j] = smaller(work.column_begin + place.column + j / 2 * 8 + j % 2, args.n - 1) / args.b_scale_columns;
    }
    __device__ __forceinline__ void load(float (&row)[kRowsPerThread], float (&column)[kColumnsPerThread], i32 block_k) const {
        gather(row, row_block, a, block_k * args.a_scale_k, args.a_scale_row, args.a_scale_type, args.a_scale_value);
        gather(column, column_block, b, block_k * args.b_scale_k, args.b_scale_column, args.b_scale_type, args.b_scale_value);
    }

    // NOTE: the type is tested outside the loops, so that all loads of a call are under way together.
    template <int kCount>
    static __device__ __forceinline__ void gather(float (&out)[kCount], const i32 (&block)[kCount], u64 p, i64 origin, i64 step, i32 type, float value) {
        if (p == 0) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) out[i] = value;
        } else if (type == kFp32) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) out[i] = __uint_as_float(load_global_u32(reinterpret_cast<const u32*>(p) + origin + block[i] * step));
        } else {
            u32 bits[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) bits[i] = load_global_u16(reinterpret_cast<const u16*>(p) + origin + block[i] * step);
#pragma unroll
            for (int i = 0; i < kCount; ++i) out[i] = type == kBf16 ? bf16_to_float(bits[i]) : fp16_to_float(bits[i]);
        }
    }
};

// Main loop ------------------------------------------------------------------------------------------------------------------------
// In iteration t tile t is multiplied; register loaders put tile t + 1 and fetch t + 2; cp.async fetches tile t + STAGES - 1.

__device__ __forceinline__ void main_loop(Accumulator& sum, const Args& args, const Work& work, const Operand& a, const Operand& b, const Place& place, u32 stages) {
    LoaderA load_a(a);
    LoaderB load_b(b);
    const Scales scales(args, work, a, place);  // unused, and gone, unless SCALE_MODE is 1
    constexpr u32 kStageBytes = sizeof(Smem::Stage), kOffsetB = kPlanesA * TileA::kBytes;
    const i32 tiles = ceil_div(args.k, BLOCK_K);
    const auto fetch = [&](i32 tile, u32 stage, bool async) {
        if (tile >= tiles) return;
        if (LoaderA::kAsync == async) load_a.fetch(tile * BLOCK_K, stage);
        if (LoaderB::kAsync == async) load_b.fetch(tile * BLOCK_K, stage + kOffsetB);
    };
    const auto put = [&](i32 tile, u32 stage) {
        if (tile >= tiles) return;
        load_a.put(stage);
        load_b.put(stage + kOffsetB);
    };

#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        fetch(s, stages + s * kStageBytes, true);
        copy_async_commit();
    }
    fetch(0, 0, false);
    put(0, stages);
    fetch(1, 0, false);

    int current = 0;
    for (i32 t = 0; t < tiles; ++t) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // tile t is complete, and everybody is done with the stage of tile t - 1
        const int next = current + 1 == STAGES ? 0 : current + 1, previous = current == 0 ? STAGES - 1 : current - 1;
        fetch(t + STAGES - 1, stages + previous * kStageBytes, true);
        copy_async_commit();
        put(t + 1, stages + next * kStageBytes);
        fetch(t + 2, 0, false);
        const u32 stage = stages + current * kStageBytes;
        if constexpr (SCALE_MODE == 0) {
            multiply_stage(sum, stage, place.warp_row, place.warp_column, place.warp_k * kWarpK);
        } else {
            float row_scale[kRowsPerThread], column_scale[kColumnsPerThread];
            // A slice past the end of k has no scale of its own; its values are zeros.
            scales.load(row_scale, column_scale, smaller(t * BLOCK_K + place.warp_k * kWarpK, args.k - 1) / kScaleBlockK);
            Accumulator part = {};
            multiply_stage(part, stage, place.warp_row, place.warp_column, place.warp_k * kWarpK);
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
                for (int j = 0; j < kFragmentsN * 2; ++j)
#pragma unroll
                    for (int v = 0; v < 4; ++v) sum[i][j][v] += row_scale[2 * i + v / 2] * column_scale[2 * j + v % 2] * part[i][j][v];
        }
        current = next;
    }
    copy_async_wait<0>();
}

// Epilogue -------------------------------------------------------------------------------------------------------------------------

// Adds the WARPS_K partial sums, in the order of their k, into the warps with warp_k = 0.
__device__ __forceinline__ void add_partial_sums(Accumulator& sum, float* scratch, const Place& place) {
    constexpr int kValues = kAccumulators, kColumns = 2 * kFragmentsN;
    float* parts = scratch + place.warp_tile * (WARPS_K - 1) * kValues * 32 + threadIdx.x % 32;
    __syncthreads();  // every warp has read its last stage
    if (place.warp_k > 0)
#pragma unroll
        for (int i = 0; i < kValues; ++i) parts[((place.warp_k - 1) * kValues + i) * 32] = sum[i / 4 / kColumns][i / 4 % kColumns][i % 4];
    __syncthreads();
    if (place.warp_k == 0)
#pragma unroll
        for (int i = 0; i < kValues * (WARPS_K - 1); ++i) {
            const int v = i % kValues;
            sum[v / 4 / kColumns][v / 4 % kColumns][v % 4] += parts[i * 32];
        }
}

// sum * row[m] * column[n] * alpha + bias[n], in this order.
__device__ __forceinline__ void finish(Accumulator& sum, const Args& args, const Work& work, const Operand& a, const Place& place) {
    float row_scale[kRowsPerThread], column_scale[kColumnsPerThread];
    if constexpr (SCALE_MODE == 0) Scales(args, work, a, place).load(row_scale, column_scale, 0);
    const float alpha = args.alpha ? load_float(args.alpha, 0, args.alpha_type) : args.alpha_value;
    const u64 bias = advance(args.bias, work.expert * args.bias_batch, args.bias_type);
#pragma unroll
    for (int j = 0; j < kColumnsPerThread; ++j) {
        const i32 column = work.column_begin + place.column + j / 2 * 8 + j % 2;
        const float bias_value = bias && column < args.n ? load_float(bias, column, args.bias_type) : 0.f;
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
            float& x = sum[i / 2][j / 2][i % 2 * 2 + j % 2];
            if constexpr (SCALE_MODE == 0) x = x * row_scale[i] * column_scale[j];
            x = x * alpha + bias_value;
        }
    }
}

template <int kType>
__device__ __forceinline__ void store(const Accumulator& sum, const Args& args, const Work& work, const Operand& a, const Place& place) {
    constexpr int kBytes = kStoredBytes<kType>;
    const i64 column_bytes = args.out_column * kBytes;
    const i32 first = work.column_begin + place.column;
    u64 start[kRowsPerThread];        // of the thread's first value in each row, 0 past the last row
    bool together[kRowsPerThread];  // the columns of a thread come in pairs; their alignment is that of the first
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        const i32 row = a.row(place.row + 8 * i);
        start[i] = row < 0 ? 0 : args.out + (work.batch * args.out_batch + row * args.out_row) * kBytes + first * column_bytes;
        together[i] = column_bytes == kBytes && start[i] % (2 * kBytes) == 0;
    }
#pragma unroll
    for (int j = 0; j < kFragmentsN * 2; ++j) {
        if (first + 8 * j >= args.n) break;
        const bool second = first + 8 * j + 1 < args.n;
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
            if (start[i] == 0) continue;
            const float x0 = sum[i / 2][j][i % 2 * 2], x1 = sum[i / 2][j][i % 2 * 2 + 1];
            if (together[i] && second) {
                store_pair<kType>(start[i] + 8 * j * kBytes, x0, x1);
            } else {
                store_one<kType>(start[i] + 8 * j * column_bytes, x0);
                if (second) store_one<kType>(start[i] + (8 * j + 1) * column_bytes, x1);
            }
        }
    }
}

// Kernel ---------------------------------------------------------------------------------------------------------------------------

// CTAs per SM that registers allow without spills: 128 accumulators a thread leave room for two CTAs of 128 threads.
constexpr int kMinCtas = kThreads > 128 ? 1 : VECTOR && kAccumulators <= 32 ? 3 : 2;

extern "C" __global__ void __launch_bounds__(kThreads, kMinCtas) portable(const __grid_constant__ Args args) {
    extern __shared__ u8 shared_bytes[];
    const Work work = args.grouped ? grouped_work<BLOCK_M, BLOCK_N>(args) : dense_work<BLOCK_M, BLOCK_N>(args);
    if (!work.any) return;

    constexpr int kA = kValueBytes<A_ELEMENT>, kB = kValueBytes<B_ELEMENT>;
    const u8* a_start = reinterpret_cast<const u8*>(args.a) + work.batch * args.a_batch * kA;
    const u8* b_start = reinterpret_cast<const u8*>(args.b) + work.expert * args.b_batch * kB;
    const i32* row_map = args.grouped ? reinterpret_cast<const i32*>(args.row_map) : nullptr;
    const Operand a{a_start, args.a_row * kA, args.a_k * kA, row_map, work.row_begin, work.row_end, args.k};
    const Operand b{b_start, args.b_column * kB, args.b_k * kB, nullptr, work.column_begin, args.n, args.k};

    const Place place;
    Accumulator sum = {};
    main_loop(sum, args, work, a, b, place, shared_address(shared_bytes));
    if constexpr (WARPS_K > 1) {
        add_partial_sums(sum, reinterpret_cast<float*>(shared_bytes), place);
        if (place.warp_k > 0) return;
    }
    finish(sum, args, work, a, place);
    if (args.out_type == kFp32)
        store<kFp32>(sum, args, work, a, place);
    else if (args.out_type == kBf16)
        store<kBf16>(sum, args, work, a, place);
    else
        store<kFp16>(sum, args, work, a, place);
}
