// Who runs when: the order of blocks and threads, opening barriers, and telling when a barrier can never open.
// Part of emulate_fibres.h, which includes it.
#pragma once
#include "emulate_fibres.h"

namespace emulate {

inline void Machine::enter() {
    try {
        machine.call_(machine.body_);
    } catch (const Stop&) {
        machine.stopped_ = true;
    } catch (const std::exception& error) {
        machine.note("exception", error.what(), machine.last_site);
        machine.stopped_ = true;
    }
    machine.fibres_[machine.thread].state = State::ended;
    machine.leave();
}

inline void Machine::run_block() {
    for (int i = 0; i < count_; i++) {
        Fibre& f = fibres_[i];
        f.started = false;
        f.state = State::ready;
        f.warp_interval = 0;
        f.exchanges = 0;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = stacks_.get() + int64_t(i) * STACK;
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, &Machine::enter, 0);
    }
    interval++;
    block_serial++;
    std::vector<int> order(count_);
    for (bool going = true; going && !stopped_; going = going || (!stopped_ && release())) {
        going = false;
        arrange(order);
        for (int i : order) {
            if (fibres_[i].state != State::ready) continue;
            going = true;
            resume(i, dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)));
            if (stopped_) return;
        }
    }
}

// Nobody is ready: opens the barriers that are complete. False if none is: the block has ended, or is stuck.
inline bool Machine::release() {
    bool opened = false;
    for (int first = 0; first < count_; first += WARP) {
        const Fibre& head = fibres_[first];
        const int last = std::min(first + WARP, count_);
        bool complete = head.state == State::warp_barrier;
        for (int i = first; i < last && complete; i++) complete = together(fibres_[i], head);
        if (!complete) continue;
        opened = true;
        const bool orders_memory = !strcmp(head.operation, "__syncwarp");  // shuffles do not
        for (int i = first; i < last; i++) {
            fibres_[i].state = State::ready;
            fibres_[i].warp_interval += orders_memory;
        }
    }
    if (opened) return true;
    int ended = 0, waiting = 0;
    for (const Fibre& f : fibres_) {
        ended += f.state == State::ended;
        waiting += f.state == State::block_barrier && together(f, fibres_[0]);
    }
    if (ended == count_) return false;
    if (waiting < count_) {
        report_divergence();
        return false;
    }
    for (Fibre& f : fibres_) f.state = State::ready;
    interval++;
    barriers++;
    return true;
}

inline void Machine::report_divergence() {
    thread = 0;  // the first thread that waits; how many wait with it; the first that does not
    while (fibres_[thread].state == State::ended) thread++;
    const Fibre& waiting = fibres_[thread];
    const bool warp = waiting.state == State::warp_barrier;
    const int first = warp ? thread / WARP * WARP : 0, last = warp ? std::min(first + WARP, count_) : count_;
    int with = 0, other = -1;
    for (int i = first; i < last; i++) {
        if (fibres_[i].state != State::ended && together(fibres_[i], waiting)) with++;
        else if (other < 0) other = i;
    }
    std::string message = std::string(waiting.operation) + " is reached by " + std::to_string(with) + " of the " +
                          std::to_string(last - first) + (warp ? " lanes of a warp" : " threads of the block");
    if (other >= 0) {
        const Fibre& f = fibres_[other];
        message += ": thread " + std::to_string(other);
        if (f.state == State::ended) message += " has ended";
        else message += std::string(" waits at ") + f.operation + " in line " + std::to_string(f.site.line);
    }
    stopped_ = true;
    note("divergent barrier", message, waiting.site);
}

template <class Body> bool Machine::launch(const Settings& s, dim3 grid, dim3 threads, const Body& body) {
    settings = s;
    settings.switch_often = s.switch_often && s.order == random_order;
    random_ = s.seed;
    steps = barriers = 0;
    stopped_ = false;
    last_site = Site();
    gridDim = grid;
    blockDim = threads;
    count_ = int(threads.count());
    thread = 0;
    block = 0;
    if (count_ < 1 || count_ > 1024 || grid.count() < 1) {
        note("launch", std::to_string(grid.count()) + " blocks of " + std::to_string(threads.count()) +
             " threads; CUDA wants at least 1 block, and 1 to 1024 threads in each", last_site);
        return false;
    }
    body_ = &body;
    call_ = [](const void* f) { (*static_cast<const Body*>(f))(); };
    fibres_.resize(count_);
    warps_.resize((count_ + WARP - 1) / WARP);
    if (stack_count_ < count_) {
        stacks_.reset(new char[int64_t(count_) * STACK]);  // costs no memory until it is touched
        stack_count_ = count_;
    }
    std::vector<int64_t> blocks(grid.count());
    arrange(blocks);
    for (int64_t b : blocks) {
        block = b;
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / (int64_t(grid.x) * grid.y));
        run_block();
        if (stopped_) return false;
    }
    return true;
}

}  // namespace emulate
