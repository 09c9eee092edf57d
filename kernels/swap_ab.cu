// D = epilogue(A @ B) for few rows of A on Hopper, by warpgroup products with roles swapped: weights are their 64 rows, decoded on the way
// from shared memory to registers, and rows of A ("tokens") their 8 to 128 columns, read from shared memory. sm_90a.
//
//   weights  each warp copies what it will decode itself, STAGES - 1 steps of 128 bytes a row ahead and across tiles (weights.cuh): no
//            barrier; a step is decoded in pieces: one while the piece before it is multiplied
//   A        four warps bring rows of A for step after step, X_STAGES at once, and lay them down as decoded weights ask for
//   k        SPLIT CTAs of a cluster cut k into runs of steps; in each, WARPS_K warpgroups take its steps in turn
//   rows     clusters have successive tiles of 16 columns, as many each: one for a warp, up to 4 WARPGROUPS / WARPS_K at a time
//   sums     that several warpgroups have are mailed, part by part, to the warp that stores the part, which adds them up in one order
//   launch   may begin before its predecessor has ended: weights are prefetched or loaded then, everything else waits
//
// Not handled: what rows.cuh and weights.cuh do not. Learned from: swap-AB kernels as FlashInfer's TGV and DeepGEMM's (roles, producers).
#define ROW_BLOCKS  1
#define STEPS_APART WARPS_K
#include "common/hopper.cuh"
#include "common/rows.cuh"

constexpr int kConsumers = 4 * WARPGROUPS, kProducers = 4, kThreads = 32 * (kConsumers + kProducers);  // warps
constexpr int kGroups = WARPGROUPS / WARPS_K;
// Of a thread: what producers do not need of those that the CTA gets is given to those who multiply.
constexpr bool kShift = WARPGROUPS > 2;
constexpr int kRegisters = 65536 / kThreads / 8 * 8, kProducerRegisters = WARPGROUPS > 3 ? 64 : 80;
constexpr int kConsumerRegisters = kRegisters + (kRegisters - kProducerRegisters) / WARPGROUPS / 8 * 8;
constexpr int kCoreBytes = TOKENS * 16 + 16;              // 8 values along k of all tokens, and what spreads them over banks
constexpr int kStepBytes = kStepValues / 8 * kCoreBytes;  // of A
constexpr int kSources = SPLIT * WARPS_K;                 // of the sums of each part: 16 columns and 8 rows of D
constexpr int kRounds = kGroups * TOKENS > 128 ? 2 : 1;   // in which sums of a tile are exchanged, so many blocks of 8 tokens in each
constexpr int kBlocks = kTokenBlocks / kRounds;
constexpr int kMail = (4 * kGroups * kBlocks + SPLIT - 1) / SPLIT * kSources * 512;
static_assert(TOKENS % 8 == 0 && WARPGROUPS % WARPS_K == 0);

// Where a warp is in its CTA, and what it does there.
struct Seat : Place {
    int warp_k, group;
    i32 rounds;             // steps of a tile for a warpgroup, some of which may not exist
    i32 begin, end, width;  // tiles of the CTA, and how many of them it takes at a time
};

// Where things are in shared memory, and the steps of A in it.
struct Shared {
    u32 barriers, x, mail, rings;

    __device__ __forceinline__ explicit Shared(u32 first)
        : barriers(first), x(first + (16 * X_STAGES + 16 + 127) / 128 * 128), mail(x + X_STAGES * kStepBytes), rings(mail + kMail) {}
    // Step `number` of all that the CTA goes through: here it is when `full` ends its phase, it may go when `empty` does.
    __device__ __forceinline__ u32 slot(u32 number) const { return number % X_STAGES; }
    __device__ __forceinline__ u32 parity(u32 number) const { return number / X_STAGES % 2; }
    __device__ __forceinline__ u32 full(u32 slot) const { return barriers + 16 + 16 * slot; }
    __device__ __forceinline__ u32 empty(u32 slot) const { return barriers + 24 + 16 * slot; }
    __device__ __forceinline__ u32 mail_full() const { return barriers; }
    __device__ __forceinline__ u32 mail_empty() const { return barriers + 8; }
};

