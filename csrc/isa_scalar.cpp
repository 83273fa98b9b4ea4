#define HERD_ISA scalar
#include "vec_scalar.h"
#include "isa.inl"
