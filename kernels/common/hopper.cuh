// PTX of Hopper: barriers that count, what TMA brings, warpgroup products. As in ptx.cuh, one instruction = one tiny function, and
// tests/emulator/hopper.cuh says the same in C++.
#pragma once
#include "common/ptx.cuh"

// Barriers in shared memory that count arrivals (PTX 9.7.13.15), sm_90 and up. A phase ends when all have arrived; the first has parity 0.
__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_init_done() {  // by the thread that initialised: the cluster's others see it behind a barrier
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_remote(u32 barrier, u32 rank) {  // at that of another CTA of the cluster
    u32 p;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(p) : "r"(barrier), "r"(rank));
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(p) : "memory");
}
// The same of what was only read, and may be overwritten. NOTE: with a release the whole cluster sees, the warp would wait for all its stores.
__device__ __forceinline__ void mbarrier_return_remote(u32 barrier, u32 rank) {
    u32 p;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(p) : "r"(barrier), "r"(rank));
    asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(p) : "memory");
}
// Until the phase of this parity has ended; what was written before the arrivals is then there: by threads of the CTA, or of its cluster.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void mbarrier_wait_cluster(u32 barrier, u32 parity) {  // NOTE: empties L1 too
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// One of the barriers 1 .. 15 of a CTA for some of its threads, whole warps: kThreads in all come, of which those that only arrive go on at
// once. All lanes of a warp come together.
template <int kThreads>
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    static_assert(kThreads % 32 == 0);
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void barrier_wait(u32 barrier) {
    static_assert(kThreads % 32 == 0);
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Warpgroups (sm_90a): 128 threads multiply as one, asynchronously (PTX 9.7.15). Registers that a product reads or adds to must not be
// touched between the fence before it and the wait behind it.
__device__ __forceinline__ void fence_async_proxy() {  // what this thread has written to shared memory is there for products
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Registers of each of this warpgroup's threads from here on, for all of its warps at once. Those of a CTA are shared out among its own.
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {  // at most the kPending newest groups are still under way afterwards
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Behind a wait: this register was read, or written, until now.
__device__ __forceinline__ void wgmma_keep(const u32& x) { asm volatile("" ::"r"(x) : "memory"); }
__device__ __forceinline__ void wgmma_keep(float& x) { asm volatile("" : "+f"(x)::"memory"); }
// A place as descriptors have it: in pieces of 16 bytes, without the rank of the CTA in its cluster, which addresses carry in bits 24 and up.
__device__ __forceinline__ u32 pieces_of(u32 shared) { return (shared & 0x3FFFF) >> 4; }
// Of a matrix contiguous along k, without swizzle: 16 bytes of each of 8 rows lie together (128 bytes); from them to the next 16 bytes of k,
// and to the next 8 rows.
__device__ __forceinline__ u64 matrix_descriptor(u32 shared, u32 k_bytes, u32 rows_bytes) {
    return pieces_of(shared) | static_cast<u64>(k_bytes >> 4) << 16 | static_cast<u64>(rows_bytes >> 4) << 32;
}

// Of a tile that TMA laid down with 128-byte swizzle, from a multiple of 1024 bytes on. Contiguous along k: rows of 128 bytes; the next 32
// bytes of k are 32 bytes on. Contiguous along m or n: 64 values of each k, the next 64 `mn_bytes` on; the next 16 k are 2048 bytes on.
// pieces: where it begins.
__device__ __forceinline__ u64 swizzled_descriptor(u32 pieces, u32 mn_bytes) {
    return pieces + (mn_bytes >> 4 << 16) | (64ull | 1ull << 30) << 32;
}

// TMA (PTX 9.7.9.27): one thread asks for a box of a tensor, whose bytes a barrier counts as they arrive; zeros from outside the tensor.
struct alignas(64) TensorMap {  // the driver encodes it (cugemm/driver.py)
    u8 opaque[128];
};
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(&map)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expecting(u32 barrier, u32 bytes) {  // an arrival; the phase ends with these bytes
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_box(u32 shared, const TensorMap& map, i32 x, i32 y, i32 z, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared),
        "l"(reinterpret_cast<u64>(&map)), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void prefetch_box(const TensorMap& map, i32 x, i32 y, i32 z) {  // to L2
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(reinterpret_cast<u64>(&map)), "r"(x), "r"(y),
                 "r"(z)
                 : "memory");
}
// To the same place in all CTAs of `mask`, each of which counts its bytes at its own barrier.
__device__ __forceinline__ void copy_box_to(u16 mask, u32 shared, const TensorMap& map, i32 x, i32 y, i32 z, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], "
        "[%5], %6;" ::"r"(shared),
        "l"(reinterpret_cast<u64>(&map)), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(mask)
        : "memory");
}

// A box from shared memory; what lies outside the tensor is left out. A thread waits for those of its groups, but the newest kPending: until
// then nobody may write to the place again.
__device__ __forceinline__ void store_box(u32 shared, const TensorMap& map, i32 x, i32 y, i32 z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(reinterpret_cast<u64>(&map)),
                 "r"(x), "r"(y), "r"(z), "r"(shared)
                 : "memory");
}
__device__ __forceinline__ void commit_boxes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_boxes() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit values to shared memory, from fragments as of mma; lanes 8i..8i+7 hold the row addresses of matrix i (PTX
// 9.7.14.5.16).
__device__ __forceinline__ void store_matrix_x4(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// Products. d: each warp of four has 16 rows, in fragments as of mma.m16n8k16, 8 columns in each block.
// clang-format off
#define CUGEMM_D1 "%0, %1, %2, %3"
#define CUGEMM_D2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CUGEMM_D4 CUGEMM_D2 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define CUGEMM_D6 CUGEMM_D4 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define CUGEMM_D8 CUGEMM_D6 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define CUGEMM_D10 CUGEMM_D8 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define CUGEMM_D12 CUGEMM_D10 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define CUGEMM_D14 CUGEMM_D12 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define CUGEMM_D16 CUGEMM_D14 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define CUGEMM_D18 CUGEMM_D16 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define CUGEMM_D20 CUGEMM_D18 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define CUGEMM_D22 CUGEMM_D20 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define CUGEMM_D24 CUGEMM_D22 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define CUGEMM_D26 CUGEMM_D24 ", " "%96, %97, %98, %99, %100, %101, %102, %103"
#define CUGEMM_D28 CUGEMM_D26 ", " "%104, %105, %106, %107, %108, %109, %110, %111"
#define CUGEMM_D30 CUGEMM_D28 ", " "%112, %113, %114, %115, %116, %117, %118, %119"
#define CUGEMM_D32 CUGEMM_D30 ", " "%120, %121, %122, %123, %124, %125, %126, %127"
#define CUGEMM_SUMS1 "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3])
#define CUGEMM_SUM(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), "+f"(d[j + 1][0]), "+f"(d[j + 1][1]), "+f"(d[j + 1][2]), "+f"(d[j + 1][3])
#define CUGEMM_SUMS2 CUGEMM_SUM(0)
#define CUGEMM_SUMS4 CUGEMM_SUMS2, CUGEMM_SUM(2)
#define CUGEMM_SUMS6 CUGEMM_SUMS4, CUGEMM_SUM(4)
#define CUGEMM_SUMS8 CUGEMM_SUMS6, CUGEMM_SUM(6)
#define CUGEMM_SUMS10 CUGEMM_SUMS8, CUGEMM_SUM(8)
#define CUGEMM_SUMS12 CUGEMM_SUMS10, CUGEMM_SUM(10)
#define CUGEMM_SUMS14 CUGEMM_SUMS12, CUGEMM_SUM(12)
#define CUGEMM_SUMS16 CUGEMM_SUMS14, CUGEMM_SUM(14)
#define CUGEMM_SUMS18 CUGEMM_SUMS16, CUGEMM_SUM(16)
#define CUGEMM_SUMS20 CUGEMM_SUMS18, CUGEMM_SUM(18)
#define CUGEMM_SUMS22 CUGEMM_SUMS20, CUGEMM_SUM(20)
#define CUGEMM_SUMS24 CUGEMM_SUMS22, CUGEMM_SUM(22)
#define CUGEMM_SUMS26 CUGEMM_SUMS24, CUGEMM_SUM(24)
#define CUGEMM_SUMS28 CUGEMM_SUMS26, CUGEMM_SUM(26)
#define CUGEMM_SUMS30 CUGEMM_SUMS28, CUGEMM_SUM(28)
#define CUGEMM_SUMS32 CUGEMM_SUMS30, CUGEMM_SUM(30)

// d += a[64 x 16] b[16 x 8 * blocks], a in registers, as of mma.m16n8k16, b by its descriptor.
#define CUGEMM_WGMMA(name, type, blocks, columns, a, b)                                                                                 \
    __device__ __forceinline__ void name(float (&d)[blocks][4], const u32 (&x)[4], u64 y) {                                             \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                                              \
                     " {" CUGEMM_D##blocks "}, {" a "}, " b ", 1, 1, 1, 0;"                                                              \
                     : CUGEMM_SUMS##blocks                                                                                              \
                     : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(y));                                                             \
    }
CUGEMM_WGMMA(wgmma_bf16, "bf16", 1, 8, "%4, %5, %6, %7", "%8")
CUGEMM_WGMMA(wgmma_fp16, "f16", 1, 8, "%4, %5, %6, %7", "%8")
CUGEMM_WGMMA(wgmma_bf16, "bf16", 2, 16, "%8, %9, %10, %11", "%12")
CUGEMM_WGMMA(wgmma_fp16, "f16", 2, 16, "%8, %9, %10, %11", "%12")
CUGEMM_WGMMA(wgmma_bf16, "bf16", 4, 32, "%16, %17, %18, %19", "%20")
CUGEMM_WGMMA(wgmma_fp16, "f16", 4, 32, "%16, %17, %18, %19", "%20")
CUGEMM_WGMMA(wgmma_bf16, "bf16", 8, 64, "%32, %33, %34, %35", "%36")
CUGEMM_WGMMA(wgmma_fp16, "f16", 8, 64, "%32, %33, %34, %35", "%36")
CUGEMM_WGMMA(wgmma_bf16, "bf16", 16, 128, "%64, %65, %66, %67", "%68")
CUGEMM_WGMMA(wgmma_fp16, "f16", 16, 128, "%64, %65, %66, %67", "%68")

// d = (add ? d : 0) + a[64 x 32 bytes] b[32 bytes x 8 * blocks], both by their descriptors. kTurned: contiguous along m, or n.
#define CUGEMM_WGMMA16(name, type, blocks, columns, x, y, p, turned_x, turned_y)                                                        \
    template <int kTurnedX, int kTurnedY>                                                                                               \
    __device__ __forceinline__ void name(float (&d)[blocks][4], u64 x_, u64 y_, bool add) {                                             \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #p ", 0;\n\t"                                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                                              \
                     " {" CUGEMM_D##blocks "}, %" #x ", %" #y ", p, 1, 1, %" #turned_x ", %" #turned_y ";\n}"                            \
                     : CUGEMM_SUMS##blocks                                                                                              \
                     : "l"(x_), "l"(y_), "r"(static_cast<u32>(add)), "n"(kTurnedX), "n"(kTurnedY));                                      \
    }
