// The parts of a layer that are no matrix product, on a CPU: each in one pass over memory, and its gradient in another.
//
//     mix           out_m = s + (x - s) mix_m,  s = x one step earlier                     token shift and all its mixes
//     normed_gate   out = (norm(y) weight + bias) silu(g),  each head normalised alone     end of time mixing
//     relu2         x = max(x, 0)^2, in x's own place                                      middle of channel mixing
//     gate          out = sigmoid(r) v                                                     end of channel mixing
//     softmax       out = softmax(logits) - the target's 1, and the cross entropy          the loss
//
// What it is not: tied to PyTorch. Plain pointers come in through the functions at the end, which rwkv_nb/model/fused.py
// and loss.py call; the same formulas in PyTorch stand there. No intrinsics: the compiler makes vectors of the plain loops.
//
// Two number formats: Wide for the residual stream and for parameters, Narrow for what matrix products read and write.
// They are float and float, double and double, or float and bfloat16; all arithmetic is Wide.
//
// Rows are shared out in pieces whose number depends on the shape alone. Where a parameter's gradient is a sum over rows,
// each piece has a sum of its own: the result is the same whatever the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

// Steps of the next loop do not wait for each other: what it writes is not what it reads.
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace {

constexpr int64_t SMALL = 1 << 14;      // numbers that are not worth a second thread
constexpr int64_t MOST_MIXES = 4;
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// ---- number formats ------------------------------------------------------------------------------------------------

struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    bfloat16(float x) {  // ties to even; a number that is none stays one
        uint32_t u;
        std::memcpy(&u, &x, 4);
        bits = x == x ? uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
    }
    operator float() const {
        const uint32_t u = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &u, 4);
        return x;
    }
};

inline double exponential(double x) { return std::exp(x); }

// 2^n e^f with n whole and |f| <= ln 2 / 2, e^f by its series: within 2e-7 of e^x, and a loop of it becomes vectors.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const int32_t n = int32_t(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f));
    const float f = x - float(n) * 0.693147181f;
    float y = 1 + f * (1 + f * (0.5f + f * (1.6666667e-1f + f * (4.1666667e-2f + f * (8.3333333e-3f + f * 1.3888889e-3f)))));
    const int32_t power = (n + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return y * scale;
}

template <class W> inline W sigmoid(W x) { return 1 / (1 + exponential(-x)); }

// ---- sharing out the rows ------------------------------------------------------------------------------------------

struct Shape {
    int64_t B, T, D, N, M;               // rows, steps, channels; channels of a head; number of mixes
    int64_t format, threads, pieces;     // pieces of each of the B rows
    Parallel parallel;                   // runs function(data) on so many threads; null: threads of our own
};

// body(piece, b, first, last) for each piece: the steps first ... last-1 of row b.
template <class Body> void share(const Shape& s, Body body) {
    struct Job {
        const Shape& s;
        Body& body;
        std::atomic<int64_t> next{0};
        static void work(void* data) {
            Job& job = *static_cast<Job*>(data);
            const Shape& s = job.s;
            const int64_t length = (s.T + s.pieces - 1) / s.pieces;
            for (int64_t piece; (piece = job.next++) < s.B * s.pieces;) {
                const int64_t first = piece % s.pieces * length;
                job.body(piece, piece / s.pieces, std::min(first, s.T), std::min(first + length, s.T));
            }
        }
    } job{s, body};
    const int64_t threads = s.B * s.T * s.D < SMALL ? 1 : std::min(s.threads, s.B * s.pieces);
    if (threads <= 1) {
        Job::work(&job);
    } else if (s.parallel) {
        s.parallel(Job::work, &job, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < threads; ++i) others.emplace_back(Job::work, &job);
        Job::work(&job);
        for (std::thread& other : others) other.join();
    }
}

// ---- mix: x (B, T, D), before (B, D), M times mix (D) -> M times (B, T, D) ------------------------------------------

struct Mix {
    const void *x, *before;
    const void* mix[MOST_MIXES];
    void* out[MOST_MIXES];               // forward: results; backward: their gradients, which are read
    void *gx, *gbefore, *gmix;           // gradients; gmix (pieces, M, D)
};

