// kernels/common/hopper.cuh in C++, by the PTX ISA's words and not by the kernels'.
#pragma once
#include "common/ptx.cuh"

struct alignas(64) TensorMap {  // what the driver was told (tests/emulated.py packs it), in place of what it would make of that
    u64 mark, address, size[3], pitch[2];
    u32 box[3], bytes;  // bytes: of a value
    u32 unused[14];
};
static_assert(sizeof(TensorMap) == 128);

namespace emulator {

// Barriers in shared memory, 8 bytes. An arrival too many counts for the next phase, as in hardware. bytes: expected and not there yet,
// modulo 2^24.
struct Mbarrier {
    u64 mark : 15, phase : 1, expected : 12, pending : 12, bytes : 24;
};
constexpr u32 kMark = 0x6D62;
constexpr u64 kMapMark = 0x70616D726F736E65;

inline Mbarrier& mbarrier(u32 address, u32 rank) {
    const u32 from = place(address);
    if (from % 8 || from + 8 > shared_size) fail("no place for an mbarrier:", from);
    if (rank >= ctas) fail("no such CTA in the cluster:", rank);
    auto& barrier = reinterpret_cast<Mbarrier&>(shared[rank][from]);
    if (barrier.mark != kMark) fail("no mbarrier was initialised at", address);
    return barrier;
}
inline void end_phase(Mbarrier& barrier) {
    if (!barrier.pending && !barrier.bytes) barrier.pending = barrier.expected, barrier.phase ^= 1, ++progress;
}
inline void arrive(Mbarrier& barrier) {
    --barrier.pending;
    end_phase(barrier);
    if (random() % 2) ++progress, yield();  // others may go on before this thread does
}

// Boxes of tensors that were asked for and have not come: they come in any order, at once or when somebody waits.
struct Box {
    TensorMap map;          // NOTE: of its thread, which may end first
    u32 to, barrier, mask;  // mask: of CTAs
    i32 from[3];
};
constexpr u32 kMostBoxes = 1024;
static Box box[kMostBoxes];

// Lines of 128 bytes; 128-byte swizzle exchanges bits 4 to 6 of an address by bits 7 to 9.
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

inline void bring(const Box& b) {
    const TensorMap& map = b.map;
    const u32 line = map.box[0] * map.bytes;
    for (i64 z = 0; z < map.box[2]; ++z)
        for (i64 y = 0; y < map.box[1]; ++y) {
            unsigned char bytes[128] = {};
            const i64 first = b.from[0], row = b.from[1] + y, matrix = b.from[2] + z;
            if (row >= 0 && matrix >= 0 && row < i64(map.size[1]) && matrix < i64(map.size[2]))
                for (i64 x = 0; x < map.box[0]; ++x) {
                    if (first + x < 0 || first + x >= i64(map.size[0])) continue;
                    const u64 from = map.address + matrix * map.pitch[1] + row * map.pitch[0] + (first + x) * map.bytes;
                    reads(reinterpret_cast<const void*>(from), map.bytes);
                    memcpy(bytes + x * map.bytes, reinterpret_cast<const void*>(from), map.bytes);
                }
            for (u32 piece = 0; piece < line; piece += 16) {
                const u32 to = swizzled(place(b.to) + (z * map.box[1] + y) * line + piece);
                if (to + 16 > shared_size) fail("a box outside shared memory, at", to);
                for (u32 rank = 0; rank < ctas; ++rank)
                    if (b.mask >> rank & 1) memcpy(shared[rank] + to, bytes + piece, 16), memcpy(view[rank] + to, bytes + piece, 16);
            }
        }
    for (u32 rank = 0; rank < ctas; ++rank)
        if (b.mask >> rank & 1) {
            Mbarrier& barrier = mbarrier(b.barrier, rank);
            barrier.bytes -= line * map.box[1] * map.box[2];
            end_phase(barrier);
        }
}
inline void bring_some() {
    if (!boxes) return;
    ++progress;
    if (random() % 4 == 0) return;
    const u32 i = random() % boxes;
    const Box b = box[i];
    box[i] = box[--boxes];
    bring(b);
}
inline void ask(const Box& b) {
    if (b.map.mark != kMapMark) fail("no tensor map, of", b.map.address);
    if (b.map.box[0] * b.map.bytes != 128 || b.to % 128) fail("a swizzled box of other lines than 128 bytes, or not aligned, to", b.to);
    if (b.from[0] * b.map.bytes % 16) fail("a box that begins inside of 16 bytes of a line, at", b.from[0]);  // as an H100 does
    if (b.mask >> ctas) fail("no such CTAs in the cluster:", b.mask);
    mbarrier(b.barrier, self->cta);
    if (eager || random() % 2) return bring(b);
    if (boxes == kMostBoxes) fail("more boxes than the emulator holds", boxes);
    box[boxes++] = b;
}

// Boxes on their way to tensors: what products see of shared memory, when the thread that asked waits for it to be read; never, if none does.
// The piece of 16 bytes in which a row of the tensor ends is written whole, zeros behind its end: as seen on an H100, PTX does not say.
struct Sent {
    TensorMap map;
    u32 from, group;
    i32 to[3];
};
constexpr u32 kMostSent = 8;
static Sent sent[kMostThreads][kMostSent];

inline void write(const Sent& s) {
    const u64 line = s.map.box[0] * s.map.bytes;
    for (i64 y = 0; y < s.map.box[1]; ++y)
        for (i64 x = 0; x < s.map.box[0]; ++x) {
            const i64 to[3] = {s.to[0] + x, s.to[1] + y, s.to[2]};
            const i64 whole = (s.map.size[0] * s.map.bytes + 15) / 16 * 16 / s.map.bytes,
                      size[3] = {whole, i64(s.map.size[1]), i64(s.map.size[2])};
            bool inside = true;
            for (int axis = 0; axis < 3; ++axis) inside &= to[axis] >= 0 && to[axis] < size[axis];
            const u64 address = s.map.address + to[2] * s.map.pitch[1] + to[1] * s.map.pitch[0] + to[0] * s.map.bytes;
            const u32 from = swizzled(place(s.from) + y * line + x * s.map.bytes);
            const unsigned char zeros[8] = {};
            if (inside) memcpy(reinterpret_cast<void*>(address), to[0] < i64(s.map.size[0]) ? view[self->cta] + from : zeros, s.map.bytes);
        }
}
inline void write_groups(u32 end) {
    auto& mine = sent[self - fibers];
    u32 left = 0;
    for (u32 i = 0; i < self->sent; ++i)
        if (mine[i].group < end)
            write(mine[i]);
        else
            mine[left++] = mine[i];
    self->sent = left;
}

// Where value k of row (or column) i of an operand lies, by its descriptor. Without swizzle: core matrices of 8 rows of 16 bytes. With it, 8
// rows of 128 bytes; turned: 64 values of 8 k.
inline u32 value_place(u64 descriptor, bool turned, u32 bytes, u32 i, u32 k) {
    const auto field = [&](int bit) { return static_cast<u32>(descriptor >> bit & 0x3FFF) << 4; };
    const u32 first = field(0), leading = field(16), stride = field(32);
    if (descriptor >> 62 == 0) return first + i / 8 * stride + k * bytes / 16 * leading + i % 8 * 16 + k * bytes % 16;
    if (turned) return swizzled(first + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * bytes);
    return swizzled(first + i / 8 * stride + i % 8 * 128 + k * bytes);
}
inline double operand(u64 descriptor, bool turned, u32 bytes, u32 i, u32 k, float (*decode)(u32)) {
    u32 bits = 0;
    const u32 from = value_place(descriptor, turned, bytes, i, k);
    if (from % bytes || from + bytes > shared_size) fail("a descriptor of what is outside shared memory, or not aligned, at", from);
    memcpy(&bits, view[self->cta] + from, bytes);
    return decode(bits);
}

// m64nN, 32 bytes along k, of which a warp does its own 16 rows; a is in registers, of which lanes show theirs, or in shared memory. In
// double, rounded once.
inline void multiply(const Product& p) {
    auto& slot = warp().slot;
    for (int i = 0; p.a && i < 4; ++i) slot[lane()][i] = p.a[i];
    slot[lane()][4] = p.b, slot[lane()][5] = p.a_place;
    wait_for_warp();
    if (slot[0][4] != p.b || slot[0][5] != p.a_place) fail("lanes have different descriptors, of them", p.b);
    const u32 bytes = p.bytes, count = 32 / bytes;
    double a[2][32], b[32];
    for (u32 row = 0; row < 2; ++row)
        for (u32 k = 0; k < count; ++k)
            a[row][k] = p.a ? p.decode_a(static_cast<u32>(slot[lane() / 4 * 4 + k % 8 / 2][row + k / 8 * 2]) >> (16 * (k % 2)) & 0xFFFF)
                            : operand(p.a_place, p.a_turned, bytes, self->thread / 32 % 4 * 16 + row * 8 + lane() / 4, k, p.decode_a);
    for (u32 i = 0; i < 2 * p.blocks; ++i) {
        const u32 column = i / 2 * 8 + lane() % 4 * 2 + i % 2;
        for (u32 k = 0; k < count; ++k) b[k] = operand(p.b, p.b_turned, bytes, column, k, p.decode_b);
        for (u32 row = 0; row < 2; ++row) {
            float& d = p.d[i / 2 * 4 + row * 2 + i % 2];
            double sum = p.add ? d : 0;
            for (u32 k = 0; k < count; ++k) sum += a[row][k] * b[k];
            d = static_cast<float>(sum);
        }
    }
    wait_for_warp();
}
inline void multiply_async(Product product) {
    if (self->thread / 128 * 128 + 128 > threads) fail("a product outside a whole warpgroup of", threads);
    if (!self->fenced) fail("a product without wgmma_fence, of blocks:", product.blocks);
    const u64 either = product.a_place | product.b;
    if (either & 0x3FFFC000C000C000 || either >> 62 > 1) fail("descriptor of more than address, steps, swizzle", either);
    product.group = self->group;
    if (eager) return multiply(product);
    if (self->products - self->first_product == kMostProducts) fail("more products than the emulator holds", kMostProducts);
    self->product[self->products++ % kMostProducts] = product;
}
inline void wait_for_products(u32 pending) {
    for (; self->first_product != self->products; ++self->first_product) {
        const Product& product = self->product[self->first_product % kMostProducts];
        if (product.group + pending >= self->group) break;
        multiply(product);
    }
}
inline float e4m3(u32 code) { return fp8(code, 4, 7); }
inline float e5m2(u32 code) { return fp8(code, 5, 15); }

}  // namespace emulator

