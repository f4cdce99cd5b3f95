// One step of RWKV-5.2 on a CPU: B token ids and the state go in, B rows of logits and the new state come out.
//
// What it is not: tied to PyTorch (plain pointers, see rwkv_nb/inference/decoder.py), or made for a prompt: a step
// reads every weight once for B tokens, and that takes the time. So matrices may be stored short, as bfloat16 or
// as 8-bit numbers with a scale for each group of columns; they become float in registers. All sums are in float32.
//
//     x = ln0(emb[id])
//     each block:   x += Wo (groupnorm(wkv(r, k, v)) silu(g)),     r, k, v, g = W (mix of ln1(x) and its last value)
//                   x += sigmoid(Wr ..) (Wv relu(Wk ..)^2),        .. = mix of ln2(x) and its last value
//     logits = head ln_out(x)
//
// One head, key channel j, value channel i:
//
//     y[i] = sum_j r[j] (S[j,i] + u[j] k[j] v[i]),     then S[j,i] = d[j] S[j,i] + k[j] v[i]
//
// Threads share the rows of each matrix, and the heads. They run through the whole step together and wait for each
// other five times a block. What is cheap (norms, mixes) each thread does for itself, which saves more waiting.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "wkv5_cpu_registers.h"

namespace {

constexpr float EPS = 1e-5f;  // of the layer norms
constexpr int MOST = 8;       // tokens that go through a matrix together
constexpr long GROUP = 64;    // columns of an INT8 matrix that share a scale; zeros fill up the last ones

enum Storage : int64_t { F32 = 0, BF16 = 1, INT8 = 2 };
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// ---- what decoder.py hands over, in this order ---------------------------------------------------------------------

struct Matrix {                  // (rows, columns), row after row
    const void* data;
    const float* scales;         // (rows, columns / GROUP), INT8 alone
    int64_t rows, columns;
};
struct Norm {
    const float *weight, *bias;
};
struct Layer {
    Norm ln1, ln2, ln_x;
    const float *mix_k, *mix_v, *mix_r, *mix_g, *decay, *bonus, *ffn_mix_k, *ffn_mix_r;  // decay: exp(-exp(time_decay))
    Matrix receptance, key, value, gate, output, ffn_key, ffn_receptance, ffn_value;
};
struct State {
    const float *att_x, *wkv, *ffn_x;              // (B, D), (B, H, N, N) as [key, value], (B, D): read
    float *new_att_x, *new_wkv, *new_ffn_x;        // written
};
struct Step {
    int64_t B, n_layer, D, A, F, V, N, storage, threads;
    double eps_x;                // of the group norm
    Parallel parallel;           // runs function(data) on so many threads; null: threads of our own
    int (*team)();               // how many threads these really are
    const int64_t* ids;          // (B)
    const void* emb;             // (V, D), F32 or BF16
    int64_t emb_storage;
    Norm ln0, ln_out;
    const Layer* layers;
    const State* states;         // one a layer
    Matrix head;
    float* logits;               // (B, V)
};

// ---- products: rows of a matrix with B vectors ---------------------------------------------------------------------

// walk: use(register of each of R rows, first column) for the columns [from, to) of rows that lie `row` numbers apart.
template <int S> struct Stored;
template <> struct Stored<F32> {
    template <int R, class Use>
    static void walk(const void* data, long row, long from, long to, Use use) {
        const float* w = static_cast<const float*>(data);
        for (long j = from; j < to; j += W) {
            vec x[R];
            UNROLL for (int y = 0; y < R; ++y) x[y] = get(w + y * row + j);
            use(x, j);
        }
    }
    static constexpr long SIZE = sizeof(float);
};
template <> struct Stored<BF16> {
    typedef uint16_t some __attribute__((vector_size(2 * W)));
    typedef uint32_t wide __attribute__((vector_size(4 * W)));
    template <int R, class Use>
    static void walk(const void* data, long row, long from, long to, Use use) {
        const uint16_t* w = static_cast<const uint16_t*>(data);
        for (long j = from; j < to; j += W) {
            vec x[R];
            UNROLL for (int y = 0; y < R; ++y) {
                some half;
                std::memcpy(&half, w + y * row + j, sizeof half);
                x[y] = reinterpret_cast<vec>(__builtin_convertvector(half, wide) << 16);  // the upper half of a float
            }
            use(x, j);
        }
    }
    static constexpr long SIZE = sizeof(uint16_t);
};
// 64 columns lie as 16 words of 4 bytes: word i holds columns i, 16 + i, 32 + i, 48 + i. So a register of words gives
// four registers of neighbours, by two shifts each.
template <> struct Stored<INT8> {
    template <int R, class Use>
    static void walk(const void* data, long row, long from, long to, Use use) {
        const int8_t* w = static_cast<const int8_t*>(data);
        for (long j = from; j < to; j += GROUP)
            for (long word = 0; word < 16; word += W) {
                lanes four[R];
                UNROLL for (int y = 0; y < R; ++y) std::memcpy(&four[y], w + y * row + j + 4 * word, sizeof four[y]);
                UNROLL for (int part = 0; part < 4; ++part) {
                    vec x[R];
                    UNROLL for (int y = 0; y < R; ++y)
                        x[y] = __builtin_convertvector((four[y] << (24 - 8 * part)) >> 24, vec);  // with its sign
                    use(x, j + 16 * part + word);
                }
            }
    }
    static constexpr long SIZE = 1;
};

inline float total(vec x) {
    float sum = 0;
    for (int i = 0; i < W; ++i) sum += x[i];
    return sum;
}

// out[y][b] = row (first + y) of the matrix times vector b, for R rows and C vectors.
template <int S, int R, int C>
inline void dot(const Matrix& m, long first, const float* x, long x_row, float (&out)[R][C]) {
    const char* w = static_cast<const char*>(m.data) + first * m.columns * Stored<S>::SIZE;
    const long size = S == INT8 ? GROUP : m.columns, groups = m.columns / size;
    vec sum[R][C] = {};
    for (long g = 0; g < groups; ++g) {
        vec part[R][C] = {};
        Stored<S>::template walk<R>(w, m.columns, g * size, (g + 1) * size, [&](const vec* row, long j) {
            UNROLL for (int b = 0; b < C; ++b) {
                const vec in = get(x + b * x_row + j);
                UNROLL for (int y = 0; y < R; ++y) part[y][b] += row[y] * in;
            }
        });
        UNROLL for (int y = 0; y < R; ++y) {
            const float scale = S == INT8 ? m.scales[(first + y) * groups + g] : 1.0f;
            UNROLL for (int b = 0; b < C; ++b) sum[y][b] += S == INT8 ? scale * part[y][b] : part[y][b];
        }
    }
    UNROLL for (int y = 0; y < R; ++y) UNROLL for (int b = 0; b < C; ++b) out[y][b] = total(sum[y][b]);
}

// use(row, vector, product) for rows [from, to) and C vectors from b0 on.
template <int S, int C, class Use>
inline void rows(const Matrix& m, long from, long to, const float* x, long x_row, long b0, Use use) {
    constexpr int R = C == 1 ? 4 : C == 2 ? 4 : 2;  // so that all sums stay in registers
    long row = from;
    for (; row + R <= to; row += R) {
        float out[R][C];
        dot<S, R, C>(m, row, x + b0 * x_row, x_row, out);
        for (int y = 0; y < R; ++y)
            for (int b = 0; b < C; ++b) use(row + y, b0 + b, out[y][b]);
    }
    for (; row < to; ++row) {
        float out[1][C];
        dot<S, 1, C>(m, row, x + b0 * x_row, x_row, out);
        for (int b = 0; b < C; ++b) use(row, b0 + b, out[0][b]);
    }
}

// ---- one thread's way through a step -------------------------------------------------------------------------------

struct Shared {
    const Step& step;
    // What a matrix is multiplied with (y, hidden, normed, mixed) has zeros behind each row, up to whole groups.
    const int64_t wide_D = wide(step.D), wide_A = wide(step.A), wide_F = wide(step.F);
    std::vector<float> x, r, k, v, g, y, hidden, gate;  // (B, D), (B, A) x 5, (B, F), (B, D)
    std::vector<float> normed, mixed;                   // (threads, B, D), (threads, 4, B, D)
    std::atomic<int64_t> next_thread{0}, arrived{0}, round{0}, threads{0};  // threads: 0 until it is known

