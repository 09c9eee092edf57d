// Builds that look for races: with -DDELAY=<seed> warps sleep here and there, and an order of events that nothing enforces shows in bits.
#pragma once
#include "common/ptx.cuh"

// Nothing. With DELAY, 0 to 1 us: another time for each warp, moment and seed.
__device__ __forceinline__ void delay() {
#ifdef DELAY
    u32 hash = clock_cycles() + 0x9E3779B9u * (DELAY + 1009 * blockIdx.x + threadIdx.x / 32);
    hash = (hash ^ hash >> 16) * 0x7FEB352Du;
    hash = (hash ^ hash >> 15) * 0x846CA68Bu;
    sleep_ns(hash >> 23);
#endif
}
