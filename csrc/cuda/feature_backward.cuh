// The two halves of the features' gradient; feature_backward.cu puts them together.
#pragma once

#include "cuda/launch.cuh"

namespace fnac::cuda {

// Writes dimg.
void image_gradient(const FeatureBackward& job, const Launch& where);

// Writes daud, and needs that many bytes of workspace.
void audio_gradient(const FeatureBackward& job, const Launch& where);
int64_t audio_gradient_workspace(const FeatureBackward& job);

}  // namespace fnac::cuda
