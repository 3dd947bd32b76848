// Plain descriptions of the tensors that cross the binding. Pointers are the caller's; nothing is owned here.
#pragma once

#include <cstdint>

namespace fnac {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A feature map of n images, c channels and p = h * w cells. Either memory order is a pair of strides (in
// elements): NCHW has stride_c = p and stride_p = 1, channels_last has stride_c = 1 and stride_p = c.
struct FeatureMap {
    const void* data;
    Dtype dtype;
    int64_t n, c, p;
    int64_t stride_c, stride_p;

    int64_t image_size() const { return c * p; }
};

}  // namespace fnac
