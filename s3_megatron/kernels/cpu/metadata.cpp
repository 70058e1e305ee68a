// Reading off thousands of tensors, in one pass over their metadata, all that the kernels rely on: looked at one by one
// from Python they take longer than to move.

#include "metadata.h"

#define S3_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
// Rows whose objects and tensors are fetched together, before any is read: what is read then is in the first cache.
constexpr int64_t TOGETHER = 8;

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
    int32_t device = 0, index = 0, dtypes[5];
    for (int64_t begin = 0; begin < rows; begin += TOGETHER) {
        const int64_t end = begin + TOGETHER < rows ? begin + TOGETHER : rows;
        for (int64_t column = 0; column < columns; ++column) {
            const char *const *its = objects + column * rows;
            for (int64_t row = end; row < end + TOGETHER && row < rows; ++row) __builtin_prefetch(its[row]);
            for (int64_t row = begin; row < end; ++row) {
                if (!is_any_of(*(const void *const *)(its[row] + torch->type_at), types, type_count)) return 0;
                const char *tensor = *(const char *const *)(its[row] + torch->tensor_at);
                for (int line = 0; line < 4; ++line) __builtin_prefetch(tensor + 64 * line);
            }
        }
        for (int64_t row = begin; row < end; ++row) {
            const int64_t *sizes = nullptr, *strides = nullptr;
            int64_t dim = 0, numel = 0;
            void *places[5] = {};
            for (int64_t column = 0; column < columns; ++column) {
                const void *x = objects[column * rows + row] + torch->tensor_at;
                int32_t layout, dtype, its_device, its_index;
                // Of a layout without storage or strides nothing further is asked.
                if (torch->layout(x, &layout) || layout != torch->strided || torch->is_neg(x)) return 0;
                if (torch->dtype(x, &dtype) || torch->device_type(x, &its_device) || torch->device_index(x, &its_index))
                    return 0;
                int32_t type = 0;
                while (type < 3 && torch->dtypes[type] != dtype) ++type;
                if (type == 3) return 0;
                if (row == 0) dtypes[column] = type;
                if (row == 0 && column == 0) {
                    device = its_device;
                    index = its_index;
                }
                if (dtypes[column] != type || device != its_device || index != its_index) return 0;

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
                if (torch->data_ptr(x, &places[column])) return 0;
                if (numel == 0) continue;
                if (torch->storage_size(x, &size) || torch->storage_offset(x, &offset)) return 0;
                if (!places[column] || size / bytes_of(type) - offset < numel) return 0;
            }
            table[row] = {places[0], places[1], places[2], places[3], places[4], numel};
        }
    }
    return 1;
}

// Counts up the versions of all but the gradients (column 1), by which autograd knows what was written since it was
// saved. Returns 0 where torch raised.
S3_EXPORT int32_t s3_count_up(const S3Torch *torch, const char *const *objects, int64_t rows, int64_t columns) {
    try {
        for (int64_t i = 0; i < rows * columns; ++i)
            if (i / rows != 1) torch->bump_version(objects[i] + torch->tensor_at);
    } catch (...) {
        return 0;
    }
    return 1;
}
