// Registers and number formats for kernels/wkv5_cpu.cpp: what makes the products of small matrices quick.
//
// What it is not: intrinsics of one processor. `vec` is a vector type of the compiler, as wide as a register; sums of a
// product stay in a tile of registers, as in any fast matrix product. Half precision is converted by its bits, in loops
// that the compiler turns into vector code.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

#define UNROLL _Pragma("GCC unroll 16")

// ---- vectors: W floats in a register; a tile of ROWS x COLS registers holds the sums of a product ------------------

#if defined(__AVX512F__)
constexpr int W = 16, COLS = 4;
#elif defined(__AVX__)
constexpr int W = 8, COLS = 2;
#elif defined(__aarch64__)
constexpr int W = 4, COLS = 4;
#else
constexpr int W = 4, COLS = 2;
#endif
constexpr int ROWS = 4;

typedef float vec __attribute__((vector_size(4 * W)));
typedef float vec_anywhere __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * W)));

inline vec get(const float* p) { return *reinterpret_cast<const vec_anywhere*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec_anywhere*>(p) = x; }
// To memory past the caches: a line that is written whole need not be read first. p: a multiple of the register's size.
inline void store_past_cache(float* p, vec x) {
#if defined(__clang__)
    __builtin_nontemporal_store(x, reinterpret_cast<vec*>(p));
#elif defined(__AVX512F__)
    __builtin_ia32_movntps512(p, x);
#elif defined(__AVX__)
    __builtin_ia32_movntps256(p, x);
#elif defined(__SSE__)
    __builtin_ia32_movntps(p, x);
#else
    store(p, x);
#endif
}

// (a0 b0 a1 b1 ...) from the lower halves of a and b, or from the upper ones.
template <int UPPER, int... I>
inline vec interleave(vec a, vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (UPPER * W / 2 + I / 2 + I % 2 * W)...);
#else
    return __builtin_shuffle(a, b, lanes{(UPPER * W / 2 + I / 2 + I % 2 * W)...});
#endif
}
inline vec lower(vec a, vec b) { return interleave<0>(a, b, std::make_integer_sequence<int, W>()); }
inline vec upper(vec a, vec b) { return interleave<1>(a, b, std::make_integer_sequence<int, W>()); }

// The sums of W registers as one register. Each round halves the registers, and the parts that each sum is still in.
inline vec sums(vec* x) {
    UNROLL for (int h = W / 2; h >= 1; h /= 2)
        UNROLL for (int i = 0; i < h; ++i) x[i] = lower(x[i], x[i + h]) + upper(x[i], x[i + h]);
    return x[0];
}

// to[j][i] = from[i][j]: interleaving the first half of the rows with the second, log2(W) times, turns W x W numbers.
inline void turn(vec (&to)[W], const vec* from) {
    UNROLL for (int i = 0; i < W; ++i) to[i] = from[i];
    UNROLL for (int round = W; round > 1; round /= 2) {
        vec next[W];
        UNROLL for (int i = 0; i < W / 2; ++i) {
            next[2 * i] = lower(to[i], to[i + W / 2]);
            next[2 * i + 1] = upper(to[i], to[i + W / 2]);
        }
        UNROLL for (int i = 0; i < W; ++i) to[i] = next[i];
    }
}
// The same for any number of rows and columns.
inline void turn(float* to, long to_row, const float* from, long from_row, long rows, long cols) {
    for (long i = 0; i < rows; i += W)
        for (long j = 0; j < cols; j += W) {
            if (i + W <= rows && j + W <= cols) {
                vec x[W], turned[W];
                UNROLL for (int y = 0; y < W; ++y) x[y] = get(from + (i + y) * from_row + j);
                turn(turned, x);
                UNROLL for (int y = 0; y < W; ++y) store(to + (j + y) * to_row + i, turned[y]);
            } else
                for (long y = i; y < rows && y < i + W; ++y)
                    for (long x = j; x < cols && x < j + W; ++x) to[x * to_row + y] = from[y * from_row + x];
        }
}

template <int R, int C>
inline void clear(vec (&sum)[R][C]) {
    UNROLL for (int x = 0; x < R; ++x) UNROLL for (int c = 0; c < C; ++c) sum[x][c] = vec{};
}
template <int R, int C>
inline void store(float* to, long row, const vec (&sum)[R][C]) {
    UNROLL for (int x = 0; x < R; ++x) UNROLL for (int c = 0; c < C; ++c) store(to + x * row + c * W, sum[x][c]);
}
// sum[x][c] += sum_k a[x, k] b[k, c]: a is read number by number (steps ax and ak), b in rows of registers.
template <int R, int C>
inline void multiply(vec (&sum)[R][C], const float* a, long ax, long ak, const float* b, long b_row, long K) {
    for (long k = 0; k < K; ++k) {
        vec row[C];
        UNROLL for (int c = 0; c < C; ++c) row[c] = get(b + k * b_row + c * W);
        UNROLL for (int x = 0; x < R; ++x)
            UNROLL for (int c = 0; c < C; ++c) sum[x][c] += a[x * ax + k * ak] * row[c];
    }
}
// body(constant C, first row, first column) for tiles of R rows and C registers that cover rows x cols.
template <int R, int C, class Body>
inline void tiles(long rows, long cols, Body body) {
    for (long x = 0; x < rows; x += R) {
        long c = 0;
        for (; c + C * W <= cols; c += C * W) body(std::integral_constant<int, C>(), x, c);
        if (C > 1)
            for (; c < cols; c += W) body(std::integral_constant<int, 1>(), x, c);
    }
}

// ---- number formats --------------------------------------------------------------------------------------------

enum Format : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline uint32_t bits(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    return b;
}
inline float number(uint32_t b) {
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}
inline float from_bfloat16(uint16_t x) { return number(uint32_t(x) << 16); }
inline uint16_t to_bfloat16(float x) {
    const uint32_t b = bits(x), even = b + 0x7fff + (b >> 16 & 1);  // ties go to the even neighbour
    return (b & 0x7fffffff) > 0x7f800000 ? uint16_t(b >> 16 | 0x40) : uint16_t(even >> 16);  // NaN stays NaN
}
// 5 bits of exponent, 10 of fraction: shifted into the place of a float's, the value is 2^112 times too small.
inline float from_float16(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
    const uint32_t finite = bits(number(rest) * 0x1p112f), infinite = rest | 0x7f800000;
    return number(sign | ((x & 0x7c00) == 0x7c00 ? infinite : finite));
}
inline uint16_t to_float16(float x) {
    const uint32_t b = bits(x), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
    const uint32_t small = bits(number(rest) + 0.5f) - bits(0.5f);  // below 2^-14: the addition rounds to 2^-24
    const uint32_t normal = (rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13;
    const uint32_t big = rest > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN; infinity, which 65520 rounds to
    return uint16_t(sign | (rest >= 0x477ff000 ? big : rest < 0x38800000 ? small : normal));
}

}  // namespace
