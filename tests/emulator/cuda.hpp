// What NVRTC gives a kernel, on one CPU thread: CUDA threads are fibers, which run until they wait for each other.
//
// A barrier lets nobody pass before all have come, and in between fibers run in another random order each time. Shared memory is poisoned
// before each CTA. Asynchronous copies and products happen as late as allowed (when they are waited for) or at once, as the run asks.
#pragma once
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <bit>  // and no larger header of C++: a library takes half a second to compile without them, and there are a hundred

extern "C" {
float fabsf(float), fmaf(float, float, float), fmaxf(float, float), fminf(float, float), ldexpf(float, int), sqrtf(float);
double fabs(double);
}

#define __device__
#define __forceinline__ inline
#define __noinline__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(...)
#define __cluster_dims__(...)
#define __shared__ static

struct Dim {
    unsigned x = 0, y = 0, z = 0;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Copy {
    unsigned to, size, valid;
    const void* from;
};
struct Product {  // of a warpgroup, under way: registers and shared memory are read when it is done
    float* d;
    const unsigned* a;  // null: in shared memory
    unsigned long long a_place, b;
    unsigned blocks, group, bytes;  // bytes: of a value
    bool a_turned, b_turned, add;
    float (*decode_a)(unsigned), (*decode_b)(unsigned);
};
struct Store {
    unsigned to, size;
};
constexpr unsigned kMostThreads = 4096, kMostCopies = 256, kMostGroups = 8, kMostCtas = 8;  // of a cluster
constexpr unsigned kMostProducts = 64, kMostStores = 1024;
struct Fiber {
    ucontext_t context;  // where it begins
    jmp_buf place;       // where it goes on, once it has begun
    bool begun;
    bool done;
    unsigned thread, cta;                 // in its CTA, in its cluster
    unsigned arrived;                     // generation of the cluster's barrier that it came to
    Copy copy[kMostGroups][kMostCopies];  // asynchronous ones, by commit; group `last` is open
    unsigned count[kMostGroups], first, last;
    Product product[kMostProducts];  // first_product .. products - 1 are under way; `group` is the open one
    unsigned first_product, products, group;
    unsigned sent, sent_groups;  // boxes on their way from shared memory, and commits of them
    bool fenced;                 // that registers are written, once at least
    Store store[kMostStores];    // since the last fence
    unsigned stores;
};
struct Barrier {
    unsigned arrived = 0, generation = 0;
};
struct Warp {
    Barrier barrier;
    unsigned long long slot[32][6];  // what its lanes show each other
};

struct Late {
    void* to;
    const void* from;
    unsigned long long size;
};

constexpr unsigned kSharedBytes = 232448, kStackBytes = 128 << 10;
alignas(1024) static unsigned char shared[kMostCtas][kSharedBytes];
static unsigned char view[kMostCtas][kSharedBytes];  // shared memory as products see it: poison where no fence followed a store
static unsigned shared_size, threads, ctas, seed;
static bool eager;
static unsigned long long progress;  // barriers passed and threads ended
static Fiber fibers[kMostThreads];
static Warp warps[kMostThreads / 32];
static Barrier cta[kMostCtas], named[kMostCtas][16], cluster, predecessor;
static Late late[16];  // what the kernel ahead has not written yet
static unsigned lates;
struct Array {
    unsigned long long from, to;
};
static Array array[64];  // what may be read, if known
static unsigned arrays;
static unsigned boxes;  // of tensors, on their way
static Fiber* self;
static jmp_buf scheduler;

// NOTE: swapcontext would do, but asks the system for signal masks, which takes most of the time.
inline void yield() {
    if (_setjmp(self->place) == 0) _longjmp(scheduler, 1);
}
[[gnu::noinline]] static void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}

static char failure[200];  // what went wrong, empty while nothing did

