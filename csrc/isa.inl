// One instruction set: the same source, compiled with its flags and its vector type.
#include <omp.h>
#include <type_traits>
namespace herd::HERD_ISA { inline int thread_number() { return omp_get_thread_num(); } }
#include "forward.h"
#include "matmul.h"
#include "api.h"

namespace herd::HERD_ISA {
extern const Api api;
const Api api = {&forward, &matmul};
}
