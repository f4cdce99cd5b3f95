// Starts the WKV-5 kernels: picks the instance for a head size and a number format. What launch.cu (nvcc) and
// launch_emulated.cpp (C++) share; each defines `start(stream, grid, block, kernel, arguments...)` and `finish()`.
//
// wkv5_plain_forward, wkv5_plain_backward; with -DWKV5_CHUNKED, which needs compute capability 8.0, also
// wkv5_chunked_forward, wkv5_chunked_backward: the same arguments, the same results, by the kernels of wkv5_chunked.cu.
//
// Plain pointers, no torch. dtype of r, k, v, y, gy, gr, gk, gv: 0 float, 1 half, 2 bfloat16. N: 16, 32, 64 or 128.
// gw, gu: (H, N), summed over the batch in float; `parts` is room for 2 B H N floats. Result: 0, or an error code.
#pragma once

struct Inputs {
    int64_t B, T, H;
    const void *r, *k, *v;
    const float *w, *u, *state;
};

template <int N, typename T> int forward(Inputs x, void* y, float* last, void* stream) {
    auto in = [](const void* p) { return static_cast<const T*>(p); };
    const int64_t blocks = x.B * x.H;
    if (blocks > 0) {
        start(stream, blocks, N, wkv5_forward<N, T>, x.T, int(x.H), in(x.r), in(x.k), in(x.v), x.w, x.u, x.state,
              static_cast<T*>(y), last);
    }
    return finish();
}

template <int N, typename T>
int backward(Inputs x, const void* gy, const float* glast, void* gr, void* gk, void* gv, float* gw, float* gu,
             float* gstate, float* parts, void* stream) {
    auto in = [](const void* p) { return static_cast<const T*>(p); };
    auto out = [](void* p) { return static_cast<T*>(p); };
    const int64_t blocks = x.B * x.H, size = x.H * N;
    const int H = int(x.H);
    auto sum_over_batch = [&](float* total) {
        if (size > 0) start(stream, (size + 127) / 128, 128, wkv5_sum_over_batch, x.B, size, parts, total);
    };
    if (blocks > 0) {
        start(stream, blocks, N, wkv5_backward_k<N, T>, x.T, H, in(x.r), in(x.v), x.w, x.u, in(gy), glast, out(gk));
        start(stream, blocks, N, wkv5_backward_v<N, T>, x.T, H, in(x.r), in(x.k), x.w, x.u, in(gy), glast, out(gv),
              gstate);
        start(stream, blocks, N, wkv5_backward_r<N, T>, x.T, H, in(x.r), in(x.k), in(x.v), x.w, x.u, x.state, in(gy),
              out(gr), parts);
    }
    sum_over_batch(gu);
    if (blocks > 0) {
        start(stream, blocks, N, wkv5_backward_w<N, T>, x.T, H, in(x.r), in(x.k), in(x.v), x.w, x.state, in(gy), glast,
              parts);
    }
    sum_over_batch(gw);
    return finish();
}

#ifdef WKV5_CHUNKED
// The kernels in chunks always read; where there is no step, the plain ones do what is left to do.
template <int N, typename T> int chunked_forward(Inputs x, void* y, float* last, void* stream) {
    if (x.T == 0) return forward<N, T>(x, y, last, stream);
    auto in = [](const void* p) { return static_cast<const T*>(p); };
    const int64_t blocks = x.B * x.H;
    if (blocks > 0) {
        start(stream, blocks, 2 * N, wkv5_values<N, T, false>, x.T, int(x.H), in(x.r), in(x.k), in(x.v), x.w, x.u, x.state,
              static_cast<T*>(y), last);
    }
    return finish();
}

