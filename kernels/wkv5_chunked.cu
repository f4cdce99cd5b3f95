// WKV-5 on a GPU, the fast way: the time in chunks of 16 steps, all large sums as matrix products on the tensor cores.
//
// The plain kernels (wkv5_cuda.cu, with the equations) wait for one step after the other. Here a chunk is worked off at
// once. With t and s counted from 0 inside the chunk, S the state before it and d^n the decay of n steps,
//     y_t[i]   =  sum_j r_t[j] d[j]^t S[j, i]  +  sum_{s <= t} A[t, s] v_s[i]
//     A[t, s]  =  sum_j r_t[j] k_s[j] d[j]^(t-1-s)      for s < t,        A[t, t] = sum_j r_t[j] u[j] k_t[j]
//     S[j, i]  becomes  d[j]^16 S[j, i] + sum_s k_s[j] d[j]^(15-s) v_s[i]
// No exponent is negative, so no power overflows, however fast a channel decays. To keep it so inside A too, a pair of
// steps belongs to the level of the highest bit in which t and s differ (1, 2, 4 or 8): between them lies a multiple m
// of that bit, d^(t-1-s) = d^(t-m) d^(m-1-s), and each level is a product of two matrices. Where the channels of a warp
// decay slowly enough for d^-8 as a factor, which is the rule, all pairs are taken at once, around m = 8.
//
// Two kernels do everything, for backward in time is forward in time with other names. Q, the gradient of the state
// after a step, becomes d Q + r_t g_t^T from one step to the step before, as S becomes d S + k_t v_t^T. So
//     wkv5_values  gives y and the last state;  with k, r, g for r, k, v, backward in time: gv and the state's gradient
//     wkv5_keys    gives gr, gu and gw;         with k, r, g, v for r, k, v, g, backward in time: gk
// Nothing is kept from forward for backward. gw needs X = dS / d log d, which follows S: each power d^n of the second
// kernel is accompanied by n d^n, so that sums of positive exponents are never a difference of large ones.
//
// Precision: state, X and all sums are float; wkv5_tiles.h says how the tensor cores take them. For y in half and
// bfloat16, and for gradients in half, all that is no input is rounded to tf32: in half that adds about as much as
// rounding the result does, in bfloat16 far less. For the gradients of r, k and v in bfloat16 it is the sum of two
// bfloat16, and their error is that of rounding them; those of w, u and the state, in float, are off by some 5e-6. For
// float, inputs and all else are sums of two tf32; by emulation the errors are as small as those of float sums. Limits:
// float numbers below 1e-35 lose digits, and as d^-8 is a factor, up to 8e13, those below 1e-21 may where decays are
// fast; no number, and no result, may be above 1e24. An infinity or a NaN makes NaNs of its chunk, earlier steps too.
//
// A warp keeps 16 channels of the state (values here, keys there) against all N of the other kind, in the registers of
// the tensor cores' result: lane (g, q) = (lane / 4, lane % 4) has rows and columns g, 2 q, 2 q + 1 as in emulate.h.
// Which channel or step a row or column stands for is our choice. Of 16 channels, tile 0 has the even ones and tile 1
// the odd ones; of 16 steps, row or column g stands for t = g / 2 + 4 (g % 2), the other half of the rows for t + 8.
// Then a lane's share of a result is the channels 4 q to 4 q + 3 of steps t and t + 8, of a factor that is summed over
// time the channels 2 g and 2 g + 1 of steps q, q + 4, q + 8, q + 12: neighbours in memory. And a result is, as it lies
// in the registers, a factor of the next product: the state is read and written without moving a number between lanes.
//
// Costs at B 8, T 4096, H 64, N 64, bfloat16: forward moves 1.07 GB and multiplies for about 0.1 ms; an H200 takes 0.59.
// What limits is the way between registers and the memory inside a processor, shared and global numbers together: 128
// bytes a cycle, so that 16 bytes for each lane take four, whether lanes read the same or not. For y a warp needs 150
// such cycles a chunk for shared memory and 64 for rows of global memory: 84 % of all. Instructions a chunk and warp: 476
// for y, 667 for gv, 557 for gk, 969 for gr and gw, more for fast decays. A processor has four blocks: hence registers
// for four times 128 threads (three times where X is kept).
// Launch: grid B H, block 2 N; compute capability 8.0 or newer; T > 0; r.numel() < 2^31; arrays aligned to 16 bytes.
// Sources: as wkv5_cuda.cu; chunks for decays of a channel: "Gated Linear Attention" (arXiv 2312.06635).
#include "wkv5_cuda.cu"  // Decay, and the sum over the batch
#include "wkv5_tiles.h"   // products of tiles, and how numbers come to them

