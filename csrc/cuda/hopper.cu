#include "cuda/hopper.cuh"

#ifndef FNAC_CUDA_EMULATION

namespace fnac::cuda {
namespace {

// A function of the driver, which is not linked: _C imports where there is none.
decltype(&cuTensorMapEncodeTiled) encoder() {
    static const auto found = [] {
        void* pointer = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault,
                                         &result);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &pointer, cudaEnableDefault, &result);
#endif
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(pointer);
    }();
    if (found == nullptr)
        throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; it needs CUDA 12.0");
    return found;
}

}  // namespace

bool is_hopper(int device) {
    int major = 0, minor = 0;
    return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
           major == 9 && minor == 0;
}

Matrix make_matrix(const void* data, int64_t rows, int64_t columns, int box_rows) {
    Matrix matrix;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2};
    const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
    // The type says how many bytes an element has, and nothing is computed.
    const auto encode = [&] {
        return encoder()(&matrix, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, strides,
                         box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    CUresult status = encode();
    int device = 0;
    // A thread that has called nothing yet, as autograd's may be, has no context; this gives it the device's.
    if (status == CUDA_ERROR_INVALID_CONTEXT && cudaGetDevice(&device) == cudaSuccess &&
        cudaSetDevice(device) == cudaSuccess)
        status = encode();
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled failed with " + std::to_string(status) +
                                 " for a matrix of " + std::to_string(rows) + " x " +
                                 std::to_string(columns) + " elements");
    return matrix;
}

}  // namespace fnac::cuda

#endif
