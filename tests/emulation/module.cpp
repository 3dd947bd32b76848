// The emulated kernels as a Python module.
#include "bindings.h"

PYBIND11_MODULE(_cuda_emulated, m) { fnac::bind_cuda(m); }
