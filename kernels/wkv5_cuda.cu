// WKV-5 on a GPU, the plain way: a block works on one head of one sequence, its N threads each on one row or column of
// the state, which they keep in registers while time goes by. Forward, backward, and the sum over the batch.
//
// Symbols, for one head: S (N keys x N values) the state, j a key channel, i a value channel, and
//     y_t[i]  =  sum_j r_t[j] (S[j, i] + u[j] k_t[j] v_t[i])            with the state before step t
//     S[j, i] becomes  d[j] S[j, i] + k_t[j] v_t[i]                     d = exp(-exp(w))
// Backward, g being the gradient of y, and Q that of the state after step t:
//     gr_t[j] = sum_i g_t[i] (S[j, i] + u[j] k_t[j] v_t[i])             forward in time, S in rows
//     gk_t[j] = sum_i v_t[i] (Q[j, i] + u[j] r_t[j] g_t[i])             backward in time, Q in rows
//     gv_t[i] = sum_j k_t[j] (Q[j, i] + u[j] r_t[j] g_t[i])             backward in time, Q in columns
//     Q[j, i] becomes  d[j] Q[j, i] + r_t[j] g_t[i]                     the gradient of the state before step t
//     gu[j]   = sum_t r_t[j] k_t[j] (v_t . g_t)
//     X[j, i] becomes  d[j] (X[j, i] + S[j, i])                         the derivative of S by log d[j]
//     gw[j]   = (sum_t r_t[j] sum_i g_t[i] X[j, i] + the last state's share) log d[j],     log d = -exp(w)
// Nothing is divided by d, which may underflow to zero.
//
// A decay near 1 is kept as the sum of two floats, d = d.value + d.rest: what a step forgets, 1 - d, has only a few
// good bits if d is rounded to one float, and after a thousand steps that shows. So "d S + kv" takes two fmaf.
//
// r, k, v, y, g (B, T, H, N) float, half or bfloat16; w, u (H, N); states (B, H, N, N) as [key, value]; all else float.
// Launch: grid B H, block N. What it is not: fast. Each of the T steps waits for the one before.
// Source: "Eagle and Finch" (arXiv 2404.05892); the derivatives follow from the first two lines.
#include "emulate.h"

// [decay]
struct Decay { float value, rest; };

__device__ inline Decay decay(float raw_w) {
    const float log_d = -expf(raw_w), value = expf(log_d);
    return {value, value > 0.5f ? (1 - value) + expm1f(log_d) : 0};  // 1 - value is exact there
}

// [sum]
// A long sum that carries along what rounding takes from it (Kahan).
struct Sum {
    float value = 0, lost = 0;
    __device__ void add(float x) {
        const float y = x - lost, next = value + y;
        lost = (next - value) - y;
        value = next;
    }
};
// [end]

// [forward: arguments]
template <int N, typename T>
__global__ void __launch_bounds__(N, 1)
wkv5_forward(int64_t steps, int heads, Global<const T> r, Global<const T> k, Global<const T> v, Global<const float> w,
             Global<const float> u, Global<const float> state, Global<T> y, Global<float> last) {
    // [forward: who am I]
    const int i = threadIdx.x;                                     // my column: value channel i
    const int b = blockIdx.x / heads, h = blockIdx.x % heads;      // my block's sequence and head
    const int64_t step = int64_t(heads) * N;                       // from one time step to the next
    const int64_t first = b * steps * step + h * N;                // where this head's step 0 lies in r, k, v, y
    const int64_t column = int64_t(blockIdx.x) * N * N + i;        // where my column lies in the states

    // [forward: shared memory]
    SHARED(float, d, N);
    SHARED(float, d_rest, N);
    SHARED(float, bonus, N);
    SHARED(float, r_t, N);
    SHARED(float, k_t, N);
    const Decay d_i = decay(w[h * N + i]);
    d[i] = d_i.value;
    d_rest[i] = d_i.rest;
    bonus[i] = u[h * N + i];

    // [forward: load the state]
    float S[N];
    for (int j = 0; j < N; j++) S[j] = state[column + j * N];

    // [forward: one step]
    for (int64_t t = 0; t < steps; t++) {
        const int64_t now = first + t * step;
        __syncthreads();  // all threads are done with the last step's r and k
        r_t[i] = to_float(r[now + i]);
        k_t[i] = to_float(k[now + i]);
        const float v_i = to_float(v[now + i]);
        __syncthreads();  // all of r and k is there
        // [forward: read, then write the state]
        float sum = 0;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float kv = k_t[j] * v_i;
            sum = fmaf(r_t[j], fmaf(bonus[j], kv, S[j]), sum);
            S[j] = fmaf(d[j], S[j], fmaf(d_rest[j], S[j], kv));
        }
        y[now + i] = from_float<T>(sum);
    }

    // [forward: store the state]
    for (int j = 0; j < N; j++) last[column + j * N] = S[j];
}
// [end]

