// The ops of csrc/ops.cpp on a GPU: what a call must fulfil, what it allocates, which kernel it launches.
//
// Targets outside the vocabulary are not looked for here, which would make the host wait for the GPU: their rows'
// log-probs and the gradients of these are NaN, and nothing is read or written out of bounds.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "token_stats.cuh"

namespace minirlhf::cuda {
namespace {

static_assert(sizeof(RowState) == state_size * sizeof(double));
static_assert(sizeof(Saved<float>) == saved_size * sizeof(float));

#define MINIRLHF_DISPATCH(TYPE, ...)                                       \
  switch (TYPE) {                                                          \
    case at::kFloat: { using T = float; __VA_ARGS__(); break; }            \
    case at::kDouble: { using T = double; __VA_ARGS__(); break; }          \
    case at::kBFloat16: { using T = __nv_bfloat16; __VA_ARGS__(); break; } \
    default: { using T = __half; __VA_ARGS__(); }                          \
  }

// The kernels run on the logits' device, on the stream that PyTorch is using there.
struct Launch {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  explicit Launch(const at::Device& device) : guard(device), stream(c10::cuda::getCurrentCUDAStream().stream()) {}
};

template <typename T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* written(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// The rows of both sets of logits, as views of them where their strides allow.
struct Rowwise {
  minirlhf::Input x, y;
  Rowwise(const Tensor& logits, const OptionalTensor& ref_logits)
      : x(as_rows(logits)), y(ref_logits ? as_rows(*ref_logits) : minirlhf::Input{}) {}

  template <typename T>
  Input<T> of(const Tensor& targets, int64_t first_column, double temperature, int64_t ignore_index) const {
    return {static_cast<const T*>(x.data()), x.rows, static_cast<const T*>(y.data()), y.rows, read<int64_t>(targets),
            x.tensor.size(-1), first_column, temperature, ignore_index};
  }
};

Tensor fresh_workspace(const Tensor& logits, int64_t rows) {
  int64_t count = 0;
  MINIRLHF_DISPATCH(logits.scalar_type(), [&] { count = rows * kept_splits<T>(logits.size(-1)); });
  return at::empty({count, state_size}, logits.options().dtype(at::kDouble));
}

// --- the ops on whole rows -------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> token_stats(const Tensor& logits, const Tensor& targets, const OptionalTensor& ref_logits,
                                       double temperature, int64_t ignore_index) {
  check_logits(logits, targets, ref_logits, temperature);
  const Launch launch(logits.device());
  const Rowwise rows(logits, ref_logits);
  const auto options = logits.options().dtype(stats_type(logits.scalar_type()));
  Tensor stats = at::empty(stats_shape(targets, ref_logits.has_value()), options);
  Tensor saved = at::empty({targets.numel(), saved_size}, options);
  Tensor workspace = fresh_workspace(logits, targets.numel());
  MINIRLHF_DISPATCH(logits.scalar_type(), [&] {
    C10_CUDA_CHECK(launch_token_stats(rows.of<T>(targets, 0, temperature, ignore_index), written<RowState>(workspace),
                                      written<Real<T>>(stats), written<Saved<Real<T>>>(saved), launch.stream));
  });
  return {stats, saved};
}

std::tuple<Tensor, Tensor> token_stats_backward(const Tensor& grad_stats, const Tensor& logits, const Tensor& targets,
                                                const OptionalTensor& ref_logits, const Tensor& saved,
                                                double temperature, int64_t ignore_index, bool policy_grad,
                                                bool ref_grad) {
  check_logits(logits, targets, ref_logits, temperature);
  check_backward(grad_stats, logits, targets, saved, ref_logits.has_value(), ref_grad);
  const Launch launch(logits.device());
  const Rowwise rows(logits, ref_logits);
  Tensor dx = policy_grad ? at::empty(logits.sizes(), logits.options()) : at::empty({0}, logits.options());
  Tensor dy = ref_grad ? at::empty(logits.sizes(), logits.options()) : at::empty({0}, logits.options());
  const Rows packed{targets.numel(), std::max<int64_t>(1, targets.numel()), 0, logits.size(-1)};
  MINIRLHF_DISPATCH(logits.scalar_type(), [&] {
    C10_CUDA_CHECK(launch_gradient(rows.of<T>(targets, 0, temperature, ignore_index), read<Real<T>>(grad_stats),
                                   read<Saved<Real<T>>>(saved), policy_grad ? written<T>(dx) : nullptr, packed,
                                   ref_grad ? written<T>(dy) : nullptr, packed, launch.stream));
  });
  return {dx, dy};
}

// --- the ops on tiles ------------------------------------------------------------------------------------------------

void token_stats_update_(const Tensor& state, const Tensor& logits, const Tensor& targets,
                         const OptionalTensor& ref_logits, int64_t first_column, double temperature,
                         int64_t ignore_index) {
  check_logits(logits, targets, ref_logits, temperature);
  check_tile(logits, ref_logits, first_column);
  check_companion("state", state, at::kDouble, {targets.numel(), state_size}, logits.device());
  const Launch launch(logits.device());
  const Rowwise rows(logits, ref_logits);
  Tensor workspace = fresh_workspace(logits, targets.numel());
  MINIRLHF_DISPATCH(logits.scalar_type(), [&] {
    C10_CUDA_CHECK(launch_update(rows.of<T>(targets, first_column, temperature, ignore_index),
                                 written<RowState>(workspace), written<RowState>(state), launch.stream));
  });
}

std::tuple<Tensor, Tensor> token_stats_finish(const Tensor& state, const Tensor& targets, bool with_ref,
                                              double temperature, int64_t ignore_index, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "dtype must be float32 or float64, got ", dtype);
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, "targets must be int64, got ", targets.scalar_type());
  TORCH_CHECK_VALUE(targets.is_contiguous(), "targets must be contiguous, got strides ", targets.strides());
  const int64_t count = targets.numel();
  check_companion("state", state, at::kDouble, {count, state_size}, targets.device());
  const Launch launch(state.device());
  const auto options = state.options().dtype(dtype);
  Tensor stats = at::empty(stats_shape(targets, with_ref), options), saved = at::empty({count, saved_size}, options);
  const auto finish = [&](auto number) {
    using S = decltype(number);
    C10_CUDA_CHECK(launch_finish(read<RowState>(state), read<int64_t>(targets), count, with_ref, temperature,
                                 ignore_index, written<S>(stats), written<Saved<S>>(saved), launch.stream));
  };
  dtype == at::kDouble ? finish(double{}) : finish(float{});
  return {stats, saved};
}

