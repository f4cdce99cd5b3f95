// The WKV-5 operator on a CPU: chunks of 16 steps, products of small matrices in registers, one head at a time.
//
// What it is not: tied to PyTorch. Plain pointers come in through the functions at the end, which rwkv_nb/wkv/cpu.py
// calls. g++ or clang and any processor will do: the vectors are those of the compiler, there are no intrinsics.
//
// One head has a state S of N keys by N values. With key channel j, value channel i, decay d[j] in [0, 1], bonus u[j]:
//
//     y_t[i]  =  sum_j r_t[j] (S_t[j,i] + u[j] k_t[j] v_t[i])          S_t+1[j,i]  =  d[j] S_t[j,i] + k_t[j] v_t[i]
//
// Chunks of L steps (n <= L in the last one), t and s counted from the chunk's start, S the state there:
//
//     y_t  =  (r_t d^t) S  +  sum_{s<=t} A[t,s] v_s            A[t,s]  =  sum_j r_t[j] F(t-s)[j] k_s[j]
//     S'   =  d^n S  +  sum_s (k_s d^(n-1-s)) v_s^T            F(0) = u,  F(lag) = d^(lag-1)
//
// No exponent of d is ever negative: nothing overflows, whatever the decay. Powers are computed in double.
//
// Pairs. For A the chunk is halved twice. If s lies in the left and t in the right half of a block of 2h steps with
// middle m, then F(t-s) = d^(t-m) d^(m-1-s): one factor goes to r_t, the other to k_s, and a tile of A is a product of
// two matrices. In one such block a step is right or left, never both, so one matrix X holds the scaled r or k of all
// steps. In the four blocks of 4 steps that are left each pair takes its own F.
//
// Backward. Q is the gradient of the state after the chunk, gA[t,s] = gy_t . v_s:
//
//     gr_t = (S gy_t) d^t + pairs         gk_s = (Q v_s) d^(n-1-s) + pairs
//     gv_s = (k_s d^(n-1-s)) Q + sum_{t>=s} A[t,s] gy_t           Q' = d^n Q + sum_t (r_t d^t) gy_t^T
//
// A factor x d^e whose gradient is g gives g d^e to x and e (x d^e) g to log d. So log d gets t r_t gr_t and
// (n-1-s) k_s gk_s of the terms without pairs, n sum_i (d^n S)[j,i] Q[j,i], and the same for the factors in X and F. No
// exponent is negative: terms do not cancel, and nothing is divided by d, which may be 0. The states S are computed
// again, from one that forward kept now and then.
//
// Layout. S is [j][i] in forward. Backward has S and Q turned, [i][j]: then gr and gk are plain products, and for gv
// only small matrices need turning. N is padded to a multiple of 16 with zeros, the last chunk to L steps: one path for
// all N and T. Half precision becomes float when a chunk is loaded and is rounded (ties to even) when stored.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "wkv5_cpu_registers.h"

