// In place of the kernels for Hopper where sm_90 is not compiled for: they serve nothing, so nothing calls
// them.
#include <stdexcept>

#include "cuda/gradients_hopper.cuh"
#include "cuda/max_logits_hopper.cuh"

namespace fnac::cuda {
namespace {

[[noreturn]] void absent() { throw std::logic_error("compiled without the kernels for sm_90a"); }

}  // namespace

bool max_logits_hopper_serves(const MaxLogits&, int) { return false; }
void max_logits_hopper(const MaxLogits&, const Launch&) { absent(); }
bool gradients_hopper_serve(const FeatureBackward&, int) { return false; }
void image_gradient_hopper(const FeatureBackward&, const Launch&) { absent(); }
int64_t audio_shares_hopper(const FeatureBackward&) { absent(); }
void audio_gradient_hopper(const FeatureBackward&, const void*, float*, const Launch&) { absent(); }

}  // namespace fnac::cuda
