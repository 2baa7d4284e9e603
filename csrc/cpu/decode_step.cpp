// One new token a row through the whole network, as sampling runs it. On the CPU.
//
//   x = wte[token] + wpe[position]
//   x += proj(attention(norm(x)))          in every block; decode_attention.cpp keeps the keys and values
//   x += out(gelu(fc(norm(x))))
//   logits = head(norm(x))
//
// Rows have nothing to do with each other. A small model's weights stay in the cache, and `minirlhf.decode` packs them
// (packed.h): each thread takes its share of the rows through all blocks by itself, one wait for the slower thread in
// place of fifty, and writes nothing between two products that the next one does not read (`forward_rows`). With weights
// that are not packed, a large model's, all threads work on one product after the other, which reads its weights once,
// and torch's operators are as good as any (`forward`).
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
#include <cmath>
#include <memory>
#include <optional>
#include <string_view>

#include "gelu.h"
#include "kernels.h"
#include "packed.h"

namespace minirlhf::cpu {
namespace {

constexpr int64_t rows_per_thread = 4;  // fewer are not worth their own pass over the weights
constexpr double epsilon = 1e-5;        // of the norms, torch's default

// A block's tensors, in the order of `minirlhf.decode.Layer`: weight and bias of each.
enum Part { ln_1 = 0, attn = 2, proj = 4, ln_2 = 6, fc = 8, out = 10, parts = 12 };
// And those around the blocks, in the order of `minirlhf.decode.Weights`.
enum End { wte, wpe, ln_f_weight, ln_f_bias, head, ends };

// --- a large model ---------------------------------------------------------------------------------------------------

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

// All rows' logits: their tokens (b,), positions (b,), and in each layer's store the slots of their heads.
Tensor forward(at::TensorList layers, at::TensorList around, at::TensorList stores, const Tensor& tokens,
               const Tensor& positions) {
  const int64_t b = tokens.numel(), d = stores[0].size(3), heads = around[wpe].size(1) / d;
  Tensor x = at::embedding(around[wte], tokens).add_(at::embedding(around[wpe], positions));  // (b, D)
  for (size_t layer = 0; layer < stores.size(); ++layer) {
    const auto at = layers.slice(layer * parts, parts);
    Tensor store = stores[layer].narrow(1, 0, b * heads);
    const Tensor qkv = affine(norm(x, at[ln_1], at[ln_1 + 1]), at[attn], at[attn + 1]);  // (b, 3D), head by head
    const Tensor mixed = decode_attention_(store, qkv.view({b * heads, 3, d}), positions);
    x.add_(affine(mixed.view({b, heads * d}), at[proj], at[proj + 1]));
    const Tensor inner = affine(norm(x, at[ln_2], at[ln_2 + 1]), at[fc], at[fc + 1]);  // (b, 4D)
    x.add_(affine(gelu(inner), at[out], at[out + 1]));
  }
  return affine(norm(x, around[ln_f_weight], around[ln_f_bias]), around[head], std::nullopt);  // (b, V')
}

// --- a small one -----------------------------------------------------------------------------------------------------

// Numbers of some rows, each row as wide as whole panels. Behind a row's end stands 0, if the row has no infinity.
template <typename T>
class Rows {
 public:
  Rows(int64_t rows, int64_t numbers) : stride_(padded(numbers)), data_(new T[rows * stride_]()) {}
  T* row(int64_t r) { return data_.get() + r * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<T[]> data_;
};

float sum_of(const Two& x) {
  return at::vec::vec_reduce_all<float>([](Floats& a, Floats& b) { return a + b; }, std::get<0>(x) + std::get<1>(x));
}

// out = (x - mean) / √(variance + ε) · weight + bias, of D numbers.
template <typename T>
void norm_row(const float* x, const Tensor& weight, const Tensor& bias, int64_t D, T* out) {
  const float *scale = weight.const_data_ptr<float>(), *shift = bias.const_data_ptr<float>();
  const auto for_panels = [&](auto f) {
    for (int64_t i = 0; i < D; i += panel_width) f(i, load(x + i, D - i));
  };
  float total = 0, squares = 0;
  for_panels([&](int64_t, const Two& piece) { total += sum_of(piece); });
  const Floats mean(total / static_cast<float>(D));
  const auto centred = [&](int64_t i, const Two& piece) {
    const Two away{std::get<0>(piece) - mean, std::get<1>(piece) - mean};
    if (D - i >= panel_width) return away;
    alignas(64) float all[panel_width];
    store(all, away);
    return load(all, D - i);
  };
  for_panels([&](int64_t i, const Two& piece) {
    const auto [a, b] = centred(i, piece);
    squares += sum_of({a * a, b * b});
  });
  const Floats inverse(static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(D) + epsilon)));
  for_panels([&](int64_t i, const Two& piece) {
    const auto [a, b] = centred(i, piece);
    const auto [scale_a, scale_b] = load(scale + i, D - i);
    const auto [shift_a, shift_b] = load(shift + i, D - i);
    store(out + i, {at::vec::fmadd(a * inverse, scale_a, shift_a), at::vec::fmadd(b * inverse, scale_b, shift_b)});
  });
}

// The same as `forward` for b of the rows, with packed weights of type T: what a product gives is rounded to T. The
// first of them is row `first` of stores and logits, which are those of all rows; tokens and positions begin with it.
template <typename T>
void forward_rows(at::TensorList layers, at::TensorList around, at::TensorList stores, const int64_t* tokens,
                  const int64_t* positions, int64_t first, int64_t b, float* logits) {
  const int64_t D = around[wpe].size(1), S = stores[0].size(2), d = stores[0].size(3), heads = D / d;
  const int64_t vocabulary = around[wte].size(0), longest = *std::max_element(positions, positions + b) + 1;
  const float *token = around[wte].const_data_ptr<float>(), *position = around[wpe].const_data_ptr<float>();
  Rows<float> x(b, D);
  Rows<T> normed(b, D), qkv(b, 3 * D), mixed(b, D), inner(b, 4 * D);
  std::unique_ptr<float[]> room(new float[attention_room(longest, d)]());

  for (int64_t r = 0; r < b; ++r)
    for (int64_t i = 0; i < D; ++i) x.row(r)[i] = token[tokens[r] * D + i] + position[positions[r] * D + i];
  const auto norm_rows = [&](const Tensor& weight, const Tensor& bias) {
    for (int64_t r = 0; r < b; ++r) norm_row(x.row(r), weight, bias, D, normed.row(r));
  };
  // finish(row, column, x Wᵀ + bias) for each panel
  const auto affine_rows = [&](Rows<T>& from, const Tensor& weight, const Tensor& bias, auto finish) {
    const float* add = bias.const_data_ptr<float>();
    const int64_t n = bias.numel();
    product<T>(from.row(0), b, from.stride(), weight, [&](int64_t r, int64_t column, const Two& sums) {
      finish(r, column, rounded<T>(sums + load(add + column, n - column)));
    });
  };
  const auto add_to_x = [&](int64_t r, int64_t column, const Two& y) {
    float* at = x.row(r) + column;
    store(at, load(at) + y);
  };

  for (size_t layer = 0; layer < stores.size(); ++layer) {
    const auto at = layers.slice(layer * parts, parts);
    float *keys = stores[layer].mutable_data_ptr<float>(), *values = keys + stores[layer].stride(0);
    norm_rows(at[ln_1], at[ln_1 + 1]);
    affine_rows(normed, at[attn], at[attn + 1],
                [&](int64_t r, int64_t column, const Two& y) { store(qkv.row(r) + column, y); });
    for (int64_t r = 0; r < b; ++r)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t n = (first + r) * heads + h, next = std::min(n + 1, (first + b) * heads - 1);
        attend(keys + n * S * d, values + n * S * d, keys + next * S * d, qkv.row(r) + 3 * h * d, mixed.row(r) + h * d,
               positions[r], d, room.get());
      }
    affine_rows(mixed, at[proj], at[proj + 1], add_to_x);
    norm_rows(at[ln_2], at[ln_2 + 1]);
    affine_rows(normed, at[fc], at[fc + 1], [&](int64_t r, int64_t column, const Two& y) {
      store(inner.row(r) + column, {gelu_vector(std::get<0>(y)), gelu_vector(std::get<1>(y))});
    });
    affine_rows(inner, at[out], at[out + 1], add_to_x);
  }
  norm_rows(around[ln_f_weight], around[ln_f_bias]);
  product<T>(normed.row(0), b, normed.stride(), around[head], [&](int64_t r, int64_t column, const Two& sums) {
    store(logits + (first + r) * vocabulary + column, rounded<T>(sums), vocabulary - column);
  });
}