// [gradient of r and u: arguments]
template <int N, typename T>
__global__ void __launch_bounds__(N, 1)
wkv5_backward_r(int64_t steps, int heads, Global<const T> r, Global<const T> k, Global<const T> v,
                Global<const float> w, Global<const float> u, Global<const float> state, Global<const T> gy,
                Global<T> gr, Global<float> gu) {
    const int j = threadIdx.x;  // my row: key channel j
    const int b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int64_t step = int64_t(heads) * N;
    const int64_t first = b * steps * step + h * N;
    const int64_t row = int64_t(blockIdx.x) * N * N + j * N;
    SHARED(float, v_t, N);
    SHARED(float, g_t, N);
    const Decay d = decay(w[h * N + j]);
    const float bonus = u[h * N + j];
    float S[N];
    Sum u_sum;
    for (int i = 0; i < N; i++) S[i] = state[row + i];

    // [gradient of r and u: one step]
    for (int64_t t = 0; t < steps; t++) {
        const int64_t now = first + t * step;
        __syncthreads();  // all threads are done with the last step's v and g
        v_t[j] = to_float(v[now + j]);
        g_t[j] = to_float(gy[now + j]);
        const float r_j = to_float(r[now + j]), k_j = to_float(k[now + j]);
        __syncthreads();  // all of v and g is there
        // [gradient of r and u: two sums over the row]
        float gS = 0, vg = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float v_i = v_t[i], g_i = g_t[i];
            gS = fmaf(g_i, S[i], gS);
            vg = fmaf(g_i, v_i, vg);
            S[i] = fmaf(d.value, S[i], fmaf(d.rest, S[i], k_j * v_i));
        }
        gr[now + j] = from_float<T>(fmaf(bonus * k_j, vg, gS));
        u_sum.add(r_j * k_j * vg);
    }
    gu[int64_t(blockIdx.x) * N + j] = u_sum.value;  // (B, H, N): the batch is summed below
}
// [end]

// [gradient of k: arguments]
template <int N, typename T>
__global__ void __launch_bounds__(N, 1)
wkv5_backward_k(int64_t steps, int heads, Global<const T> r, Global<const T> v, Global<const float> w,
                Global<const float> u, Global<const T> gy, Global<const float> glast, Global<T> gk) {
    const int j = threadIdx.x;  // my row: key channel j
    const int b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int64_t step = int64_t(heads) * N;
    const int64_t first = b * steps * step + h * N;
    const int64_t row = int64_t(blockIdx.x) * N * N + j * N;
    SHARED(float, v_t, N);
    SHARED(float, g_t, N);
    const Decay d = decay(w[h * N + j]);
    const float bonus = u[h * N + j];
    float Q[N];
    for (int i = 0; i < N; i++) Q[i] = glast[row + i];

    // [gradient of k: one step, from the last to the first]
    for (int64_t t = steps - 1; t >= 0; t--) {
        const int64_t now = first + t * step;
        __syncthreads();  // all threads are done with the last step's v and g
        v_t[j] = to_float(v[now + j]);
        g_t[j] = to_float(gy[now + j]);
        const float r_j = to_float(r[now + j]);
        __syncthreads();  // all of v and g is there
        // [gradient of k: read, then write Q]
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float rg = r_j * g_t[i];
            sum = fmaf(v_t[i], fmaf(bonus, rg, Q[i]), sum);
            Q[i] = fmaf(d.value, Q[i], fmaf(d.rest, Q[i], rg));
        }
        gk[now + j] = from_float<T>(sum);
    }
}
// [end]

