// Choosing the loop for this CPU, and sharing a step out among threads.

#include "step.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {
struct Loop {
    const char *name;
    S3Range range, softsignum;
};

// torch's own variable for the instructions it may use: it holds for this kernel too, so that another CPU can be tried.
bool allowed(const char *instructions) {
    const char *named = std::getenv("ATEN_CPU_CAPABILITY");
    if (!named) return true;
    if (!std::strcmp(named, "default")) return false;
    return std::strcmp(named, "avx2") || !std::strcmp(instructions, "avx2");
}

// Best first; the portable one is always last.
std::vector<Loop> find_loops() {
    std::vector<Loop> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (__builtin_cpu_supports("avx512bf16"))
            found.push_back({"AVX-512 with bfloat16", s3_avx512_bf16::range, s3_avx512_bf16::softsignum_range});
        found.push_back({"AVX-512", s3_avx512::range, s3_avx512::softsignum_range});
    }
    // Every CPU with AVX2 and FMA has the float16 conversions and BMI2 that its loop is compiled for as well.
    if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back({"AVX2", s3_avx2::range, s3_avx2::softsignum_range});
#endif
    found.push_back({"portable", s3_portable::range, s3_portable::softsignum_range});
    return found;
}

// Found once, as torch does: an index must mean one loop for as long as the process lives.
const std::vector<Loop> &loops() {
    static const std::vector<Loop> found = find_loops();
    return found;
}

// Rows whose first elements are fetched before their turn: small ones take less time than a line from memory.
constexpr int64_t AHEAD = 4;

void prefetch(const S3Row &row) {
    for (int kind = 0; kind < S3_MODEL; ++kind) __builtin_prefetch(row.at[kind]);
}

// Moves all rows by `range`; `out`, if not null, is added to. Threads share elements, not rows, so that a shard of
// a thousand small tensors and one large tensor take the same time.
void share_out(S3Range range, const S3Row *rows, int64_t count, const S3Settings &settings, int32_t threads,
               S3Statistics *out) {
    std::vector<int64_t> first(count + 1, 0);
    for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + rows[i].numel;
    const int64_t total = first[count];
    // A thread must be worth its start.
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, total / 16384));
    std::vector<S3Statistics> statistics(parts, S3Statistics{});
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t end = total * (part + 1) / parts;
        int64_t at = total * part / parts;
        int64_t row = std::upper_bound(first.begin(), first.end(), at) - first.begin() - 1;
        for (; at < end; ++row) {
            if (row + AHEAD < count) prefetch(rows[row + AHEAD]);
            const int64_t stop = std::min(end, first[row + 1]);
            range(rows[row], at - first[row], stop - first[row], first[row], settings,
                  out ? &statistics[part] : nullptr);
            at = stop;
        }
    }
    if (!out) return;
    for (const S3Statistics &part : statistics) {
        out->sum += part.sum;
        out->largest = std::max(out->largest, part.largest);
        out->saturated += part.saturated;
        out->agreeing += part.agreeing;
        out->elements += part.elements;
    }
}
}  // namespace

#define S3_EXPORT extern "C" __attribute__((visibility("default")))

// What this library was compiled from: build.py's fingerprint.
S3_EXPORT const char *s3_fingerprint() { return S3_FINGERPRINT; }

// The name of loop `index`, best first; null beyond the last.
S3_EXPORT const char *s3_loop(int32_t index) {
    return index < (int32_t)loops().size() ? loops()[index].name : nullptr;
}

// Moves all rows by loop `index`; `out`, if not null, is added to.
S3_EXPORT void s3_step(const S3Row *rows, int64_t count, const S3Settings *settings, int32_t index, int32_t threads,
                       S3Statistics *out) {
    share_out(loops()[index].range, rows, count, *settings, threads, out);
}

// The same for SoftSignum, whose rows have no root.
S3_EXPORT void s3_softsignum_step(const S3Row *rows, int64_t count, const S3Settings *settings, int32_t index,
                                  int32_t threads, S3Statistics *out) {
    share_out(loops()[index].softsignum, rows, count, *settings, threads, out);
}