// Rows of A -----------------------------------------------------------------------------------------------------------------------

// A warp copies whole lines of its tokens, as they are stored, to the places of what it will arrange. A task is one unit of one token: a
// piece (8 values) of each of 4 chunks becomes 4 values of 8 (k) x 4 for the two products of the unit.
struct Producer {
    static constexpr int kPieces = kStepValues / 8;  // of a token's step
    static constexpr int kTeam =
        smaller(kProducers, larger(1, kTokenBlocks* kUnits / 2) < kTokenBlocks ? larger(1, kTokenBlocks* kUnits / 2)
                                                                               : kTokenBlocks);  // warps that share a step
    static constexpr int kWarpTokens = TOKENS / kTeam;
    static constexpr int kCopies = larger(1, kWarpTokens / 4), kLines = kPieces / 8;  // of a lane: every fourth token, every eighth piece
    static constexpr int kTasks = kWarpTokens * 2 * kUnits, kEach = larger(1, kTasks / 32);  // of a warp, and of a lane
    // Each slot has one team that fills it, and in a tile one warpgroup of WARPS_K that reads it: phases of one parity are never mistaken.
    // From tile to tile the reader may change, but tiles of several warpgroups meet in the mail.
    static constexpr int kTeams = smaller(kProducers / kTeam, X_STAGES % 8 == 0 ? 4 : X_STAGES % 4 == 0 ? 2 : 1);
    static constexpr int kAhead = X_STAGES / kTeams - 1;  // steps of a team under way
    static_assert(X_STAGES % WARPS_K == 0 && kAhead > 0);

    const Args& args;
    bool pieces;
    int lane, first;         // the warp's first token
    const u8* row[kCopies];  // where its copies begin in the first step; null: no row
    u32 place, second;       // of the first copy, and of the one 8 pieces on
    int unit, token;         // of the first task; token counts from `first`
    u32 task, swapped;       // its place, and how far from its own places its first two pieces lie