    explicit Shared(const Step& s)
        : step(s), x(s.B * s.D), r(s.B * s.A), k(r), v(r), g(r), y(s.B * wide_A), hidden(s.B * wide_F), gate(s.B * s.D),
          normed(s.threads * s.B * wide_D), mixed(4 * normed.size()) {}
    static int64_t wide(int64_t n) { return (n + GROUP - 1) / GROUP * GROUP; }
};

struct Worker {
    Shared& s;
    const Step& p;
    const int64_t me, threads, D, A;
    float *normed, *mixed;

    Worker(Shared& shared, int64_t id, int64_t n)
        : s(shared), p(shared.step), me(id), threads(n), D(p.D), A(p.A),
          normed(s.normed.data() + id * p.B * s.wide_D), mixed(s.mixed.data() + 4 * id * p.B * s.wide_D) {}

    // Nobody goes on before all are here. They spin: a wait is shorter than falling asleep would take.
    void wait() {
        if (threads == 1) return;
        const int64_t round = s.round.load(std::memory_order_relaxed);
        if (s.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            s.arrived.store(0, std::memory_order_relaxed);
            s.round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; s.round.load(std::memory_order_acquire) == round;)
            if (++spins > 4000) std::this_thread::yield();  // another program may have our core
    }
    int64_t share(int64_t n, int64_t thread) const { return n * thread / threads; }

