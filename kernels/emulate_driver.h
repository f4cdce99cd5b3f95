// The program around a kernel that somebody is trying out: reads the arguments, runs the launches, writes a report.
//
// It runs as a process of its own, so that whatever the kernel does, the notebook lives on: a crash or an endless loop
// ends this process, which still says in which line the last checked access was. rwkv_nb/wkv/emulator.py generates
//     void emulate_launches(emulate::Job& job) { job.launch("name", [&] { kernel(job.integer(0), ...); }); }
// and starts the program with a folder: `job` (text: settings; for each launch its sizes and arguments) and `arrays`
// (bytes, overwritten with the results) in it, `report.json` out. What it is not: a sandbox against ill will.
#pragma once
#include "emulate.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

namespace emulate {

inline std::string read_file(const std::string& name) {
    std::string text;
    if (FILE* file = fopen(name.c_str(), "rb")) {
        char part[1 << 16];
        while (size_t n = fread(part, 1, sizeof part, file)) text.append(part, n);
        fclose(file);
    }
    return text;
}

inline void write_file(const std::string& name, const std::string& text) {
    if (FILE* file = fopen(name.c_str(), "wb")) {
        fwrite(text.data(), 1, text.size(), file);
        fclose(file);
    }
}

// A JSON object or list, built up as text.
class Json {
public:
    explicit Json(char open) : text_(1, open), close_(open == '{' ? '}' : ']') {}
    Json& add(const char* name, int64_t value) { return raw(name, std::to_string(value)); }
    Json& add(const char* name, const std::string& value) { return raw(name, quoted(value)); }
    Json& add(const char* name, const Json& value) { return raw(name, value.text()); }
    Json& add(const char* name, int64_t a, int64_t b) {
        return raw(name, "[" + std::to_string(a) + ", " + std::to_string(b) + "]");
    }
    Json& add(const char* name, const std::string& a, const std::string& b) {
        return raw(name, "[" + quoted(a) + ", " + quoted(b) + "]");
    }
    Json& add(const Json& value) { return raw(nullptr, value.text()); }
    std::string text() const { return text_ + close_; }

private:
    std::string text_;
    char close_;
    Json& raw(const char* name, const std::string& value) {
        if (text_.size() > 1) text_ += ", ";
        if (name) text_ += quoted(name) + ": ";
        text_ += value;
        return *this;
    }
    static std::string quoted(const std::string& text) {
        std::string out = "\"";
        for (char c : text) {
            if (c == '"' || c == '\\') out += '\\';
            out += static_cast<unsigned char>(c) < 32 ? ' ' : c;
        }
        return out + "\"";
    }
};

struct Argument { std::string name, value; int64_t offset = 0, size = 0, bytes = 0; };  // the last three: arrays only

class Job {
public:
    explicit Job(const std::string& folder);
    template <class Body> void launch(const char* kernel, const Body& body);
    void write_report() const;
    void write_arrays() const { write_file(folder_ + "/arrays", bytes_); }

    // Arguments of the running launch, by position.
    int64_t integer(int i) const { return strtoll(arguments_[i].value.c_str(), nullptr, 10); }
    float number(int i) const { return strtof(arguments_[i].value.c_str(), nullptr); }
    template <class T> Global<T> array(int i) {
        T* data = reinterpret_cast<T*>(&bytes_[arguments_[i].offset]);
#ifdef EMULATE_CHECKED
        return View<T>(data, arrays_[i].get());
#else
        return data;
#endif
    }

private:
    std::string folder_, words_, bytes_;
    size_t at_ = 0;  // in words_
    Settings settings_;
    const char* kernel_ = nullptr;  // that is running
    std::vector<Argument> arguments_;
    Json reports_{'['};
#ifdef EMULATE_CHECKED
    std::vector<std::unique_ptr<Array>> arrays_;  // by position, like the arguments; nothing for numbers
#endif

