// The CPU kernels behind one table of functions per instruction set; dispatch.cpp chooses the table.
#pragma once

#include <cstdint>

#include "common/features.h"

namespace fnac {

// logits[n, m] = max_p <img[n, :, p], aud[m]> * scale, argmax the first such cell.
struct MaxLogits {
    FeatureMap img;
    const float* aud;  // (m, c)
    int64_t m;
    float scale;
    float* logits;       // (n, m)
    uint16_t* argmax;    // (n, m)
    bool bf16_products;  // bfloat16 products suffice, where they are faster
    int threads;
    const uint8_t* only = nullptr;  // (n): the images to compute, where not all; for the float32 kernel
};

// maps[n, p] = <img[n, :, p], aud[n]> * scale, or given (aud == nullptr); then, where mask is not null,
// mask = minmax(maps) > threshold, avg = mean_p img, foreground = mean_p mask * img. avg may be null.
struct Pool {
    FeatureMap img;
    const float* aud;
    float scale;
    float threshold;
    float* maps;  // (n, p)
    uint8_t* mask;
    float* avg;  // (n, c)
    float* foreground;
    int threads;
};

// The gradient of everything that reads the features; each source may be null. See backends/README.md.
struct FeatureBackward {
    FeatureMap img;
    const float* aud;  // (m, c), or null
    int64_t m;
    float scale;
    const float* grad_logits;  // (n, m)
    const uint16_t* argmax;
    const float* grad_maps;  // (n, p)
    const uint8_t* mask;     // (n, p)
    const float* grad_avg;   // (n, c)
    const float* grad_foreground;
    const float* grad_aud;  // (m, c), added to daud
    void* dimg;             // as img, or null
    float* daud;            // (m, c), or null
    int threads;
};

constexpr int64_t kRowStats = 16;

// The contrastive and adjacency terms of n rows and n columns; features are (n, c), null where no term needs
// them.
struct Adjacency {
    const float* logits;  // (n, n)
    const float* aud;
    const float* avg;
    const float* foreground;
    int64_t n, c;
    float scale;
    double weights[4];
    bool masked;
    float threshold;
    float* row_stats;  // (n, kRowStats)
    float* kept;       // room of kept_size floats for what else the backward reads
    int64_t kept_size;
    float* col_lse;           // (2, n)
    float* loss;              // (): the weighted sum of the terms. Forward only.
    float* terms;             // (4). Forward only.
    const float* grad_loss;   // (), may be null. Backward only, as is what follows.
    const float* grad_terms;  // (4), may be null
    float* dlogits;
    float* daud;
    float* davg;
    float* dforeground;
    int threads;
};

struct Kernels {
    const char* name;
    void (*max_logits)(const MaxLogits&);
    void (*pool)(const Pool&);
    void (*feature_backward)(const FeatureBackward&);
    void (*adjacency)(const Adjacency&);
    void (*adjacency_backward)(const Adjacency&);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#if defined(FNAC_VNNI)
const Kernels& avxvnni_kernels();
const Kernels& avx512vnni_kernels();
#endif
#if defined(FNAC_BF16)
const Kernels& avx512bf16_kernels();
const Kernels& amx_kernels();
#endif
#endif

}  // namespace fnac
