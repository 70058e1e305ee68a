// Reading off thousands of tensors, in one pass over their metadata, all that the kernels rely on: looked at one by one
// from Python they take longer than to move.

#include "metadata.h"

#define S3_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
// Rows whose objects and tensors are fetched together, before any is read: what is read then is in the first cache.
constexpr int64_t TOGETHER = 16;

struct Column {
    int32_t layout, dtype, device, index;
    int32_t type = 0;  // the S3Type
};

bool is_any_of(const void *type, const void *const *types, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (type == types[i]) return true;
    return false;
}

// The elements of a tensor that fills one block of memory, each place once, in whatever order of dimensions; -1 of
// another.
int64_t filled(const int64_t *sizes, const int64_t *strides, int64_t dim) {
    int64_t numel = 1;
    bool contiguous = true;
    for (int64_t d = dim; d-- > 0;) {
        if (sizes[d] == 0) return 0;
        if (sizes[d] != 1 && strides[d] != numel) contiguous = false;
        if (__builtin_mul_overflow(numel, sizes[d], &numel)) return -1;
    }
    if (contiguous) return numel;
    for (int64_t reach = 1; reach < numel;) {
        int64_t next = 0;
        for (int64_t d = 0; d < dim; ++d)
            if (sizes[d] != 1 && strides[d] == reach) next = sizes[d];
        if (!next) return -1;
        reach *= next;
    }
    return numel;
}

bool same_places(const int64_t *sizes, const int64_t *strides, const int64_t *its_sizes, const int64_t *its_strides,
                 int64_t dim) {
    for (int64_t d = 0; d < dim; ++d)
        if (sizes[d] != its_sizes[d] || (sizes[d] != 1 && strides[d] != its_strides[d])) return false;
    return true;
}

int64_t bytes_of(int32_t type) { return type == S3_FLOAT32 ? 4 : 2; }
}  // namespace

// Reads `rows` rows of `columns` tensors, `objects[column * rows + row]` being Python objects, into `table`. Returns
// whether all are what a kernel may take as memory: of one of these Python types; strided, without the negative bit, in
// one device, one dtype a column and one shape and order of memory a row; without gaps, and within their storage. Where
// they are not, `table` means nothing. Reads no value.
S3_EXPORT int32_t s3_read(const S3Torch *torch, const char *const *objects, int64_t rows, int64_t columns,
                          const void *const *types, int64_t type_count, S3Row *table) {
    Column found[S3_KINDS];
    for (int64_t begin = 0; begin < rows; begin += TOGETHER) {
        const int64_t count = rows - begin < TOGETHER ? rows - begin : TOGETHER;
        const void *handles[S3_KINDS][TOGETHER];
        void *places[S3_KINDS][TOGETHER] = {};
        for (int64_t column = 0; column < columns; ++column) {
            const char *const *its = objects + column * rows + begin;
            for (int64_t row = count; row < 2 * TOGETHER && begin + row < rows; ++row) __builtin_prefetch(its[row]);
            for (int64_t row = 0; row < count; ++row) {
                if (!is_any_of(*(const void *const *)(its[row] + torch->type_at), types, type_count)) return 0;
                handles[column][row] = its[row] + torch->tensor_at;
                const char *tensor = *(const char *const *)handles[column][row];
                for (int line = 0; line < 4; ++line) __builtin_prefetch(tensor + 64 * line);
            }
        }
        for (int64_t column = 0; column < columns; ++column)
            for (int64_t row = 0; row < count; ++row) {
                const void *x = handles[column][row];
                Column its;
                // Of a layout without storage or strides nothing further is asked.
                if (torch->layout(x, &its.layout) || its.layout != torch->strided || torch->is_neg(x)) return 0;
                if (torch->dtype(x, &its.dtype) || torch->device_type(x, &its.device) ||
                    torch->device_index(x, &its.index) || torch->data_ptr(x, &places[column][row]))
                    return 0;
                if (begin + row == 0) {
                    found[column] = its;
                    while (found[column].type < S3_TYPES && torch->dtypes[found[column].type] != its.dtype)
                        ++found[column].type;
                    if (found[column].type == S3_TYPES) return 0;
                }
                if (its.dtype != found[column].dtype || its.device != found[0].device || its.index != found[0].index)
                    return 0;
            }
        for (int64_t row = 0; row < count; ++row) {
            const int64_t *sizes, *strides;
            int64_t dim, numel = 0;
            for (int64_t column = 0; column < columns; ++column) {
                const void *x = handles[column][row];
                const int64_t *its_sizes, *its_strides;
                int64_t its_dim, size, offset;
                if (torch->dim(x, &its_dim) || torch->sizes(x, &its_sizes) || torch->strides(x, &its_strides)) return 0;
                if (column == 0) {
                    sizes = its_sizes;
                    strides = its_strides;
                    dim = its_dim;
                    numel = filled(sizes, strides, dim);
                    if (numel < 0) return 0;
                } else if (its_dim != dim || !same_places(sizes, strides, its_sizes, its_strides, dim))
                    return 0;
                if (numel == 0) continue;
                if (torch->storage_size(x, &size) || torch->storage_offset(x, &offset)) return 0;
                if (!places[column][row] || size / bytes_of(found[column].type) - offset < numel) return 0;
            }
            for (int kind = 0; kind < S3_KINDS; ++kind) table[begin + row].at[kind] = places[kind][row];
            table[begin + row].numel = numel;
        }
    }
    return 1;
}

// Counts up the versions of all but the gradients, by which autograd knows what was written since it was
// saved. Returns 0 where torch raised.
S3_EXPORT int32_t s3_count_up(const S3Torch *torch, const char *const *objects, int64_t rows, int64_t columns) {
    try {
        for (int64_t i = 0; i < rows * columns; ++i)
            if (i / rows != S3_GRAD) torch->bump_version(objects[i] + torch->tensor_at);
    } catch (...) {
        return 0;
    }
    return 1;
}
