#define HERD_ISA neon
#include "vec_neon.h"
#include "isa.inl"