// [pairs of steps]
// A lane's part of A: columns s = q and q + 4 of row t (upper), of row t + 8 (left), and columns q + 8 and q + 12 of
// row t + 8 (lower). The rest of A has s > t.
struct Pairs { float upper[2], left[2], lower[2]; };

// The level of steps t and s: 0 if they are the same, -1 if s comes later.
__device__ inline int level(int t, int s) {
    const int differ = t ^ s;
    return t < s ? -1 : differ < 2 ? differ : differ < 4 ? 2 : differ < 8 ? 4 : 8;
}

// sum_j r_t[j] k_s[j] over 16 channels. Of both a lane gives steps t and t + 8.
template <How how, int m, int n>
__device__ inline Pairs pair_products(const Factor<how, 2, m>& r, const Factor<how, 1, n>& k_t,
                                      const Factor<how, 1, n>& k_t8) {
    float early[4] = {}, late[4] = {};
    product(early, r, k_t);
    product(late, r, k_t8);
    return {{early[0], early[1]}, {early[2], early[3]}, {late[2], late[3]}};
}
template <How how> __device__ inline Pairs pair_products(const float (&r)[2][4], const float (&k)[2][4]) {
    return pair_products(rounded<how>(r), rounded<how>(k[0]), rounded<how>(k[1]));
}

// A as the left factor of a product over s.
template <How how> __device__ inline OfFloats<how, 2> pairs_at(const Pairs& A) {
    const float rows[2][4] = {{A.upper[0], 0, A.upper[1], 0}, {A.left[0], A.lower[0], A.left[1], A.lower[1]}};
    return rounded<how>(rows);
}
// The same of some levels only: columns (q, q + 4) of upper and lower, or left. `all` = pairs_at(A) is taken to pieces;
// two tf32 are rounded anew instead, for so many words and their pieces do not fit the registers.
template <How how>
__device__ inline OfFloats<how, 2> chosen(const Pairs& A, OfFloats<how, 2> all, const bool (&columns)[2], bool left) {
    if constexpr (how == TWO_TF32) {
        Pairs part;
        for (int c = 0; c < 2; c++) {
            part.upper[c] = columns[c] ? A.upper[c] : 0;
            part.left[c] = left ? A.left[c] : 0;
            part.lower[c] = columns[c] ? A.lower[c] : 0;
        }
        all = pairs_at<how>(part);
    }
    for (int i = 0; i < 2 * float_terms<how>; i++) {
        unsigned* words = all.words[i / 2];
        const int c = i % 2;
        if constexpr (how == TWO_BF16) {  // (upper, 0), (left, lower)
            words[2 * c] = columns[c] ? words[2 * c] : 0;
            words[2 * c + 1] &= (columns[c] ? 0xffff0000 : 0) | (left ? 0xffff : 0);
        } else {
            words[4 * c + 2] = 0;  // as it was, but now the compiler knows
            if (how == TWO_TF32) continue;
            words[4 * c] = columns[c] ? words[4 * c] : 0;
            words[4 * c + 1] = left ? words[4 * c + 1] : 0;
            words[4 * c + 3] = columns[c] ? words[4 * c + 3] : 0;
        }
    }
    return all;
}

// Each warp knows the sum over its own 16 channels; the same lane of all warps adds them up.
template <int warps> __device__ inline void share_pairs(Shared<float> to, int warp, const Pairs& x) {
    const int place = warp * 32 + threadIdx.x % 32;
    const Pack<float, 4> four = {x.upper[0], x.upper[1], x.left[0], x.left[1]};
    const Pack<float, 2> two = {x.lower[0], x.lower[1]};
    store(to, place * 4, four);
    store(to, warps * 128 + place * 2, two);
}
template <int warps> __device__ inline Pairs sum_pairs(Shared<float> from) {
    Pairs sum = {};
    for (int warp = 0; warp < warps; warp++) {
        const int place = warp * 32 + threadIdx.x % 32;
        const Pack<float, 4> four = load<4>(from, place * 4);
        const Pack<float, 2> two = load<2>(from, warps * 128 + place * 2);
        for (int c = 0; c < 2; c++) {
            sum.upper[c] = warp ? sum.upper[c] + four[c] : four[c];
            sum.left[c] = warp ? sum.left[c] + four[c + 2] : four[c + 2];
            sum.lower[c] = warp ? sum.lower[c] + two[c] : two[c];
        }
    }
    return sum;
}

