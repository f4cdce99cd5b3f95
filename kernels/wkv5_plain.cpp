// The WKV-5 operator on a CPU with the loops of the official CUDA kernel: wkv5_cpu.cpp is measured against it.
//
// What it is not: used by the package. One column of the state at a time, step by step, four passes over the time in
// the backward, nothing kept from the forward; where the GPU has a thread for each column there is a loop here. It
// starts from a state of zeros and gives none back, as the official kernel, and knows float32 only. HEAD_SIZE is a
// constant of the compiler, so that a column stays in registers.
//
// With state S[j,i] (key j, value i), decay d[j], bonus u[j], kv = k_t[j] v_t[i], zero before the first step:
//
//     y_t[i] = sum_j r_t[j] (S[j,i] + u[j] kv),   then  S = d S + kv
//     gr_t[j] = sum_i gy_t[i] (S[j,i] + u[j] kv),                            gu[j] = sum_t r_t[j] k_t[j] (v_t . gy_t)
//     gk_t[j] = sum_i v_t[i] (Q[j,i] + u[j] r_t[j] gy_t[i]),   then  Q = d Q + r_t[j] gy_t[i],   from the last step on
//     gv_t[i] = sum_j k_t[j] (Q[j,i] + u[j] r_t[j] gy_t[i])
//     gw[j] = log d[j] sum_t r_t[j] (M_t gy_t)[j],   M the derivative of S with respect to log d:  M' = d (M + S)
//             with the S before its own step
//
// Source: the formulas and the order of loops of `wkv5_cuda.cu` (BlinkDL/RWKV-LM, RWKV-v5), in our own words.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int N = HEAD_SIZE;

struct Call {
    int64_t B, T, H, threads;
    void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
    const float *r, *k, *v, *w, *u, *gy;
    float *y, *gr, *gk, *gv, *gw_parts, *gu_parts;  // the parts: (B, H, N)
};

struct Head {
    int64_t first, step, T;  // where the head's first number lies, and how far it is from step to step
    float d[N], log_d[N], u[N];

    Head(const Call& c, int64_t b, int64_t h) : first((b * c.T * c.H + h) * N), step(c.H * N), T(c.T) {
        for (int j = 0; j < N; ++j) {
            log_d[j] = -std::exp(c.w[h * N + j]);
            d[j] = std::exp(log_d[j]);
            u[j] = c.u[h * N + j];
        }
    }
};

void forward(const Call& c, const Head& x) {
    for (int i = 0; i < N; ++i) {
        float S[N] = {};
        for (int64_t t = 0, at = x.first; t < x.T; ++t, at += x.step) {
            const float *r = c.r + at, *k = c.k + at, v = c.v[at + i];
            float y = 0;
            for (int j = 0; j < N; ++j) {
                const float kv = k[j] * v;
                y += r[j] * (x.u[j] * kv + S[j]);
                S[j] = S[j] * x.d[j] + kv;
            }
            c.y[at + i] = y;
        }
    }
}

void backward(const Call& c, const Head& x, float* gw, float* gu) {
    for (int j = 0; j < N; ++j) {  // gr and gu: a row of the state, forward in time
        float S[N] = {}, bonus = 0;
        for (int64_t t = 0, at = x.first; t < x.T; ++t, at += x.step) {
            const float *v = c.v + at, *gy = c.gy + at, k = c.k[at + j], d = x.d[j];
            float gr = 0, diagonal = 0;
            for (int i = 0; i < N; ++i) {
                gr += gy[i] * S[i];
                diagonal += gy[i] * v[i];
                S[i] = S[i] * d + k * v[i];
            }
            c.gr[at + j] = gr + x.u[j] * k * diagonal;
            bonus += c.r[at + j] * k * diagonal;
        }
        gu[j] = bonus;
    }
    for (int j = 0; j < N; ++j) {  // gw: the state and its derivative, forward in time
        float S[N] = {}, M[N] = {}, sum = 0;
        for (int64_t t = 0, at = x.first; t < x.T; ++t, at += x.step) {
            const float *v = c.v + at, *gy = c.gy + at, k = c.k[at + j], d = x.d[j];
            float product = 0;
            for (int i = 0; i < N; ++i) {
                product += gy[i] * M[i];
                M[i] = d * (M[i] + S[i]);
                S[i] = S[i] * d + k * v[i];
            }
            sum += c.r[at + j] * product;
        }
        gw[j] = sum * x.log_d[j];
    }
    const int64_t end = x.first + x.T * x.step;
    for (int j = 0; j < N; ++j) {  // gk: a row of the gradient of the state, backward in time
        float Q[N] = {};
        for (int64_t t = 0, at = end - x.step; t < x.T; ++t, at -= x.step) {
            const float *v = c.v + at, *gy = c.gy + at, r = c.r[at + j], d = x.d[j], ur = x.u[j] * r;
            float gk = 0;
            for (int i = 0; i < N; ++i) {
                gk += v[i] * (ur * gy[i] + Q[i]);
                Q[i] = Q[i] * d + r * gy[i];
            }
            c.gk[at + j] = gk;
        }
    }
    for (int i = 0; i < N; ++i) {  // gv: a column of it
        float Q[N] = {};
        for (int64_t t = 0, at = end - x.step; t < x.T; ++t, at -= x.step) {
            const float *r = c.r + at, *k = c.k + at, gy = c.gy[at + i];
            float gv = 0;
            for (int j = 0; j < N; ++j) {
                const float rgy = r[j] * gy;
                gv += k[j] * (x.u[j] * rgy + Q[j]);
                Q[j] = Q[j] * x.d[j] + rgy;
            }
            c.gv[at + i] = gv;
        }
    }
}

struct Job {
    const Call& c;
    std::atomic<int64_t> next{0};

    static void work(void* job) {
        Job& self = *static_cast<Job*>(job);
        const Call& c = self.c;
        for (int64_t i; (i = self.next++) < c.B * c.H;) {
            const Head head(c, i / c.H, i % c.H);
            if (c.gy) backward(c, head, c.gw_parts + i * N, c.gu_parts + i * N);
            else forward(c, head);
        }
    }
};

}  // namespace

// Forward, or backward if gy is given.
extern "C" void wkv5_plain(const Call* call) {
    Job job{*call};
    if (call->parallel) {
        call->parallel(Job::work, &job, unsigned(call->threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int64_t i = 1; i < call->threads; ++i) others.emplace_back(Job::work, &job);
    Job::work(&job);
    for (std::thread& other : others) other.join();
}