namespace {

#define SEPARATE __attribute__((noinline))  // a function of its own: large loops compile quicker and no slower

// ---- one call ------------------------------------------------------------------------------------------------------

constexpr int L = 16, BLOCK = 4;  // steps of a chunk, and of a block of pairs on the diagonal
constexpr long TABLE = 2 * L + 3;  // rows: u; d^0 ... d^L; what rounding these to float took away
constexpr long SKEW = 80;      // floats between two buffers, so that they do not lie a multiple of 4096 bytes apart
constexpr int64_t BUNDLE = 8;  // heads that go through time together
constexpr int64_t LARGE = 4 << 20;  // bytes of a tensor that does not stay in the second-level cache
constexpr double TINY = 1e-30;  // a smaller power counts as 0: subnormal products are slow and change nothing

// What rwkv_nb/wkv/cpu.py hands over, in this order; shapes as there. What a call does not need is null.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
struct Call {
    int64_t B, T, H, N;
    int64_t format;                      // of r, k, v, gy, y and their gradients: 0 float32, 1 bfloat16, 2 float16
    int64_t every;                       // steps from one state in `saved` to the next, a multiple of L
    int64_t threads;
    Parallel parallel;                   // runs function(data) on so many threads; null: threads of our own
    const void *r, *k, *v, *gy;
    void *y, *gr, *gk, *gv;
    const float *w, *u, *state, *glast;
    float *saved, *last, *gw, *gu, *gstate;
};

// Floats that start at a cache line.
struct Buffer {
    std::unique_ptr<float[]> memory;
    float* data;
    explicit Buffer(int64_t n) : memory(new float[n + 16]) {
        data = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / 4;
    }
};

struct Problem : Call {
    const long P;                        // N rounded up to a multiple of 16
    std::vector<double> log_d;           // (H, P)
    Buffer tables;                       // (H, TABLE, P)
    std::vector<double> glog, gbonus;    // (B, H, P): gradients of log d and u, to be summed over B
    bool past_cache;                     // y and the gradients are too large to stay in a cache until they are read

    Problem(const Call& call, bool backward) : Call(call), P((N + 15) / 16 * 16), log_d(H * P), tables(H * TABLE * P) {
        if (backward) glog.assign(B * H * P, 0), gbonus.assign(B * H * P, 0);
        const auto at = [](const void* x) { return reinterpret_cast<uintptr_t>(x); };
        const bool whole_lines = P == N && (at(y) | at(gr) | at(gk) | at(gv)) % 64 == 0;
        past_cache = format == FLOAT32 && whole_lines && 4 * B * T * H * N >= LARGE;
        for (int64_t h = 0; h < H; ++h) tabulate(h, tables.data + h * TABLE * P);
    }
    void tabulate(int64_t h, float* row) {
        std::vector<double> d(P, 0.0), now(P, 1.0);
        for (int64_t j = 0; j < P; ++j) row[j] = j < N ? u[h * N + j] : 0;
        for (int64_t j = 0; j < N; ++j) {
            log_d[h * P + j] = -std::exp(double(w[h * N + j]));
            d[j] = std::exp(log_d[h * P + j]);
        }
        for (int e = 0; e <= L; ++e)
            for (int64_t j = 0; j < P; ++j) {
                row[(1 + e) * P + j] = float(now[j]);
                row[(2 + L + e) * P + j] = float(now[j] - row[(1 + e) * P + j]);
                now[j] = now[j] * d[j] < TINY ? 0 : now[j] * d[j];
            }
    }
    int64_t stretches() const { return T > every ? (T + every - 1) / every : 1; }  // a state is kept between any two
};

// Works off heads, one after the other, in scratch memory of its own.
class Worker {
    Problem& p;
#if defined(PADDED)
    static constexpr long P = PADDED;
#else
    const long P = p.P;
#endif
    int64_t b = 0, h = 0;
    float *r, *k, *v, *gy, *gr, *gk, *X;                // (L, P): the chunk; X: r and k scaled
    float *A, *gA, *glog, *gu;                          // (L, L), (L, L), (P), (P)
    float *F;                                           // (TABLE, P): those of the head
    float *S, *Q;                                       // (P, P), in backward turned
    float *keys = nullptr, *states = nullptr;           // k, then v, and S at each chunk of a stretch
    const char* wanted[7 * L];                          // rows to fetch, the last one first
    int n_wanted = 0;

public:
    // Floats of scratch.
    static int64_t scratch(const Problem& p, bool backward) {
        const int64_t once = (7 * L + 2 + TABLE) * p.P + 2 * L * L + p.P * p.P + 16 * SKEW;
        return once + (backward ? p.every / L * (2 * L * p.P + p.P * p.P + SKEW) : 0);
    }
    Worker(Problem& p, float* scratch, bool backward) : p(p) {
        const auto take = [&scratch](long n) { return (scratch += n + SKEW) - n - SKEW; };
        for (float** x : {&r, &k, &v, &X, &gy, &gr, &gk}) *x = take(L * P);
        A = take(L * L), gA = take(L * L), glog = take(P), gu = take(P), F = take(TABLE * P);
        S = Q = take(P * P);
        if (!backward) return;
        keys = take(2 * p.every * P + SKEW);
        states = take(p.every / L * (P * P + SKEW));
    }

