// Where the rows of a (..., V) tensor lie in memory. Free of torch: the CUDA kernels use it too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MINIRLHF_HOST_DEVICE __host__ __device__
#else
#define MINIRLHF_HOST_DEVICE
#endif

namespace minirlhf {

// Any leading shape that needs no more than two strides: contiguous, padded columns, logits[:, :-1], expanded rows.
struct Rows {
  int64_t count;         // N, the product of the leading dimensions
  int64_t inner;         // rows that share one step of outer_stride; at least 1
  int64_t outer_stride;  // in elements, as all of these; 64 bits, since offsets pass 2^31
  int64_t inner_stride;

  MINIRLHF_HOST_DEVICE int64_t offset(int64_t row) const {
    return (row / inner) * outer_stride + (row % inner) * inner_stride;
  }
};

}  // namespace minirlhf
