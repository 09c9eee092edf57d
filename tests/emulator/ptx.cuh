// kernels/common/ptx.cuh in C++: what each instruction means, by the PTX ISA's words and not by the kernels'.
#pragma once
#include "common/types.cuh"

namespace emulator {

inline float bf16(u32 bits) { return std::bit_cast<float>(bits << 16); }
inline u32 to_bf16(float x) {
    const u32 bits = std::bit_cast<u32>(x);
    return __builtin_isnan(x) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline float fp16(u32 bits) { return std::bit_cast<_Float16>(static_cast<u16>(bits)); }
inline u32 to_fp16(float x) { return __builtin_isnan(x) ? 0x7FFF : std::bit_cast<u16>(static_cast<_Float16>(x)); }

template <class F>
u32 halves(F f) {
    return f(0) | f(16) << 16;
}

// From the definition of the format: `exponents` bits of exponent with this bias, the rest of 7 bits mantissa.
inline float fp8(u32 code, int exponents, int bias) {
    const int mantissas = 7 - exponents, exponent = code >> mantissas & ((1 << exponents) - 1), mantissa = code & ((1 << mantissas) - 1);
    const float sign = code & 0x80 ? -1.f : 1.f;
    if (exponents == 4 && (code & 0x7F) == 0x7F) return __builtin_nanf("");
    if (exponents == 5 && exponent == 31) return mantissa ? __builtin_nanf("") : sign * __builtin_inff();
    const float one = exponent ? 1.f : 0.f;
    return sign * ldexpf(one + ldexpf(float(mantissa), -mantissas), (exponent ? exponent : 1) - bias);
}
// The nearest finite code, of two the even one.
inline u32 to_fp8(float x, int exponents, int bias) {
    if (__builtin_isnan(x)) return 0x7F;
    u32 best = 0;
    const float size = fabsf(x);
    for (u32 code = 1; code < 0x80; ++code) {
        const float value = fp8(code, exponents, bias);
        if (!__builtin_isfinite(value)) continue;
        const double gain = fabs(double(size) - fp8(best, exponents, bias)) - fabs(double(size) - value);
        if (gain > 0 || (gain == 0 && code % 2 == 0) || (__builtin_isinf(size) && value > fp8(best, exponents, bias))) best = code;
    }
    return best | (__builtin_signbit(x) ? 0x80 : 0);
}

// m16n8k16: lanes show their fragments, each then sums for the four elements that it holds, in double and rounded once.
template <class Decode>
void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Decode decode) {
    auto& slot = warp().slot;
    for (int i = 0; i < 4; ++i) slot[lane()][i] = a[i];
    slot[lane()][4] = b0, slot[lane()][5] = b1;
    wait_for_warp();
    const auto value = [&](int holder, int word, int half) {
        return double(decode(static_cast<u32>(slot[holder][word]) >> (16 * half) & 0xFFFF));
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; ++k)
            sum += value(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) * value(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        d[i] = static_cast<float>(sum);
    }
    wait_for_warp();
}

// Lane l gives the address of row l % 8 of matrix l / 8 and gets, of each matrix, elements 2 * (l % 4) and the next of row l / 4; transposed:
// of rows 2 * (l % 4) and the next, element l / 4.
inline void load_matrix(u32 (&r)[4], u32 address, bool transposed) {
    auto& slot = warp().slot;
    at(address, 16);
    slot[lane()][0] = address;
    wait_for_warp();
    const unsigned major = lane() / 4, minor = lane() % 4 * 2;
    for (int matrix = 0; matrix < 4; ++matrix) {
        u16 value[2];
        for (int i = 0; i < 2; ++i) {
            const unsigned row = transposed ? minor + i : major, column = transposed ? major : minor + i;
            memcpy(&value[i], at(static_cast<u32>(slot[8 * matrix + row][0]), 16) + 2 * column, 2);
        }
        r[matrix] = value[0] | static_cast<u32>(value[1]) << 16;
    }
    wait_for_warp();
}

}  // namespace emulator