    template <class Use>
    void product(const Matrix& m, const float* x, Use use) {
        // Shares are whole tiles of rows, so that a row is summed in the same order whatever the number of threads.
        const int64_t from = 4 * share(m.rows / 4, me);
        const int64_t to = me + 1 == threads ? m.rows : 4 * share(m.rows / 4, me + 1);
        if (p.storage == F32) blocks<F32>(m, from, to, x, use);
        else if (p.storage == BF16) blocks<BF16>(m, from, to, x, use);
        else blocks<INT8>(m, from, to, x, use);
    }
    template <int S, class Use>
    void blocks(const Matrix& m, int64_t from, int64_t to, const float* x, Use use) {
        int64_t b = 0;
        for (; b + MOST <= p.B; b += MOST) rows<S, MOST>(m, from, to, x, Shared::wide(m.columns), b, use);
        for (; b + 4 <= p.B; b += 4) rows<S, 4>(m, from, to, x, Shared::wide(m.columns), b, use);
        for (; b + 2 <= p.B; b += 2) rows<S, 2>(m, from, to, x, Shared::wide(m.columns), b, use);
        for (; b < p.B; ++b) rows<S, 1>(m, from, to, x, Shared::wide(m.columns), b, use);
    }

    void norm(const Norm& n, const float* from, float* to) const {
        float sum = 0, squares = 0;
        for (int64_t i = 0; i < D; ++i) sum += from[i];
        const float mean = sum / D;
        for (int64_t i = 0; i < D; ++i) squares += (from[i] - mean) * (from[i] - mean);
        const float scale = 1 / std::sqrt(squares / D + EPS);
        for (int64_t i = 0; i < D; ++i) to[i] = (from[i] - mean) * scale * n.weight[i] + n.bias[i];
    }
    // normed = norm of x; mixes of it with the last step's, one after the other; thread 0 keeps it for the next step.
    void shift(const Norm& n, const float* last, float* next, std::initializer_list<const float*> mixes) {
        for (int64_t b = 0; b < p.B; ++b) {
            float* now = normed + b * s.wide_D;
            norm(n, s.x.data() + b * D, now);
            int64_t which = 0;
            for (const float* mix : mixes) {
                float* to = mixed + (which++ * p.B + b) * s.wide_D;
                for (int64_t i = 0; i < D; ++i) to[i] = last[b * D + i] + (now[i] - last[b * D + i]) * mix[i];
            }
            if (me == 0) std::memcpy(next + b * D, now, sizeof(float) * D);
        }
    }
    const float* mix(int64_t which) const { return mixed + which * p.B * s.wide_D; }