inline void mbarrier_init(u32 barrier, u32 arrivals) {
    emulator::Mbarrier made{emulator::kMark, 0, arrivals, arrivals, 0};
    if (arrivals == 0 || made.expected != arrivals) emulator::fail("an mbarrier cannot count to", arrivals);
    unsigned char* p = emulator::at(barrier, 8);
    if (reinterpret_cast<emulator::Mbarrier*>(p)->mark == emulator::kMark) emulator::fail("an mbarrier is there already, at", barrier);
    memcpy(p, &made, 8);
}
inline void mbarrier_init_done() {}  // initialisation is seen at once: to leave this out does not show
inline void mbarrier_arrive(u32 barrier) { emulator::arrive(emulator::mbarrier(barrier, emulator::self->cta)); }
inline void mbarrier_arrive_remote(u32 barrier, u32 rank) { emulator::arrive(emulator::mbarrier(barrier, rank)); }
inline void mbarrier_return_remote(u32 barrier, u32 rank) { mbarrier_arrive_remote(barrier, rank); }
inline void mbarrier_arrive_expecting(u32 barrier, u32 bytes) {
    emulator::mbarrier(barrier, emulator::self->cta).bytes += bytes;
    mbarrier_arrive(barrier);
}
inline void mbarrier_wait(u32 barrier, u32 parity) {
    while (emulator::mbarrier(barrier, emulator::self->cta).phase == (parity & 1)) {
        emulator::bring_some();
        emulator::yield();
    }
}
inline void mbarrier_wait_cluster(u32 barrier, u32 parity) { mbarrier_wait(barrier, parity); }