template <class W, class X> void mix_forward(const Shape& s, const Mix& a) {
    const int64_t T = s.T, D = s.D;
    share(s, [&](int64_t, int64_t b, int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) {
            const W* x = static_cast<const W*>(a.x) + (b * T + t) * D;
            const W* before = t ? x - D : static_cast<const W*>(a.before) + b * D;
            for (int64_t m = 0; m < s.M; ++m) {
                const W* mix = static_cast<const W*>(a.mix[m]);
                X* __restrict out = static_cast<X*>(a.out[m]) + (b * T + t) * D;
                INDEPENDENT for (int64_t i = 0; i < D; ++i) out[i] = X(before[i] + (x[i] - before[i]) * mix[i]);
            }
        }
    });
}

// Step t gets mix of its own gradient and 1 - mix of the next step's; so time runs backwards, `later` handed on.
template <class W, class X, int M> void mix_backward(const Shape& s, const Mix& a) {
    const int64_t T = s.T, D = s.D;
    const W* mix[M];
    for (int m = 0; m < M; ++m) mix[m] = static_cast<const W*>(a.mix[m]);
    share(s, [&](int64_t piece, int64_t b, int64_t first, int64_t last) {
        W* __restrict gmix = static_cast<W*>(a.gmix) + piece * M * D;
        std::fill(gmix, gmix + M * D, W(0));
        std::vector<W> carried(D, W(0));
        W* __restrict later = carried.data();
        for (int64_t t = std::min(last, T - 1); t >= first && first < last; --t) {
            const W* x = static_cast<const W*>(a.x) + (b * T + t) * D;
            const W* before = t ? x - D : static_cast<const W*>(a.before) + b * D;
            const X* g[M];
            for (int m = 0; m < M; ++m) g[m] = static_cast<const X*>(a.out[m]) + (b * T + t) * D;
            W* __restrict gx = static_cast<W*>(a.gx) + (b * T + t) * D;
            if (t == last) {  // belongs to the next piece: only what it hands on
                INDEPENDENT for (int64_t i = 0; i < D; ++i)
                    for (int m = 0; m < M; ++m) later[i] += W(g[m][i]) * (1 - mix[m][i]);
                continue;
            }
            INDEPENDENT for (int64_t i = 0; i < D; ++i) {
                const W difference = x[i] - before[i];
                W own = 0, all = 0;
                for (int m = 0; m < M; ++m) {
                    const W gradient = g[m][i];
                    own += gradient * mix[m][i];
                    all += gradient;
                    gmix[m * D + i] += gradient * difference;
                }
                gx[i] = own + later[i];
                later[i] = all - own;
            }
        }
        if (first == 0) std::copy(later, later + D, static_cast<W*>(a.gbefore) + b * D);
    });
}

// ---- normed_gate: y, g (B, T, D) in heads of N, weight, bias (D) -> (B, T, D) --------------------------------------

struct NormedGate {
    const void *y, *g, *weight, *bias;
    double eps;
    const void* gout;
    void *out, *gy, *gg, *gparameters;   // gparameters (pieces, 2, D): of weight and bias
};

template <class W, class X> void statistics(const X* y, int64_t N, double eps, W& mean, W& scale) {
    W sum = 0, squares = 0;
    INDEPENDENT for (int64_t i = 0; i < N; ++i) sum += W(y[i]);
    mean = sum / W(N);
    INDEPENDENT for (int64_t i = 0; i < N; ++i) squares += (W(y[i]) - mean) * (W(y[i]) - mean);
    scale = 1 / std::sqrt(squares / W(N) + W(eps));
}

template <class W, class X> void normed_gate_forward(const Shape& s, const NormedGate& a) {
    const int64_t N = s.N;
    const W *weight = static_cast<const W*>(a.weight), *bias = static_cast<const W*>(a.bias);
    share(s, [&](int64_t, int64_t b, int64_t first, int64_t last) {
        for (int64_t at = (b * s.T + first) * s.D; at < (b * s.T + last) * s.D; at += N) {
            const X *y = static_cast<const X*>(a.y) + at, *g = static_cast<const X*>(a.g) + at;
            X* __restrict out = static_cast<X*>(a.out) + at;
            const int64_t channel = at % s.D;
            W mean, scale;
            statistics(y, N, a.eps, mean, scale);
            INDEPENDENT for (int64_t i = 0; i < N; ++i) {
                const W z = (W(y[i]) - mean) * scale * weight[channel + i] + bias[channel + i], gate = g[i];
                out[i] = X(z * gate * sigmoid(gate));
            }
        }
    });
}