// [powers of the decay]
__device__ inline Decay decay_over(int steps, float log_d) {
    const float value = expf(steps * log_d);
    return {value, value > 0.5f ? (1 - value) + expm1f(steps * log_d) : 0};
}

// The same in one number, which costs one reading of shared memory: d^steps, or, above a half, d^steps - 1, below zero
// even where it rounds to nothing.
__device__ inline float decay_or_loss(int steps, float log_d) {
    const float value = expf(steps * log_d);
    return value > 0.5f ? fminf(expm1f(steps * log_d), -1e-37f) : value;
}
__device__ inline float decayed(float d, float x, float fresh) {  // d^steps x + fresh
    return fmaf(d < 0 ? 1 : 0, x, fmaf(d, x, fresh));
}

// A thread a channel; i: its place in w and u. Powers: d^-8 to d^8, in rows of ROW numbers.
template <int N, int ROW>
__device__ inline void fill_tables(Shared<float> powers, Shared<float> log_d, Shared<float> bonus, Global<const float> w,
                                   Global<const float> u, int i) {
    const int j = threadIdx.x;
    if (j >= N) return;
    const float log = -expf(w[i + j]);
    // d^-8 of fast decays is infinite: nobody reads it then
    for (int e = -8; e <= 8; e++) powers[(8 + e) * ROW + j] = e ? expf(e * log) : 1;  // log may be infinite
    log_d[j] = log;
    bonus[j] = u[i + j];
}
// The decay over so many steps, by the thread that has filled the channel's tables.
template <int N> __device__ inline void fill_decay(Shared<float> far, Shared<float> log_d, int steps) {
    const int j = threadIdx.x;
    if (j < N) far[j] = decay_or_loss(steps, log_d[j]);
}
template <int N>
__device__ inline void fill_decay(Shared<float> far, Shared<float> far_rest, Shared<float> log_d, int steps) {
    const int j = threadIdx.x;
    if (j >= N) return;
    const Decay d = decay_over(steps, log_d[j]);
    far[j] = d.value;
    far_rest[j] = d.rest;
}

// Whether d^-8 is at most exp(32) in the warp's 16 channels, from w[i] on: then it may be a factor. That costs a float
// two bits at most, for powers with large exponents are off by more, but what they weigh a fast channel has forgotten.
__device__ inline bool slow_decay(Global<const float> w, int i) {
    return __all_sync(0xffffffffu, expf(w[i + threadIdx.x % 16]) <= 4.0f);
}

// Blocks that a processor can hold at once: the compiler leaves 65536 registers / (blocks 2 N threads) to each.
template <int N, typename T, bool SLOPE> constexpr int blocks_at_once() {
    return N > 64 ? 1 : (sizeof(T) == 2 ? (SLOPE ? 192 : 256) : (SLOPE ? 128 : 192)) / N;
}
// [end]

