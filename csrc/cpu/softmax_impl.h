// Softmaxes of rows in float32: exp of what is at most 0, divided by their sum.
#pragma once

namespace fnac {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// exp for x <= 0 or so, to 2 ulp; below e^-69 = 1e-30 it is 0, which spares the products that follow from
// denormals.
template <class V>
typename V::F exp_negative(typename V::F x) {
    const auto n = V::round(V::mul(x, V::set(1.44269504f)));
    auto r = V::fma(n, V::set(-0.693359375f), x);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    auto y = V::set(1.f / 5040);
    for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
        y = V::fma(y, r, V::set(c));
    return V::zero_below(x, V::set(-69.f), V::exp2_scale(y, n));
}

// The sum of the exponentials of numbers less `high`, the largest.
struct SumExp {
    float high, sum;
    void write(float* to) const { to[0] = high, to[1] = 1 / sum; }
};

// Of x[0..size): NaN where there is a NaN, because its exp is one whatever the maximum.
template <class V>
SumExp sum_exp(const float* x, int64_t size) {
    auto top = V::set(kNegInf);
    for (int64_t i = 0; i < size; i += V::kLanes) top = V::max(V::load(x + i), top);
    float lanes[V::kLanes], high = kNegInf;
    V::store(lanes, top);
    for (const float lane : lanes) high = lane > high ? lane : high;
    auto total = V::set(0.f);
    for (int64_t i = 0; i < size; i += V::kLanes)
        total = V::add(total, exp_negative<V>(V::sub(V::load(x + i), V::set(high))));
    return {high, V::sum(total)};
}

// The softmax of x, given the largest of its row and the inverse of the sum.
template <class V>
typename V::F softmax(const float* x, typename V::F high, typename V::F inverse) {
    return V::mul(exp_negative<V>(V::sub(V::load(x), high)), inverse);
}

}  // namespace
}  // namespace fnac
