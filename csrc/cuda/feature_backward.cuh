// The two halves of the features' gradient; feature_backward.cu puts them together.
#pragma once

#include "cuda/launch.cuh"

namespace fnac::cuda {

// Writes dimg.
void image_gradient(const FeatureBackward& job, const Launch& where);

// Writes daud, and needs that many bytes of workspace. On Hopper, which reads channels_last, dimg holds a
// copy of the features meanwhile, if there is one to be written.
void audio_gradient(const FeatureBackward& job, const Launch& where);
int64_t audio_gradient_workspace(const FeatureBackward& job, int device);

}  // namespace fnac::cuda
