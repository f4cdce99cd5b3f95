// Products of tiles by the 32 lanes of a warp on the tensor cores, and how numbers come to them: from memory, from
// registers, and from other warps by shared memory. What they are for, and which channel and step is whose, is told at
// the head of wkv5_chunked.cu.
//
// In a product d += a b, a is 16 x 16 and b is 16 x 8. Lane (g, q) = (lane / 4, lane % 4) has of d rows g and g + 8 and
// columns 2 q and 2 q + 1, of a rows g and g + 8, of b column g, and of the 16 indices that are summed over four. Which
// four does not matter, as long as a and b agree.
//
// The tensor cores take no float, but tf32 (10 bits of fraction) and bfloat16 (7 bits). Half and bfloat16 inputs are
// exact as tf32, bfloat16 also as itself. A float is rounded to tf32, or it is the sum of two terms, high and low. Then
// a product becomes three (low times low is left out), or two if the other factor is exact in one term. Two bfloat16
// have 16 bits together, two tf32 have 22; but of bfloat16 a product takes 16 indices at once, of tf32 eight.
#pragma once
#include "emulate.h"

constexpr int L = 16;  // steps of a chunk

// [factors]
// How the tensor cores take a float: rounded to one tf32, or as a sum, high + low, of two tf32 or of two bfloat16.
enum How { ONE_TF32, TWO_TF32, TWO_BF16 };

template <typename T> constexpr bool is_bf16 = false;
template <> constexpr bool is_bf16<__nv_bfloat16> = true;
template <typename T> __device__ constexpr How how_to_take(bool gradient) {
    return sizeof(T) == 4 ? TWO_TF32 : gradient && is_bf16<T> ? TWO_BF16 : ONE_TF32;
}

// A product sums over 16 indices. A lane has four of them, in two rows of the left factor, one column of the right one.
template <How how, int rows, int terms> struct Factor { unsigned words[terms][rows * (how == TWO_BF16 ? 2 : 4)]; };
// Inputs are exact in one term where they are half or bfloat16.
template <How how> constexpr int float_terms = how == ONE_TF32 ? 1 : 2;
template <How how> constexpr int input_terms = how == TWO_TF32 ? 2 : 1;
template <How how, int rows> using OfFloats = Factor<how, rows, float_terms<how>>;
template <How how, int rows> using OfInputs = Factor<how, rows, input_terms<how>>;

// [a product of tiles]
template <How how, int m, int n>
__device__ inline void product(float d[4], const Factor<how, 2, m>& a, const Factor<how, 1, n>& b) {  // d += a b
    for (int i = m - 1; i >= 0; i--) {
        for (int j = n - 1; j >= 0; j--) {
            if (i && j) continue;  // low times low is too small to matter
            if constexpr (how == TWO_BF16) {
                mma_m16n8k16_bf16(d, a.words[i], b.words[j]);
            } else {
                mma_m16n8k8_tf32(d, a.words[i], b.words[j]);
                mma_m16n8k8_tf32(d, a.words[i] + 4, b.words[j] + 2);
            }
        }
    }
}

// [rounding]
struct Two { unsigned first, second; };
__device__ inline Two two_bf16(float a, float b) {  // high parts of both in the first word, low parts in the second
    const unsigned high = pack_bf16(a, b);
    return {high, pack_bf16(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000))};
}

template <How how, int rows> __device__ inline OfFloats<how, rows> rounded(const float (&x)[rows][4]) {
    OfFloats<how, rows> f;
    for (int i = 0; i < rows * (how == TWO_BF16 ? 2 : 4); i++) {
        const int row = i % rows, c = i / rows;
        if constexpr (how == TWO_BF16) {
            const Two both = two_bf16(x[row][2 * c], x[row][2 * c + 1]);
            f.words[0][i] = both.first;
            f.words[1][i] = both.second;
        } else {
            f.words[0][i] = to_tf32(x[row][c]);
            if constexpr (how == TWO_TF32) f.words[1][i] = to_tf32(x[row][c] - __uint_as_float(f.words[0][i]));
        }
    }
    return f;
}
template <How how> __device__ inline OfFloats<how, 1> rounded(const float (&x)[4]) {
    const float rows[1][4] = {{x[0], x[1], x[2], x[3]}};
    return rounded<how>(rows);
}

