// Half precision for a compiler without CUDA: __half and __nv_bfloat16 as 16 bits, rounded to nearest, ties to even.
//
// Only storage and conversion, no arithmetic: the kernels compute in float. Tensor cores' tf32 is a float with 10 bits
// of fraction. Source: IEEE 754; PTX ISA for cvt.rna.tf32 (ties away from zero).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };

inline uint32_t __float_as_uint(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t u = __float_as_uint(x);
    if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};  // NaN
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

inline float __half2float(__half x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinite, NaN
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));  // from bias 15 to bias 127
}

inline __half __float2half(float x) {
    uint32_t u = __float_as_uint(x), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return {0x7fff};
    if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
    if (rest < 0x38800000) {  // below 2^-14: the spacing is 2^-24, so let float's own rounding at 0.5 do it
        return {uint16_t(sign | (__float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000))};
    }
    return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
}

inline unsigned to_tf32(float x) {
    uint32_t u = __float_as_uint(x);
    return (u & 0x7f800000) == 0x7f800000 ? u : (u + 0x1000) & 0xffffe000;
}

inline unsigned pack_bf16(float low, float high) {
    return __float2bfloat16(low).bits | unsigned(__float2bfloat16(high).bits) << 16;
}

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float __expf(float x) { return expf(x); }