    __device__ __forceinline__ Producer(const Args& args, const Seat& at, int warp)
        : args(args),
          lane(at.lane),
          first(warp % kTeam * kWarpTokens),
          unit(lane / 8 % (2 * kUnits)),
          token(lane % 8 + lane / (16 * kUnits) * 8) {
        const int piece = lane % 8;
        pieces = args.a_k == 1 && args.k % 8 == 0 && (args.a | (args.a_row | at.work.batch * args.a_batch) * kRowValueBytes) % 16 == 0;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            const u8* p = row_of(at, first + i * 4 + lane / 8);
            row[i] = p ? p + piece * 8 * kRowValueBytes : nullptr;
        }
        // Pieces lie where the lane that arranges them expects those of chunk t, but for every second two units of four, which swap theirs:
        // with kCoreBytes as it is, those of a line are in different banks then.
        const int own = piece / (4 * kUnits) * kUnits + piece % kUnits, t = piece / kUnits % 4;
        place = (own * 4 + (t ^ (kUnits == 4 ? own & 2 : 0))) * kCoreBytes + (first + lane / 8) * 16;
        second = kUnits == 4 && own & 2 ? place - 2 * kCoreBytes : place + 2 * kCoreBytes;
        task = unit * 4 * kCoreBytes + (first + token) * 16;
        swapped = kUnits == 4 && unit & 2 ? 2 * kCoreBytes : 0;
    }
    __device__ __forceinline__ const u8* row_of(const Seat& at, int number) const {
        const i32 source = number < tokens_of(at.work) ? source_row(args, result_row(args, at.work, number)) : -1;
        const i64 begin = at.work.batch * args.a_batch + source * args.a_row;
        return source < 0 ? nullptr : reinterpret_cast<const u8*>(args.a) + begin * kRowValueBytes;
    }
    // Task e of a lane: tokens vary first. Its unit and token are those of task 0, and so many more.
    static __device__ constexpr int units_on(int e) { return e * 4 % (2 * kUnits); }
    static __device__ constexpr int tokens_on(int e) { return e * 2 / kUnits * 8; }
    __device__ __forceinline__ bool whole(i32 k) const { return pieces && k + kStepValues <= args.k; }
    __device__ __forceinline__ bool idle() const { return kTasks < 32 && lane >= kTasks; }

    // Where piece lane % 8 + 8 j of the lane's first token goes.
    __device__ __forceinline__ u32 line(int j) const {
        if constexpr (kUnits < 4) return place + j * (8 * kCoreBytes);
        return (j % 2 ? second : place) + j / 2 * (16 * kCoreBytes);
    }
    // The whole step that begins at k.
    __device__ __forceinline__ void fetch(i32 k, u32 to) const {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            if (row[i] == nullptr) continue;  // whatever is multiplied there is not stored
#pragma unroll
            for (int j = 0; j < kLines; ++j) copy_async<8 * kRowValueBytes>(to + line(j) + i * 64, row[i] + (k + j * 64) * kRowValueBytes);
        }
    }
    __device__ __forceinline__ void arrange(u32 to) const {
        if (idle()) return;
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
            const u32 at = to + task + units_on(e) * 4 * kCoreBytes + tokens_on(e) * 16;
            Chunk c[4];
#pragma unroll
            for (int t = 0; t < 4; ++t) c[t] = pair_up(load_shared_16((t < 2 ? at + swapped : at - swapped) + t * kCoreBytes));
#pragma unroll
            for (int w = 0; w < 4; ++w) store_shared_16(at + w * kCoreBytes, c[0].word[w], c[1].word[w], c[2].word[w], c[3].word[w]);
        }
    }
    // The last step, or values that cannot be read in pieces: one by one, zeros behind k.
    __device__ __forceinline__ void move(const Seat& at, i32 k, u32 to) const {
        if (idle()) return;
#pragma unroll 1
        for (int e = 0; e < kEach; ++e) {
            const u8* row = row_of(at, first + token + tokens_on(e));
#pragma unroll 1
            for (int t = 0; t < 4; ++t) {
                const i32 value = k + ((unit + units_on(e)) / kUnits * 4 + t) * kValues + (unit + units_on(e)) % kUnits * 8;
                const Chunk c = pair_up(gather_values(row, value, row ? smaller(args.k - value, 8) : 0, args.a_k));
#pragma unroll
                for (int w = 0; w < 4; ++w)
                    store_shared_u32(to + task + (units_on(e) * 4 + w) * kCoreBytes + tokens_on(e) * 16 + t * 4, c.word[w]);
            }
        }
    }
};

__device__ __forceinline__ void produce(const Args& args, const Seat& at, const Shared& shared, int warp, i32 turns) {
    if (warp >= Producer::kTeams * Producer::kTeam) return;
    const Producer producer(args, at, warp);
    const u32 total = turns * at.steps;
    const u32 first = warp / Producer::kTeam;
    u32 ahead = first;  // the next step to be fetched, and where it begins
    i32 step = first;
    const auto begin = [&](i32& step) {
        while (step >= at.steps) step -= at.steps;
        return (at.first_step + step) * kStepValues;
    };
    const auto fetch = [&] {
        if (ahead < total) {
            const u32 slot = shared.slot(ahead);
            delay();
            if (ahead >= X_STAGES) mbarrier_wait(shared.empty(slot), shared.parity(ahead) ^ 1);
            const i32 k = begin(step);
            if (producer.whole(k)) producer.fetch(k, shared.x + slot * kStepBytes);
            ahead += Producer::kTeams, step += Producer::kTeams;
        }
        copy_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < Producer::kAhead; ++i) fetch();
    i32 here = first;
#pragma unroll 1
    for (u32 number = first; number < total; number += Producer::kTeams, here += Producer::kTeams) {
        const u32 slot = shared.slot(number), to = shared.x + slot * kStepBytes;
        copy_async_wait<Producer::kAhead - 1>();
        __syncwarp();  // lanes arrange what others copied
        const i32 k = begin(here);
        if (producer.whole(k))
            producer.arrange(to);
        else
            producer.move(at, k, to);
        delay();
        fence_async_proxy();
        __syncwarp();
        if (at.lane == 0) mbarrier_arrive(shared.full(slot));
        fetch();
    }
    copy_async_wait<0>();
}

