// The compiled module: pointers, sizes and strides in, nothing of torch. Kernels run without the GIL. The
// CUDA kernels are its submodule `cuda`; where they were left out, `cuda_left_out` says why.
#include "bindings.h"

#include <array>
#include <memory>
#include <optional>

#include "cpu/dispatch.h"
#include "cpu/kept_memory.h"
#include "cpu/loss_state.h"
#include "cpu/parallel.h"
#include "cpu/peak.h"
#include "kept_tensor.h"

namespace py = pybind11;

namespace fnac {
namespace {

template <size_t n>
using Addresses = std::array<uintptr_t, n>;  // of tensors

// outputs: logits, argmax
void max_logits(const Image& img, uintptr_t aud, int64_t m, double tau, const Addresses<2>& outputs,
                bool bf16_products, int threads) {
    kernels().max_logits({feature_map(img), at<const float>(aud), m, static_cast<float>(1 / tau),
                          at<float>(outputs[0]), at<uint16_t>(outputs[1]), bf16_products, threads});
}

// outputs: maps, mask, mean, foreground
void pool(const Image& img, uintptr_t aud, double tau, double threshold, const Addresses<4>& outputs,
          int threads) {
    kernels().pool({feature_map(img), at<const float>(aud), static_cast<float>(1 / tau),
                    static_cast<float>(threshold), at<float>(outputs[0]), at<uint8_t>(outputs[1]),
                    at<float>(outputs[2]), at<float>(outputs[3]), threads});
}

void feature_backward(const Image& img, uintptr_t aud, int64_t m, double tau, uintptr_t grad_logits,
                      uintptr_t argmax, uintptr_t grad_maps, uintptr_t mask, uintptr_t grad_avg,
                      uintptr_t grad_foreground, uintptr_t grad_aud, uintptr_t dimg, uintptr_t daud,
                      int threads) {
    kernels().feature_backward({feature_map(img), at<const float>(aud), m, static_cast<float>(1 / tau),
                                at<const float>(grad_logits), at<const uint16_t>(argmax),
                                at<const float>(grad_maps), at<const uint8_t>(mask),
                                at<const float>(grad_avg), at<const float>(grad_foreground),
                                at<const float>(grad_aud), at<void>(dimg), at<float>(daud), threads});
}

using Weights = std::array<double, 4>;
using Threshold = std::optional<double>;

// inputs: logits, aud, mean, foreground
Adjacency adjacency_job(const Addresses<4>& inputs, int64_t n, int64_t c, double tau, const Weights& weights,
                        Threshold threshold, uintptr_t row_stats, int64_t stats_columns, uintptr_t col_lse,
                        int threads) {
    Adjacency job{};
    job.logits = at<const float>(inputs[0]);
    job.aud = at<const float>(inputs[1]);
    job.avg = at<const float>(inputs[2]);
    job.foreground = at<const float>(inputs[3]);
    job.n = n;
    job.c = c;
    job.scale = static_cast<float>(1 / tau);
    for (int t = 0; t < 4; ++t) job.weights[t] = weights[t];
    job.masked = threshold.has_value();
    job.threshold = static_cast<float>(threshold.value_or(0));
    job.row_stats = at<float>(row_stats);
    job.kept = job.row_stats + n * kRowStats;
    job.kept_size = n * (stats_columns - kRowStats);
    job.col_lse = at<float>(col_lse);
    job.threads = threads;
    return job;
}

// outputs: loss, terms, row_stats, col_lse
void adjacency(const Addresses<4>& inputs, int64_t n, int64_t c, double tau, const Weights& weights,
               Threshold threshold, const Addresses<4>& outputs, int64_t stats_columns, int threads) {
    Adjacency job =
        adjacency_job(inputs, n, c, tau, weights, threshold, outputs[2], stats_columns, outputs[3], threads);
    job.loss = at<float>(outputs[0]);
    job.terms = at<float>(outputs[1]);
    kernels().adjacency(job);
}

// grads: of the inputs
void adjacency_backward(const Addresses<4>& inputs, int64_t n, int64_t c, double tau, const Weights& weights,
                        Threshold threshold, uintptr_t row_stats, int64_t stats_columns, uintptr_t col_lse,
                        uintptr_t grad_loss, uintptr_t grad_terms, const Addresses<4>& grads, int threads) {
    Adjacency job =
        adjacency_job(inputs, n, c, tau, weights, threshold, row_stats, stats_columns, col_lse, threads);
    job.grad_loss = at<const float>(grad_loss);
    job.grad_terms = at<const float>(grad_terms);
    job.dlogits = at<float>(grads[0]);
    job.daud = at<float>(grads[1]);
    job.davg = at<float>(grads[2]);
    job.dforeground = at<float>(grads[3]);
    kernels().adjacency_backward(job);
}

bool pooled(const Weights& weights) { return weights[2] != 0 || weights[3] != 0; }

// values: the loss, then its four terms
void loss(const Image& img, uintptr_t aud, double tau, double threshold, const Weights& weights,
          Threshold adjacency_threshold, const Addresses<5>& values, uintptr_t maps, uintptr_t block,
          int64_t block_size, bool bf16_products, int threads) {
    const FeatureMap map = feature_map(img);
    const LossState state(block, block_size, map, pooled(weights));
    max_logits(img, aud, map.n, tau, {state.logits, state.argmax}, bf16_products, threads);
    pool(img, aud, tau, threshold, {maps, state.mask, state.avg, state.foreground}, threads);
    float terms[4];
    adjacency({state.logits, aud, state.avg, state.foreground}, map.n, map.c, tau, weights,
              adjacency_threshold,
              {values[0], reinterpret_cast<uintptr_t>(terms), state.row_stats, state.col_lse},
              state.stats_columns, threads);
    for (int t = 0; t < 4; ++t) *at<float>(values[t + 1]) = terms[t];
}

py::object kept(Layout layout, int dtype) {
    return KeptTensor::capsule(std::make_unique<KeptTensor>(std::move(layout), static_cast<Dtype>(dtype)));
}

// scratch: of n x n + 3 x n x c floats. The gradient of the features goes to dimg, which may be null, or
// given a layout to kept memory, whose capsule is returned: it is taken only when the scratch of the terms,
// which lies there before, is done with.
py::object loss_backward(uintptr_t grad_loss, uintptr_t grad_terms, uintptr_t grad_maps, const Image& img,
                         uintptr_t aud, double tau, const Weights& weights, Threshold adjacency_threshold,
                         uintptr_t block, int64_t block_size, uintptr_t scratch, uintptr_t dimg,
                         std::optional<Layout> layout, uintptr_t daud, int threads) {
    py::gil_scoped_release unlocked;
    const FeatureMap map = feature_map(img);
    const LossState state(block, block_size, map, pooled(weights));
    Addresses<4> grads{};  // of logits, aud, mean, foreground
    if (grad_loss != 0 || grad_terms != 0) {
        const uintptr_t features = sizeof(float) * map.n * map.c;
        grads = {scratch + 3 * features, scratch, scratch + features, scratch + 2 * features};
        adjacency_backward({state.logits, aud, state.avg, state.foreground}, map.n, map.c, tau, weights,
                           adjacency_threshold, state.row_stats, state.stats_columns, state.col_lse,
                           grad_loss, grad_terms, grads, threads);
        // One that no wanted term reaches is not written.
        if (weights[1] == 0 && weights[2] == 0) grads[1] = 0;
        if (weights[3] == 0) grads[2] = 0;
        if (weights[2] == 0) grads[3] = 0;
    }
    const auto& [dlogits, daud_terms, davg, dforeground] = grads;
    auto gradient = layout ? std::make_unique<KeptTensor>(*std::move(layout), map.dtype) : nullptr;
    if (gradient != nullptr) dimg = reinterpret_cast<uintptr_t>(gradient->data());
    feature_backward(img, aud, map.n, tau, dlogits, dlogits == 0 ? 0 : state.argmax, grad_maps,
                     dforeground == 0 ? 0 : state.mask, davg, dforeground, daud_terms, dimg, daud, threads);
    py::gil_scoped_acquire locked;
    return gradient == nullptr ? py::none() : KeptTensor::capsule(std::move(gradient));
}

}  // namespace
}  // namespace fnac