inline u32 shared_address(const void* p) {
    return static_cast<u32>(static_cast<const unsigned char*>(p) - emulator::memory()) | static_cast<u32>(emulator::self->cta) << 24;
}

inline void copy_async_16_if(bool now, u32 shared, const void* global, u32 valid) {
    if (now) emulator::copy_async(shared, global, 16, valid);
}
inline void copy_async_commit() { emulator::commit(); }
template <int kPending>
void copy_async_wait() {
    emulator::wait_for_copies(kPending);
}

inline void load_matrix_x4(u32 (&r)[4], u32 shared) { emulator::load_matrix(r, shared, false); }
inline void load_matrix_x4_transposed(u32 (&r)[4], u32 shared) { emulator::load_matrix(r, shared, true); }
inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator::mma(d, a, b0, b1, emulator::bf16); }
inline void mma_fp16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator::mma(d, a, b0, b1, emulator::fp16); }

inline Chunk load_global_16(const void* p) { return emulator::load<Chunk>(p); }
inline Chunk load_global_8(const void* p) {
    const u64 c = emulator::load<u64>(p);
    return {{static_cast<u32>(c), static_cast<u32>(c >> 32), 0, 0}};
}
inline u32 load_global_u8(const void* p) { return emulator::load<u8>(p); }
inline u32 load_global_u16(const void* p) { return emulator::load<u16>(p); }
inline u32 load_global_u32(const void* p) { return emulator::load<u32>(p); }
inline void store_shared_16(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    const u32 words[4] = {a, b, c, d};
    emulator::store(shared, words, 16);
}

inline void store_shared_8(u32 shared, u32 a, u32 b) {
    const u32 words[2] = {a, b};
    emulator::store(shared, words, 8);
}

inline u32 and_xor(u32 x, u32 mask, u32 other) { return (x & mask) ^ other; }
inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
    const u64 bytes = static_cast<u64>(high) << 32 | low;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) r |= static_cast<u32>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    return r;
}

inline u32 pack_bf16(float low, float high) { return emulator::to_bf16(low) | emulator::to_bf16(high) << 16; }
inline u32 pack_fp16(float low, float high) { return emulator::to_fp16(low) | emulator::to_fp16(high) << 16; }
inline float fp16_to_float(u32 bits) { return emulator::fp16(bits & 0xFFFF); }
inline float bf16_to_float(u32 bits) { return emulator::bf16(bits); }

inline float divide(float a, float b) { return a / b; }
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float maximum(float a, float b) { return fmaxf(a, b); }
inline float maximum_or_nan(float a, float b) {
    return __builtin_isnan(a) || __builtin_isnan(b) ? std::bit_cast<float>(0x7FFFFFFFu) : fmaxf(a, b);
}
inline float add_saturated(float a, float b) { return a + b > 0.f ? fminf(a + b, 1.f) : 0.f; }
inline float minimum(float a, float b) { return fminf(a, b); }

inline u32 maximum_bf16x2(u32 a, u32 b) {
    return emulator::halves(
        [&](int i) { return emulator::to_bf16(fmaxf(emulator::bf16(a >> i & 0xFFFF), emulator::bf16(b >> i & 0xFFFF))); });
}
inline u32 maximum_or_nan_bf16x2(u32 a, u32 b) {
    return emulator::halves(
        [&](int i) { return emulator::to_bf16(maximum_or_nan(emulator::bf16(a >> i & 0xFFFF), emulator::bf16(b >> i & 0xFFFF))); });
}
inline u32 maximum_fp16x2(u32 a, u32 b) {
    return emulator::halves(
        [&](int i) { return emulator::to_fp16(fmaxf(emulator::fp16(a >> i & 0xFFFF), emulator::fp16(b >> i & 0xFFFF))); });
}
inline u32 maximum_or_nan_fp16x2(u32 a, u32 b) {
    return emulator::halves(
        [&](int i) { return emulator::to_fp16(maximum_or_nan(emulator::fp16(a >> i & 0xFFFF), emulator::fp16(b >> i & 0xFFFF))); });
}
inline u32 largest_of_warp(u32 v) {
    u32 largest = 0;
    for (unsigned i = 0; i < 32; ++i) largest = larger(largest, emulator::exchange(v, i));
    return largest;
}

