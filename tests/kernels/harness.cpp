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
        int64_t sizes[7];  // elements, threads, bytes of x, g, m, r, model
        if (std::fread(sizes, sizeof sizes, 1, stdin) != 1) return 2;
        std::vector<char> columns[5];
        for (int i = 0; i < 5; ++i) {
            columns[i].resize(sizes[2 + i] + 1);  // one more: data() of an empty vector may be null
            if (std::fread(columns[i].data(), 1, sizes[2 + i], stdin) != (size_t)sizes[2 + i]) return 2;
        }
        const S3Row row = {columns[0].data(), columns[1].data(), columns[2].data(), columns[3].data(),
                           sizes[6] ? columns[4].data() : nullptr, sizes[0]};
        S3Statistics statistics{};
        s3_step(&row, 1, &settings, 0, (int32_t)sizes[1], &statistics);
        for (int i = 0; i < 5; ++i) std::fwrite(columns[i].data(), 1, sizes[2 + i], stdout);
        std::fwrite(&statistics, sizeof statistics, 1, stdout);
    }
    std::fprintf(stderr, "%s\n", s3_loop(0));
    return 0;
}
