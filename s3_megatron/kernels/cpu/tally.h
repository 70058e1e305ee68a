// What a run counts of its updates, for the S3Statistics that leave it.

#pragma once
#include "lanes.h"

namespace S3_LOOP {

// Elements between two times that a tally is emptied: float32 sums of 256 updates a lane at most.
constexpr int64_t COUNTED = 1024;

// Sums of one run; float32 lanes are emptied into doubles before they lose digits.
struct Tally {
    Floats sum{}, largest{};
    Ints saturated{}, agreeing{};

    void empty_into(S3Statistics &out) {
        for (int64_t i = 0; i < WIDTH; ++i) {
            const int64_t k = i / REGISTER, j = i % REGISTER;
            out.sum += sum.of[k][j];
            out.largest = largest.of[k][j] > out.largest ? largest.of[k][j] : out.largest;
            out.saturated += saturated.of[k][j];
            out.agreeing += agreeing.of[k][j];
        }
        *this = Tally{};
    }
};

S3_INLINE void count(Tally &tally, Floats u, Floats g) {
    const Floats a = magnitude(u);
    tally.sum = tally.sum + a;
    tally.largest = larger(a, tally.largest);
    tally.saturated = tally.saturated - (a > 0.9f);
    tally.agreeing = tally.agreeing - (((bits(u) ^ bits(g)) < 0x80000000u) & (u != 0.0f) & (g != 0.0f));
}
}  // namespace S3_LOOP
