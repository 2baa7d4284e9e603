// Kernels of this folder that others of it use.
#pragma once

#include <ATen/core/Tensor.h>

namespace minirlhf::cpu {

using at::Tensor;

Tensor gelu(const Tensor& x);
int64_t attention_room(int64_t slots, int64_t d);  // numbers that `attend` needs room for
// A head's attention of a new token in slot p, whose query, key and value stand in qkv, over the slots up to its own.
// keys, values: (slots, d) each; next: the keys that will be wanted after these.
void attend(float* keys, float* values, const float* next, const float* qkv, float* out, int64_t p, int64_t d,
            float* room);
void attend(float* keys, float* values, const float* next, const at::BFloat16* qkv, at::BFloat16* out, int64_t p,
            int64_t d, float* room);

Tensor decode_attention_(const Tensor& store, const Tensor& qkv, const Tensor& positions);

}  // namespace minirlhf::cpu
