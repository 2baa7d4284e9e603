// GELU in the tanh form that GPT-2 uses, and its gradient, each in one pass over its input. On the CPU.
//
//   gelu(x) = ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))) = x σ(z)         z = 2 √(2/π) (x + 0.044715 x³)
//   gelu'(x) = σ(z) + x σ(z) (1 - σ(z)) z'                              z' = 2 √(2/π) (1 + 3 · 0.044715 x²)
//
// With e = exp(-|z|), which never overflows, σ(z) is 1 / (1 + e) or, below zero, e / (1 + e); 1 - σ(z) is the other one,
// so that no digits are lost to the subtraction. One exponential instead of a tanh, which takes about four times as long.
// Source of the tanh form: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", section 2.
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "gelu.h"
#include "kernels.h"

namespace minirlhf::cpu {
namespace {

constexpr int64_t elements_per_task = 1 << 14;  // less is not worth waking a thread for

Vec<float> gradient_vector(const Vec<float>& grad, const Vec<float>& x) {
  const Logistic s(gelu_argument(x));
  const Vec<float> slope = at::vec::fmadd(x * x, Vec<float>(3 * twice_root * cubic), Vec<float>(twice_root));
  return grad * at::vec::fmadd(x * s.rest * slope, s.sigma, s.sigma);
}

template <typename F>
void for_type(const Tensor& x, F f) {
  if (x.scalar_type() == at::kFloat) return f(float{});
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, "gelu takes float32 or bfloat16, got ", x.scalar_type());
  f(at::BFloat16{});
}

}  // namespace

Tensor gelu(const Tensor& x) {
  const Tensor input = x.contiguous();
  Tensor out = at::empty_like(input);
  for_type(input, [&](auto kind) {
    using T = decltype(kind);
    const T* from = input.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, input.numel(), elements_per_task, [&](int64_t begin, int64_t end) {
      at::vec::map<T>(gelu_vector, to + begin, from + begin, end - begin);
    });
  });
  return out;
}

namespace {

Tensor gelu_backward(const Tensor& grad, const Tensor& x) {
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(),
                    "the gradient must have the input's shape and type");
  const Tensor outer = grad.contiguous(), input = x.contiguous();
  Tensor out = at::empty_like(input);
  for_type(input, [&](auto kind) {
    using T = decltype(kind);
    const T *above = outer.const_data_ptr<T>(), *from = input.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, input.numel(), elements_per_task, [&](int64_t begin, int64_t end) {
      at::vec::map2<T>(gradient_vector, to + begin, above + begin, from + begin, end - begin);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(minirlhf, CPU, m) {
  m.impl("gelu", gelu);
  m.impl("gelu_backward", gelu_backward);
}

}  // namespace minirlhf::cpu
