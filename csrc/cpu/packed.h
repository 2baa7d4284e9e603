// Products of some rows with a weight that was laid out for it once, sums first and what is done with them at once:
// y = finish(x Wᵀ). On the CPU.
//
// W (n, k) lies in panels of `panel_width` of its rows, each panel k after k, so that a step along k reads two vectors
// and multiplies them by one number of each row of x. Sums of a tile, `tile_rows` rows by a panel, stay in registers;
// bias, activation and residual are added on the way out. A row's sums are taken in one order, whatever rows stand
// beside it: a row is bitwise the same in every batch, which no library promises.
// In bfloat16, processors that multiply pairs (AVX512_BF16) get W in pairs of k; others widen it to float32 on the way.
// Source: the shape of the tile is that of Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix
// Multiplication", section 4, without its blocks, since a small model's weights are in the cache as they are.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "exp.h"

namespace minirlhf::cpu {

using at::BFloat16;
using at::Tensor;
using Floats = Vec<float>;
using Two = std::tuple<Floats, Floats>;  // as many numbers as a panel is wide

constexpr int64_t panel_width = 2 * Floats::size();
constexpr int tile_rows = Floats::size() == 16 ? 8 : 4;  // their sums leave registers for the weights

Tensor pack_weight(const Tensor& weight);

inline int64_t panels_of(int64_t n) { return (n + panel_width - 1) / panel_width; }
inline int64_t padded(int64_t n) { return panels_of(n) * panel_width; }

// --- two vectors at a time -------------------------------------------------------------------------------------------

inline Two load(const float* from) { return {Floats::loadu(from), Floats::loadu(from + Floats::size())}; }
inline Two load(const BFloat16* from) { return at::vec::convert_to_float<BFloat16>(Vec<BFloat16>::loadu(from)); }

// The first n numbers, and 0 beyond.
inline Two load(const float* from, int64_t n) {
  const int64_t lanes = Floats::size();
  if (n >= panel_width) return load(from);
  const auto some = [&](int64_t at) {
    const int64_t count = std::clamp<int64_t>(n - at, 0, lanes);
    return count == 0 ? Floats(0) : Floats::set(Floats(0), Floats::loadu(from + at, count), count);
  };
  return {some(0), some(lanes)};
}

inline void store(float* to, const Two& x, int64_t n = panel_width) {
  const int64_t lanes = Floats::size();
  std::get<0>(x).store(to, std::min(n, lanes));
  if (n > lanes) std::get<1>(x).store(to + lanes, std::min(n, panel_width) - lanes);
}
inline void store(BFloat16* to, const Two& x, int64_t n = panel_width) {
  at::vec::convert_from_float<BFloat16>(std::get<0>(x), std::get<1>(x)).store(to, std::min(n, panel_width));
}

inline Two operator+(const Two& x, const Two& y) {
  return {std::get<0>(x) + std::get<0>(y), std::get<1>(x) + std::get<1>(y)};
}

// What is left of x in the type T.
template <typename T>
inline Two rounded(const Two& x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(std::get<0>(x), std::get<1>(x)));
  }
}

// --- a tile ----------------------------------------------------------------------------------------------------------

// sums (R, panel_width) = x · panel for R rows of x, `stride` apart, and `depth` steps along k.
template <int R, typename T>
inline void tile(const T* x, int64_t stride, const T* panel, int64_t depth, float* sums) {
  Floats sum[R][2];
#pragma GCC unroll 8  // else the sums, an array, are kept in memory and not in registers
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Floats(0);
  for (int64_t i = 0; i < depth; ++i) {
    const auto [first, second] = load(panel + i * panel_width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats a(static_cast<float>(x[r * stride + i]));
      sum[r][0] = at::vec::fmadd(a, first, sum[r][0]);
      sum[r][1] = at::vec::fmadd(a, second, sum[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    sum[r][0].store(sums + r * panel_width);
    sum[r][1].store(sums + r * panel_width + Floats::size());
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// The build is for AVX512 of any kind: what this one needs beyond it is asked for when it runs.
inline bool multiplies_pairs() {
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
}

template <int R>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) inline void tile_of_pairs(
    const BFloat16* x, int64_t stride, const BFloat16* panel, int64_t depth, float* sums) {
  __m512 sum[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < depth; ++i) {
    const __m512bh first = (__m512bh)_mm512_loadu_si512(panel + 2 * i * panel_width);
    const __m512bh second = (__m512bh)_mm512_loadu_si512(panel + (2 * i + 1) * panel_width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int pair;
      std::memcpy(&pair, x + r * stride + 2 * i, sizeof(pair));
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, first);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], a, second);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(sums + r * panel_width, sum[r][0]);
    _mm512_storeu_ps(sums + r * panel_width + 16, sum[r][1]);
  }
}
#else
inline bool multiplies_pairs() { return false; }

template <int R>
inline void tile_of_pairs(const BFloat16*, int64_t, const BFloat16*, int64_t, float*) {}
#endif

// --- a product -------------------------------------------------------------------------------------------------------

template <int R, typename T, typename F>
inline void rows_by_panel(const T* x, int64_t row, int64_t rows, int64_t stride, const T* panel, int64_t depth,
                          bool pairs, int64_t column, const F& finish) {
  alignas(64) float sums[R * panel_width];
  for (; row + R <= rows; row += R) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (pairs) {
        tile_of_pairs<R>(x + row * stride, stride, panel, depth, sums);
      } else {
        tile<R>(x + row * stride, stride, panel, depth, sums);
      }
    } else {
      tile<R>(x + row * stride, stride, panel, depth, sums);
    }
    for (int r = 0; r < R; ++r) finish(row + r, column, load(sums + r * panel_width));
  }
  if constexpr (R > 1) rows_by_panel<R / 2>(x, row, rows, stride, panel, depth, pairs, column, finish);
}

// Whether this is a weight (n, k) that `pack_weight` laid out here; how far n and k are from whole panels and pairs is
// not kept.
inline bool is_packed(const Tensor& weight, int64_t n, int64_t k) {
  const bool bf16 = weight.scalar_type() == at::kBFloat16, pairs = weight.dim() == 4;
  return weight.is_contiguous() && (bf16 || weight.scalar_type() == at::kFloat) &&
         (weight.dim() == 3 || (pairs && bf16 && weight.size(3) == 2 && multiplies_pairs())) &&
         weight.size(0) == panels_of(n) && weight.size(1) == (pairs ? (k + 1) / 2 : k) && weight.size(2) == panel_width;
}

// finish(row, column, sums) is called with the sums of a row in the columns from `column` on, a panel at a time; the
// last panel's go beyond n, where the weight is 0. x: rows of k numbers, `stride` apart; if k is odd and the weight lies
// in pairs, a 0 must stand behind each row.
template <typename T, typename F>
void product(const T* x, int64_t rows, int64_t stride, const Tensor& packed, const F& finish) {
  const T* panels = packed.const_data_ptr<T>();
  for (int64_t p = 0; p < packed.size(0); ++p)
    rows_by_panel<tile_rows>(x, 0, rows, stride, panels + p * packed.stride(0), packed.size(1), packed.dim() == 4,
                             p * panel_width, finish);
}

}  // namespace minirlhf::cpu
