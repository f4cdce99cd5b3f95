// Products with packed matrices on a CPU: some rows of a matrix with n vectors. For kernels/decode_cpu.cpp.
//
// What it is not: a product of any two matrices. One side is packed beforehand by rwkv_nb/inference/packing.py, which
// has the layout: panels of 16 rows, in a panel column after column, so that a register holds the numbers of 16
// neighbouring rows, memory is read from its beginning to its end, and no sum goes across a register.
//
// With few vectors memory is the limit: numbers stored short (bfloat16, or 8 bits with a scale for 64 columns of a row)
// become float in registers. With many, arithmetic is: a group of panels is made float once, in the cache, and all
// vectors go through it in tiles of registers. Each sum takes 64 columns at a time, in their order, so it does not
// depend on the number of vectors or of threads.

#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "wkv5_cpu_registers.h"

namespace {

#define SEPARATE __attribute__((noinline))  // a function of its own: large loops compile quicker and no slower

constexpr long PANEL = 16;       // rows
constexpr long GROUP = 64;       // columns that are summed on their own, and in INT8 share a scale
constexpr int PARTS = PANEL / W; // registers that a column of a panel takes
constexpr long LINE = 64;        // bytes of the cache
constexpr long MANY = 16;        // vectors from which on unpacking first is worth it

// Panels and vectors of a tile, so that its sums fit in the registers; with one vector more panels, to hide latency.
#if defined(__AVX512F__)
constexpr int TILE = 3, VECTORS = 8, ALONE = 4;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int TILE = 1, VECTORS = 6, ALONE = 4;
#else
constexpr int TILE = 1, VECTORS = 2, ALONE = 2;
#endif

enum Storage : int64_t { F32 = 0, BF16 = 1, INT8 = 2 };

struct Matrix {                  // as decoder.py hands it over
    const void* numbers;
    const float* scales;         // (panels, columns / GROUP, PANEL), INT8 alone
    int64_t rows, columns;       // columns with the zeros that fill up the last pair or group
    int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
};

typedef uint32_t words __attribute__((vector_size(4 * W)));  // of 4 bytes, one a row
inline words get_words(const char* p) {
    words x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline vec lower_half(words x) { return reinterpret_cast<vec>(x << 16); }  // a bfloat16 is the upper half of a float
inline vec upper_half(words x) { return reinterpret_cast<vec>(x & 0xffff0000u); }

// The cache line that lies as far behind the one at p as the next tile does: its first lines would be waited for else.
template <int AHEAD>
inline void prefetch(const char* p, long panel) {
    if (AHEAD) __builtin_prefetch(p + AHEAD * panel, 0, 2);
}

// walk: use(registers of each of R panels that lie `panel` bytes apart, column) for the columns [from, to). A step of
// the walk takes 64 bytes of each panel, and asks for those of the panel that lies AHEAD panels further (0: none).
template <int S> struct Stored;
template <> struct Stored<F32> {
    static constexpr long SIZE = 4;  // bytes of a number
    template <int R, int AHEAD, class Use>
    static void walk(const char* w, long panel, long from, long to, Use use) {
        for (long j = from; j < to; ++j) {
            vec x[R][PARTS];
            UNROLL for (int y = 0; y < R; ++y) prefetch<AHEAD>(w + y * panel + j * PANEL * SIZE, panel);
            UNROLL for (int y = 0; y < R; ++y)
                UNROLL for (int p = 0; p < PARTS; ++p)
                    x[y][p] = get(reinterpret_cast<const float*>(w + y * panel) + j * PANEL + p * W);
            use(x, j);
        }
    }
};
// Word i of a pair of columns holds those of row i, the first in the lower half.
template <> struct Stored<BF16> {
    static constexpr long SIZE = 2;
    template <int R, int AHEAD, class Use>
    static void walk(const char* w, long panel, long from, long to, Use use) {
        for (long j = from; j < to; j += 2) {
            vec first[R][PARTS], second[R][PARTS];
            UNROLL for (int y = 0; y < R; ++y) prefetch<AHEAD>(w + y * panel + j * PANEL * SIZE, panel);
            UNROLL for (int y = 0; y < R; ++y)
                UNROLL for (int p = 0; p < PARTS; ++p) {
                    const words x = get_words(w + y * panel + j * PANEL * SIZE + p * 4 * W);
                    first[y][p] = lower_half(x);
                    second[y][p] = upper_half(x);
                }
            use(first, j);
            use(second, j + 1);
        }
    }
};
// Word i of four columns holds those of row i, the first in the lowest byte.
template <> struct Stored<INT8> {
    static constexpr long SIZE = 1;
    template <int R, int AHEAD, class Use>
    static void walk(const char* w, long panel, long from, long to, Use use) {
        for (long j = from; j < to; j += 4) {
            words four[R][PARTS];
            UNROLL for (int y = 0; y < R; ++y) prefetch<AHEAD>(w + y * panel + j * PANEL * SIZE, panel);
            UNROLL for (int y = 0; y < R; ++y)
                UNROLL for (int p = 0; p < PARTS; ++p)
                    four[y][p] = get_words(w + y * panel + j * PANEL * SIZE + p * 4 * W);
            UNROLL for (int byte = 0; byte < 4; ++byte) {
                vec x[R][PARTS];
                UNROLL for (int y = 0; y < R; ++y)
                    UNROLL for (int p = 0; p < PARTS; ++p)  // with its sign
                        x[y][p] = __builtin_convertvector(reinterpret_cast<lanes>(four[y][p] << (24 - 8 * byte)) >> 24,
                                                           vec);
                use(x, j + byte);
            }
        }
    }
};

// Vectors x (n, x_row) that a matrix is multiplied with, products y (n, y_row).
struct Vectors {
    const void* x;               // float, or bfloat16 for pair_panels
    long x_row;
    void* y;                     // float, or bfloat16 where `narrow` says so
    long y_row, n;
    bool narrow = false;
    // From row `row` of vector b on.
    void* place(long b, long row) const { return static_cast<char*>(y) + (b * y_row + row) * (narrow ? 2 : 4); }
};

// 16 sums to bfloat16.
inline void round_panel(uint16_t* to, const vec (&sum)[PARTS]) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(sum[0]));
    std::memcpy(to, &rounded, sizeof rounded);
#else
    float wide[PANEL];
    std::memcpy(wide, sum, sizeof wide);
    for (long i = 0; i < PANEL; ++i) to[i] = to_bfloat16(wide[i]);
#endif
}

