// Every word of emulate.h, for test_emulator.py (runs it) and test_nvcc.py (compiles it).
#include "emulate.h"

__global__ void wkv5_words_shuffles(Global<float> y) {
    const int i = threadIdx.x;
    y[i] = __shfl_sync(0xffffffff, float(i), 3, 8);
    y[32 + i] = __shfl_up_sync(0xffffffff, float(i), 1);
    y[64 + i] = __shfl_down_sync(0xffffffff, float(i), 2, 16);
    float sum = i;
    for (int n = 16; n > 0; n /= 2) sum += __shfl_xor_sync(0xffffffff, sum, n);
    y[96 + i] = sum;
    y[128 + i] = __all_sync(0xffffffff, sum == 496) ? 1 : 0;
    y[160 + i] = __all_sync(0xffffffff, i != 7) ? 1 : 0;
}
__global__ void wkv5_words_convert(Global<const float> x, Global<__half> h, Global<__nv_bfloat16> b,
                                   Global<float> back) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    h[i] = from_float<__half>(x[i]);
    b[i] = from_float<__nv_bfloat16>(x[i]);
    back[2 * i] = to_float(h[i]);
    back[2 * i + 1] = to_float(b[i]);
}
__global__ void wkv5_words_several(Global<const float> x, Global<float> y) {
    SHARED(float, s, 128);
    const int i = threadIdx.x;
    store(s, 4 * i, load<4>(x, 4 * i));
    __syncthreads();
    Pack<float, 2> pair = load<2>(s + 64, 2 * (31 - i));
    store(y, 2 * i, pair);
}
// D = C + A B: A (16, K) by rows, B (K, 8) by rows. The lane's part of each is copied from the PTX manual's figures.
__global__ void wkv5_words_tf32(Global<const float> A, Global<const float> B, Global<const float> C, Global<float> D) {
    const int group = threadIdx.x >> 2, member = threadIdx.x & 3;
    unsigned a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; i++) a[i] = to_tf32(A[(i % 2 ? group + 8 : group) * 8 + (i < 2 ? member : member + 4)]);
    for (int i = 0; i < 2; i++) b[i] = to_tf32(B[(i == 0 ? member : member + 4) * 8 + group]);
    for (int i = 0; i < 4; i++) d[i] = C[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)];
    mma_m16n8k8_tf32(d, a, b);
    for (int i = 0; i < 4; i++) D[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)] = d[i];
}
__global__ void wkv5_words_bf16(Global<const float> A, Global<const float> B, Global<const float> C, Global<float> D) {
    const int group = threadIdx.x >> 2, member = threadIdx.x & 3;
    unsigned a[4], b[2];
    float d[4], p[8], q[4];
    for (int i = 0; i < 8; i++) {
        const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
        p[i] = A[row * 16 + member * 2 + (i & 1) + (i < 4 ? 0 : 8)];
    }
    for (int i = 0; i < 4; i++) q[i] = B[(member * 2 + (i & 1) + (i < 2 ? 0 : 8)) * 8 + group];
    for (int i = 0; i < 4; i++) a[i] = pack_bf16(p[2 * i], p[2 * i + 1]);
    for (int i = 0; i < 2; i++) b[i] = pack_bf16(q[2 * i], q[2 * i + 1]);
    for (int i = 0; i < 4; i++) d[i] = C[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)];
    mma_m16n8k16_bf16(d, a, b);
    for (int i = 0; i < 4; i++) D[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)] = d[i];
}
