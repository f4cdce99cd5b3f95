// Runs the plain WKV-5 kernels, the very same source, on a processor. See launch.h for the functions, emulate.h for how.
#include <type_traits>

#include "wkv5_cuda.cu"

template <class... P, class... A> void start(void*, int64_t grid, int block, void (*kernel)(P...), A... arguments) {
    emulate::machine.launch(emulate::Settings(), dim3(unsigned(grid)), dim3(unsigned(block)), [=] { kernel(arguments...); });
}
static int finish() { return emulate::machine.problems.empty() ? 0 : 1; }

#include "launch.h"

extern "C" const char* wkv5_error(int code) {
    return code == -1 ? "no such head size or number format" : emulate::machine.problems.front().message.c_str();
}