// Ends the run: this thread does not go on.
inline void fail(const char* what, unsigned long long value) {
    snprintf(failure, sizeof failure, "%s (%llu), block %u, thread %u", what, value, blockIdx.x, threadIdx.x);
    yield();
}
inline unsigned char* memory() { return shared[self->cta]; }
// Where an address lies in shared memory. As in hardware, it tells the rank of its CTA in bits 24 and up.
inline unsigned place(unsigned address) { return address & 0xFFFFFF; }
inline unsigned char* at(unsigned address, unsigned size) {
    const unsigned from = place(address);
    if (address >> 24 != unsigned(self->cta)) fail("shared memory of another CTA, at", address);
    if (from % size || from + size > shared_size) fail("access outside shared memory, or not aligned, at", from);
    return memory() + from;
}
// An ordinary store is noted for the fence; one through a plain pointer cannot be, so that products never see it.
inline void store(unsigned address, const void* from, unsigned size) {
    memcpy(at(address, size), from, size);
    if (self->stores < kMostStores) self->store[self->stores] = {place(address), size};
    ++self->stores;
}
inline void show_stores() {
    if (self->stores > kMostStores) fail("more stores ahead of a fence than the emulator holds", self->stores);
    for (unsigned i = 0; i < self->stores; ++i)
        memcpy(view[self->cta] + self->store[i].to, memory() + self->store[i].to, self->store[i].size);
    self->stores = 0;
}
// Fails where a kernel reads global memory outside the arrays that it was given.
inline void reads(const void* p, unsigned long long size) {
    const auto address = reinterpret_cast<unsigned long long>(p);
    for (unsigned i = 0; i < arrays; ++i)
        if (array[i].from <= address && address + size <= array[i].to) return;
    if (arrays && size) fail("read outside every array, at", address);
}
template <class T>
T load(const void* p) {
    reads(p, sizeof(T));
    T value;
    if (reinterpret_cast<unsigned long long>(p) % sizeof(T)) fail("load is not aligned", reinterpret_cast<unsigned long long>(p));
    memcpy(&value, p, sizeof value);
    return value;
}

inline void wait(Barrier& barrier, unsigned count) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0, ++barrier.generation, ++progress;
        return;
    }
    while (barrier.generation == generation) yield();
}
inline void let_others_run() {
    ++progress;
    yield();
}
inline void arrive() {
    self->arrived = cluster.generation;
    if (++cluster.arrived == threads * ctas) cluster.arrived = 0, ++cluster.generation, ++progress;
}
inline void wait_for_cluster() {
    while (cluster.generation == self->arrived) yield();
}
// All threads of all CTAs must come, and only then the kernel ahead ends.
inline void wait_for_predecessor() {
    wait(predecessor, threads * ctas);
    for (; lates; --lates) memcpy(late[lates - 1].to, late[lates - 1].from, late[lates - 1].size);
}
inline Warp& warp() { return warps[(self->cta * threads + self->thread) / 32]; }
inline unsigned lane() { return self->thread % 32; }
inline void wait_for_warp() { wait(warp().barrier, threads - self->thread / 32 * 32 < 32 ? threads % 32 : 32); }

// Every lane shows `value` and reads that of lane `from`.
template <class T>
T exchange(T value, unsigned from) {
    memcpy(warp().slot[lane()], &value, sizeof value);
    wait_for_warp();
    T found;
    memcpy(&found, warp().slot[from], sizeof found);
    wait_for_warp();
    return found;
}

inline void copy(const Copy& copy) {
    reads(copy.from, copy.valid);
    unsigned char bytes[16] = {};
    memcpy(bytes, copy.from, copy.valid);
    store(copy.to, bytes, copy.size);
}
inline void copy_async(unsigned to, const void* from, unsigned size, unsigned valid) {
    if (valid > size || reinterpret_cast<unsigned long long>(from) % size) fail("asynchronous copy of, or not aligned", valid);
    if (eager)
        copy({to, size, valid, from});
    else {
        const unsigned group = self->last % kMostGroups, number = self->count[group]++;
        if (number == kMostCopies) fail("more asynchronous copies than the emulator holds", number);
        self->copy[group][number] = {to, size, valid, from};
    }
}
inline void commit() {
    if (++self->last - self->first == kMostGroups) fail("more groups of copies than the emulator holds", kMostGroups);
    self->count[self->last % kMostGroups] = 0;
}
inline void wait_for_copies(unsigned pending) {
    for (; self->last - self->first > pending; ++self->first)
        for (unsigned i = 0; i < self->count[self->first % kMostGroups]; ++i) copy(self->copy[self->first % kMostGroups][i]);
}

