// The program around a kernel that somebody is trying out: reads the arguments, runs the launches, writes a report.
//
// It runs as a process of its own, so that whatever the kernel does, the notebook lives on: a crash or an endless loop
// ends this process, which still says in which line the last checked access was. rwkv_nb/wkv/emulator.py generates
//   void emulate_launches(emulate::Job& job) { job.launch("name", [&] { kernel(job.integer(0), job.array<float>(1)); }); }
// and starts the program with a folder: `job` (text: settings; per launch its sizes and arguments) and `arrays` (bytes,
// overwritten with the results) in it, `report.json` out. What it is not: a sandbox against ill will.
#pragma once
#include "emulate.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <fstream>

namespace emulate {

struct Argument { char kind; int64_t integer, offset, size; double number; std::string name; };

class Job {
public:
    explicit Job(const std::string& folder);
    void write_report() const;
    void write_arrays() const { std::ofstream(folder_ + "/arrays", std::ios::binary).write(bytes_.data(), bytes_.size()); }

    template <class Body> void launch(const char* kernel, const Body& body);

    // Arguments of the running launch, by position.
    int64_t integer(int i) const { return arguments_[i].integer; }
    float number(int i) const { return float(arguments_[i].number); }
    template <class T> Global<T> array(int i) {
#ifdef EMULATE_CHECKED
        return View<T>(reinterpret_cast<T*>(&bytes_[arguments_[i].offset]), arrays_[i].get());
#else
        return reinterpret_cast<T*>(&bytes_[arguments_[i].offset]);
#endif
    }

private:
    std::string folder_, bytes_, reports_;
    std::ifstream in_;
    Settings settings_;
    std::vector<Argument> arguments_;
    int64_t element_bytes_ = 0;
    dim3 read_size() { unsigned x, y, z; in_ >> x >> y >> z; return dim3(x, y, z); }
    std::string launch_report(const char* kernel) const;
#ifdef EMULATE_CHECKED
    std::vector<std::unique_ptr<Array>> arrays_;
#endif
};

inline Job* running = nullptr;
inline const char* running_kernel = "";

inline std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        out += static_cast<unsigned char>(c) < 32 ? ' ' : c;
    }
    return out + "\"";
}

inline Job::Job(const std::string& folder) : folder_(folder), in_(folder + "/job") {
    std::ifstream arrays(folder + "/arrays", std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(arrays), std::istreambuf_iterator<char>());
    int order, often, seconds;
    in_ >> order >> settings_.seed >> often >> settings_.limit >> seconds;
    settings_.order = Order(order);
    settings_.switch_often = often;
    alarm(seconds);
}

template <class Body> void Job::launch(const char* kernel, const Body& body) {
    if (!machine.problems.empty() && machine.problems.back().kind != "uninitialised") return;  // an earlier launch failed
    running_kernel = kernel;
    const dim3 grid = read_size(), block = read_size();
    int count;
    in_ >> count;
    arguments_.assign(count, Argument());
    for (Argument& a : arguments_) {
        in_ >> a.kind >> a.name;
        if (a.kind == 'i') in_ >> a.integer;
        if (a.kind == 'f') in_ >> a.number;
        if (a.kind == 'a') in_ >> a.offset >> a.size >> a.integer;  // bytes from the start, elements, bytes of one
    }
#ifdef EMULATE_CHECKED
    arrays_.clear();
    findings = Findings();
    for (const Argument& a : arguments_) arrays_.emplace_back(new Array(a.name, false, a.kind == 'a' ? a.size : 0, int(a.integer)));
#endif
    machine.launch(settings_, grid, block, body);
    reports_ += (reports_.empty() ? "" : ",\n") + launch_report(kernel);
    running_kernel = "";
}