PYBIND11_MODULE(_C, m) {
    using namespace fnac;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("forked", &forked);
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("isas", &available_isas);
    m.def("peak_fma", &peak_fma, unlocked);
    m.def("peak_amx", &peak_amx, unlocked);
    m.attr("kept_from") = KeptMemory::kFrom;
    m.def("kept", &kept);
    m.def("release_kept", &KeptMemory::release);
    m.def("max_logits", &max_logits, unlocked);
    m.def("pool", &pool, unlocked);
    m.def("feature_backward", &feature_backward, unlocked);
    m.def("adjacency", &adjacency, unlocked);
    m.def("adjacency_backward", &adjacency_backward, unlocked);
    m.def("loss", &loss, unlocked);
    m.def("loss_backward", &loss_backward);
#ifdef FNAC_CPU_LEFT_OUT
    m.attr("cpu_left_out") = FNAC_CPU_LEFT_OUT;
#else
    m.attr("cpu_left_out") = py::none();
#endif
#ifdef FNAC_CUDA_LEFT_OUT
    m.attr("cuda_left_out") = FNAC_CUDA_LEFT_OUT;
#else
    py::module_ cuda = m.def_submodule("cuda");
    bind_cuda(cuda);
    cuda.attr("compiler") = FNAC_CUDA_COMPILER;
#endif
}
