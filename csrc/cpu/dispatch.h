// The choice of the instruction set.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fnac {

// The best table that this processor runs, or the one that FNAC_CPU_ISA names. Read once.
// Throws std::runtime_error where FNAC_CPU_ISA names something that this processor or build does not have.
const Kernels& kernels();

// Names of the tables that this processor runs, the best last.
std::vector<std::string> available_isas();

}  // namespace fnac
