// One new token a row through the whole network, as sampling runs it. On the CPU.
//
//   x = wte[token] + wpe[position]
//   x += proj(attention(norm(x)))          in every block; decode_attention.cpp keeps the keys and values
//   x += out(gelu(fc(norm(x))))
//   logits = head(norm(x))
//
// Rows have nothing to do with each other, so each thread takes its share of them through all blocks by itself. That is
// one wait for the slower thread in place of fifty, and the products of a small model, which are too small to divide,
// need not be. A large model's weights do not stay in the cache: there all threads work on one product, which reads them
// once.
// Source: Radford et al. 2019, section 2.3 (the network of `minirlhf.model`).
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "kernels.h"

namespace minirlhf::cpu {
namespace {

constexpr int64_t cached_bytes = 1 << 25;  // of weights that threads may read each by itself
constexpr int64_t rows_per_thread = 8;     // fewer are not worth their own pass over the weights

// A block's tensors, in the order of `minirlhf.decode.Layer`: weight and bias of each.
enum Part { ln_1 = 0, attn = 2, proj = 4, ln_2 = 6, fc = 8, out = 10, parts = 12 };
// And those around the blocks, in the order of `minirlhf.decode.Weights`.
enum End { wte, wpe, ln_f_weight, ln_f_bias, head, ends };

// Weights may be packed by the library that torch ships; only its own operator reads these.
Tensor affine(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor input = x.to(weight.scalar_type());
  if (!weight.is_mkldnn()) return at::linear(input, weight, bias);
  using Packed = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                        c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static const auto packed =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Packed>();
  return packed.call(input, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

Tensor norm(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return at::layer_norm(x, {x.size(-1)}, weight, bias);
}

// Some rows' logits: their tokens (b,), positions (b,), and in each layer's store the slots of their heads.
Tensor forward(at::TensorList layers, at::TensorList around, at::TensorList stores, const Tensor& tokens,
               const Tensor& positions, int64_t first_head) {
  const int64_t b = tokens.numel(), d = stores[0].size(3), heads = around[wpe].size(1) / d;
  Tensor x = at::embedding(around[wte], tokens).add_(at::embedding(around[wpe], positions));  // (b, D)
  for (size_t layer = 0; layer < stores.size(); ++layer) {
    const auto at = layers.slice(layer * parts, parts);
    Tensor store = stores[layer].narrow(1, first_head, b * heads);
    const Tensor qkv = affine(norm(x, at[ln_1], at[ln_1 + 1]), at[attn], at[attn + 1]);  // (b, 3D), head by head
    const Tensor mixed = decode_attention_(store, qkv.view({b * heads, 3, d}), positions);
    x.add_(affine(mixed.view({b, heads * d}), at[proj], at[proj + 1]));
    const Tensor inner = affine(norm(x, at[ln_2], at[ln_2 + 1]), at[fc], at[fc + 1]);  // (b, 4D)
    x.add_(affine(gelu(inner), at[out], at[out + 1]));
  }
  return affine(norm(x, around[ln_f_weight], around[ln_f_bias]), around[head], std::nullopt);  // (b, V')
}

// layers: 12 tensors a block; around: 5, see above; stores: a layer's (2, C, S, d) each, changed in place; tokens and
// positions (B,) int64. Returns the logits (B, V').
Tensor decode_step_(at::TensorList layers, at::TensorList around, at::TensorList stores, const Tensor& tokens,
                    const Tensor& positions) {
  TORCH_CHECK_VALUE(around.size() == ends && !stores.empty() && layers.size() == parts * stores.size(), "a step takes ",
                    parts, " tensors and a store for each of one or more blocks, and ", int64_t{ends}, " around them");
  TORCH_CHECK_VALUE(tokens.dim() == 1 && tokens.sizes() == positions.sizes(), "a token and a position a row, got ",
                    tokens.sizes(), " and ", positions.sizes());
  const int64_t B = tokens.numel(), heads = around[wpe].size(1) / stores[0].size(3);
  int64_t bytes = around[head].numel() * around[head].itemsize();
  for (const Tensor& weight : layers) bytes += weight.numel() * weight.itemsize();
  const int64_t rows = bytes <= cached_bytes ? rows_per_thread : B;

  Tensor logits = at::empty({B, around[wte].size(0)}, around[wte].options().dtype(around[head].scalar_type()));
  at::parallel_for(0, B, std::max<int64_t>(1, rows), [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView no_gradient;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // which other threads do not see
    const int64_t n = end - begin;
    logits.narrow(0, begin, n).copy_(forward(layers, around, stores, tokens.narrow(0, begin, n),
                                             positions.narrow(0, begin, n), begin * heads));
  });
  return logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(minirlhf, CPU, m) { m.impl("decode_step_", decode_step_); }
TORCH_LIBRARY_IMPL(minirlhf, MkldnnCPU, m) { m.impl("decode_step_", decode_step_); }  // with packed weights

}  // namespace minirlhf::cpu
