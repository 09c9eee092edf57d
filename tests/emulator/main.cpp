// One kernel as a shared library: SOURCE is its file, ENTRY its function, ARGS what it takes; other macros are the kernel's own.
#include "cuda.hpp"

#include SOURCE

// CTAs of a cluster, of kernels that have them.
#ifndef SPLIT
#define SPLIT 1
#endif
#ifndef SHARE
#define SHARE 1
#endif
#define CLUSTER (SPLIT * SHARE)

extern "C" const char* failure() { return emulator::failure; }

// Of the next launch: these bytes come when the kernel ahead of it ends.
extern "C" void write_late(void* to, const void* from, unsigned long long size) { emulator::late[emulator::lates++] = {to, from, size}; }

// The next launch may read these bytes, and others told so, and no others.
extern "C" void allow(unsigned long long from, unsigned long long size) { emulator::array[emulator::arrays++] = {from, from + size}; }

extern "C" int launch(const void* packed, unsigned size, unsigned grid, unsigned block, unsigned shared_size, unsigned seed, int eager) {
    if (size != sizeof(ARGS)) return 2;
    static ARGS args;
    memcpy(&args, packed, size);
    emulator::shared_size = shared_size, emulator::seed = seed, emulator::eager = eager;
    const int code = emulator::run(grid, block, CLUSTER, [] { ENTRY(args); });
    emulator::lates = emulator::arrays = 0;
    return code;
}
