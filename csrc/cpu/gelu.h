// GELU in its tanh form, a vector at a time; gelu.cpp has the formulas and their source.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include "exp.h"

namespace minirlhf::cpu {

constexpr double twice_root = 1.5957691216057308;  // 2 √(2/π)
constexpr double cubic = 0.044715;

// σ(z) and 1 - σ(z).
struct Logistic {
  Vec<float> sigma, rest;
  explicit Logistic(const Vec<float>& z) {
    const Vec<float> one(1), unit(in_bits<float> ? 1.4426950408889634f : 1.0f);
    const Vec<float> e = exp_level<float>(z.abs() * unit.neg());
    const Vec<float> large = one / (one + e), small = e * large;
    const Vec<float> negative = z < Vec<float>(0);
    sigma = Vec<float>::blendv(large, small, negative);
    rest = Vec<float>::blendv(small, large, negative);
  }
};

inline Vec<float> gelu_argument(const Vec<float>& x) {
  return x * at::vec::fmadd(x * x, Vec<float>(twice_root * cubic), Vec<float>(twice_root));
}

inline Vec<float> gelu_vector(const Vec<float>& x) { return x * Logistic(gelu_argument(x)).sigma; }

}  // namespace minirlhf::cpu
