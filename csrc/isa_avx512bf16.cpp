#define HERD_ISA avx512bf16
#define HERD_BRAINS
#include "vec_avx512.h"
#include "isa.inl"