    // One head, steps [start, start + every); `more`: the next head follows. Between two such stretches of time `last`
    // and `gstate` hold the state.
    void forward(int64_t batch, int64_t head, int64_t start, bool more) {
        const int64_t end = start + steps(start, p.T, p.every);
        begin(batch, head);
        load_state(S, mine(start ? p.last : p.state), false);
        if (start && p.saved) store_state(saved(start), S, false);
        for (int64_t t0 = start; t0 < end; t0 += L) {
            const int n = steps(t0, p.T);
            load(r, p.r, t0, n);
            load(k, p.k, t0, n);
            load(v, p.v, t0, n);
            n_wanted = 0;
            for (const void* x : {p.v, p.k, p.r}) {
                if (t0 + L < end) soon(x, t0 + L, h);
                else if (more) soon(x, start, h + 1);
            }
            if (!p.past_cache) soon(p.y, t0, h);
            near_pairs();
            far_pairs(8);
            far_pairs(4);
            for (int t = 0; t < L; ++t) scale(r + t * P, r + t * P, t);
            for (int s = 0; s < n; ++s) scale(k + s * P, k + s * P, n - 1 - s);
            outputs(t0, n);
            update(S, S, k, v, n, false);
        }
        store_state(p.last + state(), S, false);
    }

    // The same for the gradients; stretches come last to first. In each: the states at the starts of all chunks, then
    // the gradients from the last chunk to the first.
    void backward(int64_t batch, int64_t head, int64_t start, bool more) {
        const int64_t end = start + steps(start, p.T, p.every);
        int64_t c = 0, chunks = (end - start + L - 1) / L;
        begin(batch, head);
        load_state(Q, mine(end == p.T ? p.glast : p.gstate), end == p.T);
        load_state(states, start ? saved(start) : mine(p.state), true);
        for (; c < chunks; ++c) {
            const int64_t t0 = start + c * L;
            at_chunk(c);
            load(k, p.k, t0, steps(t0, end));
            load(v, p.v, t0, steps(t0, end));
            if (c + 1 == chunks) break;
            n_wanted = 0;
            for (const void* x : {p.v, p.k}) soon(x, t0 + L, h);
            if (c + 2 == chunks) soon(p.r, t0 + L, h), soon(p.gy, t0 + L, h);
            for (int s = 0; s < L; ++s) scale(X + s * P, k + s * P, L - 1 - s);
            update(S + P * P + SKEW, S, v, X, L, true);
        }
        while (--chunks >= 0) {
            const int64_t t0 = start + chunks * L;
            at_chunk(chunks);
            n_wanted = 0;
            for (const void* x : {p.gy, p.r})
                if (chunks) soon(x, t0 - L, h);
            for (const void* x : {p.v, p.k})
                if (!chunks && more) soon(x, start, h + 1);
            for (const void* x : {p.gv, p.gk, p.gr})
                if (!p.past_cache) soon(x, t0, h);
            chunk_backward(t0, steps(t0, end));
        }
        store_state(p.gstate + state(), Q, start == 0);
    }

private:
    static int64_t steps(int64_t t0, int64_t end, int64_t most = L) { return end - t0 < most ? end - t0 : most; }
    const float* power(long e) const { return F + (1 + e) * P; }
    const float* rest(long e) const { return F + (2 + L + e) * P; }
    void begin(int64_t batch, int64_t head) {
        b = batch, h = head;
        std::memcpy(F, p.tables.data + h * TABLE * P, sizeof(float) * TABLE * P);
    }
    int64_t state() const { return (b * p.H + h) * p.N * p.N; }
    const float* mine(const float* states) const { return states ? states + state() : nullptr; }
    float* saved(int64_t t0) const {
        return p.saved + ((b * p.H + h) * (p.stretches() - 1) + t0 / p.every - 1) * p.N * p.N;
    }
    int64_t offset(int64_t t) const { return ((b * p.T + t) * p.H + h) * p.N; }