template <class W, class X> void normed_gate_backward(const Shape& s, const NormedGate& a) {
    const int64_t N = s.N;
    const W *weights = static_cast<const W*>(a.weight), *biases = static_cast<const W*>(a.bias);
    share(s, [&](int64_t piece, int64_t b, int64_t first, int64_t last) {
        W* parameters = static_cast<W*>(a.gparameters) + piece * 2 * s.D;
        std::fill(parameters, parameters + 2 * s.D, W(0));
        std::vector<W> scratch(2 * N);
        W *__restrict normed = scratch.data(), *__restrict gnormed = normed + N;
        for (int64_t at = (b * s.T + first) * s.D; at < (b * s.T + last) * s.D; at += N) {
            const X *y = static_cast<const X*>(a.y) + at, *g = static_cast<const X*>(a.g) + at;
            const X* gout = static_cast<const X*>(a.gout) + at;
            X *__restrict gy = static_cast<X*>(a.gy) + at, *gg = static_cast<X*>(a.gg) + at;  // gg may be gout
            const int64_t channel = at % s.D;
            const W *weight = weights + channel, *bias = biases + channel;
            W *__restrict gweight = parameters + channel, *__restrict gbias = gweight + s.D;
            W mean, scale, sum = 0, product = 0;
            statistics(y, N, a.eps, mean, scale);
            INDEPENDENT for (int64_t i = 0; i < N; ++i) {
                const W n = (W(y[i]) - mean) * scale, gate = g[i], open = sigmoid(gate), above = gout[i];
                const W gz = above * gate * open;
                gg[i] = X(above * (n * weight[i] + bias[i]) * open * (1 + gate * (1 - open)));
                gweight[i] += gz * n;
                gbias[i] += gz;
                normed[i] = n;
                gnormed[i] = gz * weight[i];
                sum += gnormed[i];
                product += gnormed[i] * n;
            }
            sum /= W(N), product /= W(N);
            INDEPENDENT for (int64_t i = 0; i < N; ++i) gy[i] = X(scale * (gnormed[i] - sum - normed[i] * product));
        }
    });
}

// ---- number by number ----------------------------------------------------------------------------------------------

struct Pointwise {
    const void *a, *b, *gout;
    void *out, *ga, *gb;
};

// body(i) for each of the B T D numbers.
template <class Body> void each(const Shape& s, Body body) {
    share(s, [&](int64_t, int64_t b, int64_t first, int64_t last) { body((b * s.T + first) * s.D, (b * s.T + last) * s.D); });
}

// In x's own place: nothing fresh is written, and what the gradient needs, 2 max(x, 0), is twice the root of the result.
template <class W, class X> void relu2_forward(const Shape& s, const Pointwise& p) {
    each(s, [&](int64_t i, int64_t end) {
        X* __restrict x = static_cast<X*>(p.out);
        INDEPENDENT for (; i < end; ++i) {
            const W y = std::max(W(x[i]), W(0));
            x[i] = X(y * y);
        }
    });
}

template <class W, class X> void relu2_backward(const Shape& s, const Pointwise& p) {
    each(s, [&](int64_t i, int64_t end) {
        const X *out = static_cast<const X*>(p.a), *gout = static_cast<const X*>(p.gout);
        X* gx = static_cast<X*>(p.ga);  // may be gout
        INDEPENDENT for (; i < end; ++i) gx[i] = X(2 * std::sqrt(W(out[i])) * W(gout[i]));
    });
}

template <class W, class X> void gate_forward(const Shape& s, const Pointwise& p) {
    each(s, [&](int64_t i, int64_t end) {
        const X *r = static_cast<const X*>(p.a), *v = static_cast<const X*>(p.b);
        W* __restrict out = static_cast<W*>(p.out);
        INDEPENDENT for (; i < end; ++i) out[i] = sigmoid(W(r[i])) * W(v[i]);
    });
}

