// Checked arrays: every read and write of a kernel is counted, checked against the array's size, and checked for races.
//
// Two accesses to one element race if at least one is a write, two threads make them, and no barrier lies between:
// threads of one block are ordered by __syncthreads, lanes of one warp by __syncwarp too, different blocks by nothing.
// So it is enough to number the intervals between barriers and to remember, for each element, who wrote it last and who
// read it since. A race is found under every schedule, whether or not the numbers came out right this time.
//
// What it is not: a proof for all inputs (it sees the accesses of this run), nor a check of arrays that a kernel
// declares without SHARED or Global.
// Source: the idea of FastTrack (Flanagan, Freund 2009), with barriers in place of locks.
#pragma once
#include "emulate_fibres.h"

#include <type_traits>

namespace emulate {

struct Who {  // an access
    Site site;
    int block = 0, interval = 0, warp_interval = 0;
    int16_t thread = -1;
    bool atomic = false;
    bool any() const { return thread >= 0; }
};

struct Element {
    Who writer;
    Who reader;             // the latest of its block's interval
    Who reader_same_warp;   // another lane of its warp in the same warp interval
    Who reader_other_warp;  // a thread of another warp in the same interval
    Who first_reader;       // of all: if another block has read, it came first, since blocks run one after the other
    int block_serial = -1;  // shared memory: the block that all this belongs to
};

struct Race {
    std::string array;
    bool shared;
    int64_t element, count;
    Who first, second;
    bool first_writes, second_writes;
};

struct Array {
    std::string name;
    bool shared;
    int64_t size;
    int bytes;  // of one element
    std::vector<Element> elements;
    int64_t reads = 0, writes = 0;
    Array(std::string name, bool shared, int64_t size, int bytes)
        : name(std::move(name)), shared(shared), size(size), bytes(bytes), elements(size) {}
};

struct Findings {  // of one launch
    std::vector<Race> races;
    std::vector<Array*> arrays;
};
inline thread_local Findings findings;

// An index and the line where it is written: the compiler fills in the place when it converts a number to an At.
struct At {
    int64_t index;
    Site site;
    template <class I> At(I i, EMULATE_HERE) : index(static_cast<int64_t>(i)), site{file, line} {}
};

inline bool unordered(const Who& a, const Who& now) {
    if (!a.any() || (a.atomic && now.atomic)) return false;
    if (a.block != now.block) return true;
    if (a.thread == now.thread || a.interval != now.interval) return false;
    return a.thread / WARP != now.thread / WARP || a.warp_interval == now.warp_interval;
}

inline void report_race(const Array& array, int64_t index, const Who& a, bool a_writes, const Who& b, bool b_writes) {
    for (Race& r : findings.races) {  // once for each pair of lines
        if (r.array == array.name && r.first.site.line == a.site.line && r.second.site.line == b.site.line &&
            r.first_writes == a_writes && r.second_writes == b_writes) {
            r.count++;
            return;
        }
    }
    if (findings.races.size() < 100) {
        findings.races.push_back({array.name, array.shared, index, 1, a, b, a_writes, b_writes});
    }
}

inline void report_unwritten(const Array& array, int64_t index, Site site) {
    for (const Problem& p : machine.problems) {  // once a line
        if (p.kind == "uninitialised" && p.site.line == site.line) return;
    }
    const std::string element = array.name + "[" + std::to_string(index) + "]";
    machine.note("uninitialised", element + " is read before any thread wrote it", site);
}

inline void remember_reader(Element& e, const Who& now) {
    Who& last = e.reader;
    if (!last.any() || last.block != now.block || last.interval != now.interval) {
        e.reader_same_warp = e.reader_other_warp = Who();
    } else if (last.thread / WARP != now.thread / WARP) {
        e.reader_other_warp = last;
        e.reader_same_warp = Who();
    } else if (last.warp_interval != now.warp_interval) {
        e.reader_same_warp = Who();
    } else if (last.thread != now.thread) {
        e.reader_same_warp = last;
    }
    last = now;
    if (!e.first_reader.any()) e.first_reader = now;
}

// Checks one access before it happens. It may throw Stop.
inline void access(Array& array, int64_t index, bool reads, bool writes, Site site, bool atomic = false) {
    Machine& m = machine;
    m.count_step(site);
    if (index < 0 || index >= array.size) {
        const std::string element = array.name + "[" + std::to_string(index) + "]";
        m.fail("out of bounds", element + ": the array has " + std::to_string(array.size) + " elements", site);
    }
    m.maybe_switch();
    Element& e = array.elements[index];
    if (array.shared && e.block_serial != m.block_serial) {
        e = Element();
        e.block_serial = m.block_serial;
    }
    const Who now{site, int(m.block), m.interval, m.warp_interval(), int16_t(m.thread), atomic};
    array.reads += reads;
    array.writes += writes;
    if (reads && array.shared && !e.writer.any()) report_unwritten(array, index, site);
    if (unordered(e.writer, now)) report_race(array, index, e.writer, true, now, writes);
    if (writes) {
        for (const Who* r : {&e.reader, &e.reader_same_warp, &e.reader_other_warp, &e.first_reader}) {
            if (!unordered(*r, now)) continue;
            report_race(array, index, *r, false, now, true);
            break;
        }
        e.writer = now;
    } else {
        remember_reader(e, now);
    }
}

template <class T> class View;

// What x[i] is: reading it counts as a read, assigning to it as a write. Only at once: `auto a = x[i]` does not compile
// further on, since it would read later than it looks.
template <class T> class Ref {
    using Value = std::remove_const_t<T>;

public:
    Ref(T* data, Array* array, int64_t index, Site site) : data_(data), array_(array), index_(index), site_(site) {}
    Ref(const Ref& r) : Ref(r.data_, r.array_, r.index_, r.site_) {}  // not trivial, so that printf refuses it
    operator Value() const&& { return read(); }
    Value read() const {
        access(*array_, index_, true, false, site_);
        return data_[index_];
    }
    void operator=(T value) const&& {
        access(*array_, index_, false, true, site_);
        data_[index_] = value;
    }
    void operator=(const Ref& other) const&& { std::move(*this) = other.read(); }
    template <class V> void operator+=(V v) const&& { std::move(*this) = static_cast<T>(read() + v); }
    template <class V> void operator-=(V v) const&& { std::move(*this) = static_cast<T>(read() - v); }
    template <class V> void operator*=(V v) const&& { std::move(*this) = static_cast<T>(read() * v); }
    template <class V> void operator/=(V v) const&& { std::move(*this) = static_cast<T>(read() / v); }
    View<T> operator&() const&& { return View<T>(data_, array_, index_); }

private:
    T* data_;
    Array* array_;
    int64_t index_;
    Site site_;
};

// An array as a kernel sees it, from element `first` on; indices are checked against the whole array.
template <class T> class View {
    using Value = std::remove_const_t<T>;

public:
    View(T* data, Array* array, int64_t first = 0) : data_(data), array_(array), first_(first) {}
    Ref<T> operator[](At i) const { return Ref<T>(data_, array_, first_ + i.index, i.site); }
    Ref<T> operator*() const { return (*this)[0]; }
    View operator+(int64_t n) const { return View(data_, array_, first_ + n); }
    operator View<const T>() const { return View<const T>(data_, array_, first_); }

    void read_many(At i, int n, Value* into) const {
        check_aligned(i, n);
        for (int j = 0; j < n; j++) into[j] = Ref<T>(data_, array_, first_ + i.index + j, i.site).read();
    }
    void write_many(At i, int n, const T* from) const {
        check_aligned(i, n);
        for (int j = 0; j < n; j++) Ref<T>(data_, array_, first_ + i.index + j, i.site) = from[j];
    }
    T atomic_add(T value, Site site) const {
        access(*array_, first_, true, true, site, true);
        T old = data_[first_];
        data_[first_] = old + value;
        return old;
    }

private:
    T* data_;
    Array* array_;
    int64_t first_;

    void check_aligned(At i, int n) const {
        const int64_t index = first_ + i.index;
        if (index % n == 0) return;
        machine.fail("misaligned", array_->name + "[" + std::to_string(index) + "]: an access to " + std::to_string(n) +
                     " elements at once must start at a multiple of " + std::to_string(n), i.site);
    }
};

template <class T, int n> struct SharedArray {
    Array array;
    alignas(16) T data[n];
    explicit SharedArray(const char* name) : array(name, true, n, sizeof(T)) { memset(data, 0xff, sizeof data); }
    View<T> view() {
        auto& known = findings.arrays;
        if (std::find(known.begin(), known.end(), &array) == known.end()) known.push_back(&array);
        return View<T>(data, &array);
    }
};

}  // namespace emulate

template <class T> T atomicAdd(emulate::View<T> x, std::common_type_t<T> value, EMULATE_HERE) {
    return x.atomic_add(value, {file, line});
}