    // n steps from t0 on; the rest of the chunk and of the padded channels is zero.
    SEPARATE void load(float* to, const void* from, int64_t t0, int n) const {
        for (int t = 0; t < n; ++t, to += P) {
            const int64_t at = offset(t0 + t);
            const uint16_t* half = static_cast<const uint16_t*>(from) + at;
            long j = p.N;
            if (p.format == FLOAT32) copy(to, static_cast<const float*>(from) + at, j);
            else if (p.format == BFLOAT16) for (j = 0; j < p.N; ++j) to[j] = from_bfloat16(half[j]);
            else for (j = 0; j < p.N; ++j) to[j] = from_float16(half[j]);
            for (; j < P; ++j) to[j] = 0;
        }
        if (n < L) std::memset(to, 0, sizeof(float) * (L - n) * P);
    }
    SEPARATE void save(void* to, const float* from, int64_t t0, int n) const {
        for (int t = 0; t < n; ++t, from += P) {
            const int64_t at = offset(t0 + t);
            uint16_t* half = static_cast<uint16_t*>(to) + at;
            float* row = static_cast<float*>(to) + at;
            if (p.past_cache) for (long j = 0; j < P; j += W) store_past_cache(row + j, get(from + j));
            else if (p.format == FLOAT32) copy(row, from, p.N);
            else if (p.format == BFLOAT16) for (long j = 0; j < p.N; ++j) half[j] = to_bfloat16(from[j]);
            else for (long j = 0; j < p.N; ++j) half[j] = to_float16(from[j]);
        }
    }
    static void copy(float* to, const float* from, long n) {
        long j = 0;
        for (; j <= n - W; j += W) store(to + j, get(from + j));
        for (; j < n; ++j) to[j] = from[j];
    }
    // A state between (N, N) outside and (P, P) here, turned or as it is. A null pointer stands for zeros.
    void load_state(float* to, const float* from, bool turned) const {
        if (P > p.N || !from) std::memset(to, 0, sizeof(float) * P * P);
        if (!from) return;
        if (turned) turn(to, P, from, p.N, p.N, p.N);
        else for (long j = 0; j < p.N; ++j) copy(to + j * P, from + j * p.N, p.N);
    }
    void store_state(float* to, const float* from, bool turned) const {
        if (turned) turn(to, p.N, from, P, p.N, p.N);
        else for (long j = 0; j < p.N; ++j) copy(to + j * p.N, from + j * P, p.N);
    }
    // The rows of the chunk at t0 will be needed. A row is a page away from the one before, so the processor cannot
    // guess it: `ask` fetches a few into the cache, little by little, while products are computed.
    void soon(const void* tensor, int64_t t0, int64_t head) {
        const int64_t bytes = p.format == FLOAT32 ? 4 : 2, step = p.H * p.N * bytes;
        const char* row = static_cast<const char*>(tensor) + (offset(t0) + (head - h) * p.N) * bytes;
        for (int n = steps(t0, p.T); n > 0; --n, row += step) wanted[n_wanted++] = row;
    }
    void ask() {
        const int64_t bytes = p.N * (p.format == FLOAT32 ? 4 : 2);
        for (int i = 0; i < 2 && n_wanted > 0; ++i) {
            const char* row = wanted[--n_wanted];
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
        }
    }

    // to = from d^e, for one step
    void scale(float* to, const float* from, int e) const {
        for (long j = 0; j < P; j += W) store(to + j, get(from + j) * get(power(e) + j));
    }

