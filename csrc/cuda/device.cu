// What this build can run on.
#include <sstream>

#include "cuda/launch.cuh"

#ifndef FNAC_CUDA_ARCHITECTURES
#error "define FNAC_CUDA_ARCHITECTURES as what is compiled in, such as \"sm_80,sm_90,compute_90\""
#endif

namespace fnac::cuda {

std::vector<std::string> architectures() {
    std::vector<std::string> names;
    std::istringstream list(FNAC_CUDA_ARCHITECTURES);
    for (std::string name; std::getline(list, name, ',');) names.push_back(name);
    return names;
}

#ifdef FNAC_CUDA_EMULATION

std::string problem(int) { return ""; }

#else

namespace {

std::string version(int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Machine code runs on chips of its own generation that are not older; PTX on every chip that is not older.
// Of either, what ends in "a" is for one chip, in "f" for its generation.
bool serves(const std::string& architecture, int major, int minor) {
    const size_t digits = architecture.find('_') + 1;
    const int number = std::stoi(architecture.substr(digits)), device = 10 * major + minor;
    if (architecture.ends_with('a')) return number == device;
    const bool any_later = architecture.starts_with("compute") && !architecture.ends_with('f');
    return number <= device && (any_later || number / 10 == major);
}

}  // namespace

std::string problem(int device) {
    int driver = 0, runtime = 0, major = 0, minor = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (status != cudaSuccess) {
        cudaGetLastError();  // or the next call would report it again
        const std::string has =
            driver == 0 ? "there is no driver" : "the driver is for CUDA " + version(driver);
        return "CUDA device " + std::to_string(device) + " cannot be used (" + cudaGetErrorName(status) +
               ", " + cudaGetErrorString(status) + "): " + has + ", this build needs CUDA " +
               version(runtime);
    }
    for (const std::string& architecture : architectures())
        if (serves(architecture, major, minor)) return "";
    const std::string number = std::to_string(10 * major + minor);
    return "CUDA device " + std::to_string(device) + " is sm_" + number + ", this build has " +
           FNAC_CUDA_ARCHITECTURES + "; rebuild for it: CMAKE_CUDA_ARCHITECTURES=" + number +
           " pip install -e .";
}

#endif

}  // namespace fnac::cuda
