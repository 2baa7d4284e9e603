// Attention of one new token a row over the keys and values kept of the tokens before it. On the CPU.
//
//   keys[p] = k, values[p] = v          p: the new token's position, which is also its slot
//   out = Σ_{s ≤ p} w_s values[s]       w = softmax over s ≤ p of q · keys[s] / √d
//
// A head of a row is one task, reads its filled slots once each and no others, and depends on nothing beside it: rows
// of different lengths need no mask, and a row's result is bitwise the same whatever the batch. As batched matrix
// products the same takes several operations, with masks for what a row does not have.
// Source: Vaswani et al. 2017, eq. 1.
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "exp.h"
#include "kernels.h"

namespace minirlhf::cpu {
namespace {

using V = Vec<float>;

constexpr int64_t lanes = V::size();
constexpr int64_t numbers_per_task = 1 << 14;  // of keys; less is not worth waking a thread for
constexpr float log2_e = 1.4426950408889634f;

// A head's vector of d numbers in registers' worth of pieces; the last piece may be part of one, filled with 0.
template <typename F>
inline void for_pieces(int64_t d, F f) {
  for (int64_t i = 0; i < d; i += lanes) f(i, std::min(lanes, d - i));
}

inline float dot(const float* a, const float* b, int64_t d) {
  V sum(0);
  for_pieces(d, [&](int64_t i, int64_t n) { sum = at::vec::fmadd(V::loadu(a + i, n), V::loadu(b + i, n), sum); });
  return at::vec::vec_reduce_all<float>([](V& x, V& y) { return x + y; }, sum);
}

// Scores to weights exp(score - largest), in place; returns their sum. `room` is as long as whole vectors need.
float weigh(float* room, int64_t n) {
  float largest = room[0];
  for (int64_t s = 1; s < n; ++s) largest = std::max(largest, room[s]);
  const V unit(in_bits<float> ? log2_e : 1.0f), top(largest);
  V sum(0);
  for (int64_t s = 0; s < n; s += lanes) {
    const int64_t count = std::min(lanes, n - s);
    V weights = exp_level<float>((V::loadu(room + s) - top) * unit);
    if (count < lanes) weights = V::set(V(0), weights, count);
    weights.store(room + s);
    sum = sum + weights;
  }
  return at::vec::vec_reduce_all<float>([](V& x, V& y) { return x + y; }, sum);
}

// Asks for d numbers that will be read soon. What is kept of all rows is larger than the nearest caches, and the pieces
// that a head reads are too short for the processor to foresee.
inline void expect(const float* from, int64_t d) {
  for (int64_t i = 0; i < d; i += 16) __builtin_prefetch(from + i);
}

template <typename T>
void attend_head(float* keys, float* values, const float* next, const T* qkv, T* out, int64_t p, int64_t d,
                 float* room) {
  float* query = room;
  float* weights = query + d;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t i = 0; i < d; ++i) {
    query[i] = static_cast<float>(qkv[i]) * scale;
    keys[p * d + i] = static_cast<float>(qkv[d + i]);
    values[p * d + i] = static_cast<float>(qkv[2 * d + i]);
  }
  for (int64_t s = 0; s <= p; ++s) {
    expect(values + s * d, d);
    weights[s] = dot(query, keys + s * d, d);
  }
  const float inverse = 1.0f / weigh(weights, p + 1);
  for_pieces(d, [&](int64_t i, int64_t n) {
    V sum(0);
    for (int64_t s = 0; s <= p; ++s) {
      if (i == 0) expect(next + s * d, d);
      sum = at::vec::fmadd(V(weights[s]), V::loadu(values + s * d + i, n), sum);
    }
    float piece[lanes];
    (sum * V(inverse)).store(piece);
    for (int64_t j = 0; j < n; ++j) out[i + j] = static_cast<T>(piece[j]);
  });
}

}  // namespace

int64_t attention_room(int64_t slots, int64_t d) { return d + slots + lanes; }

void attend(float* keys, float* values, const float* next, const float* qkv, float* out, int64_t p, int64_t d,
            float* room) {
  attend_head(keys, values, next, qkv, out, p, d, room);
}
void attend(float* keys, float* values, const float* next, const at::BFloat16* qkv, at::BFloat16* out, int64_t p,
            int64_t d, float* room) {
  attend_head(keys, values, next, qkv, out, p, d, room);
}

// store (2, C, S, d) float32, each half contiguous: keys and values of C heads, head n of row b at n = b H + h; qkv
// (B·H, 3, d) float32 or bfloat16; positions (B,) int64. Returns (B·H, d) in qkv's type.
Tensor decode_attention_(const Tensor& store, const Tensor& qkv, const Tensor& positions) {
  TORCH_CHECK_VALUE(store.dim() == 4 && store.size(0) == 2 && store[0].is_contiguous(),
                    "store must be (2, C, S, d), each half contiguous");
  TORCH_CHECK_TYPE(store.scalar_type() == at::kFloat, "store must be float32, got ", store.scalar_type());
  const int64_t heads = qkv.size(0), S = store.size(2), d = store.size(3), B = positions.numel();
  TORCH_CHECK_VALUE(qkv.dim() == 3 && qkv.size(1) == 3 && qkv.size(2) == d && heads <= store.size(1),
                    "qkv must be (heads, 3, ", d, ") with at most ", store.size(1), " heads");
  TORCH_CHECK_VALUE(B > 0 ? heads % B == 0 : heads == 0, heads, " heads do not divide among ", B, " rows");
  TORCH_CHECK_TYPE(positions.scalar_type() == at::kLong, "positions must be int64, got ", positions.scalar_type());
  const Tensor input = qkv.contiguous(), at = positions.contiguous();
  const int64_t* p = at.const_data_ptr<int64_t>();
  int64_t longest = 0, slots = 0;
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(p[b] >= 0 && p[b] < S, "position ", p[b], " is outside the ", S, " slots of a row");
    longest = std::max(longest, p[b] + 1);
    slots += p[b] + 1;
  }
  Tensor out = at::empty({heads, d}, qkv.options());
  if (heads == 0) return out;
  const int64_t H = heads / B, each = slots / B * d;
  float *keys = store.mutable_data_ptr<float>(), *values = keys + store.stride(0);
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    const T* from = input.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const int64_t grain = std::max<int64_t>(1, numbers_per_task / std::max<int64_t>(1, each));
    at::parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> room(attention_room(longest, d));
      for (int64_t n = begin; n < end; ++n) {
        const float* next = keys + std::min(n + 1, end - 1) * S * d;
        attend(keys + n * S * d, values + n * S * d, next, from + n * 3 * d, to + n * d, p[n / H], d, room.data());
      }
    });
  };
  if (qkv.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    TORCH_CHECK_TYPE(qkv.scalar_type() == at::kBFloat16, "qkv must be float32 or bfloat16, got ", qkv.scalar_type());
    run(at::BFloat16{});
  }
  return out;
}

TORCH_LIBRARY_IMPL(minirlhf, CPU, m) { m.impl("decode_attention_", decode_attention_); }

}  // namespace minirlhf::cpu
