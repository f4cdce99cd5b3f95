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

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "packed_cpu.h"

namespace {

constexpr float EPS = 1e-5f;  // of the layer norms
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
using Team = int (*)();

// ---- what decoder.py hands over, in this order ---------------------------------------------------------------------

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
    Team team;                   // how many threads these really are
    const int64_t* ids;          // (B)
    const void* emb;             // (V, D), F32 or BF16
    int64_t emb_storage;
    Norm ln0, ln_out;
    const Layer* layers;
    const State* states;         // one a layer
    Matrix head;
    float* logits;               // (B, V)
};

// ---- norms ---------------------------------------------------------------------------------------------------------

inline float total(vec x) {
    float sum = 0;
    for (int i = 0; i < W; ++i) sum += x[i];
    return sum;
}
struct Moments {
    float mean, scale;           // scale: 1 / standard deviation
};
// n: a multiple of a register's numbers.
inline Moments moments(const float* x, int64_t n, float eps) {
    vec sum{}, squares{};
    for (int64_t i = 0; i < n; i += W) sum += get(x + i);
    const float mean = total(sum) / n;
    for (int64_t i = 0; i < n; i += W) squares += (get(x + i) - mean) * (get(x + i) - mean);
    return {mean, 1 / std::sqrt(total(squares) / n + eps)};
}

// ---- one thread's way through a step -------------------------------------------------------------------------------

struct Shared {
    const Step& step;
    // What a matrix is multiplied with (y, hidden, normed, mixed) has zeros behind each row, up to whole groups.
    const int64_t wide_D = wide(step.D), wide_A = wide(step.A), wide_F = wide(step.F);
    std::vector<float> x, r, k, v, g, y, hidden, gate, out;  // (B, D), (B, A) x 5, (B, F), (B, D) x 2
    std::vector<float> normed, mixed;                   // (threads, B, D), (threads, 4, B, D)
    const int64_t scratch_size;                         // of a thread
    std::vector<float> scratch;
    std::atomic<int64_t> arrived{0}, round{0};

    explicit Shared(const Step& s)
        : step(s), x(s.B * s.D), r(s.B * s.A), k(r), v(r), g(r), y(s.B * wide_A), hidden(s.B * wide_F), gate(x), out(x),
          normed(s.threads * s.B * wide_D), mixed(4 * normed.size()),
          scratch_size(scratch_floats(std::max({wide_D, wide_A, wide_F}), s.B)), scratch(s.threads * scratch_size) {}
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

    // y (B, y_row) = m times x; then use(number of it, vector, row) for the rows that this thread has made.
    template <class Use>
    void product(const Matrix& m, const float* x, float* y, int64_t y_row, Use use) {
        const int64_t from = share(m.panels(), me), to = share(m.panels(), me + 1);
        const Vectors vectors{x, Shared::wide(m.columns), y, y_row, p.B};
        float* scratch = s.scratch.data() + me * s.scratch_size;
        with_storage(p.storage, [&](auto S) { panels<S>(m, from, to, vectors, scratch); });
        for (int64_t b = 0; b < p.B; ++b)
            for (int64_t row = PANEL * from; row < std::min(PANEL * to, m.rows); ++row) use(y[b * y_row + row], b, row);
    }