inline std::string Job::launch_report(const char* kernel) const {
    std::string out = "{\"kernel\": " + quoted(kernel) + ", \"barriers\": " + std::to_string(machine.barriers);
#ifdef EMULATE_CHECKED
    auto number = [](const char* name, int64_t value) { return std::string(", \"") + name + "\": " + std::to_string(value); };
    auto array_report = [&](Array& a) {
        std::string one = "{\"name\": " + quoted(a.name) + ", \"space\": " + (a.shared ? "\"shared\"" : "\"global\"") + number("size", a.size) +
                          number("element_bytes", a.bytes) + number("reads", a.reads) + number("writes", a.writes) + "}";
        a.reads = a.writes = 0;  // a shared array outlives the launch
        return one;
    };
    std::string arrays, races;
    for (size_t i = 0; i < arrays_.size(); i++) {
        if (arguments_[i].kind == 'a') arrays += (arrays.empty() ? "" : ",\n ") + array_report(*arrays_[i]);
    }
    for (Array* a : findings.arrays) arrays += (arrays.empty() ? "" : ",\n ") + array_report(*a);
    for (const Race& r : findings.races) {
        auto pair = [&](const char* name, int64_t a, int64_t b) { return std::string(", \"") + name + "\": [" + std::to_string(a) + ", " + std::to_string(b) + "]"; };
        races += (races.empty() ? "" : ",\n ") + ("{\"array\": " + quoted(r.array)) + ", \"space\": " + (r.shared ? "\"shared\"" : "\"global\"") +
                 number("element", r.element) + number("count", r.count) + pair("blocks", r.first.block, r.second.block) +
                 pair("threads", r.first.thread, r.second.thread) + pair("lines", r.first.site.line, r.second.site.line) +
                 ", \"kinds\": [" + (r.first_writes ? "\"write\"" : "\"read\"") + ", " + (r.second_writes ? "\"write\"" : "\"read\"") + "]" +
                 ", \"files\": [" + quoted(r.first.site.file) + ", " + quoted(r.second.site.file) + "]}";
    }
    out += ", \"arrays\": [" + arrays + "], \"races\": [" + races + "]";
#endif
    return out + "}";
}

inline void Job::write_report() const {
    std::string problems;
    for (const Problem& p : machine.problems) {
        problems += (problems.empty() ? "" : ",\n ") + ("{\"kind\": " + quoted(p.kind)) + ", \"message\": " + quoted(p.message) +
                    ", \"file\": " + quoted(p.site.file) + ", \"line\": " + std::to_string(p.site.line) +
                    ", \"block\": " + std::to_string(p.block) + ", \"thread\": " + std::to_string(p.thread) + "}";
    }
    std::string last = *running_kernel ? (reports_.empty() ? "" : ",\n") + launch_report(running_kernel) : "";  // broke off
    std::ofstream(folder_ + "/report.json") << "{\"launches\": [" << reports_ << last << "],\n\"problems\": [" << problems << "]}\n";
}

// The process is lost, but what is known can still be written down: we are on a stack of our own.
inline void on_signal(int number) {
    const char* what = number == SIGALRM ? "time limit" : "crash";
    const char* why = number == SIGALRM   ? "the time is over: an endless loop?"
                      : number == SIGSEGV ? "access to memory that is not there (a pointer, or an index of a thread's own array)"
                      : number == SIGFPE  ? "integer division by zero"
                      : number == SIGILL  ? "index outside a thread's own array"
                                          : "bus error";
    machine.note(what, why, machine.last_site);
    running->write_report();
    _exit(0);
}

}  // namespace emulate

void emulate_launches(emulate::Job& job);

int main(int count, char** values) {
    if (count != 2) return 2;
    static char stack[64 * 1024];
    stack_t alternative = {};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, nullptr);
    struct sigaction action = {};
    action.sa_handler = emulate::on_signal;
    action.sa_flags = SA_ONSTACK;
    for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGALRM}) sigaction(number, &action, nullptr);
    emulate::Job job(values[1]);
    emulate::running = &job;
    emulate_launches(job);
    fflush(stdout);
    job.write_arrays();
    job.write_report();
    _exit(0);  // abandoned fibres are not unwound
}