// Main loop -----------------------------------------------------------------------------------------------------------------------

// A step is decoded and multiplied piece by piece. One is decoded while another is multiplied, unless many sums leave no registers for it.
constexpr int kPieces = kUnits > 1 ? 4 : 2, kPieceUnits = 2 * kUnits / kPieces, kProducts = 2 * kPieceUnits;
constexpr int kBuffers = WARPGROUPS > 3 && kUnits == 4 ? 1 : 2;
constexpr int kEarly = WARPGROUPS > 3 ? 1 : 2;  // halves of a step that are loaded at its beginning
using Fragments = u32[kProducts][4];

template <int kUnit, int kCount = kPieceUnits>
__device__ __forceinline__ void decode_units(Fragments& f, const Chunk (&raw)[2], const u32 (&scale)[2][2]) {
    constexpr int kBlock = kScaleOfUnit<kUnit>, kTo = 2 * (kPieceUnits - kCount);
    decode_fragments<kUnit>(raw[0], raw[1], scale[0][kBlock], scale[1][kBlock], f[kTo], f[kTo + 1]);
    if constexpr (kCount > 1) decode_units<kUnit + 1, kCount - 1>(f, raw, scale);
}

// NOTE: the compiler takes registers for free that a product still reads, and copies sums ahead of the wait, unless they are used behind it.
__device__ __forceinline__ void keep(const Fragments& f) {
#pragma unroll
    for (int i = 0; i < kProducts * 4; ++i) wgmma_keep(f[i / 4][i % 4]);
}
__device__ __forceinline__ void keep(Sums& sum) {
#pragma unroll
    for (int i = 0; i < kTokenBlocks * 4; ++i) wgmma_keep(sum[0][i / 4][i % 4]);
}

// Begins the products of a piece; x: its rows of A.
__device__ __forceinline__ void multiply(Sums& sum, const Fragments& f, u32 x) {
    const u64 first = matrix_descriptor(x, kCoreBytes, 128);
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
        const u64 b = first + p * (2 * kCoreBytes / 16);
        if constexpr (kComputeBf16)
            wgmma_bf16(sum[0], f[p], b);
        else
            wgmma_fp16(sum[0], f[p], b);
    }
    wgmma_commit();
}