    std::string word() {
        const size_t end = words_.find_first_of(" \n", at_);
        const std::string found = words_.substr(at_, end - at_);
        at_ = end + 1;
        return found;
    }
    int64_t integer_word() { return strtoll(word().c_str(), nullptr, 10); }
    Json launch_report() const;
};

inline Job* running = nullptr;

inline Job::Job(const std::string& folder)
    : folder_(folder), words_(read_file(folder + "/job")), bytes_(read_file(folder + "/arrays")) {
    settings_.order = Order(integer_word());
    settings_.seed = uint64_t(integer_word());
    settings_.switch_often = integer_word();
    settings_.limit = integer_word();
    alarm(unsigned(integer_word()));
}

template <class Body> void Job::launch(const char* kernel, const Body& body) {
    auto size = [this] { unsigned x = integer_word(), y = integer_word(), z = integer_word(); return dim3(x, y, z); };
    const dim3 grid = size(), block = size();
    arguments_.assign(integer_word(), Argument());
    for (Argument& a : arguments_) {
        const bool is_array = word() == "array";
        a.name = word();
        if (is_array) a.offset = integer_word(), a.size = integer_word(), a.bytes = integer_word();
        else a.value = word();
    }
#ifdef EMULATE_CHECKED
    findings = Findings();
    arrays_.clear();
    for (const Argument& a : arguments_) {
        arrays_.emplace_back(a.bytes ? new Array(a.name, false, a.size, int(a.bytes)) : nullptr);
    }
#endif
    machine.problems.clear();
    kernel_ = kernel;
    const bool whole = machine.launch(settings_, grid, block, body);
    reports_.add(launch_report());
    kernel_ = nullptr;
    if (!whole) throw Stop();  // what comes next would work with half a result
}

inline Json Job::launch_report() const {
    Json report('{');
    Json problems('[');
    for (const Problem& p : machine.problems) {
        Json one('{');
        one.add("kind", p.kind).add("message", p.message).add("file", p.site.file).add("line", p.site.line);
        problems.add(one.add("block", p.block).add("thread", p.thread));
    }
    report.add("kernel", kernel_).add("barriers", machine.barriers).add("problems", problems);
#ifdef EMULATE_CHECKED
    Json arrays('['), races('[');
    auto add_array = [&arrays](Array& a) {
        Json one('{');
        one.add("name", a.name).add("space", a.shared ? "shared" : "global").add("size", a.size);
        arrays.add(one.add("element_bytes", a.bytes).add("reads", a.reads).add("writes", a.writes));
        a.reads = a.writes = 0;  // a shared array outlives the launch
    };
    for (const auto& a : arrays_) {
        if (a) add_array(*a);
    }
    for (Array* a : findings.arrays) add_array(*a);
    for (const Race& r : findings.races) {
        const Who &a = r.first, &b = r.second;
        Json one('{');
        one.add("array", r.array).add("space", r.shared ? "shared" : "global");
        one.add("element", r.element).add("count", r.count);
        one.add("blocks", a.block, b.block).add("threads", a.thread, b.thread).add("lines", a.site.line, b.site.line);
        one.add("kinds", r.first_writes ? "write" : "read", r.second_writes ? "write" : "read");
        races.add(one.add("files", a.site.file, b.site.file));
    }
    report.add("arrays", arrays).add("races", races);
#endif
    return report;
}

inline void Job::write_report() const {
    Json launches = reports_;
    if (kernel_) launches.add(launch_report());  // broke off
    write_file(folder_ + "/report.json", launches.text());
}

// The process is lost, but what is known can still be written down: the handler has a stack of its own.
inline void on_signal(int number) {
    const char* what = number == SIGALRM   ? "the time is over: an endless loop?"
                       : number == SIGSEGV ? "access to memory that is not there (a pointer, or a thread's own array)"
                       : number == SIGFPE  ? "integer division by zero"
                       : number == SIGILL  ? "index outside a thread's own array"
                                           : "bus error";
    machine.note(number == SIGALRM ? "time limit" : "crash", what, machine.last_site);
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
    try {
        emulate_launches(job);
    } catch (const emulate::Stop&) {
    }
    fflush(stdout);
    job.write_arrays();
    job.write_report();
    _exit(0);  // abandoned fibres are not unwound
}