// The sums of R panels with C vectors, from vector b on, to their places in y. In the last panel rows may be missing.
template <int R, int C>
inline void put(const vec (&sum)[R][C][PARTS], const Matrix& m, long first, const Vectors& v, long b) {
    for (int y = 0; y < R; ++y) {
        const long row = (first + y) * PANEL, left = m.rows - row;
        for (int c = 0; c < C; ++c) {
            const long n = left < PANEL ? left : PANEL;
            if (v.narrow) {
                uint16_t rounded[PANEL];
                round_panel(rounded, sum[y][c]);
                std::memcpy(v.place(b + c, row), rounded, sizeof(uint16_t) * n);
            } else
                std::memcpy(v.place(b + c, row), sum[y][c], sizeof(float) * n);
        }
    }
}

// R panels from `first` on with C vectors.
template <int S, int R, int C, int AHEAD>
SEPARATE void tile(const Matrix& m, long first, const Vectors& v, long b) {
    const float* x = static_cast<const float*>(v.x) + b * v.x_row;
    const long panel = m.columns * PANEL * Stored<S>::SIZE, groups = (m.columns + GROUP - 1) / GROUP;
    const char* w = static_cast<const char*>(m.numbers) + first * panel;
    vec sum[R][C][PARTS] = {};
    for (long g = 0; g < groups; ++g) {
        vec part[R][C][PARTS] = {};
        const long to = g + 1 < groups ? (g + 1) * GROUP : m.columns;
        Stored<S>::template walk<R, AHEAD>(w, panel, g * GROUP, to, [&](const vec (&row)[R][PARTS], long j) {
            UNROLL for (int c = 0; c < C; ++c) {
                const float in = x[c * v.x_row + j];
                UNROLL for (int y = 0; y < R; ++y)
                    UNROLL for (int p = 0; p < PARTS; ++p) part[y][c][p] += row[y][p] * in;
            }
        });
        UNROLL for (int y = 0; y < R; ++y)
            UNROLL for (int p = 0; p < PARTS; ++p) {
                const vec scale = S == INT8 ? get(m.scales + ((first + y) * groups + g) * PANEL + p * W) : vec{};
                UNROLL for (int c = 0; c < C; ++c)
                    sum[y][c][p] += S == INT8 ? scale * part[y][c][p] : part[y][c][p];
            }
    }
    put(sum, m, first, v, b);
}