// Sums of one tile over this warpgroup's steps. `number`: of the tile's first step. A warp without a tile multiplies what happens to be
// there.
__device__ __forceinline__ void multiply_tile(Sums& sum, const Seat& at, Fetch& fetch, const Reads& reads, const Shared& shared, i32 tile,
                                              u32& stage, u32 number) {
    u32 nan[2] = {};
    BlockScales block(fetch.args, at, tile);
    Fragments f[kBuffers];
#pragma unroll 1
    for (i32 round = 0; round < at.rounds; ++round, stage = fetch.behind(stage)) {
        const i32 step = round * WARPS_K + at.warp_k;
        Chunk raw[kEarly][2];
        u32 scale[kEarly][2][2] = {};
        copy_async_wait<STAGES - 2>();
        __syncwarp();  // lanes read what others fetched, and all are done with the stage that is filled next
#pragma unroll
        for (int c = 0; c < kEarly; ++c) reads.load(raw[c], scale[c], stage, c);
        fetch.next();
        if constexpr (SCALE_BLOCK != 0) block.load(fetch.args, at.first_step + step);
        if (step >= at.steps) continue;  // other warpgroups, or CTAs, have one step more
        const u32 slot = shared.slot(number + step), x = shared.x + slot * kStepBytes;
        Sums part = {};
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
            const int c = p * 2 / kPieces;  // the half that it belongs to
            const bool first = p % (kPieces / 2) == 0, last = p % (kPieces / 2) == kPieces / 2 - 1;
            if (p >= kBuffers) {
                wgmma_wait<kBuffers - 1>();
                keep(f[p % kBuffers]);
            }
            if (first && c >= kEarly) reads.load(raw[0], scale[0], stage, c);
            const Chunk(&chunk)[2] = raw[c % kEarly];
            if constexpr (kLookForNan) {
#pragma unroll
                for (int i = 0; first && i < 8; ++i) nan[i / 4] |= nan_codes(chunk[i / 4].word[i % 4]);
            }
            if (first)
                decode_units<0>(f[p % kBuffers], chunk, scale[c % kEarly]);
            else
                decode_units<kUnits - kPieceUnits>(f[p % kBuffers], chunk, scale[c % kEarly]);
            delay();
            if (p == 0) mbarrier_wait(shared.full(slot), shared.parity(number + step));
            multiply(SCALE_BLOCK == 0 ? sum : part, f[p % kBuffers], x + p * kProducts * 2 * kCoreBytes);
            if (p < kPieces - 1 && !(last && kParts == 2)) continue;
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < kBuffers; ++i) keep(f[i]);
            if constexpr (SCALE_BLOCK == 0) {
                keep(sum);
            } else {
                keep(part);
                if (c == 1 && kParts == 2 && ((at.first_step + step) * 2 + 1) * SCALE_BLOCK >= fetch.args.k) break;  // no block, no scale
                block.add(sum, part, c * (kParts - 1));
            }
        }
        delay();
        if (at.lane == 0) mbarrier_arrive(shared.empty(slot));
    }
    if constexpr (kLookForNan) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            nan[i] |= __shfl_xor_sync(~0u, nan[i], 1);  // of the row's four lanes
            nan[i] |= __shfl_xor_sync(~0u, nan[i], 2);
#pragma unroll
            for (int j = 0; j < kTokenBlocks; ++j)
                if (nan[i]) sum[0][j][i * 2] = sum[0][j][i * 2 + 1] = __uint_as_float(0x7FC00000u);
        }
    }
}

// Sums ----------------------------------------------------------------------------------------------------------------------------

// What scales four columns of D, and is added to them.
struct Columns {
    i32 first;
    float factor[4], bias[4], alpha;

    __device__ __forceinline__ void load(const Args& args, i32 expert, i32 column) {
        first = column;
        alpha = args.alpha ? load_float(args.alpha, 0, args.alpha_type) : args.alpha_value;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const i32 n = smaller(column + c, args.n - 1);
            factor[c] = outer_scale(args.b_outer, args.b_outers, expert, n, args.b_outer_value);
            bias[c] = args.bias && args.bias_row == 0 ? load_float(args.bias, expert * args.bias_expert + n, args.bias_type) : 0.f;
        }
    }
};

// Part q of the CTA's tile is stored by CTA q % SPLIT, whose warps take its parts in turn; or by the warp that summed it, if nobody else did.
struct Mail {
    const Shared& shared;
    const Seat& at;
    int warp, rank;

