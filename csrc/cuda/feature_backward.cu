// The gradient of the features. A pair's gradient touches one cell in P, so what there is to do is sparse: a
// gather of rows, 2 N M C multiply-adds. The other way, a one-hot matrix on the tensor cores, costs P times
// as many products, at B = 4096, 7x7, 512 channels the forward pass over again for each of the two, and would
// round the gradient of the logits to 16 bits. Each half has its own kernel, whose head says how it gathers.
#include "cuda/feature_backward.cuh"

namespace fnac::cuda {

int64_t workspace_bytes(const FeatureBackward& job, int device) {
    return job.daud == nullptr ? 0 : audio_gradient_workspace(job, device);
}

void run(const FeatureBackward& job, const Launch& where) {
    if (job.daud != nullptr) audio_gradient(job, where);
    if (job.dimg != nullptr) image_gradient(job, where);
}

}  // namespace fnac::cuda
