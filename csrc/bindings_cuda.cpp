// The CUDA kernels as Python functions: `_C.cuda`, and the module of the emulated kernels in the tests.
//
// A call enqueues its kernels on the given device, which is current, and stream, and returns; the GIL is
// released meanwhile. Workspace comes from `allocate(bytes)`, which returns a tensor and is called only where
// a job needs some. The tensor may be freed once its kernels are enqueued, because the caller's allocator
// reuses memory in the order of the stream.
#include <array>
#include <optional>

#include "bindings.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace fnac::cuda {
namespace {

// (device, stream)
using Place = std::tuple<int, uintptr_t>;
using Three = std::array<uintptr_t, 3>;
using Four = std::array<uintptr_t, 4>;

template <class Job>
void enqueue(const Job& job, const Place& place, const py::function& allocate) {
    py::object workspace;
    Launch launch{std::get<0>(place), at<void>(std::get<1>(place)), nullptr};
    if (const int64_t bytes = workspace_bytes(job, launch.device)) {
        workspace = allocate(bytes);
        launch.workspace = at<void>(workspace.attr("data_ptr")().template cast<uintptr_t>());
    }
    py::gil_scoped_release unlocked;
    run(job, launch);
}

float reciprocal(double tau) { return static_cast<float>(1 / tau); }

void max_logits(const Image& img, uintptr_t aud, int64_t m, double tau, int precision, uintptr_t logits,
                uintptr_t argmax, const Place& place, const py::function& allocate) {
    enqueue(MaxLogits{feature_map(img), at<const void>(aud), m, reciprocal(tau),
                      static_cast<Precision>(precision), at<float>(logits), at<uint16_t>(argmax)},
            place, allocate);
}

void pool(const Image& img, uintptr_t aud, double tau, double threshold, uintptr_t maps, uintptr_t mask,
          uintptr_t avg, uintptr_t foreground, const Place& place, const py::function& allocate) {
    enqueue(Pool{feature_map(img), at<const void>(aud), reciprocal(tau), static_cast<float>(threshold),
                 at<float>(maps), at<uint8_t>(mask), at<float>(avg), at<float>(foreground)},
            place, allocate);
}

void feature_backward(const Image& img, uintptr_t aud, int64_t m, double tau, int precision,
                      uintptr_t grad_logits, uintptr_t argmax, uintptr_t grad_maps, uintptr_t mask,
                      uintptr_t grad_avg, uintptr_t grad_foreground, uintptr_t grad_aud, uintptr_t dimg,
                      uintptr_t daud, const Place& place, const py::function& allocate) {
    enqueue(FeatureBackward{feature_map(img), at<const void>(aud), m, reciprocal(tau),
                            static_cast<Precision>(precision), at<const float>(grad_logits),
                            at<const uint16_t>(argmax), at<const float>(grad_maps), at<const uint8_t>(mask),
                            at<const float>(grad_avg), at<const float>(grad_foreground),
                            at<const float>(grad_aud), at<void>(dimg), at<void>(daud)},
            place, allocate);
}

// tensors: logits, mean and foreground features; aud as an image of one cell.
AdjacencyInputs inputs(const Three& tensors, const Image& aud, double tau, int precision,
                       const std::array<double, 4>& weights, std::optional<double> threshold) {
    const FeatureMap sounds = feature_map(aud);
    return {at<const float>(tensors[0]),
            sounds.data,
            sounds.dtype,
            at<const float>(tensors[1]),
            at<const float>(tensors[2]),
            sounds.n,
            sounds.c,
            reciprocal(tau),
            static_cast<Precision>(precision),
            {weights[0], weights[1], weights[2], weights[3]},
            threshold.has_value(),
            static_cast<float>(threshold.value_or(0))};
}

void adjacency(const Three& tensors, const Image& aud, double tau, int precision,
               const std::array<double, 4>& weights, std::optional<double> threshold, uintptr_t row_stats,
               uintptr_t col_lse, uintptr_t loss, uintptr_t terms, const Place& place,
               const py::function& allocate) {
    enqueue(Adjacency{inputs(tensors, aud, tau, precision, weights, threshold), at<float>(row_stats),
                      at<float>(col_lse), at<float>(loss), at<float>(terms)},
            place, allocate);
}

void adjacency_backward(const Three& tensors, const Image& aud, double tau, int precision,
                        const std::array<double, 4>& weights, std::optional<double> threshold,
                        uintptr_t row_stats, uintptr_t col_lse, uintptr_t grad_loss, uintptr_t grad_terms,
                        const Four& grads, const Place& place, const py::function& allocate) {
    enqueue(AdjacencyBackward{inputs(tensors, aud, tau, precision, weights, threshold),
                              at<const float>(row_stats), at<const float>(col_lse),
                              at<const float>(grad_loss), at<const float>(grad_terms), at<float>(grads[0]),
                              at<float>(grads[1]), at<float>(grads[2]), at<float>(grads[3])},
            place, allocate);
}

}  // namespace
}  // namespace fnac::cuda

void fnac::bind_cuda(py::module_& m) {
    using namespace fnac;
    m.def("architectures", &cuda::architectures);
    m.def("problem", &cuda::problem);
    m.def("max_logits", &cuda::max_logits);
    m.def("pool", &cuda::pool);
    m.def("feature_backward", &cuda::feature_backward);
    m.def("adjacency", &cuda::adjacency);
    m.def("adjacency_backward", &cuda::adjacency_backward);
}
