// Integers by their width, the 16-byte chunk, and arithmetic that NVRTC has no header for.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i16 = short;
using i32 = int;
using i64 = long long;

struct alignas(16) Chunk {  // the unit of every vector access: 16 bytes
    u32 word[4];
};

template <class T>
__device__ __forceinline__ constexpr T smaller(T a, T b) {
    return a < b ? a : b;
}
template <class T>
__device__ __forceinline__ constexpr T larger(T a, T b) {
    return a > b ? a : b;
}
// Right below zero too, and near INT_MAX.
__device__ __forceinline__ constexpr i32 ceil_div(i32 a, i32 b) { return a / b + (a % b > 0); }
