// What every instruction set offers.
#pragma once
#include "abi.h"

namespace herd {
struct Api {
    void (*forward)(const Model&, const Step&, int threads);
    void (*matmul)(const Matrix&, const float* x, int64_t rows, float* y, int threads);
};
}  // namespace herd
