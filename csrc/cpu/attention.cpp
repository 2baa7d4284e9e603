// Attention of whole sequences, and its gradient, from the product that holds queries, keys and values. On the CPU.
//
//   P[t][s] = softmax over s of q[t] · k[s] / √d        s ≤ t, or where a mask says so
//   out[t] = Σ_s P[t][s] v[s]
//
//   dP[t][s] = dout[t] · v[s]                           dS = P (dP - Σ_s P dP) / √d
//   dq[t] = Σ_s dS[t][s] k[s]                           dk[s] = Σ_t dS[t][s] q[t]       dv[s] = Σ_t P[t][s] dout[t]
//
// A head of a sequence is one task. It works on a few queries at a time, whose weights stay in the first cache, and
// looks no further than the last token that one of them looks at; the gradient computes them again rather than keep
// them. Written out in torch, short sequences take longer to be rearranged for batched products, and back, than to be
// multiplied.
// Source: Vaswani et al. 2017, eq. 1; the gradient by blocks without stored weights: Dao et al. 2022,
// "FlashAttention", appendix B.2. Differs: a few queries look at all their keys at once, so that no softmax is put
// together from parts; up to a thousand tokens or so a head's keys fit into the cache.
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "exp.h"

namespace minirlhf::cpu {
namespace {

using at::Tensor;
using V = Vec<float>;

constexpr int64_t lanes = V::size();
constexpr int64_t block = 8;  // queries at a time
constexpr float log2_e = 1.4426950408889634f;

int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

float total(const V& x) {
  return at::vec::vec_reduce_all<float>([](V& a, V& b) { return a + b; }, x);
}

// to[r][s] = Σ_{i < d} rows[r][i] columns[i][s] for s < n, to whole vectors. rows: `block` of them, `stride` apart; those
// of columns and of the result are `width` apart.
void products(const float* rows, int64_t stride, const float* columns, float* to, int64_t width, int64_t n, int64_t d) {
  for (int64_t s = 0; s < n; s += lanes) {
    V sum[block];
    for (int r = 0; r < block; ++r) sum[r] = V(0);
    for (int64_t i = 0; i < d; ++i) {
      const V column = V::loadu(columns + i * width + s);
      for (int r = 0; r < block; ++r) sum[r] = at::vec::fmadd(V(rows[r * stride + i]), column, sum[r]);
    }
    for (int r = 0; r < block; ++r) sum[r].store(to + r * width + s);
  }
}

// to[s] += Σ_r weights[r][s] rows[r] for s < n
void spread(const float* weights, int64_t width, const float* rows, int64_t stride, float* to, int64_t n) {
  for (int64_t i = 0; i < stride; i += lanes) {
    V row[block];
    for (int r = 0; r < block; ++r) row[r] = V::loadu(rows + r * stride + i);
    for (int64_t s = 0; s < n; ++s) {
      V sum = V::loadu(to + s * stride + i);
      for (int r = 0; r < block; ++r) sum = at::vec::fmadd(V(weights[r * width + s]), row[r], sum);
      sum.store(to + s * stride + i);
    }
  }
}

// One head of one sequence, in float32: vectors of d numbers lie `stride` apart, filled up with 0 to whole vectors, and
// so do the queries to whole blocks.
class Head {
 public:
  Head(int64_t T, int64_t d, bool gradient)
      : T(T), d(d), stride(padded(d)), width(padded(T)), scale(1.0f / std::sqrt(static_cast<float>(d))) {
    const int64_t rows = T + block;
    room.assign((gradient ? 7 : 3) * rows * stride + (gradient ? 2 : 1) * (d + block) * width, 0.0f);
    float* next = room.data();
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    q = take(rows * stride), k = take(rows * stride), v = take(rows * stride);
    k_columns = take(d * width), weights = take(block * width);
    if (!gradient) return;
    above = take(rows * stride), v_columns = take(d * width), slopes = take(block * width);
    dq = take(rows * stride), dk = take(rows * stride), dv = take(rows * stride);
  }

  // qkv: the sequence's first query of this head; a token's three parts lie D apart, tokens 3D.
  template <typename T_>
  void read(const T_* qkv, int64_t D) {
    for (int64_t t = 0; t < T; ++t) {
      const T_* token = qkv + t * 3 * D;
      for (int64_t i = 0; i < d; ++i) {
        q[t * stride + i] = static_cast<float>(token[i]);
        k[t * stride + i] = k_columns[i * width + t] = static_cast<float>(token[D + i]);
        v[t * stride + i] = static_cast<float>(token[2 * D + i]);
      }
    }
  }

