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
// decay slowly enough for d^-8 as a factor, which is the rule, y takes all pairs at once, around m = 8.
//
// Two kernels do everything, for backward in time is forward in time with other names. Q, the gradient of the state
// after a step, becomes d Q + r_t g_t^T from one step to the step before, as S becomes d S + k_t v_t^T. So
//     wkv5_values  gives y and the last state;  with k, r, g for r, k, v, backward in time: gv and the state's gradient
//     wkv5_keys    gives gr, gu and gw;         with k, r, g, v for r, k, v, g, backward in time: gk
// Nothing is kept from forward for backward. gw needs X = dS / d log d, which follows S: each power d^n of the second
// kernel is accompanied by n d^n, so that sums of positive exponents are never a difference of large ones.
//
// Precision: state, X and all sums are float. The tensor cores' tf32 has 10 bits of fraction, as many as half and more
// than bfloat16: what comes from those is exact, and rounding the rest costs less than rounding y to them does. Float
// inputs are split in two tf32 (FINE below), three products for one, with errors as small as those of float sums. Two
// exceptions: float numbers below 1e-35 lose digits in the split, and as d^-8 is a factor, r and k must stay below 1e34.
//
// A warp keeps 16 channels of the state (values here, keys there) against all N of the other kind, in the registers of
// the tensor cores' result: lane (g, q) = (lane / 4, lane % 4) has rows and columns g, 2 q, 2 q + 1 as in emulate.h.
// Which channel or step a row or column stands for is our choice. Of 16 channels, tile 0 has the even ones and tile 1
// the odd ones; of 16 steps, row or column g stands for t = g / 2 + 4 (g % 2), the other half of the rows for t + 8.
// Then a lane's share of a result is the channels 4 q to 4 q + 3 of steps t and t + 8, of a factor that is summed over
// time the channels 2 g and 2 g + 1 of steps q, q + 4, q + 8, q + 12: neighbours in memory. And a result is, as it lies
// in the registers, a factor of the next product: the state is read and written without moving a number between lanes.
//
// Costs at B 8, T 4096, H 64, N 64, bfloat16: forward moves 1.07 GB and multiplies for about 0.1 ms. What limits is the
// number of instructions: each of a block's 4 warps issues some 440 a chunk (530 for fast decays, 930 for gr with gw),
// and a processor has four blocks: hence registers for four times 128 threads (three times where X is kept). A NaN
// spreads over its chunk.
// Launch: grid B H, block 2 N; compute capability 8.0 or newer; any T; r.numel() < 2^31; arrays aligned to 16 bytes.
// Sources: as wkv5_cuda.cu; chunks for decays of a channel: "Gated Linear Attention" (arXiv 2312.06635).
#include "wkv5_cuda.cu"  // Decay, and the sum over the batch

constexpr int L = 16;  // steps of a chunk

// [a product of tiles]
// Factors as the tensor cores take them. FINE: the sum of two tf32, high + low, instead of one.
template <bool FINE, int n> struct Factor { unsigned high[n], low[n]; };

template <bool FINE, int n> __device__ inline Factor<FINE, n> rounded(const float (&x)[n]) {
    Factor<FINE, n> f;
    for (int i = 0; i < n; i++) {
        f.high[i] = to_tf32(x[i]);
        if (FINE) f.low[i] = to_tf32(x[i] - __uint_as_float(f.high[i]));
    }
    return f;
}

// For numbers that are a tf32 already: half and bfloat16 inputs, and what was rounded before.
template <bool FINE, int n> __device__ inline Factor<FINE, n> exact(const float (&x)[n]) {
    Factor<FINE, n> f = {};
    for (int i = 0; i < n && !FINE; i++) f.high[i] = __float_as_uint(x[i]);
    return FINE ? rounded<FINE>(x) : f;
}

