// One instruction set: the same source, compiled with its flags and its vector type. Everything lies in a namespace of its own, and
// no template of the standard library is used: a copy of one compiled here could be linked in for processors that cannot run it.
#include <omp.h>
namespace herd::HERD_ISA { inline int thread_number() { return omp_get_thread_num(); } }
#include "forward.h"
#include "matmul.h"
#include "documents.h"
#include "pass.h"
#include "dense.h"
#include "api.h"

namespace herd::HERD_ISA {
extern const Api api;
const Api api = {&forward, &matmul, &head, &documents, &documents_backward, &pass_over, &dense};
}
