// AVX-VNNI: the AVX2 kernels with max-pooled logits through int16 products, which it adds up at twice the
// rate of float32 multiply-adds. Entered only where the processor has it.
#include "cpu/int16_avx2.h"

namespace fnac {

const Kernels& avxvnni_kernels() {
    static const Kernels table = screened<Avx2, Int16Products<Avx2, Int16Avx2>, kernels_of<Avx2>>("avxvnni");
    return table;
}

}  // namespace fnac