    __device__ __forceinline__ u32 letter(int q, int source) const {
        return shared.mail + (q / SPLIT * kSources + source) * 512 + at.lane * 16;
    }
    static __device__ __forceinline__ void wait(u32 barrier, u32 parity) {
        SPLIT > 1 ? mbarrier_wait_cluster(barrier, parity) : mbarrier_wait(barrier, parity);
    }
    // number: of all rounds; round: of those of the tile; tiles: that the CTA has this time.
    __device__ __forceinline__ void send(const Sums& sum, i32 number, int round, int tiles) const {
        if (kSources > 1 && number > 0) wait(shared.mail_empty(), number % 2 ^ 1);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            if (at.group >= tiles) break;
            const int q = at.group * kBlocks + block;
            const float (&s)[4] = sum[0][round * kBlocks + block];
            if constexpr (SPLIT > 1)
                store_remote_16(letter(q, rank * WARPS_K + at.warp_k), q % SPLIT, s);
            else
                store_shared_16(letter(q, at.warp_k), __float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]),
                                __float_as_uint(s[3]));
        }
        arrive(shared.mail_full());
    }
    __device__ __forceinline__ void arrive(u32 barrier) const {
        if (kSources == 1) return;
        __syncwarp();
        if constexpr (SPLIT > 1) {
            if (at.lane < SPLIT) mbarrier_arrive_remote(barrier, at.lane);
        } else if (at.lane == 0) {
            mbarrier_arrive(barrier);
        }
    }
    // first: the first of those tiles.
    __device__ __forceinline__ void finish(const Args& args, i32 number, int round, i32 first, int tiles) const {
        const int begin = kSources > 1 ? warp * SPLIT + rank : at.group * kBlocks;
        const int end = kSources > 1 ? tiles * kBlocks : smaller(begin + kBlocks, tiles * kBlocks);
        const auto column = [&](int q) { return (first + q / kBlocks) * 16 + at.t * 4; };
        Columns columns;
        columns.load(args, at.work.expert, column(begin));
        if (kSources > 1) wait(shared.mail_full(), number % 2);
        __syncwarp();  // lanes read what others have summed
#pragma unroll 1
        for (int q = begin; q < end; q += kSources > 1 ? kConsumers * SPLIT : 1) {
            if (column(q) != columns.first) columns.load(args, at.work.expert, column(q));
            store(args, columns, q, (round * kBlocks + q % kBlocks) * 8 + at.g);
        }
        __syncwarp();
        arrive(shared.mail_empty());
    }
    // Four columns of one token: sum * row[m] * column[n] * alpha + bias[n], in this order.
    __device__ __forceinline__ void store(const Args& args, const Columns& columns, int q, int token) const {
        const i32 count = smaller(4, args.n - columns.first);
        if (count <= 0 || token >= tokens_of(at.work)) return;
        const Work& work = at.work;
        const i32 to = result_row(args, work, token), source = source_row(args, to);
        const float row =
            outer_scale(args.a_outer, args.a_outers, work.batch, scale_row(args, args.a_outers, work, token, source), args.a_outer_value);
        float x[4] = {};
        // The lane that summed value n of a token: n % 8 is its row g, token / 2 its t.
        const u32 letters = shared.mail + q / SPLIT * kSources * 512 + (at.t % 2 * 16 + at.g / 2) * 16 + (at.t / 2 * 2 + at.g % 2) * 4;
#pragma unroll 4
        for (int sender = 0; sender < kSources; ++sender) {
#pragma unroll
            for (int c = 0; c < 4; ++c) x[c] += load_shared_float(letters + sender * 512 + c * 64);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float bias = columns.bias[c];
            if (args.bias_row != 0 && c < count) bias = load_float(args.bias, to * args.bias_row + columns.first + c, args.bias_type);
            x[c] = source < 0 ? 0.f : x[c] * kResidue * row * columns.factor[c] * columns.alpha + bias;
        }
        const i64 place = work.batch * args.out_batch + to * args.out_row + columns.first * args.out_column;
        store_four(args.out, place, args.out_column, args.out_type, x, count);
    }
};

// Kernel --------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void consume(const Args& args, const Seat& at, const Shared& shared, int warp, int rank, i32 turns) {
    const bool to_the_end = at.begin + (turns - 1) * at.width + at.group < at.end;  // has a tile each time, if at all
    const i32 turns_of_group = at.group >= at.width ? 0 : larger(0, turns - !to_the_end);
    const Walk walk = {at.begin + at.group, at.warp_k, turns_of_group * at.rounds, at.rounds * WARPS_K, at.width};
    Fetch fetch(args, at, walk, shared.rings + warp * STAGES * kStageBytes);
    const bool later = args.early == 1 || args.grouped != 0;
    if (args.early == 1) fetch.prefetch();
    if (later) wait_for_predecessor();
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) fetch.next();
    if (!later) wait_for_predecessor();
    __syncthreads();  // barriers are there