#define CUGEMM_WGMMA8(name, types, blocks, columns, x, y, p)                                                                            \
    __device__ __forceinline__ void name(float (&d)[blocks][4], u64 x_, u64 y_, bool add) {                                             \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #p ", 0;\n\t"                                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k32.f32." types                                                      \
                     " {" CUGEMM_D##blocks "}, %" #x ", %" #y ", p, 1, 1;\n}"                                                           \
                     : CUGEMM_SUMS##blocks                                                                                              \
                     : "l"(x_), "l"(y_), "r"(static_cast<u32>(add)));                                                                   \
    }
#define CUGEMM_WGMMAS(blocks, columns, x, y, p, turned_x, turned_y)                                                                     \
    CUGEMM_WGMMA16(wgmma_bf16, "bf16", blocks, columns, x, y, p, turned_x, turned_y)                                                    \
    CUGEMM_WGMMA16(wgmma_fp16, "f16", blocks, columns, x, y, p, turned_x, turned_y)                                                     \
    CUGEMM_WGMMA8(wgmma_e4m3_e4m3, "e4m3.e4m3", blocks, columns, x, y, p)                                                               \
    CUGEMM_WGMMA8(wgmma_e4m3_e5m2, "e4m3.e5m2", blocks, columns, x, y, p)                                                               \
    CUGEMM_WGMMA8(wgmma_e5m2_e4m3, "e5m2.e4m3", blocks, columns, x, y, p)                                                               \
    CUGEMM_WGMMA8(wgmma_e5m2_e5m2, "e5m2.e5m2", blocks, columns, x, y, p)
