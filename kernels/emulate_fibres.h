// Blocks and threads on a processor: each CUDA thread is a fibre with its own stack; blocks run one after the other.
//
// A fibre runs until it waits at a barrier or ends; then the next one runs, in the order of the schedule. When all
// threads of a block wait at the same __syncthreads (or all lanes of a warp at the same warp operation), they go on. If
// nobody can go on, some threads have missed a barrier: the launch stops with a Problem instead of hanging.
//
//   emulate::machine.launch(settings, grid, block, [=] { kernel(...); });      every thread calls the function once
//
// Order: `in order`, `reversed` and `random` decide who runs first between two barriers. A kernel without races gives
// the same numbers under all of them. What it is not: parallel.
// Source: POSIX <ucontext.h> to start a fibre; setjmp to switch, which is twenty times faster since it asks no system.
#pragma once
#ifdef __APPLE__
#define _XOPEN_SOURCE 700
#define _DARWIN_C_SOURCE
#endif
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    int64_t count() const { return int64_t(x) * y * z; }
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

#define EMULATE_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()  // the place of the call

namespace emulate {

enum Order { in_order, reversed, random_order };

struct Settings {
    Order order = in_order;
    uint64_t seed = 0;
    bool switch_often = false;  // random order only: other threads may run between any two checked accesses
    int64_t limit = INT64_MAX;  // accesses and barriers of one launch; more is taken for an endless loop
};

struct Site { const char* file = ""; int line = 0; };

struct Problem { std::string kind, message; Site site; int64_t block; int thread; };

struct Stop {};  // thrown inside a fibre: the launch is over

constexpr int WARP = 32, STACK = 128 * 1024, WORDS = 8;

enum class State { ready, block_barrier, warp_barrier, ended };

struct Fibre {
    ucontext_t context;
    jmp_buf jump;
    bool started;
    State state;
    Site site;                // of the barrier where it waits
    const char* operation;    // and its name
    int warp_interval;        // __syncwarp passed so far
    unsigned exchanges;       // shuffles and matrix products so far
};

struct Warp { uint32_t words[2][WARP][WORDS]; };  // what lanes show one another; two sets, used in turn

class Machine {
public:
    Settings settings;
    std::vector<Problem> problems;
    int64_t steps = 0, barriers = 0, block = 0;
    int thread = 0, interval = 0, block_serial = 0;
    Site last_site;

    template <class Body> bool launch(const Settings& s, dim3 grid, dim3 threads, const Body& body);

    void wait_for_block(const char* name, Site site) { count_step(site); wait(State::block_barrier, name, site); }
    void wait_for_warp(const char* name, Site site, unsigned mask) {
        if (mask != 0xffffffffu) fail("warp mask", std::string(name) + " needs the mask 0xffffffff: all lanes", site);
        count_step(site);
        wait(State::warp_barrier, name, site);
    }

    // Shows `n` words to the warp; returns what every lane showed, once all have.
    const uint32_t (*exchange(const char* name, const uint32_t* words, int n, Site site, unsigned mask))[WORDS] {
        Warp& warp = warps_[thread / WARP];
        auto* shown = warp.words[fibres_[thread].exchanges++ % 2];
        memcpy(shown[thread % WARP], words, n * 4);
        wait_for_warp(name, site, mask);
        return shown;
    }

    int warp_interval() const { return fibres_[thread].warp_interval; }

    void count_step(Site site) {
        last_site = site;
        if (++steps > settings.limit) {
            const std::string limit = std::to_string(settings.limit);
            fail("step limit", "more than " + limit + " accesses and barriers: an endless loop?", site);
        }
    }
    void maybe_switch() {
        if (settings.switch_often && next_random() % 4 == 0) leave();
    }
    void note(const char* kind, std::string message, Site site) {
        if (problems.size() < 100) problems.push_back({kind, std::move(message), site, block, thread});
    }
    [[noreturn]] void fail(const char* kind, std::string message, Site site) {
        note(kind, std::move(message), site);
        throw Stop();
    }

private:
    void (*call_)(const void*) = nullptr;
    const void* body_ = nullptr;
    int count_ = 0;
    bool stopped_ = false;
    uint64_t random_ = 0;
    std::vector<Fibre> fibres_;
    std::vector<Warp> warps_;
    std::unique_ptr<char[]> stacks_;
    int64_t stack_count_ = 0;
    jmp_buf home_;

    uint64_t next_random() {  // splitmix64
        uint64_t z = random_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    template <class I> void arrange(std::vector<I>& order) {  // fills it with 0 .. n - 1 as the schedule wants it
        const size_t n = order.size();
        for (size_t i = 0; i < n; i++) order[i] = I(settings.order == reversed ? n - 1 - i : i);
        if (settings.order != random_order) return;
        for (size_t i = n; i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
    }

    static void enter();  // a fibre's first function

    void wait(State state, const char* name, Site site) {
        Fibre& f = fibres_[thread];
        f.state = state;
        f.operation = name;
        f.site = site;
        leave();
    }

    __attribute__((noinline)) void leave() {
        if (!_setjmp(fibres_[thread].jump)) _longjmp(home_, 1);
    }

    __attribute__((noinline)) void resume(int i, dim3 index) {
        thread = i;
        threadIdx = index;
        if (_setjmp(home_)) return;
        if (fibres_[i].started) _longjmp(fibres_[i].jump, 1);
        fibres_[i].started = true;
        setcontext(&fibres_[i].context);
    }

    // Do these two wait for the same thing?
    static bool together(const Fibre& a, const Fibre& b) {
        return a.state == b.state && a.site.line == b.site.line && !strcmp(a.operation, b.operation);
    }
    void run_block();
    bool release();
    void report_divergence();
};

inline thread_local Machine machine;

}  // namespace emulate

#include "emulate_schedule.h"

inline void __syncthreads(EMULATE_HERE) { emulate::machine.wait_for_block("__syncthreads", {file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATE_HERE) {
    emulate::machine.wait_for_warp("__syncwarp", {file, line}, mask);
}
