#define HERD_ISA amx
#define HERD_BRAINS
#define HERD_TILES
#include "vec_avx512.h"
#include "isa.inl"