// body(constant C, first vector) for tiles of C vectors that cover all.
template <class Body>
inline void cover(long n, Body body) {
    long b = 0;
    for (; b + VECTORS <= n; b += VECTORS) body(std::integral_constant<int, VECTORS>(), b);
    if (VECTORS > 4 && b + 4 <= n) body(std::integral_constant<int, 4>(), b), b += 4;
    if (VECTORS > 2 && b + 2 <= n) body(std::integral_constant<int, 2>(), b), b += 2;
    if (b < n) body(std::integral_constant<int, 1>(), b);
}
// body(constant R, first panel) for groups of R panels that cover [from, to).
template <int R, class Body>
inline void groups(long from, long to, Body body) {
    for (; from + R <= to; from += R) body(std::integral_constant<int, R>(), from);
    if (R > 1)
        for (; from < to; ++from) body(std::integral_constant<int, 1>(), from);
}

// R panels as float in `to`.
template <int S, int R>
SEPARATE void unpack(const Matrix& m, long first, float* to) {
    const long panel = m.columns * PANEL * Stored<S>::SIZE, groups = (m.columns + GROUP - 1) / GROUP;
    const char* w = static_cast<const char*>(m.numbers) + first * panel;
    Stored<S>::template walk<R, 0>(w, panel, 0, m.columns, [&](const vec (&row)[R][PARTS], long j) {
        for (int y = 0; y < R; ++y)
            for (int p = 0; p < PARTS; ++p) {
                const float* scales = m.scales + ((first + y) * groups + j / GROUP) * PANEL + p * W;
                store(to + (y * m.columns + j) * PANEL + p * W, S == INT8 ? get(scales) * row[y][p] : row[y][p]);
            }
    });
}

// Floats of scratch that `panels` needs for n vectors.
inline long scratch_floats(long columns, long n) { return n < MANY ? 0 : TILE * PANEL * columns; }

// Panels [from, to).
template <int S>
void panels(const Matrix& m, long from, long to, const Vectors& v, float* scratch) {
    constexpr bool SHORT = S != F32;  // panels so short that they end before the processor has seen where they lead
    if (v.n == 1) return groups<ALONE>(from, to, [&](auto R, long at) { tile<S, R, 1, SHORT * R>(m, at, v, 0); });
    groups<TILE>(from, to, [&](auto R, long at) {
        if (S == F32 || v.n < MANY) return cover(v.n, [&](auto C, long b) { tile<S, R, C, 0>(m, at, v, b); });
        unpack<S, R>(m, at, scratch);
        const Matrix there{scratch, nullptr, m.rows - at * PANEL, m.columns};
        const Vectors moved{v.x, v.x_row, v.place(0, at * PANEL), v.y_row, v.n, v.narrow};
        cover(v.n, [&](auto C, long b) { tile<F32, R, C, 0>(there, 0, moved, b); });
    });
}

// ---- products of bfloat16 numbers, sums in float -------------------------------------------------------------------