    void run() {
        embed();
        for (int64_t i = 0; i < p.n_layer; ++i) block(p.layers[i], p.states[i]);
        for (int64_t b = 0; b < p.B; ++b) norm(p.ln_out, s.x.data() + b * D, normed + b * s.wide_D);
        product(p.head, normed, [&](int64_t row, int64_t b, float y) { p.logits[b * p.V + row] = y; });
    }
    void embed() {
        if (me == 0) {
            std::vector<float> row(D);
            for (int64_t b = 0; b < p.B; ++b) {
                const int64_t at = p.ids[b] * D;
                for (int64_t i = 0; i < D; ++i)
                    row[i] = p.emb_storage == F32 ? static_cast<const float*>(p.emb)[at + i]
                                                  : from_bfloat16(static_cast<const uint16_t*>(p.emb)[at + i]);
                norm(p.ln0, row.data(), s.x.data() + b * D);
            }
        }
        wait();
    }
    void block(const Layer& l, const State& state) {
        const auto keep = [](std::vector<float>& to, int64_t width) {
            return [&to, width](int64_t row, int64_t b, float y) { to[b * width + row] = y; };
        };
        const auto add = [&](int64_t row, int64_t b, float y) { s.x[b * D + row] += y; };
        const auto sigmoid = [](float x) { return 1 / (1 + std::exp(-x)); };

        shift(l.ln1, state.att_x, state.new_att_x, {l.mix_r, l.mix_k, l.mix_v, l.mix_g});
        product(l.receptance, mix(0), keep(s.r, A));
        product(l.key, mix(1), keep(s.k, A));
        product(l.value, mix(2), keep(s.v, A));
        product(l.gate, mix(3), [&](int64_t row, int64_t b, float y) { s.g[b * A + row] = y * sigmoid(y); });
        wait();
        const int64_t heads = p.B * A / p.N;
        for (int64_t h = share(heads, me); h < share(heads, me + 1); ++h) head(l, state, h);
        wait();
        product(l.output, s.y.data(), add);
        wait();
        shift(l.ln2, state.ffn_x, state.new_ffn_x, {l.ffn_mix_k, l.ffn_mix_r});
        const auto squared_relu = [&](int64_t row, int64_t b, float y) {
            s.hidden[b * s.wide_F + row] = y > 0 ? y * y : 0;
        };
        product(l.ffn_key, mix(0), squared_relu);
        product(l.ffn_receptance, mix(1), [&](int64_t row, int64_t b, float y) { s.gate[b * D + row] = sigmoid(y); });
        wait();
        const auto gated = [&](int64_t row, int64_t b, float y) { add(row, b, s.gate[b * D + row] * y); };
        product(l.ffn_value, s.hidden.data(), gated);
        wait();
    }
    // Head h of B x H: the recurrence, the norm of its N outputs, the gate.
    void head(const Layer& l, const State& state, int64_t h) {
        const int64_t N = p.N, at = h * N, channel = at % A;  // of (B, A), of (A)
        const float *r = s.r.data() + at, *k = s.k.data() + at, *v = s.v.data() + at;
        const float *d = l.decay + channel, *u = l.bonus + channel;
        float* y = s.y.data() + at / A * s.wide_A + channel;
        for (int64_t i = 0; i < N; ++i) y[i] = 0;
        for (int64_t j = 0; j < N; ++j) {
            const float *from = state.wkv + (at + j) * N, now = u[j] * k[j];
            float* to = state.new_wkv + (at + j) * N;
            for (int64_t i = 0; i < N; ++i) {
                y[i] += r[j] * (from[i] + now * v[i]);
                to[i] = d[j] * from[i] + k[j] * v[i];
            }
        }
        float sum = 0, squares = 0;
        for (int64_t i = 0; i < N; ++i) sum += y[i];
        const float mean = sum / N;
        for (int64_t i = 0; i < N; ++i) squares += (y[i] - mean) * (y[i] - mean);
        const float scale = 1 / std::sqrt(squares / N + float(p.eps_x));
        for (int64_t i = 0; i < N; ++i)
            y[i] = ((y[i] - mean) * scale * l.ln_x.weight[channel + i] + l.ln_x.bias[channel + i]) * s.g[at + i];
    }

    static void work(void* shared) {
        Shared& s = *static_cast<Shared*>(shared);
        const int64_t id = s.next_thread++;
        if (s.step.parallel && s.step.team) s.threads = s.step.team();  // perhaps fewer than were asked for
        while (s.threads == 0) std::this_thread::yield();
        Worker(s, id, s.threads).run();
    }
};

}  // namespace

// The result is 0, or 1 where memory is short.
extern "C" int64_t rwkv5_step(const Step* given) {
    try {
        Shared shared(*given);
        std::vector<std::thread> others;
        if (given->parallel && given->team) {
            given->parallel(Worker::work, &shared, unsigned(given->threads), 0);
            return 0;
        }
        others.reserve(given->threads);
        try {
            while (int64_t(others.size()) < given->threads - 1) others.emplace_back(Worker::work, &shared);
        } catch (const std::system_error&) {  // no more threads to be had: those that run do all the work
        }
        shared.threads = int64_t(others.size()) + 1;
        Worker::work(&shared);
        for (std::thread& other : others) other.join();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