template <int N, typename T>
int chunked_backward(Inputs x, const void* gy, const float* glast, void* gr, void* gk, void* gv, float* gw, float* gu,
                     float* gstate, float* parts, void* stream) {
    if (x.T == 0) return backward<N, T>(x, gy, glast, gr, gk, gv, gw, gu, gstate, parts, stream);
    auto in = [](const void* p) { return static_cast<const T*>(p); };
    auto out = [](void* p) { return static_cast<T*>(p); };
    const int64_t blocks = x.B * x.H, size = x.H * N;
    const int H = int(x.H);
    const T *r = in(x.r), *k = in(x.k), *v = in(x.v), *g = in(gy);
    float *gw_parts = parts, *gu_parts = parts + blocks * N, *none = nullptr;
    if (blocks > 0) {
        start(stream, blocks, 2 * N, wkv5_values<N, T, true>, x.T, H, k, r, g, x.w, x.u, glast, out(gv), gstate);
        start(stream, blocks, 2 * N, wkv5_keys<N, T, true>, x.T, H, k, r, g, x.w, x.u, glast, v, glast, out(gk), none,
              none);
        start(stream, blocks, 2 * N, wkv5_keys<N, T, false>, x.T, H, r, k, v, x.w, x.u, x.state, g, glast, out(gr),
              gw_parts, gu_parts);
    }
    if (size > 0) {
        start(stream, (size + 127) / 128, 128, wkv5_sum_over_batch, x.B, size, gu_parts, gu);
        start(stream, (size + 127) / 128, 128, wkv5_sum_over_batch, x.B, size, gw_parts, gw);
    }
    return finish();
}
#endif

// Calls f(head size, number) with a compile-time head size and a number of the format; -1 if there is no such instance.
// -DWKV5_HEAD_SIZE=64 -DWKV5_DTYPE=2 compiles those instances only, in a fraction of the time.
#ifdef WKV5_HEAD_SIZE
constexpr int only_head_size = WKV5_HEAD_SIZE;
#else
constexpr int only_head_size = 0;
#endif
#ifdef WKV5_DTYPE
constexpr int only_dtype = WKV5_DTYPE;
#else
constexpr int only_dtype = -1;
#endif

template <int dtype, int n, typename T, class F> int try_instance(int wanted_dtype, int wanted_n, const F& f) {
    if constexpr ((only_head_size == 0 || only_head_size == n) && (only_dtype == -1 || only_dtype == dtype)) {
        if (wanted_dtype == dtype && wanted_n == n) return f(std::integral_constant<int, n>(), T());
    }
    return -1;
}
template <int n, class F> int with_head_size(int dtype, int N, const F& f) {
    switch (dtype) {
        case 0: return try_instance<0, n, float>(dtype, N, f);
        case 1: return try_instance<1, n, __half>(dtype, N, f);
        case 2: return try_instance<2, n, __nv_bfloat16>(dtype, N, f);
        default: return -1;
    }
}
template <class F> int with_instance(int dtype, int N, const F& f) {
    switch (N) {
        case 16: return with_head_size<16>(dtype, N, f);
        case 32: return with_head_size<32>(dtype, N, f);
        case 64: return with_head_size<64>(dtype, N, f);
        case 128: return with_head_size<128>(dtype, N, f);
        default: return -1;
    }
}

#define WKV5_FUNCTIONS(name, run_forward, run_backward)                                                                  \
    extern "C" int wkv5_##name##_forward(int dtype, int N, int64_t B, int64_t T, int64_t H, const void* r, const void* k, \
                                         const void* v, const float* w, const float* u, const float* state, void* y,     \
                                         float* last, void* stream) {                                                    \
        return with_instance(dtype, N, [=](auto n, auto t) {                                                             \
            return run_forward<decltype(n)::value, decltype(t)>({B, T, H, r, k, v, w, u, state}, y, last, stream);       \
        });                                                                                                              \
    }                                                                                                                    \
    extern "C" int wkv5_##name##_backward(int dtype, int N, int64_t B, int64_t T, int64_t H, const void* r,              \
                                          const void* k, const void* v, const float* w, const float* u,                  \
                                          const float* state, const void* gy, const float* glast, void* gr, void* gk,    \
                                          void* gv, float* gw, float* gu, float* gstate, float* parts, void* stream) {   \
        return with_instance(dtype, N, [=](auto n, auto t) {                                                             \
            return run_backward<decltype(n)::value, decltype(t)>({B, T, H, r, k, v, w, u, state}, gy, glast, gr, gk, gv, \
                                                                 gw, gu, gstate, parts, stream);                         \
        });                                                                                                              \
    }

WKV5_FUNCTIONS(plain, forward, backward)
#ifdef WKV5_CHUNKED
WKV5_FUNCTIONS(chunked, chunked_forward, chunked_backward)
#endif