// [values: arguments]
template <int N, typename T, bool REVERSED>
__global__ void __launch_bounds__(2 * N, blocks_at_once<N, T, false>())
wkv5_values(int64_t steps, int heads, Global<const T> r, Global<const T> k, Global<const T> v, Global<const float> w,
            Global<const float> u, Global<const float> state, Global<T> y, Global<float> last) {
    // [values: who am I]
    constexpr How how = how_to_take<T>(REVERSED);
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const int b = blockIdx.x / heads, h = blockIdx.x % heads, mine = 16 * warp;  // my warp's value channels
    const int t = g / 2 + g % 2 * 4;  // my rows are steps t and t + 8
    const int total = int(steps), row = heads * N;
    const unsigned step = REVERSED ? -row : row;  // unsigned: a step back is one forward that wraps round
    const unsigned first = (b * total + (REVERSED ? total - 1 : 0)) * row + h * N;  // where step 0 lies in r, k, v
    const unsigned at_t = first + mine + 4 * q + t * step, at_q = first + mine + 2 * g + q * step;
    const int64_t matrix = int64_t(blockIdx.x) * N * N;
    const int levels[2] = {level(t, q), level(t, q + 4)};

    // [values: shared memory]
    // Two arrays instead of eight: addresses with one base fit one register.
    SHARED(float, exchange, (2 * L + 4 + 12) * N);  // 4: gaps
    const Shared<float> r_far = exchange, k_far = r_far + L * N, parts = k_far + (L + 4) * N;
    constexpr int ROW = N + 4;  // rows t and t + 4 use other banks of the memory
    SHARED(float, powers, 17 * ROW + 3 * N);
    const Shared<float> log_d = powers + 17 * ROW, bonus = log_d + N, far = bonus + N;
    fill_tables<N, ROW>(powers, log_d, bonus, w, u, h * N);
    fill_decay<N>(far, log_d, L);
    __syncthreads();  // the powers are there
    const bool slow = slow_decay(w, h * N + mine);

    // [values: load the state]
    float S[N / 16][2][4];  // S[m][p][i]: key 16 m + 4 q + i % 2 * 2 + p, value mine + 2 g + i / 2
#pragma unroll
    for (int m = 0; m < N / 16; m++) {
        for (int e = 0; e < 4; e++) {
            const Pack<float, 2> two = load<2>(state + matrix, (16 * m + 4 * q + e) * N + mine + 2 * g);
            S[m][e % 2][e / 2] = two[0];
            S[m][e % 2][e / 2 + 2] = two[1];
        }
    }

    // [values: a chunk arrives]
    Waiting<T, 2, 4> r_next, k_next;
    Waiting<T, 4, 2> v_next;
    r_next.load_from(r, at_t, step, total - t);
    k_next.load_from(k, at_t, step, total - t);
    v_next.load_from(v, at_q, step, total - q);
    for (int start = 0; start < total; start += L) {
        const int next = start + L, left = total - next;
        float r_t[2][4], k_t[2][4];
        const auto r_exact = over_channels<how, 2>(r_next);
        r_next.unpack(r_t);
        k_next.unpack(k_t);
        r_next.load_from(r, at_t + next * step, step, left - t);

        // [values: pairs inside the chunk]
        float uk[2][4];
        const Pack<float, 4> u4 = load<4>(bonus, mine + 4 * q);
        for (int i = 0; i < 8; i++) uk[i / 4][i % 4] = u4[i % 4] * k_t[i / 4][i % 4];
        Pairs A = pair_products(r_exact, rounded<how>(uk[0]), rounded<how>(uk[1]));
        if (slow) {  // around step 8: d^(t-1-s) = d^(t-8) d^(7-s)
            for (int i = 0; i < 2; i++) {
                const Pack<float, 4> since = load<4>(powers, (t + 8 * i) * ROW + mine + 4 * q);
                const Pack<float, 4> until = load<4>(powers, (15 - t - 8 * i) * ROW + mine + 4 * q);
                for (int e = 0; e < 4; e++) r_t[i][e] *= since[e], k_t[i][e] *= until[e];
            }
            const Pairs fresh = pair_products<how>(r_t, k_t);
            for (int c = 0; c < 2; c++) {
                if (levels[c] > 0) A.upper[c] = fresh.upper[c], A.lower[c] = fresh.lower[c];
                A.left[c] = fresh.left[c];
            }
            const Pack<float, 4> d = load<4>(powers, 16 * ROW + mine + 4 * q);
            for (int i = 0; i < 8; i++) r_t[i / 4][i % 4] *= d[i % 4], k_t[i / 4][i % 4] *= d[i % 4];
        } else {  // with each level r and k take on one more d^bit: r where the step has the bit, k where it has not
            const auto k_exact = over_channels<how, 1>(k_next), k8_exact = over_channels<how, 1>(k_next, 1);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int bit = 1 << n;
                const Pairs fresh = n == 0 && how == TWO_BF16 ? pair_products(r_exact, k_exact, k8_exact)
                                                              : pair_products<how>(r_t, k_t);
                for (int c = 0; c < 2; c++) {
                    if (levels[c] == bit) A.upper[c] = fresh.upper[c], A.lower[c] = fresh.lower[c];
                    if (bit == 8) A.left[c] = fresh.left[c];
                }
                const Pack<float, 4> d = load<4>(powers, (8 + bit) * ROW + mine + 4 * q);
                for (int i = 0; i < 8; i++) {
                    if ((t + i / 4 * 8) & bit) r_t[i / 4][i % 4] *= d[i % 4];
                    if (!((t + i / 4 * 8) & bit)) k_t[i / 4][i % 4] *= d[i % 4];
                }
            }
        }
        for (int c = 0; c < 2; c++) {
            if (levels[c] < 0) A.upper[c] = A.lower[c] = 0;
        }

        // [values: give the others their share]
        // By now r_t is r_t d^t, and k_s is k_s d^(15-s).
        k_next.load_from(k, at_t + next * step, step, left - t);  // not before: registers are short above
        __syncthreads();  // all warps are done with the last chunk's
        share_rows<N>(r_far, warp, to_share<how>(r_t));
        share_columns<N, true, how, float_terms<how>>(k_far, warp, k_t, t);
        share_pairs<N / 16>(parts, warp, A);
        __syncthreads();  // all of it is there

        // [values: read the state]
        float out[2][4] = {};  // out[p][i]: step t + i / 2 * 8, value mine + 4 q + i % 2 * 2 + p
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            const auto rows = shared_rows<N, how, float_terms<how>>(r_far, m);
            for (int i = 0; i < 2; i++) {
                const float x[4] = {S[m][0][2 * i], S[m][1][2 * i], S[m][0][2 * i + 1], S[m][1][2 * i + 1]};
                product(out[i], rows, rounded<how>(x));
            }
        }
        // [values: read the pairs]
        A = sum_pairs<N / 16>(parts);
        const auto pairs = pairs_at<how>(A);
        const auto values = over_steps<how, 2>(v_next);
        for (int i = 0; i < 2; i++) product(out[i], pairs, over_steps<how, 1>(v_next, i));
        v_next.load_from(v, at_q + next * step, step, left - q);
        for (int i = 0; i < 2; i++) {
            Pack<T, 4> pack;
            for (int e = 0; e < 4; e++) pack[e] = from_float<T>(out[e % 2][e / 2 + 2 * i]);
            const int past = start + 8 * i;
            if (past + t < total) store(y, at_t + past * step, pack);
        }

        // [values: write the state]
        const bool full = next <= total;  // not `break`: the compiler would load k and v after it, too late