    // ---- pairs of steps inside the chunk

    // out[t, s] = a_t . b_s for BLOCK x BLOCK pairs.
    SEPARATE void dots(float* out, const float* a, const float* b) {
        constexpr int C = W / BLOCK;  // so many columns at a time that the sums come out as one register
        ask();
        UNROLL for (int s = 0; s < BLOCK; s += C) {
            vec sum[BLOCK][C];
            clear(sum);
            for (long j = 0; j < P; j += W) {
                vec column[C];
                UNROLL for (int c = 0; c < C; ++c) column[c] = get(b + (s + c) * P + j);
                UNROLL for (int t = 0; t < BLOCK; ++t) {
                    const vec row = get(a + t * P + j);
                    UNROLL for (int c = 0; c < C; ++c) sum[t][c] += row * column[c];
                }
            }
            float total[BLOCK][C];
            store(total[0], sums(sum[0]));
            for (int t = 0; t < BLOCK; ++t)
                for (int c = 0; c < C; ++c) out[t * L + s + c] = total[t][c];
        }
    }
    // A in the blocks on the diagonal.
    SEPARATE void near_pairs() {
        for (int x = 0; x < L; x += BLOCK) {
            const float *rx = r + x * P, *kx = k + x * P;
            vec sum[BLOCK][BLOCK];
            clear(sum);
            ask();
            for (long j = 0; j < P; j += W)
                UNROLL for (int t = 0; t < BLOCK; ++t)
                    UNROLL for (int s = 0; s <= t; ++s)
                        sum[t][s] += get(rx + t * P + j) * get(F + (t - s) * P + j) * get(kx + s * P + j);
            float total[BLOCK][BLOCK];
            UNROLL for (int i = 0; i < BLOCK * BLOCK; i += W) store(total[0] + i, sums(sum[0] + i));
            for (int t = 0; t < BLOCK; ++t)
                for (int s = 0; s <= t; ++s) A[(x + t) * L + x + s] = total[t][s];
        }
    }
    // Step t is in the right half of its block of 2h (exponent t-m), or in the left (exponent m-1-t).
    static int exponent(int half, int t) { return t & half ? t & (half - 1) : half - 1 - (t & (half - 1)); }

    // X and the tiles of A between the halves of all blocks of 2h steps.
    SEPARATE void far_pairs(int half) {
        for (int t = 0; t < L; ++t) scale(X + t * P, (t & half ? r : k) + t * P, exponent(half, t));
        for (int m = half; m < L; m += 2 * half)
            for (int t = m; t < m + half; t += BLOCK)
                for (int s = m - half; s < m; s += BLOCK) dots(A + t * L + s, X + t * P, X + s * P);
    }
    // The pairs s <= t of one block: sum_t += a[t, s] b_s
    template <int C>
    static void triangle(vec (&sum)[BLOCK][C], const float* a, const float* b, long b_row) {
        UNROLL for (int t = 0; t < BLOCK; ++t)
            UNROLL for (int s = 0; s <= t; ++s)
                UNROLL for (int c = 0; c < C; ++c) sum[t][c] += a[t * L + s] * get(b + s * b_row + c * W);
    }

    // ---- products with the state