CUGEMM_WGMMAS(2, 16, 8, 9, 10, 11, 12)
CUGEMM_WGMMAS(4, 32, 16, 17, 18, 19, 20)
CUGEMM_WGMMAS(6, 48, 24, 25, 26, 27, 28)
CUGEMM_WGMMAS(8, 64, 32, 33, 34, 35, 36)
CUGEMM_WGMMAS(10, 80, 40, 41, 42, 43, 44)
CUGEMM_WGMMAS(12, 96, 48, 49, 50, 51, 52)
CUGEMM_WGMMAS(14, 112, 56, 57, 58, 59, 60)
CUGEMM_WGMMAS(16, 128, 64, 65, 66, 67, 68)
CUGEMM_WGMMAS(18, 144, 72, 73, 74, 75, 76)
CUGEMM_WGMMAS(20, 160, 80, 81, 82, 83, 84)
CUGEMM_WGMMAS(22, 176, 88, 89, 90, 91, 92)
CUGEMM_WGMMAS(24, 192, 96, 97, 98, 99, 100)
CUGEMM_WGMMAS(26, 208, 104, 105, 106, 107, 108)
CUGEMM_WGMMAS(28, 224, 112, 113, 114, 115, 116)
CUGEMM_WGMMAS(30, 240, 120, 121, 122, 123, 124)
CUGEMM_WGMMAS(32, 256, 128, 129, 130, 131, 132)
// clang-format on