template <int kThreads>
void barrier_arrive(u32 number) {
    if (number == 0 || number > 15) emulator::fail("no such barrier:", number);
    emulator::Barrier& barrier = emulator::named[emulator::self->cta][number];
    if (++barrier.arrived == kThreads) barrier.arrived = 0, ++barrier.generation, ++emulator::progress;
}
template <int kThreads>
void barrier_wait(u32 number) {
    if (number == 0 || number > 15) emulator::fail("no such barrier:", number);
    emulator::wait(emulator::named[emulator::self->cta][number], kThreads);
}

inline void prefetch_tensor_map(const TensorMap&) {}
inline void prefetch_box(const TensorMap& map, i32, i32, i32) {
    if (map.mark != emulator::kMapMark) emulator::fail("no tensor map, of", map.address);
}
inline void copy_box(u32 to, const TensorMap& map, i32 x, i32 y, i32 z, u32 barrier) {
    emulator::ask({map, to, barrier, 1u << emulator::self->cta, {x, y, z}});
}
inline void copy_box_to(u16 mask, u32 to, const TensorMap& map, i32 x, i32 y, i32 z, u32 barrier) {
    emulator::ask({map, to, barrier, mask, {x, y, z}});
}
inline void store_box(u32 from, const TensorMap& map, i32 x, i32 y, i32 z) {
    using namespace emulator;
    if (map.mark != kMapMark) fail("no tensor map, of", map.address);
    if (map.box[0] * map.bytes != 128 || map.box[2] != 1 || from % 1024)
        fail("a box of other lines than 128 bytes, or not aligned, at", from);
    if (x * map.bytes % 16) fail("a box that begins inside of 16 bytes of a line, at", x);
    at(from + map.box[1] * 128 - 16, 16);
    if (self->sent == kMostSent) fail("more boxes than the emulator holds", kMostSent);
    sent[self - fibers][self->sent++] = {map, from, self->sent_groups, {x, y, z}};
}
inline void commit_boxes() {
    ++emulator::self->sent_groups;
    if (emulator::eager) emulator::write_groups(emulator::self->sent_groups);
}
template <int kPending>
void wait_for_boxes() {
    if (emulator::self->sent_groups > kPending) emulator::write_groups(emulator::self->sent_groups - kPending);
}
inline void store_matrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const u32 words[4] = {a, b, c, d};
    emulator::at(address, 16);
    for (unsigned matrix = 0; matrix < 4; ++matrix)
        emulator::store(emulator::exchange(address, 8 * matrix + emulator::lane() / 4) + emulator::lane() % 4 * 4, &words[matrix], 4);
}