void token_stats_gradient_(const Tensor& logits, const OptionalTensor& ref_logits, const Tensor& grad_stats,
                           const Tensor& targets, const Tensor& saved, int64_t first_column, double temperature,
                           int64_t ignore_index, bool policy_grad, bool ref_grad) {
  check_logits(logits, targets, ref_logits, temperature);
  check_tile(logits, ref_logits, first_column);
  check_backward(grad_stats, logits, targets, saved, ref_logits.has_value(), ref_grad);
  const Launch launch(logits.device());
  const Rowwise rows(logits, ref_logits);
  MINIRLHF_DISPATCH(logits.scalar_type(), [&] {
    C10_CUDA_CHECK(launch_gradient(rows.of<T>(targets, first_column, temperature, ignore_index),
                                   read<Real<T>>(grad_stats), read<Saved<Real<T>>>(saved),
                                   policy_grad ? written<T>(logits) : nullptr, rows.x.rows,
                                   ref_grad ? written<T>(*ref_logits) : nullptr, rows.y.rows, launch.stream));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(minirlhf, CUDA, m) {
  m.impl("token_stats", &token_stats);
  m.impl("token_stats_backward", &token_stats_backward);
  m.impl("token_stats_update_", &token_stats_update_);
  m.impl("token_stats_finish", &token_stats_finish);
  m.impl("token_stats_gradient_", &token_stats_gradient_);
}

}  // namespace minirlhf::cuda
