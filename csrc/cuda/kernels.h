// The CUDA kernels as the binding sees them: plain structs and no CUDA header, so this file also compiles
// where there is no CUDA. Pointers are device pointers of the caller's; nothing is owned, allocated or
// synchronised here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/features.h"

namespace fnac::cuda {

// How float32 operands are multiplied; bfloat16 and float16 operands always go to the tensor cores as they
// are.
enum class Precision : int { kExact = 0, kTensorFloat32 = 1 };

// Where a job runs: the device is current. The workspace has workspace_bytes(job) bytes, aligned to 64,
// undefined on entry.
struct Launch {
    int device;
    void* stream;
    void* workspace;
};

// logits[n, m] = max_p <img[n, :, p], aud[m]> * scale, argmax the first such cell.
struct MaxLogits {
    FeatureMap img;
    const void* aud;  // (m, c), of img's dtype
    int64_t m;
    float scale;
    Precision precision;
    float* logits;     // (n, m)
    uint16_t* argmax;  // (n, m)
};

// maps[n, p] = <img[n, :, p], aud[n]> * scale, or given (aud == nullptr); then, where mask is not null,
// mask = minmax(maps) > threshold, avg = mean_p img, foreground = mean_p mask * img. avg may be null.
struct Pool {
    FeatureMap img;
    const void* aud;
    float scale;
    float threshold;
    float* maps;    // (n, p)
    uint8_t* mask;  // (n, p)
    float* avg;     // (n, c)
    float* foreground;
};

// The gradient of everything that reads the features; each source may be null. See backends/README.md.
struct FeatureBackward {
    FeatureMap img;
    const void* aud;  // (m, c), of img's dtype, or null
    int64_t m;
    float scale;
    Precision precision;
    const float* grad_logits;  // (n, m)
    const uint16_t* argmax;
    const float* grad_maps;  // (n, p)
    const uint8_t* mask;     // (n, p)
    const float* grad_avg;   // (n, c)
    const float* grad_foreground;
    const float* grad_aud;  // (m, c)
    void* dimg;             // as img, or null
    void* daud;             // (m, c) of img's dtype, or null
};

constexpr int64_t kRowStats = 16;

// The contrastive and adjacency terms of n rows and n columns; features are (n, c), the means float32, null
// where no term needs them.
struct AdjacencyInputs {
    const float* logits;  // (n, n)
    const void* aud;
    Dtype dtype;  // of aud
    const float* avg;
    const float* foreground;
    int64_t n, c;
    float scale;
    Precision precision;
    double weights[4];
    bool masked;
    float threshold;
};

struct Adjacency {
    AdjacencyInputs inputs;
    float* row_stats;  // (n, kRowStats)
    float* col_lse;    // (2, n)
    float* loss;       // ()
    float* terms;      // (4)
};

struct AdjacencyBackward {
    AdjacencyInputs inputs;
    const float* row_stats;
    const float* col_lse;
    const float* grad_loss;   // (), may be null
    const float* grad_terms;  // (4), may be null
    float* dlogits;           // (n, n)
    float* daud;              // (n, c); not written where no wanted term reaches it, as the two that follow
    float* davg;
    float* dforeground;
};

// Bytes of workspace that run(job) needs on a device; 0 is possible.
int64_t workspace_bytes(const MaxLogits&, int device);
int64_t workspace_bytes(const Pool&, int device);
int64_t workspace_bytes(const FeatureBackward&, int device);
int64_t workspace_bytes(const Adjacency&, int device);
int64_t workspace_bytes(const AdjacencyBackward&, int device);

// Enqueue a job. Throws std::runtime_error that names the kernel, its sizes and CUDA's own words.
void run(const MaxLogits&, const Launch&);
void run(const Pool&, const Launch&);
void run(const FeatureBackward&, const Launch&);
void run(const Adjacency&, const Launch&);
void run(const AdjacencyBackward&, const Launch&);

// Architectures compiled in ("sm_90", ..., "compute_120" for PTX), and why a device cannot run them (empty:
// it can).
std::vector<std::string> architectures();
std::string problem(int device);

}  // namespace fnac::cuda
