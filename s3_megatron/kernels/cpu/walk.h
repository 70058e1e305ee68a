// How a loop walks a run of elements: what it asks for ahead of its turn, where it stops, and how the run ends.

#pragma once
#include "formats.h"
#include "tally.h"

namespace S3_LOOP {

// With AVX-512, whose 32 registers hold the constants beside four chains, a step is one loop. In three it took 1.08 times
// as long (S3 in float32, 30 million elements, Zen 4).
#if defined(__AVX512F__)
constexpr bool WIDE = true;
#else
constexpr bool WIDE = false;
#endif

// Elsewhere it is two or three short loops over a span's elements: a step is one chain of some thirty dependent
// operations, of which a CPU sees no more than two at a time, and each loop keeps its constants in registers.
constexpr int64_t SPAN = 256;

// Asks for elements before their turn, once a cache line: the CPU's own prefetcher falls behind several streams that are
// read and written in turns. Without it the AVX-512 loop took 1.3 times as long (Sapphire Rapids), and a step in spans,
// each of which waits at its start then, 1.2 to 1.3 times in S3 and 1.05 to 1.15 in SoftSignum (Zen 3).
constexpr int64_t AHEAD = WIDE ? 512 : SPAN;

S3_INLINE void prefetch(const S3Row &row, int kind, int64_t at, const S3Settings &s) {
    const uint8_t *ahead = (const uint8_t *)row.at[kind] + (at + AHEAD) * bytes_of(s.types[kind]);
    for (int64_t line = 0; line < WIDTH * bytes_of(s.types[kind]); line += 64) __builtin_prefetch(ahead + line, 1);
}

// Moves the last elements of a row, fewer than WIDTH, from `at` on: through the same arithmetic, in a copy padded with
// zeros, so that a result depends on nothing but its own element.
template <class Move>
S3_INLINE void move_rest(const S3Row &row, int64_t at, int64_t end, const S3Settings &s, Move move) {
    uint8_t copy[S3_KINDS][WIDTH * 4] = {};
    S3Row rest = {{}, WIDTH};
    const auto place = [&](int kind) { return (uint8_t *)row.at[kind] + at * bytes_of(s.types[kind]); };
    const auto length = [&](int kind) { return (end - at) * bytes_of(s.types[kind]); };
    for (int kind = 0; kind < S3_KINDS; ++kind) {
        if (!row.at[kind]) continue;
        rest.at[kind] = copy[kind];
        memcpy(copy[kind], place(kind), length(kind));
    }
    move(rest);
    for (int kind = 0; kind < S3_KINDS; ++kind)
        if (row.at[kind] && kind != S3_GRAD) memcpy(place(kind), copy[kind], length(kind));
}

// Moves elements [begin, end) of a row. `sound(at, stop, tally)` moves them from `at` on and returns where it stopped: at
// once where it knows no such settings. `any(row, at, number, tally)` moves the WIDTH elements where it did not move, and
// the row's last ones in a copy, where `at` is not their `number` in the row.
template <class Sound, class Any>
S3_INLINE void walk(const S3Row &row, int64_t begin, int64_t end, const S3Settings &s, S3Statistics *out, Sound sound,
                    Any any) {
    // Two, for `any` is no part of the loops: what it counts into stands in memory.
    Tally tally, others;
    int64_t at = begin;
    while (at + WIDTH <= end) {
        const int64_t stop = end - at < COUNTED ? end : at + COUNTED;
        while (at + WIDTH <= stop) {
            const int64_t from = at;
            at = out ? sound(at, stop, &tally) : sound(at, stop, nullptr);
            if (at > from) continue;
            any(row, at, at, out ? &others : nullptr);
            at += WIDTH;
        }
        if (out) others.empty_into(*out);
        if (out) tally.empty_into(*out);
    }
    if (at < end) {
        move_rest(row, at, end, s, [&](const S3Row &rest) { any(rest, 0, at, out ? &others : nullptr); });
        if (out) others.empty_into(*out);
    }
    if (out) out->elements += end - begin;
}
}  // namespace S3_LOOP