#pragma unroll
        for (int m = 0; full && m < N / 16; m++) {
            const Pack<float, 4> d = load<4>(far, 16 * m + 4 * q);
            for (int p = 0; p < 2; p++) {
                float fresh[4] = {};
                product(fresh, values, shared_columns<N, true, how, float_terms<how>>(k_far, m, p));
                for (int i = 0; i < 4; i++) {
                    float& x = S[m][p][i];
                    x = decayed(d[p + i % 2 * 2], x, fresh[i]);
                }
            }
        }
    }

    // [values: the steps that fill no chunk]
    // Their y is there. The state takes them one by one.
    __syncthreads();  // all warps are done with d^16
    fill_decay<N>(far, log_d, 1);
    __syncthreads();  // d is there
    for (int now = total / L * L; now < total; now++) {
        const Pack<T, 2> value = load<2>(v, at_q + (now - q) * step);
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            const Pack<T, 4> key = load<4>(k, at_t + (now - t) * step + (16 * m - mine));
            const Pack<float, 4> d = load<4>(far, 16 * m + 4 * q);
            for (int i = 0; i < 8; i++) {
                const int e = i % 4;
                float& x = S[m][e % 2][e / 2 + i / 4 * 2];
                x = decayed(d[e], x, to_float(key[e]) * to_float(value[i / 4]));
            }
        }
    }

    // [values: store the state]
#pragma unroll
    for (int m = 0; m < N / 16; m++) {
        for (int e = 0; e < 4; e++) {
            const Pack<float, 2> two = {S[m][e % 2][e / 2], S[m][e % 2][e / 2 + 2]};
            store(last + matrix, (16 * m + 4 * q + e) * N + mine + 2 * g, two);
        }
    }
}
// [end]