// For numbers that need no rounding: half and bfloat16 inputs, and what was rounded before. TWO_TF32 splits them.
template <How how, int rows> __device__ inline OfInputs<how, rows> exact(const float (&x)[rows][4]) {
    static_assert(how != TWO_BF16, "bfloat16 comes in words, see over_channels and over_steps");
    OfInputs<how, rows> f;
    for (int i = 0; i < 4 * rows; i++) f.words[0][i] = __float_as_uint(x[i % rows][i / rows]);
    if constexpr (how == TWO_TF32) f = rounded<how>(x);
    return f;
}

// [a lane's share of a chunk]
// `count` steps of n channels, kept as words: the next chunk waits in registers, two bfloat16 in one.
template <typename T, int count, int n> struct Waiting {
    unsigned words[count][n * sizeof(T) / 4];

    // Steps t, t + 16 / count, ... of x, whose step t lies at i; `left` = steps from t to the end. In place of steps past
    // the end comes the last one: no result depends on it. To leave them out costs more: the compiler then loads to other
    // registers, and waits for the memory right there to copy them.
    __device__ void load_from(Global<const T> x, unsigned i, unsigned step, int left) {
        for (int c = 0; c < count; c++) {
            const int later = L / count * c;
            const Pack<T, n> pack = load<n>(x, i + (later < left ? later : left - 1) * step);
            memcpy(words[c], &pack, sizeof pack);
        }
    }
    __device__ float number(int c, int e) const {
        const unsigned word = words[c][e * sizeof(T) / 4];
        const uint16_t half = uint16_t(word >> e % 2 * 16);
        T x;
        if (sizeof(T) == 2) memcpy(&x, &half, 2);
        else memcpy(&x, &word, sizeof x);
        return to_float(x);
    }
    __device__ void unpack(float (&x)[count][n]) const {
        for (int i = 0; i < count * n; i++) x[i / n][i % n] = number(i / n, i % n);
    }
};

// [inputs as factors]
// They lose nothing. Summed over four channels: steps t and t + 8, or the one of them that is named.
template <How how, int rows, typename T>
__device__ inline OfInputs<how, rows> over_channels(const Waiting<T, 2, 4>& x, int first = 0) {
    if constexpr (how == TWO_BF16) {
        OfInputs<how, rows> f;
        for (int i = 0; i < 2 * rows; i++) f.words[0][i] = x.words[first + i % rows][i / rows];
        return f;
    } else {
        float y[rows][4];
        for (int i = 0; i < 4 * rows; i++) y[i / 4][i % 4] = x.number(first + i / 4, i % 4);
        return exact<how>(y);
    }
}

// Half e of two words, side by side.
__device__ inline unsigned halves(unsigned a, unsigned b, int e) {
    return e ? a >> 16 | (b & 0xffff0000) : (a & 0xffff) | b << 16;
}

// Summed over four steps, which stand in the order q, q + 8, q + 4, q + 12 everywhere: two channels, or the one named.
__device__ inline int in_order(int c) { return c / 2 + c % 2 * 2; }  // its place among q, q + 4, q + 8, q + 12

template <How how, int rows, typename T>
__device__ inline OfInputs<how, rows> over_steps(const Waiting<T, 4, 2>& x, int first = 0) {
    if constexpr (how == TWO_BF16) {
        OfInputs<how, rows> f;
        for (int i = 0; i < 2 * rows; i++) {
            f.words[0][i] = halves(x.words[i / rows][0], x.words[i / rows + 2][0], first + i % rows);
        }
        return f;
    } else {
        float y[rows][4];
        for (int i = 0; i < 4 * rows; i++) y[i / 4][i % 4] = x.number(in_order(i % 4), first + i / 4);
        if constexpr (how == ONE_TF32 && rows == 2) return rounded<how>(y);  // so the compiler places them side by side
        else return exact<how>(y);
    }
}

// [sharing factors]
// A lane has channels 4 q to 4 q + 3 of two steps t, t + 8. As a factor whose rows are steps, summed over channels, the
// same lane of every warp wants them; as one with channels in columns, summed over steps, lane (g, q) wants channel 2 g
// (tile 0) or 2 g + 1 (tile 1). Two parts of four words a lane and warp: bfloat16 as they are multiplied, one part for
// inputs; tf32 as floats, for there is no room for more: who takes them splits them.
template <int N> __device__ inline int row_place(int part, int warp, int lane) {
    return (warp * 32 + lane) * 4 + part * (N / 16 * 128);  // so the compiler sees one address and two offsets
}
// GAP: a gap after every eight lanes, so that those that write at once, with other q, meet other banks of the memory.
// It takes one more register.
template <int N, bool GAP> __device__ inline int column_place(int part, int warp, int lane) {
    if (!GAP) return row_place<N>(part, warp, lane);
    return warp * 160 + lane * 4 + lane / 8 * 8 + part * (N / 16 * 160);
}