// --- the operation ---------------------------------------------------------------------------------------------------

// What `forward_rows` reads without a look: whole tensors of float32, and weights packed alike.
void check_packed(at::TensorList layers, at::TensorList around, at::TensorList stores) {
  const int64_t D = around[wpe].size(1);
  const auto plain = [](const Tensor& x, int64_t n) {
    return x.scalar_type() == at::kFloat && x.is_contiguous() && (n < 0 || x.numel() == n);
  };
  const auto packed = [&](const Tensor& x, int64_t n, int64_t k) {
    return x.scalar_type() == around[head].scalar_type() && x.dim() == around[head].dim() && is_packed(x, n, k);
  };
  const auto kept = [&](const Tensor& x) {
    return x.scalar_type() == at::kFloat && x.sizes() == stores[0].sizes() && x.dim() == 4 && x.size(0) == 2 &&
           x.size(3) > 0 && D % x.size(3) == 0 && x.stride(3) == 1 && x.stride(2) == x.size(3) &&
           x.stride(1) == x.size(2) * x.size(3);
  };
  bool fits = plain(around[wte], -1) && around[wte].size(1) == D && plain(around[wpe], -1) &&
              plain(around[ln_f_weight], D) && plain(around[ln_f_bias], D) &&
              packed(around[head], around[wte].size(0), D);
  for (size_t layer = 0; layer < stores.size(); ++layer) {
    const auto at = layers.slice(layer * parts, parts);
    fits = fits && plain(at[ln_1], D) && plain(at[ln_1 + 1], D) && plain(at[ln_2], D) && plain(at[ln_2 + 1], D) &&
           packed(at[attn], 3 * D, D) && plain(at[attn + 1], 3 * D) && packed(at[proj], D, D) &&
           plain(at[proj + 1], D) && packed(at[fc], 4 * D, D) && plain(at[fc + 1], 4 * D) &&
           packed(at[out], D, 4 * D) && plain(at[out + 1], D) && kept(stores[layer]);
  }
  TORCH_CHECK_VALUE(fits, "packed weights want all of a network's shapes, and the rest in float32, contiguous");
}

