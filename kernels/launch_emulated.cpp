// Runs the WKV-5 kernels, the very same source, on a processor. See launch.h for the functions.
#include <type_traits>

#ifdef WKV5_CHUNKED
#include "wkv5_chunked.cu"  // brings the plain ones along
#else
#include "wkv5_cuda.cu"
#endif

static thread_local std::string problem;

template <class... P, class... A> void start(void*, int64_t grid, int block, void (*kernel)(P...), A... arguments) {
    auto body = [=] { kernel(arguments...); };
    emulate::machine.launch(emulate::Settings(), dim3(unsigned(grid)), dim3(unsigned(block)), body);
}

static int finish() {
    std::vector<emulate::Problem> problems;
    problems.swap(emulate::machine.problems);
    if (problems.empty()) return 0;
    problem = problems[0].message;
    return 1;
}

#include "launch.h"

extern "C" const char* wkv5_error(int code) {
    return code == -1 ? "no such head size or number format" : problem.c_str();
}
