// AVX2 + FMA. Entered only where the processor has them.
#include "cpu/int16_avx2.h"

namespace fnac {

const Kernels& avx2_kernels() {
    static const Kernels table = screened<Avx2, Int16Products<Avx2, Int16Avx2>, kernels_of<Avx2>>("avx2");
    return table;
}

}  // namespace fnac