// [keys: arguments]
template <int N, typename T, bool REVERSED>
__global__ void __launch_bounds__(2 * N, blocks_at_once<N, T, !REVERSED>())
wkv5_keys(int64_t steps, int heads, Global<const T> r, Global<const T> k, Global<const T> v, Global<const float> w,
          Global<const float> u, Global<const float> state, Global<const T> gy, Global<const float> glast, Global<T> gr,
          Global<float> gw, Global<float> gu) {
    // [keys: who am I]
    constexpr How how = how_to_take<T>(true);
    constexpr bool SLOPE = !REVERSED;  // keep X, for gw; else r, glast, gw, gu are unused
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const int b = blockIdx.x / heads, h = blockIdx.x % heads, mine = 16 * warp;  // my warp's key channels
    const int t = g / 2 + g % 2 * 4;  // my rows are steps t and t + 8
    const int total = int(steps), row = heads * N;
    const unsigned step = REVERSED ? -row : row;  // unsigned: a step back is one forward that wraps round
    const unsigned first = (b * total + (REVERSED ? total - 1 : 0)) * row + h * N;
    const unsigned at_t = first + mine + 4 * q + t * step, at_q = first + mine + 2 * g + q * step;
    const int64_t matrix = int64_t(blockIdx.x) * N * N;
    const int levels[2] = {level(t, q), level(t, q + 4)};

    // [keys: shared memory]
    SHARED(float, exchange, (2 * L + 12) * N);
    const Shared<float> g_all = exchange, v_all = exchange + L * N, parts = exchange + 2 * L * N;
    constexpr int ROW = N + 4;
    SHARED(float, powers, 17 * ROW + 4 * N);
    const Shared<float> log_d = powers + 17 * ROW, bonus = log_d + N, far = bonus + N, far_rest = far + N;
    fill_tables<N, ROW>(powers, log_d, bonus, w, u, h * N);
    fill_decay<N>(far, far_rest, log_d, L);
    const bool slow = slow_decay(w, h * N + mine);
    // No barrier: the powers are read after the first one of a chunk.

    // [keys: load the state]
    float S[N / 16][2][4];  // S[m][p][i]: key mine + 2 g + i / 2, value 16 m + 4 q + i % 2 * 2 + p
    float X[SLOPE ? N / 16 : 1][2][4] = {};
    float log_sum[4] = {}, u_sum[4] = {};  // of gw and gu, for keys mine + 4 q to mine + 4 q + 3
#pragma unroll
    for (int m = 0; m < N / 16; m++) {
        for (int p = 0; p < 2; p++) {
            const Pack<float, 4> four = load<4>(state + matrix, (mine + 2 * g + p) * N + 16 * m + 4 * q);
            for (int e = 0; e < 4; e++) S[m][e % 2][e / 2 + 2 * p] = four[e];
        }
    }

    // [keys: a chunk arrives]
    Waiting<T, 2, 4> g_next, v_next, r_now;
    Waiting<T, 4, 2> k_next;
    g_next.load_from(gy, at_t, step, total - t);
    v_next.load_from(v, at_t, step, total - t);
    k_next.load_from(k, at_q, step, total - q);
    for (int start = 0; start < total; start += L) {
        const int next = start + L, left = total - next;

        // [keys: give the others their share]
        const auto v_exact = over_channels<how, 1>(v_next), v8_exact = over_channels<how, 1>(v_next, 1);  // t, t + 8
        const Pairs of_warp = pair_products(over_channels<how, 2>(g_next), v_exact, v8_exact);  // g_t . v_s
        __syncthreads();  // all warps are done with the last chunk's
        share_rows<N>(g_all, warp, to_share<how>(g_next));
        share_columns<N, false, how, input_terms<how>>(v_all, warp, v_next, t);
        share_pairs<N / 16>(parts, warp, of_warp);
        __syncthreads();  // all of it is there
        g_next.load_from(gy, at_t + next * step, step, left - t);
        v_next.load_from(v, at_t + next * step, step, left - t);

        // [keys: read the state]
        // S g_t and X g_t, [p][i]: step t + i / 2 * 8, key mine + 4 q + i % 2 * 2 + p
        float out[2][4] = {}, slope[2][4] = {};
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            const auto rows = shared_rows<N, how, input_terms<how>>(g_all, m);
            for (int i = 0; i < 2; i++) {
                const float x[4] = {S[m][0][2 * i], S[m][1][2 * i], S[m][0][2 * i + 1], S[m][1][2 * i + 1]};
                product(out[i], rows, rounded<how>(x));
                if constexpr (SLOPE) {
                    const float y[4] = {X[m][0][2 * i], X[m][1][2 * i], X[m][0][2 * i + 1], X[m][1][2 * i + 1]};
                    product(slope[i], rows, rounded<how>(y));
                }
            }
        }

        // [keys: pairs inside the chunk]
        // slope is the derivative of out by log d. k_t[n][p]: step q + 4 n, key mine + 2 g + p.
        const Pairs A = sum_pairs<N / 16>(parts);
        const auto all_pairs = pairs_at<how>(A);
        float k_t[4][2], r_t[2][4];
        k_next.unpack(k_t);
        if (slow) {
            // Around step 8: d^t (S g_t) + sum_s A[t, s] d^(t-1-s) k_s
            //               = d^(t-8) (d^8 (S g_t) + sum_s A[t, s] d^(7-s) k_s)
            for (int n = 0; n < 4; n++) {
                const Pack<float, 2> until = load<2>(powers, (15 - q - 4 * n) * ROW + mine + 2 * g);
                for (int p = 0; p < 2; p++) k_t[n][p] *= until[p];
            }
            const Pack<float, 4> d8 = load<4>(powers, 16 * ROW + mine + 4 * q);
            for (int i = 0; i < 8; i++) {
                float &x = out[i % 2][i / 2], &y = slope[i % 2][i / 2];
                const float power = d8[i % 2 + i / 2 % 2 * 2];
                if (SLOPE) y = fmaf(float(t + i / 4 * 8), x, y) * power;
                x *= power;
            }
            const bool earlier[2] = {levels[0] > 0, levels[1] > 0};
            Pairs distant;
            for (int c = 0; c < 2; c++) {
                const int between = t - 1 - q - 4 * c;  // steps between s and t
                distant.upper[c] = fmaxf(between, 0) * A.upper[c];
                distant.lower[c] = fmaxf(between, 0) * A.lower[c];
                distant.left[c] = (between + 8) * A.left[c];
            }
            const auto pairs = chosen<how>(A, all_pairs, earlier, true), weighted = pairs_at<how>(distant);
            for (int p = 0; p < 2; p++) {
                const float x[4] = {k_t[0][p], k_t[2][p], k_t[1][p], k_t[3][p]};
                const auto keys = rounded<how>(x);
                product(out[p], pairs, keys);
                if (SLOPE) product(slope[p], weighted, keys);
            }
            for (int i = 0; i < 2; i++) {
                const Pack<float, 4> since = load<4>(powers, (t + 8 * i) * ROW + mine + 4 * q);
                for (int e = 0; e < 4; e++) {
                    out[e % 2][e / 2 + 2 * i] *= since[e];
                    if (SLOPE) slope[e % 2][e / 2 + 2 * i] *= since[e];
                }
            }
            const Pack<float, 2> d8_keys = load<2>(powers, 16 * ROW + mine + 2 * g);
            for (int n = 0; n < 4; n++) {
                for (int p = 0; p < 2; p++) k_t[n][p] *= d8_keys[p];
            }
        } else {
            // From the state before the chunk forwards: what comes from before a step with the bit decays by d^bit on
            // its way over the pairs of that level, which are added to it.
#pragma unroll
            for (int n = 3; n >= 0; n--) {
                const int bit = 1 << n;
                const Pack<float, 4> d = load<4>(powers, (8 + bit) * ROW + mine + 4 * q);
                for (int i = 0; i < 8; i++) {
                    if ((t + i / 4 * 8) & bit) {
                        float &x = out[i % 2][i / 2], &y = slope[i % 2][i / 2];
                        const float power = d[i % 2 + i / 2 % 2 * 2];
                        if (SLOPE) y = fmaf(bit, x, y) * power;
                        x *= power;
                    }
                }
                const bool here[2] = {levels[0] == bit, levels[1] == bit};
                const auto pairs = chosen<how>(A, all_pairs, here, bit == 8);
                for (int p = 0; p < 2; p++) {
                    float x[4] = {}, y[4] = {};
                    for (int i = 0; i < 4; i++) {
                        if (bit == 8 && i % 2) continue;  // level 8 has no s from 8 on
                        const int distance = bit - 1 - (q + 4 * in_order(i)) % bit;  // from s to the end of its half
                        x[i] = k_t[in_order(i)][p] * powers[(8 + distance) * ROW + mine + 2 * g + p];
                        y[i] = distance * x[i];
                    }
                    product(out[p], pairs, rounded<how>(x));
                    if (SLOPE && bit > 1) product(slope[p], pairs, rounded<how>(y));
                }
            }
            const Pack<float, 2> d8 = load<2>(powers, 16 * ROW + mine + 2 * g);
            for (int n = 0; n < 4; n++) {
                const Pack<float, 2> fall = load<2>(powers, (15 - q - 4 * (n % 2)) * ROW + mine + 2 * g);
                for (int p = 0; p < 2; p++) k_t[n][p] *= n < 2 ? fall[p] * d8[p] : fall[p];
            }
        }

        // [keys: the step itself]
        if (SLOPE) r_now.load_from(r, at_t + start * step, step, total - start - t);
        float own[2][4] = {};  // k_t (v_t . g_t)
        const bool diagonal[2] = {levels[0] == 0, levels[1] == 0};
        const auto same = chosen<how>(A, all_pairs, diagonal, false);
        for (int p = 0; p < 2; p++) product(own[p], same, over_steps<how, 1>(k_next, p));
        k_next.load_from(k, at_q + next * step, step, left - q);
        const Pack<float, 4> u4 = load<4>(bonus, mine + 4 * q);
        if (SLOPE) r_now.unpack(r_t);
        for (int i = 0; i < 2; i++) {
            Pack<T, 4> pack;
            if (start + t + 8 * i < total) {
                for (int e = 0; e < 4; e++) {
                    const float now = own[e % 2][e / 2 + 2 * i];
                    pack[e] = from_float<T>(fmaf(u4[e], now, out[e % 2][e / 2 + 2 * i]));
                    if (SLOPE) {
                        log_sum[e] = fmaf(r_t[i][e], slope[e % 2][e / 2 + 2 * i], log_sum[e]);
                        u_sum[e] = fmaf(r_t[i][e], now, u_sum[e]);
                    }
                }
                store(gr, at_t + (start + 8 * i) * step, pack);
            }
        }

        // [keys: write the state]
        if (start + L > total) break;
        const Pack<float, 2> d = load<2>(far, mine + 2 * g), rest = load<2>(far_rest, mine + 2 * g);
        float late[2][4], late_slope[2][4];  // k_s d^(15-s) and its derivative
        for (int i = 0; i < 8; i++) {
            const int n = in_order(i % 4), p = i / 4;
            late[p][i % 4] = k_t[n][p];
            late_slope[p][i % 4] = (L - 1 - q - 4 * n) * k_t[n][p];
        }
        const auto keys = rounded<how>(late), slopes = rounded<how>(late_slope);
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            for (int p = 0; p < 2; p++) {
                float fresh[4] = {}, fresh_slope[4] = {};
                const auto values = shared_columns<N, false, how, input_terms<how>>(v_all, m, p);
                product(fresh, keys, values);
                if (SLOPE) product(fresh_slope, slopes, values);
                for (int i = 0; i < 4; i++) {
                    float& x = S[m][p][i];
                    if (SLOPE) {
                        float& y = X[m][p][i];
                        y = fmaf(L, x, y);
                        y = fmaf(d[i / 2], y, fmaf(rest[i / 2], y, fresh_slope[i]));
                    }
                    x = fmaf(d[i / 2], x, fmaf(rest[i / 2], x, fresh[i]));
                }
            }
        }
    }
    if (!SLOPE) return;

    // [keys: the steps that fill no chunk]
    __syncthreads();  // all warps are done with d^16
    fill_decay<N>(far, far_rest, log_d, 1);
    __syncthreads();  // d is there
    const Pack<float, 2> d = load<2>(far, mine + 2 * g), rest = load<2>(far_rest, mine + 2 * g);
    for (int now = total / L * L; now < total; now++) {
        const Pack<T, 2> key = load<2>(k, at_q + (now - q) * step);
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            const Pack<T, 4> value = load<4>(v, at_t + (now - t) * step + (16 * m - mine));
            for (int i = 0; i < 8; i++) {
                const int e = i % 4;
                float &x = S[m][e % 2][e / 2 + i / 4 * 2], &y = X[SLOPE ? m : 0][e % 2][e / 2 + i / 4 * 2];
                y += x;
                y = fmaf(d[i / 4], y, rest[i / 4] * y);
                x = fmaf(d[i / 4], x, fmaf(rest[i / 4], x, to_float(key[i / 4]) * to_float(value[e])));
            }
        }
    }

    // [keys: the last state's share]
    float share[2] = {};  // of keys mine + 2 g and mine + 2 g + 1
