// Kept memory as a tensor, by way of DLPack's capsules (https://dmlc.github.io/dlpack/latest/c_api.html, the
// ABI before version 1, which every torch reads): one step in Python where a buffer and a view of it were
// two.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "common/features.h"
#include "cpu/kept_memory.h"

namespace fnac {
namespace dlpack {

struct Tensor {
    void* data;
    int32_t device_type, device_id, dims;
    uint8_t type_code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

}  // namespace dlpack

// Shape and strides of a dense tensor, strides in elements.
using Layout = std::pair<std::vector<int64_t>, std::vector<int64_t>>;

class KeptTensor {
  public:
    KeptTensor(Layout layout, Dtype dtype)
        : layout_(std::move(layout)),
          bits_(dtype == Dtype::kFloat32 ? 32 : 16),
          dtype_(dtype),
          memory_(bytes()) {}

    void* data() const { return memory_.data(); }

    // What torch.utils.dlpack.from_dlpack takes; it owns the tensor.
    static pybind11::object capsule(std::unique_ptr<KeptTensor> kept) {
        auto& [shape, strides] = kept->layout_;
        kept->managed_ = {
            {kept->data(), dlpack::kCpu, 0, static_cast<int32_t>(shape.size()),
             kept->dtype_ == Dtype::kBFloat16 ? dlpack::kBfloat : dlpack::kFloat,
             static_cast<uint8_t>(kept->bits_), 1, shape.data(), strides.data(), 0},
            kept.get(),
            [](dlpack::ManagedTensor* managed) { delete static_cast<KeptTensor*>(managed->context); }};
        PyObject* const made = PyCapsule_New(&kept->managed_, kName, [](PyObject* capsule) {
            // Whoever takes the tensor renames the capsule.
            if (PyCapsule_IsValid(capsule, kName) == 0) return;
            auto* const managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, kName));
            managed->deleter(managed);
        });
        if (made == nullptr) throw pybind11::error_already_set();
        kept.release();
        return pybind11::reinterpret_steal<pybind11::object>(made);
    }

  private:
    static constexpr const char* kName = "dltensor";

    size_t bytes() const {
        const auto& shape = layout_.first;
        return std::accumulate(shape.begin(), shape.end(), static_cast<size_t>(bits_ / 8),
                               [](size_t product, int64_t size) { return product * size; });
    }

    Layout layout_;
    int bits_;
    Dtype dtype_;
    KeptMemory memory_;
    dlpack::ManagedTensor managed_{};
};

}  // namespace fnac
