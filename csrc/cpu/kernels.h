// Kernels of this folder that others of it use.
#pragma once

#include <ATen/core/Tensor.h>

namespace minirlhf::cpu {

using at::Tensor;

Tensor gelu(const Tensor& x);
Tensor decode_attention_(const Tensor& store, const Tensor& qkv, const Tensor& positions);

}  // namespace minirlhf::cpu