  // The weights of queries t, t + 1, … on all that they look at; returns how many tokens these are. mask: (T, T) of the
  // sequence, or none.
  int64_t weigh(int64_t t, const bool* mask) {
    int64_t reach = std::min(T, t + block);
    if (mask) {
      for (reach = T; reach > 1; --reach) {
        bool seen = false;
        for (int64_t r = t; r < std::min(T, t + block); ++r) seen |= mask[r * T + reach - 1];
        if (seen) break;
      }
    }
    products(q + t * stride, stride, k_columns, weights, width, reach, d);
    const V unit(scale * (in_bits<float> ? log2_e : 1.0f));
    for (int64_t r = 0; r < block; ++r) {
      float* row = weights + r * width;
      if (t + r >= T) {  // no query: it takes and gives nothing
        std::fill(row, row + padded(reach), 0.0f);
        continue;
      }
      const int64_t own = mask ? reach : std::min(reach, t + r + 1);
      for (int64_t s = own; s < padded(reach); ++s) row[s] = -std::numeric_limits<float>::infinity();
      for (int64_t s = 0; mask && s < own; ++s)
        if (!mask[(t + r) * T + s]) row[s] = -std::numeric_limits<float>::infinity();
      V largest = V::loadu(row);
      for (int64_t s = lanes; s < reach; s += lanes) largest = at::vec::maximum(largest, V::loadu(row + s));
      const V top(at::vec::vec_reduce_all<float>([](V& a, V& b) { return at::vec::maximum(a, b); }, largest));
      V sum(0);
      for (int64_t s = 0; s < reach; s += lanes) {
        const V weight = exp_level<float>((V::loadu(row + s) - top) * unit);
        weight.store(row + s);
        sum = sum + weight;
      }
      const V inverse(1.0f / total(sum));
      for (int64_t s = 0; s < reach; s += lanes) (V::loadu(row + s) * inverse).store(row + s);
    }
    return reach;
  }

  // out: like qkv, the first of this head; tokens lie D apart.
  template <typename T_>
  void forward(const bool* mask, T_* out, int64_t D) {
    std::vector<float> mixed(block * stride);
    for (int64_t t = 0; t < T; t += block) {
      const int64_t reach = weigh(t, mask);
      products(weights, width, v, mixed.data(), stride, stride, reach);
      for (int64_t r = t; r < std::min(T, t + block); ++r)
        for (int64_t i = 0; i < d; ++i) out[r * D + i] = static_cast<T_>(mixed[(r - t) * stride + i]);
    }
  }

  // grad: like out; to: like qkv.
  template <typename T_>
  void backward(const bool* mask, const T_* grad, T_* to, int64_t D) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t i = 0; i < d; ++i) {
        above[t * stride + i] = static_cast<float>(grad[t * D + i]);
        v_columns[i * width + t] = v[t * stride + i];
      }
    }
    std::fill(dk, dk + T * stride, 0.0f);
    std::fill(dv, dv + T * stride, 0.0f);
    for (int64_t t = 0; t < T; t += block) {
      const int64_t reach = weigh(t, mask);
      products(above + t * stride, stride, v_columns, slopes, width, reach, d);
      for (int64_t r = 0; r < block; ++r) {
        float *slope = slopes + r * width, *weight = weights + r * width;
        V sum(0);
        for (int64_t s = 0; s < reach; s += lanes) sum = at::vec::fmadd(V::loadu(slope + s), V::loadu(weight + s), sum);
        const V mean(total(sum)), unit(scale);
        for (int64_t s = 0; s < reach; s += lanes)
          ((V::loadu(slope + s) - mean) * V::loadu(weight + s) * unit).store(slope + s);
      }
      products(slopes, width, k, dq + t * stride, stride, stride, reach);
      spread(slopes, width, q + t * stride, stride, dk, reach);
      spread(weights, width, above + t * stride, stride, dv, reach);
    }
    for (int64_t t = 0; t < T; ++t) {
      T_* token = to + t * 3 * D;
      for (int64_t i = 0; i < d; ++i) {
        token[i] = static_cast<T_>(dq[t * stride + i]);
        token[D + i] = static_cast<T_>(dk[t * stride + i]);
        token[2 * D + i] = static_cast<T_>(dv[t * stride + i]);
      }
    }
  }

 private:
  const int64_t T, d, stride, width;
  const float scale;
  std::vector<float> room;
  float *q, *k, *v, *k_columns, *weights;
  float *above = nullptr, *v_columns = nullptr, *slopes = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;
};