inline u32 multiply_fp16x2(u32 a, u32 b) {
    return emulator::halves([&](int i) { return emulator::to_fp16(emulator::fp16(a >> i & 0xFFFF) * emulator::fp16(b >> i & 0xFFFF)); });
}
inline u32 subtract_fp16x2(u32 a, u32 b) {
    return emulator::halves([&](int i) { return emulator::to_fp16(emulator::fp16(a >> i & 0xFFFF) - emulator::fp16(b >> i & 0xFFFF)); });
}
inline u32 multiply_bf16x2_sm90(u32 a, u32 b) {
    return emulator::halves([&](int i) { return emulator::to_bf16(emulator::bf16(a >> i & 0xFFFF) * emulator::bf16(b >> i & 0xFFFF)); });
}
inline u32 multiply_add_bf16x2(u32 a, u32 b, u32 c) {  // the sum in double is exact wherever bf16 could tell
    return emulator::halves([&](int i) {
        const double sum = double(emulator::bf16(a >> i & 0xFFFF)) * emulator::bf16(b >> i & 0xFFFF) + emulator::bf16(c >> i & 0xFFFF);
        return emulator::to_bf16(static_cast<float>(sum));
    });
}
inline u32 decode_e4m3_fp16(u16 codes) { return pack_fp16(emulator::fp8(codes & 0xFF, 4, 7), emulator::fp8(codes >> 8, 4, 7)); }
inline u16 encode_e4m3_sm89(float low, float high) { return emulator::to_fp8(low, 4, 7) | emulator::to_fp8(high, 4, 7) << 8; }
inline u16 encode_e5m2_sm89(float low, float high) { return emulator::to_fp8(low, 5, 15) | emulator::to_fp8(high, 5, 15) << 8; }

inline void hold(u32&) {}
inline void hold(float&) {}
inline void copy_async_16_streaming(u32 shared, const void* global) { emulator::copy_async(shared, global, 16, 16); }
inline void prefetch_l2(const void*) {}
template <int kBytes>
void copy_async(u32 to, const void* from) {
    emulator::copy_async(to, from, kBytes, kBytes);
}
inline Chunk load_shared_16(u32 p) {
    Chunk c;
    memcpy(&c, emulator::at(p, 16), 16);
    return c;
}
inline float load_shared_float(u32 p) {
    float v;
    memcpy(&v, emulator::at(p, 4), 4);
    return v;
}
inline u32 load_shared_u16(u32 p) {
    u16 v;
    memcpy(&v, emulator::at(p, 2), 2);
    return v;
}
inline u32 load_shared_u8(u32 p) { return *emulator::at(p, 1); }
inline void store_shared_u32(u32 p, u32 v) { emulator::store(p, &v, 4); }
inline void wait_for_predecessor() { emulator::wait_for_predecessor(); }
inline u32 clock_cycles() { return emulator::random(); }
inline void sleep_ns(u32 ns) {  // one lane holds up its warp: the longest of 32 would be the same everywhere
    if (emulator::lane() == 0)
        for (; ns >= 32; ns -= 32) emulator::let_others_run();
}
inline u32 cluster_rank() { return emulator::self->cta; }
inline void store_remote_16(u32 shared, u32 rank, const float (&x)[4]) {
    emulator::at(shared, 16);
    memcpy(emulator::shared[rank] + emulator::place(shared), x, 16);
}
inline Chunk load_remote_16(u32 shared, u32 rank) {
    emulator::at(shared, 16);
    Chunk c;
    memcpy(&c, emulator::shared[rank] + emulator::place(shared), 16);
    return c;
}
inline void cluster_arrive() { emulator::arrive(); }
inline void cluster_arrive_relaxed() { emulator::arrive(); }
inline void cluster_wait() { emulator::wait_for_cluster(); }