template <class W, class X> void gate_backward(const Shape& s, const Pointwise& p) {
    each(s, [&](int64_t i, int64_t end) {
        const X *r = static_cast<const X*>(p.a), *v = static_cast<const X*>(p.b);
        const W* gout = static_cast<const W*>(p.gout);
        X *__restrict gr = static_cast<X*>(p.ga), *__restrict gv = static_cast<X*>(p.gb);
        INDEPENDENT for (; i < end; ++i) {
            const W open = sigmoid(W(r[i])), through = gout[i] * open;
            gv[i] = X(through);
            gr[i] = X(through * W(v[i]) * (1 - open));
        }
    });
}

// ---- softmax: logits (T, V) of T positions, in place ---------------------------------------------------------------

struct Softmax {
    void* logits;                        // become the gradient of loss by logit
    const int64_t* targets;              // (T)
    const void* weights;                 // (T): what each position counts
    void *losses, *largest;              // (T): cross entropy; the largest logit
    int64_t* at;                         // (T): where that is
};

// The largest of n numbers; one that is none does not count. In lanes: else the compiler would compare one by one.
template <class W, class X> W maximum(const X* x, int64_t n) {
    constexpr int64_t LANES = 16;
    W most[LANES];
    std::fill(most, most + LANES, W(-INFINITY));
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) most[lane] = W(x[i + lane]) > most[lane] ? W(x[i + lane]) : most[lane];
    for (; i < n; ++i) most[0] = W(x[i]) > most[0] ? W(x[i]) : most[0];
    return *std::max_element(most, most + LANES);
}

template <class W, class X> void softmax(const Shape& s, const Softmax& a) {
    constexpr int64_t BLOCK = 1024;
    const int64_t V = s.D;
    share(s, [&](int64_t, int64_t, int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) {
            X* row = static_cast<X*>(a.logits) + t * V;
            W largest = -INFINITY;
            int64_t at = 0;
            for (int64_t start = 0; start < V; start += BLOCK) {
                const int64_t end = std::min(V, start + BLOCK);
                const W here = maximum<W>(row + start, end - start);
                if (here > largest) largest = here, at = start;
            }
            while (at < V - 1 && W(row[at]) < largest) ++at;
            W sum = 0;
            INDEPENDENT for (int64_t i = 0; i < V; ++i) sum += exponential(W(row[i]) - largest);
            const int64_t target = a.targets[t];
            const W weight = static_cast<const W*>(a.weights)[t], logit = row[target];
            const W share = exponential(logit - largest) / sum - 1, factor = weight / sum;
            INDEPENDENT for (int64_t i = 0; i < V; ++i) row[i] = X(exponential(W(row[i]) - largest) * factor);
            row[target] = X(share * weight);
            static_cast<W*>(a.losses)[t] = std::log(sum) + largest - logit;
            static_cast<W*>(a.largest)[t] = largest;
            a.at[t] = at;
        }
    });
}

template <class W, class X> void mix_backward_any(const Shape& s, const Mix& a) {
    s.M == 4 ? mix_backward<W, X, 4>(s, a) : mix_backward<W, X, 2>(s, a);
}

}  // namespace

#define FOR_EACH_FORMAT(name, function, Arguments)                          \
    extern "C" void name(const Shape* s, const Arguments* a) {              \
        if (s->format == 0) function<float, float>(*s, *a);                 \
        if (s->format == 1) function<double, double>(*s, *a);               \
        if (s->format == 2) function<float, bfloat16>(*s, *a);              \
    }

FOR_EACH_FORMAT(elementwise_mix_forward, mix_forward, Mix)
FOR_EACH_FORMAT(elementwise_mix_backward, mix_backward_any, Mix)
FOR_EACH_FORMAT(elementwise_normed_gate_forward, normed_gate_forward, NormedGate)
FOR_EACH_FORMAT(elementwise_normed_gate_backward, normed_gate_backward, NormedGate)
FOR_EACH_FORMAT(elementwise_relu2_forward, relu2_forward, Pointwise)
FOR_EACH_FORMAT(elementwise_relu2_backward, relu2_backward, Pointwise)
FOR_EACH_FORMAT(elementwise_gate_forward, gate_forward, Pointwise)
FOR_EACH_FORMAT(elementwise_gate_backward, gate_backward, Pointwise)
FOR_EACH_FORMAT(elementwise_softmax, softmax, Softmax)
