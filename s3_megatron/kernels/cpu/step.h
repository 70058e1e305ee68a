// The interface between Python (library.py, through ctypes) and the vectorized loops. Plain C types, so that one compiled
// library serves every version of torch and of Python.

#pragma once
#include <stdint.h>

// How an element is stored; the numbers are those of library.py's table.
enum S3Type : int32_t { S3_FLOAT32 = 0, S3_BFLOAT16 = 1, S3_FLOAT16 = 2 };
constexpr int S3_TYPES = 3;

// What a step takes of each parameter, in the order of kernels/call.py's ROLES; all but gradients are written.
enum S3Kind { S3_PARAM, S3_GRAD, S3_EXP_AVG, S3_ROOT, S3_MODEL };
constexpr int S3_KINDS = 5;

// One tensor of each kind, all of `numel` contiguous elements; the model's, a low-precision copy of the weights to write,
// may be null.
struct S3Row {
    void *at[S3_KINDS];
    int64_t numel;
};

struct S3Settings {
    float lr, weight_decay;
    float factor;             // of the gradient; negative to maximize
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float p;
    float bound;              // of |update|: 1, or infinity where the betas differ
    int32_t form;             // kernels/call.py's: 1, 2 or 3 for these exponents, 15 for 1.5, 0 for any other
    int32_t nesterov;
    int32_t forgets;          // beta2 is 0: r plays no part
    int32_t stochastic;       // round the states stochastically (bfloat16 only)
    S3Type types[S3_KINDS];
    uint32_t seed[2];         // the two keys of this step's noise
    float tau;                // SoftSignum's temperature, infinity for a hard step; its beta is beta1
};

// Over the elements of a run: sum and maximum of |update|, how many exceed 0.9, how many have the gradient's sign, how
// many there are.
struct S3Statistics {
    double sum, largest, saturated, agreeing, elements;
};

// Moves elements [begin, end) of a row whose first element has number `first` among all rows'.
using S3Range = void (*)(const S3Row &, int64_t begin, int64_t end, int64_t first, const S3Settings &, S3Statistics *);
#define S3_DECLARE_LOOP(name)                                                                                          \
    namespace name {                                                                                                   \
    void range(const S3Row &, int64_t, int64_t, int64_t, const S3Settings &, S3Statistics *);                          \
    void softsignum_range(const S3Row &, int64_t, int64_t, int64_t, const S3Settings &, S3Statistics *);               \
    }
S3_DECLARE_LOOP(s3_portable)
#if defined(__x86_64__)
S3_DECLARE_LOOP(s3_avx2)
S3_DECLARE_LOOP(s3_avx512)
S3_DECLARE_LOOP(s3_avx512_bf16)
#endif
