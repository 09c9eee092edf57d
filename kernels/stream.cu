// Reads memory and keeps nothing: the time that any product over the same bytes has to beat, launch included. Run by `cugemm bench`.
//
// Two CTAs of 512 threads per SM, 16-byte loads, eight in flight per thread: that reaches the full read bandwidth of an H100 from about
// 100 MB, and from 5 MB to within the 1.7 us that a graph node costs. `data` is 16-byte aligned; bytes behind the last whole chunk are left out.
#include "common/ptx.cuh"

// Python packs this struct as "<2Qq".
struct Args {
    u64 data, sink;
    i64 chunks;  // of 16 bytes
};
static_assert(sizeof(Args) == 24, "the host packs this layout");

constexpr int kThreads = 512;
constexpr int kInFlight = 8;

// NOTE: two CTAs per SM allow 64 registers. Without the 2 the compiler stays at 32 and asks for the late chunks after the early ones arrive.
extern "C" __global__ void __launch_bounds__(kThreads, 2) stream(const __grid_constant__ Args args) {
    const i64 stride = 16 * static_cast<i64>(gridDim.x) * kThreads;
    const u64 end = args.data + 16 * args.chunks;
    u32 mixed = 0;
    for (u64 p = args.data + 16 * (static_cast<u64>(blockIdx.x) * kThreads + threadIdx.x); p < end; p += kInFlight * stride) {
        Chunk chunk[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {  // past the end: this thread's first chunk again, from cache
            const u64 at = p + i * stride;
            chunk[i] = load_global_16(reinterpret_cast<const void*>(at < end ? at : p));
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) mixed ^= chunk[i].word[0] ^ chunk[i].word[1] ^ chunk[i].word[2] ^ chunk[i].word[3];
    }
    // NOTE: never true, but the compiler cannot know, so the loads stay.
    if (args.chunks < 0) *reinterpret_cast<u32*>(args.sink) = mixed;
}