// sum += both products of pairs: one word a row in w, the same pair of x for all.
inline void add_pair(vec& sum, words w, uint32_t x) {
#if defined(__AVX512BF16__)
    const __m512i a = reinterpret_cast<__m512i>(w), b = _mm512_set1_epi32(int(x));
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    sum += lower_half(w) * number(x << 16);
    sum += upper_half(w) * number(x & 0xffff0000u);
#endif
}

// As tile, of panels stored in BF16 with vectors in bfloat16.
template <int R, int C>
SEPARATE void pair_tile(const Matrix& m, long first, const Vectors& v, long b) {
    const uint16_t* x = static_cast<const uint16_t*>(v.x) + b * v.x_row;
    const long panel = m.columns * PANEL * Stored<BF16>::SIZE;
    const char* w = static_cast<const char*>(m.numbers) + first * panel;
    vec sum[R][C][PARTS] = {};
    for (long j = 0; j < m.columns; j += 2) {
        words pair[R][PARTS];
        UNROLL for (int y = 0; y < R; ++y)
            UNROLL for (int p = 0; p < PARTS; ++p)
                pair[y][p] = get_words(w + y * panel + j * PANEL * Stored<BF16>::SIZE + p * 4 * W);
        UNROLL for (int c = 0; c < C; ++c) {
            uint32_t in;
            std::memcpy(&in, x + c * v.x_row + j, sizeof in);
            UNROLL for (int y = 0; y < R; ++y)
                UNROLL for (int p = 0; p < PARTS; ++p) add_pair(sum[y][c][p], pair[y][p], in);
        }
    }
    put(sum, m, first, v, b);
}

// R panels of storage S as BF16 in `to`. scratch: as many floats.
template <int S, int R>
SEPARATE void unpack_pairs(const Matrix& m, long first, float* scratch, uint32_t* to) {
    const float* from = S == F32 ? static_cast<const float*>(m.numbers) + first * PANEL * m.columns : scratch;
    if (S != F32) unpack<S, R>(m, first, scratch);
    for (long pair = 0; pair < R * m.columns / 2; ++pair)
        for (long row = 0; row < PANEL; ++row) {
            const float* at = from + 2 * pair * PANEL + row;
            to[pair * PANEL + row] = to_bfloat16(at[0]) | uint32_t(to_bfloat16(at[PANEL])) << 16;
        }
}

// Panels [from, to) with vectors in bfloat16. scratch, pairs: R PANEL columns numbers, half as many words.
template <int S>
void pair_panels(const Matrix& m, long from, long to, const Vectors& v, float* scratch, uint32_t* pairs) {
    groups<TILE>(from, to, [&](auto R, long at) {
        if (S == BF16) {  // while these panels are multiplied, the next are fetched, a part with each tile of vectors
            const long panel = m.columns * PANEL * Stored<BF16>::SIZE, bytes = std::min<long>(R, to - at - R) * panel;
            const char* next = static_cast<const char*>(m.numbers) + (at + R) * panel;
            return cover(v.n, [&](auto C, long b) {
                for (long i = bytes * b / v.n / LINE * LINE; i < bytes * (b + C) / v.n; i += LINE)
                    __builtin_prefetch(next + i, 0, 2);
                pair_tile<R, C>(m, at, v, b);
            });
        }
        unpack_pairs<S, R>(m, at, scratch, pairs);
        const Matrix there{pairs, nullptr, m.rows - at * PANEL, m.columns};
        const Vectors moved{v.x, v.x_row, v.place(0, at * PANEL), v.y_row, v.n, v.narrow};
        cover(v.n, [&](auto C, long b) { pair_tile<R, C>(there, 0, moved, b); });
    });
}

// use(integral constant S) for the storage that a number names.
template <class Use>
inline void with_storage(int64_t storage, Use use) {
    if (storage == F32) use(std::integral_constant<int, F32>());
    else if (storage == BF16) use(std::integral_constant<int, BF16>());
    else use(std::integral_constant<int, INT8>());
}

}  // namespace