inline void fence_async_proxy() { emulator::show_stores(); }
template <int kRegisters>
inline void more_registers() {}
template <int kRegisters>
inline void fewer_registers() {}
inline void wgmma_fence() { emulator::self->fenced = true; }  // only its absence all along shows
inline void wgmma_commit() { ++emulator::self->group; }
template <int kPending>
void wgmma_wait() {
    static_assert(kPending >= 0 && kPending < 8);
    emulator::wait_for_products(kPending);
}
inline void wgmma_keep(const u32&) {}
inline void wgmma_keep(float&) {}
inline u32 pieces_of(u32 shared) { return emulator::place(shared) / 16; }
inline u64 matrix_descriptor(u32 shared, u32 k_bytes, u32 rows_bytes) {
    const u32 any = emulator::place(shared) | k_bytes | rows_bytes;
    if (any % 16 || any > 0x3FFFF) emulator::fail("a descriptor cannot hold bytes", any);
    return pieces_of(shared) | static_cast<u64>(k_bytes >> 4) << 16 | static_cast<u64>(rows_bytes >> 4) << 32;
}
inline u64 swizzled_descriptor(u32 pieces, u32 mn_bytes) {
    if (pieces * 16 % 1024 >= 128) emulator::fail("a swizzled tile is not aligned, at", pieces * 16);
    if (pieces > 0x3FFF) emulator::fail("a descriptor cannot hold pieces", pieces);
    return pieces | static_cast<u64>(mn_bytes / 16) << 16 | 64ull << 32 | 1ull << 62;
}

#define PRODUCTS_OF_REGISTERS(name, decode)                                                           \
    template <int kBlocks>                                                                            \
    void name(float (&d)[kBlocks][4], const u32(&a)[4], u64 b) {                                      \
        emulator::multiply_async({d[0], a, 0, b, kBlocks, 0, 2, false, false, true, decode, decode}); \
    }
#define PRODUCTS_OF_16_BITS(name, decode)                                                                                  \
    template <int kTurnedA, int kTurnedB, int kBlocks>                                                                     \
    void name(float (&d)[kBlocks][4], u64 a, u64 b, bool add) {                                                            \
        emulator::multiply_async({d[0], nullptr, a, b, kBlocks, 0, 2, kTurnedA == 1, kTurnedB == 1, add, decode, decode}); \
    }
#define PRODUCTS_OF_8_BITS(name, decode_a, decode_b)                                                           \
    template <int kBlocks>                                                                                     \
    void name(float (&d)[kBlocks][4], u64 a, u64 b, bool add) {                                                \
        emulator::multiply_async({d[0], nullptr, a, b, kBlocks, 0, 1, false, false, add, decode_a, decode_b}); \
    }
PRODUCTS_OF_REGISTERS(wgmma_bf16, emulator::bf16)
PRODUCTS_OF_REGISTERS(wgmma_fp16, emulator::fp16)
PRODUCTS_OF_16_BITS(wgmma_bf16, emulator::bf16)
PRODUCTS_OF_16_BITS(wgmma_fp16, emulator::fp16)
PRODUCTS_OF_8_BITS(wgmma_e4m3_e4m3, emulator::e4m3, emulator::e4m3)
PRODUCTS_OF_8_BITS(wgmma_e4m3_e5m2, emulator::e4m3, emulator::e5m2)
PRODUCTS_OF_8_BITS(wgmma_e5m2_e4m3, emulator::e5m2, emulator::e4m3)
PRODUCTS_OF_8_BITS(wgmma_e5m2_e5m2, emulator::e5m2, emulator::e5m2)