template <bool FINE>
__device__ inline void product(float d[4], const Factor<FINE, 4>& a, const Factor<FINE, 2>& b) {  // d += a b
    if (FINE) {
        mma_m16n8k8_tf32(d, a.low, b.high);
        mma_m16n8k8_tf32(d, a.high, b.low);
    }
    mma_m16n8k8_tf32(d, a.high, b.high);
}

// [a lane's share of a chunk]
// `count` steps of n channels, kept as words: the next chunk waits in registers, two bfloat16 in one.
template <typename T, int count, int n> struct Waiting {
    unsigned words[count][n * sizeof(T) / 4] = {};

    // Steps t, t + 16 / count, ... of x, whose step t lies at i; `left` = steps from t to the end. Steps past the end
    // leave what was there: numbers that no result depends on.
    __device__ void load_from(Global<const T> x, unsigned i, unsigned step, int left) {
        for (int c = 0; c < count; c++) {
            const int later = L / count * c;
            if (left > later) {
                const Pack<T, n> pack = load<n>(x, i + later * step);
                memcpy(words[c], &pack, sizeof pack);
            }
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

// [sharing factors]
// x: channels 4 q to 4 q + 3 of two steps t, t + 8. The first as a factor whose rows are steps and whose columns are
// channels, which the same lane of every warp wants; the second as one with channels in columns and steps in rows,
// which lane (g, q) wants for channel 2 g (tile 0) or 2 g + 1 (tile 1) and steps q, q + 8, q + 4, q + 12.
__device__ inline void share_rows(Shared<float> to, int warp, const float (&x)[2][4]) {
    for (int p = 0; p < 2; p++) {
        const Pack<float, 4> pack = {x[0][p], x[1][p], x[0][p + 2], x[1][p + 2]};
        store(to, ((2 * warp + p) * 32 + threadIdx.x % 32) * 4, pack);
    }
}
__device__ inline void share_columns(Shared<float> to, int warp, const float (&x)[2][4], int t) {
    for (int e = 0; e < 4; e++) {
        const int lane = (2 * (threadIdx.x % 4) + e / 2) * 4 + t % 4;
        const Pack<float, 2> pack = {x[0][e], x[1][e]};
        store(to, ((2 * warp + e % 2) * 32 + lane) * 4 + t / 4 * 2, pack);
    }
}
__device__ inline Pack<float, 4> shared_factor(Shared<float> from, int tile) {
    return load<4>(from, (tile * 32 + threadIdx.x % 32) * 4);
}

// [pairs of steps]
// A lane's part of A: columns s = q and q + 4 of row t (upper), of row t + 8 (left), and columns q + 8 and q + 12 of
// row t + 8 (lower). The rest of A has s > t.
struct Pairs { float upper[2], left[2], lower[2]; };

// The level of steps t and s: 0 if they are the same, -1 if s comes later.
__device__ inline int level(int t, int s) {
    const int differ = t ^ s;
    return t < s ? -1 : differ < 2 ? differ : differ < 4 ? 2 : differ < 8 ? 4 : 8;
}

// sum_j r_t[j] k_s[j] over 16 channels; of both factors a lane gives steps t and t + 8.
template <bool FINE, bool EXACT_R, bool EXACT_K>
__device__ inline Pairs pair_products(const float (&r)[2][4], const float (&k)[2][4]) {
    float early[4] = {}, late[4] = {};
    for (int n = 0; n < 4; n += 2) {
        const float a[4] = {r[0][n], r[1][n], r[0][n + 1], r[1][n + 1]};
        const float b[2] = {k[0][n], k[0][n + 1]}, c[2] = {k[1][n], k[1][n + 1]};
        const Factor<FINE, 4> rows = EXACT_R ? exact<FINE>(a) : rounded<FINE>(a);
        product(early, rows, EXACT_K ? exact<FINE>(b) : rounded<FINE>(b));
        product(late, rows, EXACT_K ? exact<FINE>(c) : rounded<FINE>(c));
    }
    return {{early[0], early[1]}, {early[2], early[3]}, {late[2], late[3]}};
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

// A thread a channel; i: its place in w and u. far + far_rest = d^16. The powers, in rows of ROW numbers: d^0 to d^8; for
// PAIRS d^-8 to d^8 and then d^7 to d^-8, so that what step t needs for r and for k lies at fixed places from row t on.
template <int N, int ROW, bool PAIRS>
__device__ inline void fill_tables(Shared<float> powers, Shared<float> log_d, Shared<float> bonus, Shared<float> far,
                                   Shared<float> far_rest, Global<const float> w, Global<const float> u, int i) {
    const int j = threadIdx.x;
    if (j >= N) return;
    const float log = -expf(w[i + j]);
    // d^-8 of fast decays is infinite: nobody reads it then
    for (int e = PAIRS ? -8 : 0; e <= 8; e++) powers[(PAIRS ? 8 + e : e) * ROW + j] = expf(e * log);
    for (int e = 0; PAIRS && e < L; e++) powers[(17 + e) * ROW + j] = expf((7 - e) * log);
    const Decay d = decay_over(L, log);
    log_d[j] = log;
    bonus[j] = u[i + j];
    far[j] = d.value;
    far_rest[j] = d.rest;
}
template <int N>
__device__ inline void fill_one_step(Shared<float> far, Shared<float> far_rest, Shared<float> log_d) {
    const int j = threadIdx.x;
    if (j >= N) return;
    const Decay d = decay_over(1, log_d[j]);
    far[j] = d.value;
    far_rest[j] = d.rest;
}

// Whether d^-8 is at most exp(10) in the warp's 16 channels, from log_d on: then it may be a factor.
__device__ inline bool slow_decay(Shared<float> log_d) {
    return __all_sync(0xffffffffu, log_d[threadIdx.x % 16] >= -1.25f);
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
    constexpr bool FINE = sizeof(T) == 4;
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
    // Two arrays instead of seven: addresses with one base fit one register.
    SHARED(float, exchange, (2 * L + 12) * N);
    const Shared<float> r_far = exchange, k_far = exchange + L * N, parts = exchange + 2 * L * N;
    constexpr int ROW = N + 4;  // rows t and t + 4 use other banks of the memory
    SHARED(float, powers, 33 * ROW + 4 * N);
    const Shared<float> log_d = powers + 33 * ROW, bonus = log_d + N, far = bonus + N, far_rest = far + N;
    fill_tables<N, ROW, true>(powers, log_d, bonus, far, far_rest, w, u, h * N);
    __syncthreads();  // the powers are there
    const bool slow = slow_decay(log_d + mine);

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
        float r_t[2][4], k_t[2][4], v_t[4][2];
        r_next.unpack(r_t);
        k_next.unpack(k_t);
        r_next.load_from(r, at_t + next * step, step, left - t);

        // [values: pairs inside the chunk]
        float uk[2][4];
        const Pack<float, 4> u4 = load<4>(bonus, mine + 4 * q);
        for (int i = 0; i < 8; i++) uk[i / 4][i % 4] = u4[i % 4] * k_t[i / 4][i % 4];
        Pairs A = pair_products<FINE, true, false>(r_t, uk);
        if (slow) {  // around step 8: d^(t-1-s) = d^(t-8) d^(7-s)
            for (int i = 0; i < 2; i++) {
                const Pack<float, 4> since = load<4>(powers, (t + 8 * i) * ROW + mine + 4 * q);
                const Pack<float, 4> until = load<4>(powers, (17 + t + 8 * i) * ROW + mine + 4 * q);
                for (int e = 0; e < 4; e++) r_t[i][e] *= since[e], k_t[i][e] *= until[e];
            }
            const Pairs fresh = pair_products<FINE, false, false>(r_t, k_t);
            for (int c = 0; c < 2; c++) {
                if (levels[c] > 0) A.upper[c] = fresh.upper[c], A.lower[c] = fresh.lower[c];
                A.left[c] = fresh.left[c];
            }
            const Pack<float, 4> d = load<4>(powers, 16 * ROW + mine + 4 * q);
            for (int i = 0; i < 8; i++) r_t[i / 4][i % 4] *= d[i % 4], k_t[i / 4][i % 4] *= d[i % 4];
        } else {  // with each level r and k take on one more d^bit: r where the step has the bit, k where it has not
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int bit = 1 << n;
                const Pairs fresh = n == 0 ? pair_products<FINE, true, true>(r_t, k_t)
                                           : pair_products<FINE, false, false>(r_t, k_t);
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
        for (int i = 0; i < 8 && !FINE; i++) {
            r_t[i / 4][i % 4] = __uint_as_float(to_tf32(r_t[i / 4][i % 4]));
            k_t[i / 4][i % 4] = __uint_as_float(to_tf32(k_t[i / 4][i % 4]));
        }
        k_next.load_from(k, at_t + next * step, step, left - t);  // not before: registers are short above
        __syncthreads();  // all warps are done with the last chunk's
        share_rows(r_far, warp, r_t);
        share_columns(k_far, warp, k_t, t);
        share_pairs<N / 16>(parts, warp, A);
        __syncthreads();  // all of it is there

        // [values: read the state]
        float out[2][4] = {};  // out[p][i]: step t + i / 2 * 8, value mine + 4 q + i % 2 * 2 + p
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            for (int p = 0; p < 2; p++) {
                const Factor<FINE, 4> rows = exact<FINE>(shared_factor(r_far, 2 * m + p).at);
                for (int i = 0; i < 2; i++) {
                    const float x[2] = {S[m][p][2 * i], S[m][p][2 * i + 1]};
                    product(out[i], rows, rounded<FINE>(x));
                }
            }
        }
        // [values: read the pairs]
        A = sum_pairs<N / 16>(parts);
        v_next.unpack(v_t);
        v_next.load_from(v, at_q + next * step, step, left - q);
        for (int c = 0; c < 2; c++) {
            const float a[4] = {A.upper[c], A.left[c], 0, A.lower[c]};
            for (int i = 0; i < 2; i++) {
                const float x[2] = {v_t[c][i], v_t[c + 2][i]};
                product(out[i], rounded<FINE>(a), exact<FINE>(x));
            }
        }
        for (int i = 0; i < 2; i++) {
            Pack<T, 4> pack;
            for (int e = 0; e < 4; e++) pack[e] = from_float<T>(out[e % 2][e / 2 + 2 * i]);
            const int past = start + 8 * i;
            if (past + t < total) store(y, at_t + past * step, pack);
        }

        // [values: write the state]
        if (start + L > total) break;
        Factor<FINE, 4> values[2];
        for (int c = 0; c < 2; c++) {
            const float a[4] = {v_t[c][0], v_t[c][1], v_t[c + 2][0], v_t[c + 2][1]};
            values[c] = rounded<FINE>(a);  // again, without loss: so the compiler places the four side by side
        }
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            const Pack<float, 4> d = load<4>(far, 16 * m + 4 * q), rest = load<4>(far_rest, 16 * m + 4 * q);
            for (int p = 0; p < 2; p++) {
                float fresh[4] = {};
                const Pack<float, 4> keys = shared_factor(k_far, 2 * m + p);
                for (int c = 0; c < 2; c++) {
                    const float x[2] = {keys[2 * c], keys[2 * c + 1]};
                    product(fresh, values[c], exact<FINE>(x));
                }
                for (int i = 0; i < 4; i++) {
                    float& x = S[m][p][i];
                    x = fmaf(d[p + i % 2 * 2], x, fmaf(rest[p + i % 2 * 2], x, fresh[i]));
                }
            }
        }
    }

    // [values: the steps that fill no chunk]
    // Their y is there. The state takes them one by one.
    __syncthreads();  // all warps are done with d^16
    fill_one_step<N>(far, far_rest, log_d);
    __syncthreads();  // d is there
    for (int now = total / L * L; now < total; now++) {
        const Pack<T, 2> value = load<2>(v, at_q + (now - q) * step);
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            const Pack<T, 4> key = load<4>(k, at_t + (now - t) * step + (16 * m - mine));
            const Pack<float, 4> d = load<4>(far, 16 * m + 4 * q), rest = load<4>(far_rest, 16 * m + 4 * q);
            for (int i = 0; i < 8; i++) {
                const int e = i % 4;
                float& x = S[m][e % 2][e / 2 + i / 4 * 2];
                x = fmaf(d[e], x, fmaf(rest[e], x, to_float(key[e]) * to_float(value[i / 4])));
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
    constexpr bool FINE = sizeof(T) == 4, SLOPE = !REVERSED;  // SLOPE: keep X, for gw; else r, glast, gw, gu are unused
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
    SHARED(float, powers, 13 * N);
    const Shared<float> log_d = powers + 9 * N, bonus = log_d + N, far = bonus + N, far_rest = far + N;
    fill_tables<N, N, false>(powers, log_d, bonus, far, far_rest, w, u, h * N);
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
        float g_t[2][4], v_t[2][4], k_t[4][2], r_t[2][4];
        g_next.unpack(g_t);
        v_next.unpack(v_t);
        g_next.load_from(gy, at_t + next * step, step, left - t);
        v_next.load_from(v, at_t + next * step, step, left - t);

        // [keys: give the others their share]
        Pairs A = pair_products<FINE, true, true>(g_t, v_t);  // g_t . v_s
        __syncthreads();  // all warps are done with the last chunk's
        share_rows(g_all, warp, g_t);
        share_columns(v_all, warp, v_t, t);
        share_pairs<N / 16>(parts, warp, A);
        __syncthreads();  // all of it is there

        // [keys: read the state]
        // S g_t and X g_t, [p][i]: step t + i / 2 * 8, key mine + 4 q + i % 2 * 2 + p
        float out[2][4] = {}, slope[2][4] = {};
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            for (int p = 0; p < 2; p++) {
                const Factor<FINE, 4> rows = exact<FINE>(shared_factor(g_all, 2 * m + p).at);
                for (int i = 0; i < 2; i++) {
                    const float x[2] = {S[m][p][2 * i], S[m][p][2 * i + 1]};
                    product(out[i], rows, rounded<FINE>(x));
                    if (SLOPE) {
                        const float y[2] = {X[m][p][2 * i], X[m][p][2 * i + 1]};
                        product(slope[i], rows, rounded<FINE>(y));
                    }
                }
            }
        }

        // [keys: pairs inside the chunk]
        // From the state before the chunk forwards: what comes from before a step with the bit decays by d^bit on its
        // way over the pairs of that level, which are added to it. slope is the derivative of out by log d.
        A = sum_pairs<N / 16>(parts);
        k_next.unpack(k_t);
        if (SLOPE) r_now.load_from(r, at_t + start * step, step, total - start - t);
#pragma unroll
        for (int n = 3; n >= 0; n--) {
            const int bit = 1 << n;
            const Pack<float, 4> d = load<4>(powers, bit * N + mine + 4 * q);
            for (int i = 0; i < 8; i++) {
                if ((t + i / 4 * 8) & bit) {
                    float &x = out[i % 2][i / 2], &y = slope[i % 2][i / 2];
                    const float power = d[i % 2 + i / 2 % 2 * 2];
                    if (SLOPE) y = fmaf(bit, x, y) * power;
                    x *= power;
                }
            }
            for (int c = 0; c < (bit == 4 ? 1 : 2); c++) {  // steps q + 4 and q + 12 have bit 4: no s of level 4 has
                const bool yes = levels[c] == bit;
                const float a[4] = {yes ? A.upper[c] : 0, bit == 8 ? A.left[c] : 0, 0, yes ? A.lower[c] : 0};
                const Factor<FINE, 4> pairs = rounded<FINE>(a);
                const int distance = bit - 1 - (q + 4 * c) % bit;  // steps from s to the end of its half
                const Pack<float, 2> fall = load<2>(powers, distance * N + mine + 2 * g);
                for (int p = 0; p < 2; p++) {
                    const float power = bit == 1 ? 1 : fall[p];
                    const float x[2] = {k_t[c][p] * power, bit == 8 ? 0 : k_t[c + 2][p] * power};
                    product(out[p], pairs, bit == 1 ? exact<FINE>(x) : rounded<FINE>(x));
                    if (SLOPE && bit > 1) {
                        const float y[2] = {distance * x[0], distance * x[1]};
                        product(slope[p], pairs, rounded<FINE>(y));
                    }
                }
            }
        }

        // [keys: the step itself]
        k_next.load_from(k, at_q + next * step, step, left - q);
        float own[2][4] = {};  // k_t (v_t . g_t)
        for (int c = 0; c < 2; c++) {
            const float a[4] = {levels[c] == 0 ? A.upper[c] : 0, 0, 0, levels[c] == 0 ? A.lower[c] : 0};
            for (int p = 0; p < 2; p++) {
                const float x[2] = {k_t[c][p], k_t[c + 2][p]};
                product(own[p], rounded<FINE>(a), exact<FINE>(x));
            }
        }
        const Pack<float, 4> u4 = load<4>(bonus, mine + 4 * q);
        if (SLOPE) r_now.unpack(r_t);
        for (int i = 0; i < 2; i++) {
            Pack<T, 4> pack;
            if (start + t + 8 * i < total) {
                for (int e = 0; e < 4; e++) {
                    const float same = own[e % 2][e / 2 + 2 * i];
                    pack[e] = from_float<T>(fmaf(u4[e], same, out[e % 2][e / 2 + 2 * i]));
                    if (SLOPE) {
                        log_sum[e] = fmaf(r_t[i][e], slope[e % 2][e / 2 + 2 * i], log_sum[e]);
                        u_sum[e] = fmaf(r_t[i][e], same, u_sum[e]);
                    }
                }
                store(gr, at_t + (start + 8 * i) * step, pack);
            }
        }

        // [keys: write the state]
        if (start + L > total) break;
        const Pack<float, 2> d8 = load<2>(powers, 8 * N + mine + 2 * g);
        const Pack<float, 2> d = load<2>(far, mine + 2 * g), rest = load<2>(far_rest, mine + 2 * g);
        Factor<FINE, 4> keys[2], slopes[2];  // k_s d^(15-s) and its derivative
        for (int c = 0; c < 2; c++) {
            const Pack<float, 2> fall = load<2>(powers, (7 - q - 4 * c) * N + mine + 2 * g);
            float a[4], y[4];
            for (int i = 0; i < 4; i++) {
                const int p = i % 2;
                const float late = k_t[c + i / 2 * 2][p] * fall[p];
                a[i] = i < 2 ? late * d8[p] : late;
                y[i] = (L - 1 - q - 4 * c - i / 2 * 8) * a[i];
            }
            keys[c] = rounded<FINE>(a);
            if (SLOPE) slopes[c] = rounded<FINE>(y);
        }
#pragma unroll
        for (int m = 0; m < N / 16; m++) {
            for (int p = 0; p < 2; p++) {
                float fresh[4] = {}, fresh_slope[4] = {};
                const Pack<float, 4> values = shared_factor(v_all, 2 * m + p);
                for (int c = 0; c < 2; c++) {
                    const float x[2] = {values[2 * c], values[2 * c + 1]};
                    product(fresh, keys[c], exact<FINE>(x));
                    if (SLOPE) product(fresh_slope, slopes[c], exact<FINE>(x));
                }
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
    fill_one_step<N>(far, far_rest, log_d);
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
