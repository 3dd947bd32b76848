#pragma once

#include "cuda/hopper.cuh"

namespace fnac::cuda {

// Whether sizes, dtype and alignment are such that these kernels take what comes through the logits (on
// Hopper).
bool gradients_hopper_serve(const FeatureBackward& job, int device);

// Writes dimg.
void image_gradient_hopper(const FeatureBackward& job, const Launch& where);

// Writes what ranges of images give to the sounds' gradient, without the scale, (shares, m, c); `cells` are
// the features in channels_last.
int64_t audio_shares_hopper(const FeatureBackward& job);
void audio_gradient_hopper(const FeatureBackward& job, const void* cells, float* sums, const Launch& where);

}  // namespace fnac::cuda
