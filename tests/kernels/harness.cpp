// Moves the problems in stdin by the compiled kernel's first loop and writes what became of them to stdout, so that a
// library for another machine can be tried under an emulator. test_aarch64.py writes and reads the same layout: per
// problem S3Settings, the number of elements, of threads, the bytes of each of five columns, and the columns.

#include <cstdio>
#include <vector>

#include "step.h"

extern "C" const char *s3_loop(int32_t index);
extern "C" void s3_step(const S3Row *, int64_t, const S3Settings *, int32_t, int32_t, S3Statistics *);

int main() {
    S3Settings settings;
    while (std::fread(&settings, sizeof settings, 1, stdin) == 1) {
        int64_t sizes[2 + S3_KINDS];  // elements, threads, bytes of x, g, m, r, model
        if (std::fread(sizes, sizeof sizes, 1, stdin) != 1) return 2;
        std::vector<char> columns[S3_KINDS];
        for (int i = 0; i < S3_KINDS; ++i) {
            columns[i].resize(sizes[2 + i] + 1);  // one more: data() of an empty vector may be null
            if (std::fread(columns[i].data(), 1, sizes[2 + i], stdin) != (size_t)sizes[2 + i]) return 2;
        }
        S3Row row = {{}, sizes[0]};
        for (int i = 0; i < S3_KINDS; ++i) row.at[i] = i == S3_MODEL && !sizes[2 + i] ? nullptr : columns[i].data();
        S3Statistics statistics{};
        s3_step(&row, 1, &settings, 0, (int32_t)sizes[1], &statistics);
        for (int i = 0; i < S3_KINDS; ++i) std::fwrite(columns[i].data(), 1, sizes[2 + i], stdout);
        std::fwrite(&statistics, sizeof statistics, 1, stdout);
    }
    std::fprintf(stderr, "%s\n", s3_loop(0));
    return 0;
}