inline unsigned random() { return (seed = seed * 1664525u + 1013904223u) >> 8; }

// Runs a kernel: every cluster by itself, its fibers in turns from a random one on. 0 if all threads came to an end.
template <class Kernel>
int run(unsigned grid, unsigned block, unsigned cluster_size, Kernel kernel) {
    static Kernel* entry;
    static char* const stacks = static_cast<char*>(malloc(static_cast<size_t>(kMostThreads) * kStackBytes));
    const unsigned all = block * cluster_size;
    if (all > kMostThreads || cluster_size > kMostCtas || shared_size > kSharedBytes) {
        snprintf(failure, sizeof failure, "too large: %u CTAs of %u threads with %u bytes of shared memory", cluster_size, block,
                 shared_size);
        return 3;
    }
    ctas = cluster_size, failure[0] = 0, boxes = 0;
    entry = &kernel;
    threads = block, blockDim.x = block, gridDim.x = grid;
    for (unsigned number = 0; number < grid; number += ctas) {
        for (unsigned i = 0; i < ctas; ++i)
            memset(shared[i], 0xFF, shared_size), memset(view[i], 0xFF, shared_size), cta[i] = {}, memset(named[i], 0, sizeof named[i]);
        for (Warp& warp : warps) warp.barrier = {};
        cluster = predecessor = {};
        for (unsigned i = 0; i < all; ++i) {
            Fiber& fiber = fibers[i];
            fiber.thread = i % block, fiber.cta = i / block, fiber.done = false, fiber.first = fiber.last = fiber.count[0] = 0;
            fiber.first_product = fiber.products = fiber.group = fiber.stores = 0, fiber.fenced = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = stacks + static_cast<size_t>(i) * kStackBytes;
            fiber.context.uc_stack.ss_size = kStackBytes;
            fiber.begun = false;
            const auto thread = [] {
                (*entry)();
                if (const unsigned left = self->products - self->first_product) fail("a thread ends ahead of its products", left);
                self->done = true, ++progress;
                yield();
            };
            makecontext(&fiber.context, thread, 0);
        }
        for (unsigned left = all; left;) {
            const unsigned first = random() % all;
            const unsigned long long before = progress;
            for (unsigned i = 0; i < all; ++i) {
                Fiber& fiber = fibers[(first + i) % all];
                if (fiber.done) continue;
                self = &fiber, threadIdx.x = fiber.thread, blockIdx.x = number + fiber.cta;
                resume(fiber);
                if (failure[0]) return 3;
                left -= fiber.done;
            }
            if (progress == before) return 1;  // all that are left wait for what never comes
        }
        if (boxes) {
            snprintf(failure, sizeof failure, "a kernel ends ahead of %u boxes that it asked for", boxes);
            return 3;
        }
    }
    return 0;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::cta[emulator::self->cta], emulator::threads); }
inline void __syncwarp() { emulator::wait_for_warp(); }
template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return emulator::exchange(value, static_cast<unsigned>(from));
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
    const unsigned lane = emulator::lane();
    return emulator::exchange(value, lane >= distance ? lane - distance : lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    return emulator::exchange(value, emulator::lane() ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= emulator::exchange<unsigned>(vote, i) << i;
    return votes;
}
inline int __reduce_add_sync(unsigned, int value) {
    int sum = 0;
    for (unsigned i = 0; i < 32; ++i) sum += emulator::exchange(value, i);
    return sum;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
template <class T>
T atomicMax(T* p, T x) {
    const T old = *p;
    if (x > old) *p = x;
    return old;
}