    // y = (r d^t) S + A v
    SEPARATE void outputs(int64_t t0, int n) {
        tiles<BLOCK, COLS>(L, P, [&](auto columns, long x, long c) {
            vec sum[BLOCK][columns];
            clear(sum);
            ask();
            multiply(sum, r + x * P, P, 1, S + c, P, P);
            multiply(sum, A + x * L, L, 1, v + c, P, x);
            triangle(sum, A + x * L + x, v + x * P + c, P);
            store(X + c, P, sum);
            if (c + columns * W == P && x < n) save(p.y, X, t0 + x, steps(x, n, BLOCK));
        });
    }
    // to = d^n from + a^T b, for a state or, turned, for a turned one.
    SEPARATE void update(float* to, const float* from, const float* a, const float* b, int n, bool turned) {
        const float *whole = power(n), *more = rest(n);
        tiles<ROWS, COLS>(P, P, [&](auto columns, long x, long c) {
            constexpr int C = columns;
            vec sum[ROWS][C];
            ask();
            UNROLL for (int y = 0; y < ROWS; ++y)
                UNROLL for (int z = 0; z < C; ++z) {
                    const vec old = get(from + (x + y) * P + c + z * W);
                    sum[y][z] = turned ? old * get(whole + c + z * W) + old * get(more + c + z * W)
                                       : old * whole[x + y] + old * more[x + y];
                }
            multiply(sum, a + x, 1, P, b + c, P, L);
            store(to + x * P + c, P, sum);
        });
    }

    // ---- backward

