// What every backend checks before it touches memory, so that a direct call of an op is as safe as one through Python.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "rows.h"

namespace minirlhf {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t state_size = 8;  // numbers that describe a row after some of its columns
constexpr int64_t saved_size = 6;  // numbers that its gradient needs; which ones is the backend's own affair

// A tensor of rows whose last stride is 1, and where they lie.
struct Input {
  Tensor tensor;
  Rows rows{0, 1, 0, 0};
  const void* data() const { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
};

// Collapses the leading dimensions of (..., V) from the right into two, where the strides allow; else copies.
inline Input as_rows(const Tensor& x) {
  const int64_t leading = x.dim() - 1;
  if (x.numel() == 0) return {x, {0, 1, 0, 0}};
  if (x.size(leading) > 1 && x.stride(leading) != 1) return as_rows(x.contiguous());
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};  // inner, outer
  int level = 0;
  for (int64_t d = leading - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (sizes[level] == 1) {
      sizes[level] = x.size(d), strides[level] = x.stride(d);
    } else if (x.stride(d) == strides[level] * sizes[level]) {
      sizes[level] *= x.size(d);
    } else if (level == 0) {
      level = 1;
      sizes[level] = x.size(d), strides[level] = x.stride(d);
    } else {
      return as_rows(x.contiguous());
    }
  }
  return {x, {sizes[0] * sizes[1], sizes[0], strides[1], strides[0]}};
}

inline at::ScalarType stats_type(at::ScalarType logits) { return logits == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_logits(const Tensor& logits, const Tensor& targets, const OptionalTensor& ref_logits,
                         double temperature) {
  const auto type = logits.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                   "logits must be float32, float64, bfloat16 or float16, got ", type);
  TORCH_CHECK_VALUE(logits.dim() >= 1, "logits must have shape (..., V), got a scalar");
  TORCH_CHECK_VALUE(logits.size(-1) > 0, "logits must have at least one column, got shape ", logits.sizes());
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, "targets must be int64, got ", targets.scalar_type());
  TORCH_CHECK_VALUE(targets.sizes() == logits.sizes().slice(0, logits.dim() - 1), "targets must have shape ",
                    logits.sizes().slice(0, logits.dim() - 1), ", got ", targets.sizes());
  TORCH_CHECK_VALUE(targets.device() == logits.device(), "targets must be on the logits' device ", logits.device(),
                    ", got ", targets.device());
  TORCH_CHECK_VALUE(targets.is_contiguous(), "targets must be contiguous, got strides ", targets.strides());
  TORCH_CHECK_VALUE(temperature >= 1e-30 && temperature <= 1e30, "temperature must lie between 1e-30 and 1e30, got ",
                    temperature);
  if (!ref_logits) return;
  TORCH_CHECK_TYPE(ref_logits->scalar_type() == type, "ref_logits must have the logits' dtype ", type, ", got ",
                   ref_logits->scalar_type());
  TORCH_CHECK_VALUE(ref_logits->sizes() == logits.sizes(), "ref_logits must have shape ", logits.sizes(), ", got ",
                    ref_logits->sizes());
  TORCH_CHECK_VALUE(ref_logits->device() == logits.device(), "ref_logits must be on the logits' device ",
                    logits.device(), ", got ", ref_logits->device());
}

// A contiguous companion of the rows, e.g. saved (N, 6) or grad_stats (K, ...).
inline void check_companion(const char* name, const Tensor& x, at::ScalarType type, at::IntArrayRef shape,
                            const at::Device& device) {
  TORCH_CHECK_TYPE(x.scalar_type() == type, name, " must be ", type, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " must have shape ", shape, ", got ", x.sizes());
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " must be contiguous, got strides ", x.strides());
  TORCH_CHECK_VALUE(x.device() == device, name, " must be on the logits' device ", device, ", got ", x.device());
}

inline at::DimVector stats_shape(const Tensor& targets, bool with_ref) {
  at::DimVector shape{with_ref ? 4 : 2};
  shape.append(targets.sizes().begin(), targets.sizes().end());
  return shape;
}

inline void check_backward(const Tensor& grad_stats, const Tensor& logits, const Tensor& targets, const Tensor& saved,
                           bool with_ref, bool ref_grad) {
  const auto type = stats_type(logits.scalar_type());
  check_companion("grad_stats", grad_stats, type, stats_shape(targets, with_ref), logits.device());
  check_companion("saved", saved, type, {targets.numel(), saved_size}, logits.device());
  TORCH_CHECK_VALUE(with_ref || !ref_grad, "ref_grad asks for the gradient of ref_logits, which were not given");
}

inline void check_tile(const Tensor& logits, const OptionalTensor& ref_logits, int64_t first_column) {
  for (const Tensor* tile : {&logits, ref_logits ? &*ref_logits : &logits}) {
    TORCH_CHECK_VALUE(tile->dim() == 2, "a tile must have shape (N, C), got ", tile->sizes());
    TORCH_CHECK_VALUE(tile->size(1) <= 1 || tile->stride(1) == 1, "a tile's last stride must be 1, got strides ",
                      tile->strides());
    TORCH_CHECK_VALUE(tile->size(0) <= 1 || tile->stride(0) >= tile->size(1), "a tile's rows must not overlap, got ",
                      "strides ", tile->strides());
  }
  TORCH_CHECK_VALUE(first_column >= 0, "first_column must not be negative, got ", first_column);
}

}  // namespace minirlhf
