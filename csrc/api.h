// What every instruction set offers.
#pragma once
#include "abi.h"
#include "scratch.h"

namespace herd {
struct Api {
    void (*forward)(const Model&, const Step&, const Buffers&);
    void (*matmul)(const Matrix&, const float* x, int64_t rows, float* y, const MatmulBuffers&);
    void (*head)(const Head&, const float* x, const int64_t* index, int64_t rows, float* y, const MatmulBuffers&);
    void (*documents)(const Documents&, const DocumentBuffers&);
    void (*documents_backward)(const Documents&, const DocumentBuffers&);
    void (*pass_over)(const Pass&, const Team&);
    void (*dense)(const Dense&, const DenseBuffers&);
};
}  // namespace herd
