// CUDA's words for two compilers: one kernel source runs on a GPU (nvcc) and on a processor (any C++17 compiler).
//
// A kernel file includes this header and nothing else. Under nvcc the words below are plain pointers and arrays and
// cost nothing. Under a C++ compiler each CUDA thread is a fibre that runs until its next barrier (emulate_fibres.h);
// with -DEMULATE_CHECKED every access goes through a view that finds races and counts traffic (emulate_checks.h).
//
//   Global<T> x            parameter: an array in global memory; x[i], x + n. Global<const T> if only read.
//   SHARED(T, x, n);       an array of n numbers in the block's shared memory, aligned to 16 bytes; x[i], x + n.
//   Shared<T> x            parameter of a __device__ function: such an array.
//   Pack<T, n>, load<n>(x, i), store(x, i, pack)      n neighbours in one access; i is a multiple of n.
//   to_float(x), from_float<T>(x)                     between float, __half, __nv_bfloat16 and float.
//   to_tf32(x), pack_bf16(low, high)                  registers of the two matrix products:
//   mma_m16n8k8_tf32(d, a, b), mma_m16n8k16_bf16(d, a, b)     d += a b by the 32 lanes of a warp together.
//
// The fragments are PTX's. With g = lane / 4 and q = lane % 4 a lane holds
//   d[0..3], 16 x 8 floats    rows g, g, g + 8, g + 8      columns 2 q, 2 q + 1, 2 q, 2 q + 1
//   tf32  a[0..3], 16 x 8     rows g, g + 8, g, g + 8      columns q, q, q + 4, q + 4
//         b[0..1],  8 x 8     rows q, q + 4                column g
//   bf16  a[0..3], 16 x 16    rows g, g + 8, g, g + 8      columns 2 q, 2 q, 2 q + 8, 2 q + 8, each with the next one
//         b[0..1], 16 x 8     rows 2 q, 2 q + 8, each with the next one      column g
// Two bfloat16 share a register, the first in its low half.
//
// Emulated besides: threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp, __shfl_sync, __shfl_xor_sync,
// __shfl_up_sync, __shfl_down_sync (4-byte values), __all_sync, all these with full warps, atomicAdd(&x[i], v). What it
// is not: a model of time, of caches, or of the order in which a GPU's memory becomes visible. Write `float a = x[i]`:
// with `auto` it would be a reference into a checked array, and refuse to work.
// Source: CUDA C++ Programming Guide (language extensions), PTX ISA (matrix fragments for mma.m16n8k8 and .m16n8k16).
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <class T> using Global = T* __restrict__;
template <class T> using Shared = T*;
#define SHARED(type, name, size) __shared__ __align__(16) type name[size]

#else
#include "emulate_fibres.h"
#include "emulate_numbers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#ifdef EMULATE_CHECKED
#include "emulate_checks.h"
template <class T> using Global = emulate::View<T>;
template <class T> using Shared = emulate::View<T>;
#define SHARED(type, name, size)                                                  \
    static thread_local emulate::SharedArray<type, size> name##_storage(#name);   \
    emulate::View<type> name = name##_storage.view()
#else
template <class T> using Global = T*;
template <class T> using Shared = T*;
#define __shared__ static thread_local
#define SHARED(type, name, size) alignas(16) static thread_local type name[size]
inline float atomicAdd(float* x, float v) { float old = *x; *x += v; return old; }
inline int atomicAdd(int* x, int v) { int old = *x; *x += v; return old; }
#endif
#endif

// ---- several neighbours at once ----
template <class T, int n> struct alignas(sizeof(T) * n) Pack {
    T at[n];
    __device__ T& operator[](int i) { return at[i]; }
    __device__ const T& operator[](int i) const { return at[i]; }
};

#ifndef EMULATE_CHECKED
template <int n, class T> __device__ inline Pack<T, n> load(const T* x, int64_t i) {
    return *reinterpret_cast<const Pack<T, n>*>(x + i);
}
template <int n, class T> __device__ inline void store(T* x, int64_t i, const Pack<T, n>& pack) {
    *reinterpret_cast<Pack<T, n>*>(x + i) = pack;
}
#else
template <int n, class T>
inline Pack<std::remove_const_t<T>, n> load(emulate::View<T> x, emulate::At i) {
    Pack<std::remove_const_t<T>, n> pack;
    x.read_many(i, n, pack.at);
    return pack;
}
template <int n, class T> inline void store(emulate::View<T> x, emulate::At i, const Pack<T, n>& pack) {
    x.write_many(i, n, pack.at);
}
#endif

// ---- number formats ----
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half(x); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }

// ---- matrix products by a warp ----
#ifdef __CUDACC__
__device__ inline unsigned to_tf32(float x) {
#if __CUDA_ARCH__ >= 900
    unsigned y;
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));  // one instruction instead of three; ties go to even
    return y;
#elif __CUDA_ARCH__ >= 800
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
#else
    return __float_as_uint(x);
#endif
}

__device__ inline unsigned pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
}

// GPUs before sm_80 have neither format in their tensor cores: a kernel that gets here on one stops with an error.
__device__ inline void mma_m16n8k8_tf32(float d[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

__device__ inline void mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}
#else
#include "emulate_warps.h"
#endif