    void norm(const Norm& n, const float* from, float* to) const {
        const Moments m = moments(from, D, EPS);
        for (int64_t i = 0; i < D; ++i) to[i] = (from[i] - m.mean) * m.scale * n.weight[i] + n.bias[i];
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
        product(p.head, normed, p.logits, p.V, [](float, int64_t, int64_t) {});
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
        const auto nothing = [](float&, int64_t, int64_t) {};
        const auto add = [&](float y, int64_t b, int64_t row) { s.x[b * D + row] += y; };
        const auto sigmoid = [](float x) { return 1 / (1 + std::exp(-x)); };

        shift(l.ln1, state.att_x, state.new_att_x, {l.mix_r, l.mix_k, l.mix_v, l.mix_g});
        product(l.receptance, mix(0), s.r.data(), A, nothing);
        product(l.key, mix(1), s.k.data(), A, nothing);
        product(l.value, mix(2), s.v.data(), A, nothing);
        product(l.gate, mix(3), s.g.data(), A, [&](float& y, int64_t, int64_t) { y *= sigmoid(y); });
        wait();
        const int64_t heads = p.B * A / p.N;
        for (int64_t h = share(heads, me); h < share(heads, me + 1); ++h) head(l, state, h);
        wait();
        product(l.output, s.y.data(), s.out.data(), D, add);
        wait();
        shift(l.ln2, state.ffn_x, state.new_ffn_x, {l.ffn_mix_k, l.ffn_mix_r});
        const auto squared_relu = [](float& y, int64_t, int64_t) { y = y > 0 ? y * y : 0; };
        product(l.ffn_key, mix(0), s.hidden.data(), s.wide_F, squared_relu);
        product(l.ffn_receptance, mix(1), s.gate.data(), D, [&](float& y, int64_t, int64_t) { y = sigmoid(y); });
        wait();
        const auto gated = [&](float y, int64_t b, int64_t row) { add(s.gate[b * D + row] * y, b, row); };
        product(l.ffn_value, s.hidden.data(), s.out.data(), D, gated);
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
        const Moments m = moments(y, N, float(p.eps_x));
        for (int64_t i = 0; i < N; ++i)
            y[i] = ((y[i] - m.mean) * m.scale * l.ln_x.weight[channel + i] + l.ln_x.bias[channel + i]) * s.g[at + i];
    }
};

// ---- one product, for prompts --------------------------------------------------------------------------------------

struct Product {
    int64_t n, storage, pairs, narrow, threads;  // pairs: x holds bfloat16, and the matrix is rounded to it
    Parallel parallel;
    Team team;
    Matrix matrix;
    const void* x;               // (n, columns)
    void* y;                     // (n, rows), float, or bfloat16 if narrow
};

void multiply(const Product& p, int64_t me, int64_t threads, float* scratch, uint32_t* pairs) {
    const Matrix& m = p.matrix;
    const int64_t from = m.panels() * me / threads, to = m.panels() * (me + 1) / threads;
    const Vectors vectors{p.x, m.columns, p.y, m.rows, p.n, p.narrow != 0};
    with_storage(p.storage, [&](auto S) {
        if (p.pairs) pair_panels<S>(m, from, to, vectors, scratch, pairs);
        else panels<S>(m, from, to, vectors, scratch);
    });
}

// ---- threads -------------------------------------------------------------------------------------------------------

// job(thread, how many) on `wanted` threads: those of `parallel`, perhaps fewer, or of our own.
template <class Job>
void together(Parallel parallel, Team team, int64_t wanted, Job job) {
    struct Crew {
        Job& job;
        Team team;
        std::atomic<int64_t> next{0}, threads{0};  // threads: 0 until it is known
        static void work(void* crew) {
            Crew& c = *static_cast<Crew*>(crew);
            const int64_t id = c.next++;
            if (c.team) c.threads = c.team();
            while (c.threads == 0) std::this_thread::yield();
            c.job(id, int64_t(c.threads));
        }
    } crew{job, parallel ? team : nullptr};
    if (crew.team) return parallel(Crew::work, &crew, unsigned(wanted), 0);
    std::vector<std::thread> others;
    others.reserve(wanted);
    try {
        while (int64_t(others.size()) < wanted - 1) others.emplace_back(Crew::work, &crew);
    } catch (const std::system_error&) {  // no more threads to be had: those that run do all the work
    }
    crew.threads = int64_t(others.size()) + 1;
    Crew::work(&crew);
    for (std::thread& other : others) other.join();
}

}  // namespace

// Both return 0, or 1 where memory is short.
extern "C" int64_t rwkv5_step(const Step* step) {
    try {
        Shared shared(*step);
        const auto work = [&](int64_t me, int64_t threads) { Worker(shared, me, threads).run(); };
        together(step->parallel, step->team, step->threads, work);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
extern "C" int64_t rwkv5_product(const Product* p) {
    try {
        const int64_t size = p->pairs ? TILE * PANEL * p->matrix.columns : scratch_floats(p->matrix.columns, p->n);
        const std::unique_ptr<float[]> scratch(new float[size * p->threads]);
        const std::unique_ptr<uint32_t[]> pairs(new uint32_t[p->pairs ? size / 2 * p->threads : 0]);
        together(p->parallel, p->team, p->threads, [&](int64_t me, int64_t n) {
            multiply(*p, me, n, scratch.get() + me * size, pairs.get() + me * (size / 2));
        });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