// [gradient of v and the state: arguments]
template <int N, typename T>
__global__ void __launch_bounds__(N, 1)
wkv5_backward_v(int64_t steps, int heads, Global<const T> r, Global<const T> k, Global<const float> w,
                Global<const float> u, Global<const T> gy, Global<const float> glast, Global<T> gv,
                Global<float> gstate) {
    const int i = threadIdx.x;  // my column: value channel i
    const int b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int64_t step = int64_t(heads) * N;
    const int64_t first = b * steps * step + h * N;
    const int64_t column = int64_t(blockIdx.x) * N * N + i;
    SHARED(float, d, N);
    SHARED(float, d_rest, N);
    SHARED(float, bonus, N);
    SHARED(float, r_t, N);
    SHARED(float, k_t, N);
    const Decay d_i = decay(w[h * N + i]);
    d[i] = d_i.value;
    d_rest[i] = d_i.rest;
    bonus[i] = u[h * N + i];
    float Q[N];
    for (int j = 0; j < N; j++) Q[j] = glast[column + j * N];

    // [gradient of v and the state: one step, from the last to the first]
    for (int64_t t = steps - 1; t >= 0; t--) {
        const int64_t now = first + t * step;
        __syncthreads();  // all threads are done with the last step's r and k
        r_t[i] = to_float(r[now + i]);
        k_t[i] = to_float(k[now + i]);
        const float g_i = to_float(gy[now + i]);
        __syncthreads();  // all of r and k is there
        // [gradient of v and the state: read, then write Q]
        float sum = 0;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float rg = r_t[j] * g_i;
            sum = fmaf(k_t[j], fmaf(bonus[j], rg, Q[j]), sum);
            Q[j] = fmaf(d[j], Q[j], fmaf(d_rest[j], Q[j], rg));
        }
        gv[now + i] = from_float<T>(sum);
    }
    for (int j = 0; j < N; j++) gstate[column + j * N] = Q[j];
}
// [end]

// [gradient of w: arguments]
template <int N, typename T>
__global__ void __launch_bounds__(N, 1)
wkv5_backward_w(int64_t steps, int heads, Global<const T> r, Global<const T> k, Global<const T> v,
                Global<const float> w, Global<const float> state, Global<const T> gy, Global<const float> glast,
                Global<float> gw) {
    constexpr int W = N < 64 ? N : 64;  // value channels at a time: two rows of W floats fit the registers
    const int j = threadIdx.x;          // my row: key channel j
    const int b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int64_t step = int64_t(heads) * N;
    const int64_t first = b * steps * step + h * N;
    const int64_t row = int64_t(blockIdx.x) * N * N + j * N;
    SHARED(float, v_t, N);
    SHARED(float, g_t, N);
    const Decay d = decay(w[h * N + j]);
    Sum total;
    for (int part = 0; part < N; part += W) {
        // [gradient of w: the state and its derivative]
        float S[W], X[W];
        for (int i = 0; i < W; i++) {
            S[i] = state[row + part + i];
            X[i] = 0;
        }
        for (int64_t t = 0; t < steps; t++) {
            const int64_t now = first + t * step;
            __syncthreads();  // all threads are done with the last step's v and g
            v_t[j] = to_float(v[now + j]);
            g_t[j] = to_float(gy[now + j]);
            const float r_j = to_float(r[now + j]), k_j = to_float(k[now + j]);
            __syncthreads();  // all of v and g is there
            // [gradient of w: read X, then write X and S]
            float sum = 0;
#pragma unroll
            for (int i = 0; i < W; i++) {
                sum = fmaf(g_t[part + i], X[i], sum);
                X[i] += S[i];
                X[i] = fmaf(d.value, X[i], d.rest * X[i]);
                S[i] = fmaf(d.value, S[i], fmaf(d.rest, S[i], k_j * v_t[part + i]));
            }
            total.add(r_j * sum);
        }
        // [gradient of w: the last state's share]
        for (int i = 0; i < W; i++) total.add(glast[row + part + i] * X[i]);
    }
    gw[int64_t(blockIdx.x) * N + j] = total.value * -expf(w[h * N + j]);  // (B, H, N): the batch is summed below
}
// [end]

// [sum over the batch]
// parts (batch, size) -> total (size); one thread an element, always in the same order, so no atomics are needed.
__global__ void wkv5_sum_over_batch(int64_t batch, int64_t size, Global<const float> parts, Global<float> total) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    Sum sum;
    for (int64_t b = 0; b < batch; b++) sum.add(parts[b * size + i]);
    total[i] = sum.value;
}
// [end]
