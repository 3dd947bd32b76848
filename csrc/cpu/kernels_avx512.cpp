// Compiled with -mavx512{f,bw,vl,dq}; entered only where the processor has them.
#include "cpu/avx512.h"
#include "cpu/kernels_impl.h"

namespace fnac {
const Kernels& avx512_kernels() { return kernels_of<Avx512>(); }
}  // namespace fnac
