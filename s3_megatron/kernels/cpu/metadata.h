// The interface between Python (kernels/metadata.py, through ctypes) and what reads tensors' metadata. No header of
// torch's or of Python's: functions come as pointers, and where a tensor lies in its Python object is found at run time.

#pragma once
#include "step.h"

// torch's own functions. A tensor's handle is the address of its at::Tensor; those that return a number return 0, or
// another one for an exception that they caught.
struct S3Torch {
    int32_t (*data_ptr)(const void *, void **);
    int32_t (*storage_size)(const void *, int64_t *);  // bytes
    int32_t (*storage_offset)(const void *, int64_t *);
    int32_t (*dim)(const void *, int64_t *);
    int32_t (*sizes)(const void *, const int64_t **);
    int32_t (*strides)(const void *, const int64_t **);
    int32_t (*dtype)(const void *, int32_t *);
    int32_t (*device_type)(const void *, int32_t *);
    int32_t (*device_index)(const void *, int32_t *);
    int32_t (*layout)(const void *, int32_t *);
    bool (*is_neg)(const void *);
    void (*bump_version)(const void *);
    int64_t type_at, tensor_at;  // bytes from a Python object's beginning to its type, to its at::Tensor
    int32_t strided;             // torch's number of this layout
    int32_t dtypes[S3_TYPES];    // torch's numbers of the S3Types
};
