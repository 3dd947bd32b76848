#pragma once

#include "cuda/hopper.cuh"

namespace fnac::cuda {

// Whether sizes, dtype and alignment are such that this kernel takes the job (on Hopper), and its launch; the
// workspace holds channels_last_bytes(img).
bool max_logits_hopper_serves(const MaxLogits& job, int device);
void max_logits_hopper(const MaxLogits& job, const Launch& where);

}  // namespace fnac::cuda