#pragma unroll
    for (int m = 0; m < N / 16; m++) {
        for (int p = 0; p < 2; p++) {
            const Pack<float, 4> four = load<4>(glast + matrix, (mine + 2 * g + p) * N + 16 * m + 4 * q);
            for (int e = 0; e < 4; e++) {
                share[p] = fmaf(four[e], X[SLOPE ? m : 0][e % 2][e / 2 + 2 * p], share[p]);
            }
        }
    }

    // [keys: sums over the lanes]
    for (int p = 0; p < 2; p++) {
        for (int other = 1; other < 4; other *= 2) share[p] += __shfl_xor_sync(0xffffffffu, share[p], other);
    }
    const Pack<float, 4> log4 = load<4>(log_d, mine + 4 * q);
    Pack<float, 4> w_pack, u_pack;
    for (int e = 0; e < 4; e++) {
        for (int other = 4; other < 32; other *= 2) {
            log_sum[e] += __shfl_xor_sync(0xffffffffu, log_sum[e], other);
            u_sum[e] += __shfl_xor_sync(0xffffffffu, u_sum[e], other);
        }
        const float of_key = __shfl_sync(0xffffffffu, share[e % 2], (2 * q + e / 2) * 4);  // of key mine + 4 q + e
        w_pack[e] = log4[e] * (log_sum[e] + of_key);
        u_pack[e] = u_sum[e];
    }
    if (g == 0) {  // (B, H, N): the batch is summed by wkv5_sum_over_batch
        store(gw, int64_t(blockIdx.x) * N + mine + 4 * q, w_pack);
        store(gu, int64_t(blockIdx.x) * N + mine + 4 * q, u_pack);
    }
}
// [end]