void check(const Tensor& qkv, int64_t heads, const std::optional<Tensor>& attend) {
  TORCH_CHECK_VALUE(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0, "qkv must be (B, T, 3 · ", heads,
                    " · d), got ", qkv.sizes());
  if (!attend) return;
  const int64_t B = qkv.size(0), T = qkv.size(1);
  TORCH_CHECK_TYPE(attend->scalar_type() == at::kBool, "attend must be bool, got ", attend->scalar_type());
  TORCH_CHECK_VALUE(attend->sizes() == at::IntArrayRef({B, T, T}), "attend must be (", B, ", ", T, ", ", T, "), got ",
                    attend->sizes());
}

// Runs f(head, b, first) for every head of every sequence: `first` is where the head's numbers begin in a token's D.
template <typename F>
void for_heads(const Tensor& qkv, int64_t heads, bool gradient, F f) {
  const int64_t B = qkv.size(0), T = qkv.size(1), d = qkv.size(2) / (3 * heads);
  if (qkv.numel() == 0) return;
  at::parallel_for(0, B * heads, 1, [&](int64_t begin, int64_t end) {
    Head head(T, d, gradient);
    for (int64_t n = begin; n < end; ++n) f(head, n / heads, n % heads * d);
  });
}

template <typename F>
void for_type(const Tensor& x, F f) {
  if (x.scalar_type() == at::kFloat) return f(float{});
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, "attention takes float32 or bfloat16, got ", x.scalar_type());
  f(at::BFloat16{});
}

const bool* mask_of(const std::optional<Tensor>& attend, int64_t b) {
  return attend ? attend->const_data_ptr<bool>() + b * attend->stride(0) : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& attend) {
  return attend ? std::optional<Tensor>(attend->contiguous()) : std::nullopt;
}

// qkv (B, T, 3D): queries, keys and values, in each head after head; attend (B, T, T), True where row t looks at s, and
// at least once in each row; none = at itself and back. Returns (B, T, D).
Tensor attention(const Tensor& qkv, int64_t heads, const std::optional<Tensor>& attend) {
  check(qkv, heads, attend);
  const Tensor input = qkv.contiguous();
  const auto mask = contiguous(attend);
  const int64_t T = input.size(1), D = input.size(2) / 3;
  Tensor out = at::empty({input.size(0), T, D}, input.options());
  for_type(input, [&](auto kind) {
    using T_ = decltype(kind);
    const T_* from = input.const_data_ptr<T_>();
    T_* to = out.mutable_data_ptr<T_>();
    for_heads(input, heads, false, [&](Head& head, int64_t b, int64_t first) {
      head.read(from + b * T * 3 * D + first, D);
      head.forward(mask_of(mask, b), to + b * T * D + first, D);
    });
  });
  return out;
}

Tensor attention_backward(const Tensor& grad, const Tensor& qkv, int64_t heads, const std::optional<Tensor>& attend) {
  check(qkv, heads, attend);
  const Tensor input = qkv.contiguous(), outer = grad.contiguous();
  const bool fits = outer.sizes() == at::IntArrayRef({input.size(0), input.size(1), input.size(2) / 3});
  TORCH_CHECK_VALUE(fits && outer.scalar_type() == input.scalar_type(),
                    "the gradient must have the output's shape and type");
  const auto mask = contiguous(attend);
  const int64_t T = input.size(1), D = input.size(2) / 3;
  Tensor out = at::empty_like(input);
  for_type(input, [&](auto kind) {
    using T_ = decltype(kind);
    const T_ *from = input.const_data_ptr<T_>(), *above = outer.const_data_ptr<T_>();
    T_* to = out.mutable_data_ptr<T_>();
    for_heads(input, heads, true, [&](Head& head, int64_t b, int64_t first) {
      head.read(from + b * T * 3 * D + first, D);
      head.backward(mask_of(mask, b), above + b * T * D + first, to + b * T * 3 * D + first, D);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(minirlhf, CPU, m) {
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
}

}  // namespace minirlhf::cpu
