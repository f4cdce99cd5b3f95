// Launches the plain WKV-5 kernels on a GPU: what needs CUDA's <<< >>>. See launch.h for the functions.
#include <type_traits>

#include "wkv5_cuda.cu"

template <class... P, class... A>
void start(void* stream, int64_t grid, int block, void (*kernel)(P...), A... arguments) {
    kernel<<<dim3(unsigned(grid)), dim3(unsigned(block)), 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
}
static int finish() { return cudaGetLastError(); }

#include "launch.h"

extern "C" const char* wkv5_error(int code) {
    return code == -1 ? "no such head size or number format" : cudaGetErrorString(cudaError_t(code));
}
