// Launches the WKV-5 kernels on a GPU: what needs CUDA's <<< >>>. See launch.h for the functions.
#include <type_traits>

#ifdef WKV5_CHUNKED
#include "wkv5_chunked.cu"  // brings the plain ones along
#else
#include "wkv5_cuda.cu"
#endif

template <class... P, class... A>
void start(void* stream, int64_t grid, int block, void (*kernel)(P...), A... arguments) {
    kernel<<<dim3(unsigned(grid)), dim3(unsigned(block)), 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
}
static int finish() { return cudaGetLastError(); }

#include "launch.h"

extern "C" const char* wkv5_error(int code) {
    return code == -1 ? "no such head size or number format" : cudaGetErrorString(cudaError_t(code));
}