    void at_chunk(int64_t c) {
        k = keys + c * L * P;
        v = keys + p.every * P + SKEW + c * L * P;
        S = states + c * (P * P + SKEW);
    }
    void chunk_backward(int64_t t0, int n) {
        load(r, p.r, t0, n);
        load(gy, p.gy, t0, n);
        for (int t = 0; t < L; t += BLOCK)
            for (int s = 0; s <= t; s += BLOCK) dots(gA + t * L + s, gy + t * P, v + s * P);
        near_pairs();
        near_gradients();
        for (int half : {8, 4}) {
            far_pairs(half);
            far_gradients(half);
        }
        through(gr, gy, S, r, Q, p.gr, t0, n, [](int t) { return t; });
        through(gk, v, Q, k, nullptr, p.gk, t0, n, [n](int s) { return s < n ? n - 1 - s : 0; });
        values(t0, n);
        for (int t = 0; t < L; ++t) scale(r + t * P, r + t * P, t);
        update(Q, Q, gy, r, n, true);
        double *glog_sum = p.glog.data() + (b * p.H + h) * P, *gu_sum = p.gbonus.data() + (b * p.H + h) * P;
        for (long j = 0; j < P; ++j) glog_sum[j] += glog[j], gu_sum[j] += gu[j];
    }
    // Gradients of the pairs in the blocks on the diagonal, to r, k, u and log d; the first to write all of these.
    SEPARATE void near_gradients() {
        std::memset(glog, 0, sizeof(float) * P);
        std::memset(gu, 0, sizeof(float) * P);
        for (int x = 0; x < L; x += BLOCK) {
            ask();
            for (long j = 0; j < P; j += W) {
                const float *rx = r + x * P + j, *kx = k + x * P + j, *gx = gA + x * L + x;
                vec gks[BLOCK], share = get(glog + j), bonus = get(gu + j);
                UNROLL for (int t = 0; t < BLOCK; ++t) {
                    const vec rt = get(rx + t * P);
                    vec grt = {};
                    gks[t] = vec{};
                    UNROLL for (int s = 0; s <= t; ++s) {
                        const vec ks = get(kx + s * P), g = gx[t * L + s] * get(F + (t - s) * P + j);
                        grt += g * ks;
                        gks[s] += g * rt;
                        if (s == t) bonus += gx[t * L + s] * ks * rt;
                        else if (s < t - 1) share += float(t - s - 1) * g * ks * rt;
                    }
                    store(gr + (x + t) * P + j, grt);
                }
                UNROLL for (int s = 0; s < BLOCK; ++s) store(gk + (x + s) * P + j, gks[s]);
                store(glog + j, share);
                store(gu + j, bonus);
            }
        }
    }
    // Gradients of X, from there to r or k and log d.
    SEPARATE void far_gradients(int half) {
        tiles<BLOCK, COLS>(L, P, [&](auto columns, long x, long c) {
            constexpr int C = columns;
            const long left = x & ~long(2 * half - 1), right = left + half;
            vec sum[BLOCK][C];
            clear(sum);
            ask();
            if (x & half) multiply(sum, gA + x * L + left, L, 1, X + left * P + c, P, half);
            else multiply(sum, gA + right * L + x, 1, L, X + right * P + c, P, half);
            float* g = (x & half ? gr : gk) + x * P + c;
            UNROLL for (int z = 0; z < C; ++z) {
                vec share = get(glog + c + z * W);
                UNROLL for (int y = 0; y < BLOCK; ++y) {
                    const long at = y * P + z * W;
                    const int e = exponent(half, int(x) + y);
                    store(g + at, get(g + at) + sum[y][z] * get(power(e) + c + z * W));
                    share += float(e) * get(X + x * P + c + at) * sum[y][z];
                }
                store(glog + c + z * W, share);
            }
        });
    }
    // g += (a M) d^e, M the turned state or its gradient; log d gets e x g. Then g is complete. With M = S, other = Q
    // log d also gets what S leaves behind the chunk, n sum_i (d^n S)[j, i] Q[j, i]: in the first rows, where each
    // register of S is loaded anyway.
    template <class Exponent>
    SEPARATE void through(float* g, const float* a, const float* M, const float* x, const float* other, void* out,
                          int64_t t0, int n, Exponent e) {
        tiles<BLOCK, COLS>(L, P, [&](auto columns, long t, long c) {
            constexpr int C = columns;
            vec sum[BLOCK][C], carried[1][C];
            clear(sum);
            clear(carried);
            ask();
            if (other && t == 0) {
                for (long i = 0; i < P; ++i) {
                    vec row[C];
                    UNROLL for (int z = 0; z < C; ++z) row[z] = get(M + i * P + c + z * W);
                    UNROLL for (int z = 0; z < C; ++z) carried[0][z] += row[z] * get(other + i * P + c + z * W);
                    UNROLL for (int y = 0; y < BLOCK; ++y)
                        UNROLL for (int z = 0; z < C; ++z) sum[y][z] += a[y * P + i] * row[z];
                }
            } else {
                multiply(sum, a + t * P, P, 1, M + c, P, P);
            }
            UNROLL for (int z = 0; z < C; ++z) {
                vec share = get(glog + c + z * W) + float(n) * get(power(n) + c + z * W) * carried[0][z];
                UNROLL for (int y = 0; y < BLOCK; ++y) {
                    const long at = (t + y) * P + c + z * W;
                    const vec gx = sum[y][z] * get(power(e(t + y)) + c + z * W);
                    store(g + at, get(g + at) + gx);
                    share += float(e(t + y)) * get(x + at) * gx;
                }
                store(glog + c + z * W, share);
            }
            if (c + columns * W == P && t < n) save(out, g + t * P, t0 + t, steps(t, n, BLOCK));
        });
    }
    // gv = kd Q + A^T gy. Q is turned, so the product is made turned: gv^T = Q^T kd^T.
    SEPARATE void values(int64_t t0, int n) {
        float *kdT = X, *gv = gk;  // gk is done
        for (int s = 0; s < n; ++s) scale(k + s * P, k + s * P, n - 1 - s);
        turn(kdT, L, k, P, L, P);
        for (long i = 0; i < P; i += W)
            for (long s0 = 0; s0 < L; s0 += W) {
                vec turned[W], sum[W];
                for (int y = 0; y < W; y += ROWS) {
                    vec part[ROWS][4];  // four sums for each number, since one alone would wait for itself
                    clear(part);
                    ask();
                    for (long j = 0; j < P; j += 4)
                        UNROLL for (int z = 0; z < 4; ++z) {
                            const vec ks = get(kdT + (j + z) * L + s0);
                            UNROLL for (int x = 0; x < ROWS; ++x) part[x][z] += Q[(i + y + x) * P + j + z] * ks;
                        }
                    UNROLL for (int x = 0; x < ROWS; ++x)
                        turned[y + x] = (part[x][0] + part[x][1]) + (part[x][2] + part[x][3]);
                }
                turn(sum, turned);
                for (long t = s0; t < L; ++t) {
                    const vec g = get(gy + t * P + i);
                    UNROLL for (int s = 0; s < W; ++s)
                        if (s0 + s <= t) sum[s] += A[t * L + s0 + s] * g;
                }
                UNROLL for (int s = 0; s < W; ++s) store(gv + (s0 + s) * P + i, sum[s]);
            }
        save(p.gv, gv, t0, n);
    }
};

// ---- all heads -----------------------------------------------------------------------------------------------------

struct Job {
    Problem& p;
    bool backward;
    float* scratch;
    int64_t scratch_each, bundles;
    std::atomic<int64_t> next_worker{0}, next_task{0};

