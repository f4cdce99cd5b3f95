// What the 32 lanes of a warp do together: shuffles, a vote and the two matrix products of the tensor cores.
//
// Every lane shows its words, waits until all lanes have, and takes what it needs. As on a GPU this orders no memory:
// only __syncwarp and __syncthreads do. Products: inputs rounded to tf32 or bf16, multiplied exactly, added in float32,
// each sum rounded to nearest; tensor cores may cut off what is below the last bit.
#pragma once
#include "emulate_fibres.h"
#include "emulate_numbers.h"

namespace emulate {

template <class T> T shuffle(const char* name, unsigned mask, T value, int from, Site site) {
    static_assert(sizeof(T) == 4, "the emulated shuffles carry 4-byte values");
    uint32_t word;
    memcpy(&word, &value, 4);
    auto* shown = machine.exchange(name, &word, 1, site, mask);
    memcpy(&value, shown[from], 4);
    return value;
}

inline int lane() { return machine.thread % WARP; }
inline int group(int width) { return lane() / width * width; }  // first lane of the group of `width` lanes

// d += a b: K columns of a; at(row, column) of each factor from the words that the lanes show.
template <int K, class A, class B> void product(float d[4], const A& a, const B& b) {
    const int g = lane() / 4, q = lane() % 4;
    for (int n = 0; n < 4; n++) {
        const int row = g + n / 2 * 8, column = 2 * q + n % 2;
        float sum = 0;
        for (int k = 0; k < K; k++) sum += a(row, k) * b(k, column);
        d[n] += sum;
    }
}

}  // namespace emulate

template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32, EMULATE_HERE) {
    return emulate::shuffle("__shfl_sync", mask, value, emulate::group(width) + from % width, {file, line});
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATE_HERE) {
    const int from = emulate::lane() ^ bits;
    const bool inside = from < emulate::group(width) + width;
    return emulate::shuffle("__shfl_xor_sync", mask, value, inside ? from : emulate::lane(), {file, line});
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, EMULATE_HERE) {
    const int from = emulate::lane() - by;
    const bool inside = from >= emulate::group(width);
    return emulate::shuffle("__shfl_up_sync", mask, value, inside ? from : emulate::lane(), {file, line});
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, EMULATE_HERE) {
    const int from = emulate::lane() + by;
    const bool inside = from < emulate::group(width) + width;
    return emulate::shuffle("__shfl_down_sync", mask, value, inside ? from : emulate::lane(), {file, line});
}

inline int __all_sync(unsigned mask, int predicate, EMULATE_HERE) {
    const uint32_t word = predicate != 0;
    auto* shown = emulate::machine.exchange("__all_sync", &word, 1, {file, line}, mask);
    bool all = true;
    for (int lane = 0; lane < emulate::WARP; lane++) all = all && shown[lane][0];
    return all;
}

inline void mma_m16n8k8_tf32(float d[4], const unsigned a[4], const unsigned b[2], EMULATE_HERE) {
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    auto* shown = emulate::machine.exchange("mma_m16n8k8_tf32", words, 6, {file, line}, 0xffffffffu);
    auto value = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000); };  // the tensor core reads 19 bits
    emulate::product<8>(
        d, [&](int row, int k) { return value(shown[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]); },
        [&](int k, int column) { return value(shown[column * 4 + k % 4][4 + k / 4]); });
}

inline void mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2], EMULATE_HERE) {
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    auto* shown = emulate::machine.exchange("mma_m16n8k16_bf16", words, 6, {file, line}, 0xffffffffu);
    auto value = [](uint32_t bits, int half) { return __uint_as_float(half ? bits & 0xffff0000 : bits << 16); };
    emulate::product<16>(
        d, [&](int row, int k) { return value(shown[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2); },
        [&](int k, int column) { return value(shown[column * 4 + k % 8 / 2][4 + k / 8], k % 2); });
}
