// The compiled module: pointers, sizes and strides in, nothing of torch. Every call releases the GIL. The
// CUDA kernels are its submodule `cuda`; where they were left out, `cuda_left_out` says why.
#include "bindings.h"

#include <array>
#include <optional>

#include "cpu/dispatch.h"
#include "cpu/kept_memory.h"
#include "cpu/parallel.h"
#include "cpu/peak.h"

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

// inputs: logits, aud, mean, foreground
Adjacency adjacency_job(const Addresses<4>& inputs, int64_t n, int64_t c, double tau,
                        const std::array<double, 4>& weights, std::optional<double> threshold,
                        uintptr_t row_stats, int64_t stats_columns, uintptr_t col_lse, int threads) {
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
void adjacency(const Addresses<4>& inputs, int64_t n, int64_t c, double tau,
               const std::array<double, 4>& weights, std::optional<double> threshold,
               const Addresses<4>& outputs, int64_t stats_columns, int threads) {
    Adjacency job =
        adjacency_job(inputs, n, c, tau, weights, threshold, outputs[2], stats_columns, outputs[3], threads);
    job.loss = at<float>(outputs[0]);
    job.terms = at<float>(outputs[1]);
    kernels().adjacency(job);
}

// grads: of the inputs
void adjacency_backward(const Addresses<4>& inputs, int64_t n, int64_t c, double tau,
                        const std::array<double, 4>& weights, std::optional<double> threshold,
                        uintptr_t row_stats, int64_t stats_columns, uintptr_t col_lse, uintptr_t grad_loss,
                        uintptr_t grad_terms, const Addresses<4>& grads, int threads) {
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

void loss(const Image& img, uintptr_t aud, double tau, double threshold, const std::array<double, 4>& weights,
          std::optional<double> adjacency_threshold, const Addresses<2>& logits, const Addresses<4>& pools,
          const Addresses<4>& terms, int64_t stats_columns, bool bf16_products, int threads) {
    const FeatureMap map = feature_map(img);
    max_logits(img, aud, map.n, tau, logits, bf16_products, threads);
    pool(img, aud, tau, threshold, pools, threads);
    adjacency({logits[0], aud, pools[2], pools[3]}, map.n, map.c, tau, weights, adjacency_threshold, terms,
              stats_columns, threads);
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
    py::class_<KeptMemory>(m, "KeptMemory", py::buffer_protocol())
        .def(py::init<size_t>())
        .def_buffer([](KeptMemory& memory) {
            return py::buffer_info(static_cast<uint8_t*>(memory.data()),
                                   static_cast<py::ssize_t>(memory.size()));
        })
        .def_static("release", &KeptMemory::release);
    m.def("max_logits", &max_logits, unlocked);
    m.def("pool", &pool, unlocked);
    m.def("feature_backward", &feature_backward, unlocked);
    m.def("adjacency", &adjacency, unlocked);
    m.def("adjacency_backward", &adjacency_backward, unlocked);
    m.def("loss", &loss, unlocked);
#ifdef FNAC_CUDA_LEFT_OUT
    m.attr("cuda_left_out") = FNAC_CUDA_LEFT_OUT;
#else
    py::module_ cuda = m.def_submodule("cuda");
    bind_cuda(cuda);
    cuda.attr("compiler") = FNAC_CUDA_COMPILER;
#endif
}