#if SPLIT > 1
    cluster_wait();
#endif
    const Reads reads(at);
    u32 stage = fetch.ring;
    i32 first = at.begin;
#pragma unroll 1
    for (i32 turn = 0; turn < turns; ++turn, first += at.width) {
        const int tiles = smaller(at.width, at.end - first);
        Sums sum = {};
        multiply_tile(sum, at, fetch, reads, shared, first + at.group, stage, turn * at.steps);
        const Mail mail{shared, at, warp, rank};
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            delay();
            mail.send(sum, turn * kRounds + round, round, tiles);
            delay();
            mail.finish(args, turn * kRounds + round, round, first, tiles);
        }
    }
    copy_async_wait<0>();
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        swap_ab(const __grid_constant__ Args args) {
    extern __shared__ u8 shared_bytes[];
    const int warp = threadIdx.x / 32, group = warp / 4, rank = SPLIT > 1 ? cluster_rank() : 0;
    const i32 number = blockIdx.x / SPLIT;
    const bool one = gridDim.x == args.clusters * SPLIT && args.grouped == 0;  // batch and piece: no divisions then
    const i32 cluster = one ? number : number % args.clusters;
    const i32 all = ceil_div(args.k, kStepValues), each = ceil_div(all, SPLIT);  // steps of a row; of a CTA
    constexpr i32 kTiles = 4 * kGroups;                                          // of a CTA at once, at most
    Seat at;
    at.lane = threadIdx.x % 32, at.g = at.lane / 4, at.t = at.lane % 4;
    at.warp_k = group % WARPS_K, at.group = group / WARPS_K * 4 + warp % 4;
    at.first_step = rank * each, at.steps = larger(smaller(each, all - at.first_step), 0), at.rounds = ceil_div(each, WARPS_K);
    at.work = one ? Work{0, args.m, 0, 0, 0, 0, 0, true} : rows_of(args, number / args.clusters);
    const i32 tiles = at.work.any ? ceil_div(args.n, kRows) : 0, share = ceil_div(tiles, args.clusters);
    at.begin = cluster * share, at.end = smaller(at.begin + share, tiles);
    at.width = share <= kTiles ? share : ceil_div(share, ceil_div(share, kTiles));
    const i32 turns = at.begin >= at.end ? 0 : share <= kTiles ? 1 : ceil_div(at.end - at.begin, at.width);
    const Shared shared(shared_address(shared_bytes));
    if (threadIdx.x == 32 * kConsumers) {
        for (i32 slot = 0; slot < X_STAGES; ++slot) {
            mbarrier_init(shared.full(slot), Producer::kTeam);
            mbarrier_init(shared.empty(slot), 4 * kGroups);
        }
        mbarrier_init(shared.mail_full(), SPLIT * kConsumers);
        mbarrier_init(shared.mail_empty(), SPLIT * kConsumers);
        mbarrier_init_done();
    }
#if SPLIT > 1
    cluster_arrive();  // nobody writes to a CTA that has not begun
#endif
    if (warp < kConsumers) {
        if constexpr (kShift) more_registers<kConsumerRegisters>();
        consume(args, at, shared, warp, rank, turns);
    } else {
        if constexpr (kShift) fewer_registers<kProducerRegisters>();
        wait_for_predecessor();
        __syncthreads();
        produce(args, at, shared, warp - kConsumers, turns);
#if SPLIT > 1
        cluster_wait();
#endif
    }
#if SPLIT > 1
    cluster_arrive();  // nobody leaves while others write to it
    cluster_wait();
#endif
}