// layers: 12 tensors a block; around: 5, see above; stores: a layer's (2, C, S, d) each, changed in place; tokens and
// positions (B,) int64. Returns the logits (B, V'), of packed weights in float32.
Tensor decode_step_(at::TensorList layers, at::TensorList around, at::TensorList stores, const Tensor& tokens,
                    const Tensor& positions) {
  TORCH_CHECK_VALUE(around.size() == ends && !stores.empty() && layers.size() == parts * stores.size(), "a step takes ",
                    parts, " tensors and a store for each of one or more blocks, and ", int64_t{ends}, " around them");
  TORCH_CHECK_VALUE(tokens.dim() == 1 && tokens.sizes() == positions.sizes(), "a token and a position a row, got ",
                    tokens.sizes(), " and ", positions.sizes());
  at::AutoDispatchBelowADInplaceOrView no_gradient;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (around[head].dim() == 2) return forward(layers, around, stores, tokens, positions);

  check_packed(layers, around, stores);
  const int64_t B = tokens.numel(), S = stores[0].size(2), heads = around[wpe].size(1) / stores[0].size(3);
  TORCH_CHECK_VALUE(B * heads <= stores[0].size(1), B, " rows do not fit the stores");
  const Tensor ids = tokens.to(at::kLong).contiguous(), slots = positions.to(at::kLong).contiguous();
  const int64_t *id = ids.const_data_ptr<int64_t>(), *slot = slots.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < B; ++r) {
    TORCH_CHECK_VALUE(id[r] >= 0 && id[r] < around[wte].size(0), "token ", id[r], " is outside the vocabulary");
    TORCH_CHECK_VALUE(slot[r] >= 0 && slot[r] < std::min(S, around[wpe].size(0)), "position ", slot[r],
                      " is outside the ", std::min(S, around[wpe].size(0)), " slots of a row");
  }
  Tensor logits = at::empty({B, around[wte].size(0)}, around[wte].options());
  float* to = logits.mutable_data_ptr<float>();
  const bool bf16 = around[head].scalar_type() == at::kBFloat16;
  at::parallel_for(0, B, rows_per_thread, [&](int64_t begin, int64_t end) {
    const auto run = bf16 ? forward_rows<BFloat16> : forward_rows<float>;
    run(layers, around, stores, id + begin, slot + begin, begin, end - begin, to);
  });
  return logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(minirlhf, CPU, m) { m.impl("decode_step_", decode_step_); }
TORCH_LIBRARY_IMPL(minirlhf, MkldnnCPU, m) { m.impl("decode_step_", decode_step_); }  // with weights of that library

}  // namespace minirlhf::cpu