template <How how> __device__ inline auto to_share(const float (&x)[2][4]) {
    if constexpr (how == TWO_TF32) return exact<ONE_TF32>(x);  // floats as they are
    else return rounded<how>(x);
}
template <How how, typename T> __device__ inline auto to_share(const Waiting<T, 2, 4>& x) {
    return over_channels<how == TWO_TF32 ? ONE_TF32 : how, 2>(x);
}
template <int N, How how, int terms>
__device__ inline void share_rows(Shared<float> to, int warp, const Factor<how, 2, terms>& f) {
    constexpr int parts = how == TWO_BF16 ? 1 : 2;  // of a term
    for (int part = 0; part < terms * parts; part++) {
        Pack<float, 4> pack;
        for (int e = 0; e < 4; e++) pack[e] = __uint_as_float(f.words[part / parts][part % parts * 4 + e]);
        store(to, row_place<N>(part, warp, threadIdx.x % 32), pack);
    }
}
template <int N, How how, int terms>
__device__ inline Factor<how, 2, terms> shared_rows(Shared<float> from, int warp) {
    Factor<how, 2, terms> f;
    float x[2][4];
    for (int part = 0; part < (how == TWO_BF16 ? terms : 2); part++) {
        const Pack<float, 4> pack = load<4>(from, row_place<N>(part, warp, threadIdx.x % 32));
        for (int e = 0; e < 4; e++) {
            if constexpr (how == TWO_BF16) f.words[part][e] = __float_as_uint(pack[e]);
            else x[e % 2][2 * part + e / 2] = pack[e];
        }
    }
    if constexpr (how != TWO_BF16) f = exact<how>(x);
    return f;
}

// Channel e of both steps, as words to share.
template <How how> __device__ inline Two both_steps(const float (&x)[2][4], int e) {
    if constexpr (how == TWO_BF16) return two_bf16(x[0][e], x[1][e]);
    if constexpr (how == ONE_TF32) return {to_tf32(x[0][e]), to_tf32(x[1][e])};
    return {__float_as_uint(x[0][e]), __float_as_uint(x[1][e])};
}
template <How how, typename T> __device__ inline Two both_steps(const Waiting<T, 2, 4>& x, int e) {
    if constexpr (how == TWO_BF16) return {halves(x.words[0][e / 2], x.words[1][e / 2], e % 2), 0};
    return {__float_as_uint(x.number(0, e)), __float_as_uint(x.number(1, e))};
}
template <int N, bool GAP, How how, int terms, typename X>
__device__ inline void share_columns(Shared<float> to, int warp, const X& x, int t) {
    for (int e = 0; e < 4; e++) {
        const Two words = both_steps<how>(x, e);
        const int lane = (2 * (threadIdx.x % 4) + e / 2) * 4 + t % 4;
        if constexpr (how == TWO_BF16) {
            const int place = column_place<N, GAP>(0, warp, lane) + e % 2 * 2 + t / 4;
            to[place] = __uint_as_float(words.first);
            if (terms == 2) to[place + column_place<N, GAP>(1, 0, 0)] = __uint_as_float(words.second);
        } else {
            const Pack<float, 2> pack = {__uint_as_float(words.first), __uint_as_float(words.second)};
            store(to, column_place<N, GAP>(e % 2, warp, lane) + t / 4 * 2, pack);
        }
    }
}
template <int N, bool GAP, How how, int terms>
__device__ inline Factor<how, 1, terms> shared_columns(Shared<float> from, int warp, int tile) {
    if constexpr (how == TWO_BF16) {
        Factor<how, 1, terms> f;
        for (int part = 0; part < terms; part++) {
            const Pack<float, 4> both = load<4>(from, column_place<N, GAP>(part, warp, threadIdx.x % 32));
            for (int e = 0; e < 2; e++) f.words[part][e] = __float_as_uint(both[2 * tile + e]);
        }
        return f;
    } else {
        const Pack<float, 4> pack = load<4>(from, column_place<N, GAP>(tile, warp, threadIdx.x % 32));
        const float x[1][4] = {{pack[0], pack[1], pack[2], pack[3]}};
        return exact<how>(x);
    }
}