    // A task is a bundle of heads of one batch row, worked off stretch by stretch: steps lie pages apart, and heads
    // that share these pages find them in the processor's table of addresses.
    static void work(void* job) {
        Job& self = *static_cast<Job*>(job);
        const Problem& p = self.p;
        Worker worker(self.p, self.scratch + self.next_worker++ * self.scratch_each, self.backward);
        for (int64_t i; (i = self.next_task++) < p.B * self.bundles;) {
            const int64_t b = i / self.bundles, first = i % self.bundles * p.H / self.bundles;
            const int64_t end = (i % self.bundles + 1) * p.H / self.bundles;
            for (int64_t c = 0; c < p.stretches(); ++c)
                for (int64_t h = first; h < end; ++h) {
                    if (self.backward) worker.backward(b, h, (p.stretches() - 1 - c) * p.every, h + 1 < end);
                    else worker.forward(b, h, c * p.every, h + 1 < end);
                }
        }
    }
};

// Threads of our own would share the cores with those of torch, which keep spinning for a while after each operation.
// So cpu.py gives us GOMP_parallel of the OpenMP library that torch has loaded, where it finds it.
void run(Problem& p, bool backward) {
    const int64_t heads = p.B * p.H, threads = p.threads < heads ? p.threads : heads;
    if (threads < 1) return;
    int64_t bundle = heads / (2 * threads);  // at least two bundles a thread
    bundle = bundle < 1 ? 1 : bundle > BUNDLE ? BUNDLE : bundle;
    const int64_t each = (Worker::scratch(p, backward) + 15) / 16 * 16;
    const Buffer scratch(threads * each);
    Job job{p, backward, scratch.data, each, (p.H + bundle - 1) / bundle};
    if (threads == 1) {
        Job::work(&job);
    } else if (p.parallel) {
        p.parallel(Job::work, &job, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        others.reserve(threads);
        try {
            while (int64_t(others.size()) < threads - 1) others.emplace_back(Job::work, &job);
        } catch (const std::system_error&) {  // no more threads to be had: those that run do all the work
        }
        Job::work(&job);
        for (std::thread& other : others) other.join();
    }
}

template <class Finish>
int64_t call(const Call& given, bool backward, Finish finish) {
    try {
        Problem p(given, backward);
        run(p, backward);
        finish(p);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

// The result is 0, or 1 where memory is short.
extern "C" int64_t wkv5_forward(const Call* given) {
    return call(*given, false, [](Problem&) {});
}

extern "C" int64_t wkv5_backward(const Call* given) {
    return call(*given, true, [](Problem& p) {
        for (int64_t h = 0; h < p.H; ++h)
            for (int64_t j = 0; j < p.N; ++j) {
                double glog = 0, gbonus = 0;
                for (int64_t b = 0; b < p.B; ++b) {
                    glog += p.glog[(b * p.H + h) * p.P + j];
                    gbonus += p.gbonus[(b * p.H + h) * p.P + j];
                }
                p.gw[h * p.N + j] = float(glog * p.log_d[h * p.P + j]);  // log d = -exp(w), which is its own derivative
                p.gu[h * p.N + j] = float(gbonus);
            }
    });
}
