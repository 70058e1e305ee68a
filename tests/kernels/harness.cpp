// Moves the problems in stdin by the compiled kernel's first loop and writes what became of them to stdout, so that a
// library for another machine can be tried under an emulator. test_aarch64.py writes and reads the same layout: per
// problem S3Settings, 1 for SoftSignum or 0, the number of elements, of threads, the bytes of each of five columns, and
// the columns.

#include <cstdio>
#include <vector>

#include "step.h"

extern "C" const char *s3_loop(int32_t index);
using Step = void(const S3Row *, int64_t, const S3Settings *, int32_t, int32_t, S3Statistics *);
extern "C" Step s3_step, s3_softsignum_step;

int main() {
    S3Settings settings;
    while (std::fread(&settings, sizeof settings, 1, stdin) == 1) {
        int64_t sizes[3 + S3_KINDS];  // SoftSignum or not, elements, threads, bytes of x, g, m, r, model
        if (std::fread(sizes, sizeof sizes, 1, stdin) != 1) return 2;
        std::vector<char> columns[S3_KINDS];
        for (int i = 0; i < S3_KINDS; ++i) {
            columns[i].resize(sizes[3 + i]);
            if (std::fread(columns[i].data(), 1, sizes[3 + i], stdin) != (size_t)sizes[3 + i]) return 2;
        }
        S3Row row = {{}, sizes[1]};
        for (int i = 0; i < S3_KINDS; ++i) row.at[i] = sizes[3 + i] ? columns[i].data() : nullptr;
        S3Statistics statistics{};
        (sizes[0] ? s3_softsignum_step : s3_step)(&row, 1, &settings, 0, (int32_t)sizes[2], &statistics);
        for (int i = 0; i < S3_KINDS; ++i) std::fwrite(columns[i].data(), 1, sizes[3 + i], stdout);
        std::fwrite(&statistics, sizeof statistics, 1, stdout);
    }
    std::fprintf(stderr, "%s\n", s3_loop(0));
    return 0;
}
