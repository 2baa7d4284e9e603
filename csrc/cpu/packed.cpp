// Weights laid out for packed.h, and a linear layer that reads them.
#include "packed.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace minirlhf::cpu {
namespace {

constexpr int64_t operations_per_task = 1 << 20;  // less is not worth waking a thread for

template <typename T>
void linear(const Tensor& x, const Tensor& packed, const Tensor& bias, Tensor& out) {
  const int64_t rows = x.size(0), k = x.size(1), n = out.size(1);
  const T* from = x.const_data_ptr<T>();
  const float* add = bias.const_data_ptr<float>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, operations_per_task / std::max<int64_t>(1, n * k));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    product(from + begin * k, end - begin, k, packed, [&](int64_t row, int64_t column, const Two& sums) {
      store(to + (begin + row) * n + column, sums + load(add + column, n - column), n - column);
    });
  });
}

}  // namespace

// weight (n, k) float32 or bfloat16 -> (panels, k, width), or in pairs (panels, ⌈k/2⌉, width, 2); 0 beyond n and k.
Tensor pack_weight(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "a weight must be (n, k), got ", weight.sizes());
  const bool bf16 = weight.scalar_type() == at::kBFloat16;
  TORCH_CHECK_TYPE(bf16 || weight.scalar_type() == at::kFloat, "a weight must be float32 or bfloat16, got ",
                   weight.scalar_type());
  const int64_t n = weight.size(0), k = weight.size(1), panels = panels_of(n);
  const bool pairs = bf16 && multiplies_pairs();
  const Tensor whole = at::constant_pad_nd(weight, {0, pairs ? k % 2 : 0, 0, padded(n) - n}).contiguous();
  if (!pairs) return whole.view({panels, panel_width, k}).transpose(1, 2).contiguous();
  return whole.view({panels, panel_width, (k + 1) / 2, 2}).transpose(1, 2).contiguous();
}

namespace {

// x (..., k) in the weight's type, bias (n,) float32 -> (..., n) in the weight's type.
Tensor packed_linear(const Tensor& x, const Tensor& packed, const Tensor& bias) {
  TORCH_CHECK_TYPE(x.scalar_type() == packed.scalar_type(), "x must be ", packed.scalar_type(),
                   ", the weight's type, got ", x.scalar_type());
  TORCH_CHECK_TYPE(bias.scalar_type() == at::kFloat, "the bias must be float32, got ", bias.scalar_type());
  const int64_t n = bias.numel(), k = x.dim() == 0 ? 0 : x.size(-1);
  TORCH_CHECK_VALUE(k > 0 && is_packed(packed, n, k), "the weight must be what pack_weight made of one of shape (", n,
                    ", ", k, "), as bias and x want it, got ", packed.sizes());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  Tensor rows = x.reshape({x.numel() / k, k}), out = at::empty({rows.size(0), n}, x.options());
  if (packed.dim() == 4 && k % 2 == 1) rows = at::constant_pad_nd(rows, {0, 1});
  rows = rows.contiguous();
  const Tensor add = bias.contiguous();
  if (x.scalar_type() == at::kFloat) {
    linear<float>(rows, packed, add, out);
  } else {
    linear<BFloat16>(rows, packed, add, out);
  }
  return out.view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(minirlhf, CPU, m) {
  m.impl("pack_weight", pack_weight);
  m.impl("packed_linear", packed_linear);
}

}  // namespace minirlhf::cpu
