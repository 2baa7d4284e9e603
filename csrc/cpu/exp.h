// exp of logits relative to a row's maximum, a vector at a time: the one expensive step of a softmax.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <type_traits>

namespace minirlhf::cpu {

template <typename S>
using Vec = at::vec::Vectorized<S>;

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <typename S>
constexpr bool in_bits = std::is_same_v<S, float>;  // powers of two of our own, below
#else
template <typename S>
constexpr bool in_bits = false;
#endif

// A level t stands for (x - m) / T, with m the row's maximum, in nats, or in bits where powers of two are cheaper. Not
// by way of x - m: t = x · scale - reference is one fused multiply-add, with scale = 1 / T in the unit of t and
// reference = m · scale rounded. So t is rounded once, and a shift of all logits costs no digits. The rounding of the
// reference leaves the maximum itself at a small t, the top, instead of at 0: Σ exp(t) = exp(top) Σ exp((x - m) / T).
// A finite logit below about -2e38 T has t = -inf.
template <typename S>
struct Levels {
  double maximum;
  double nats;       // one unit of t
  double scale;      // the same number in every use, exactly
  double reference;  // likewise
  double top;

  Levels(double maximum, double inverse_temperature)
      : maximum(maximum),
        nats(in_bits<S> ? 0.6931471805599453 : 1.0),
        scale(static_cast<S>(inverse_temperature / nats)),
        reference(static_cast<S>(maximum * scale)),
        top(std::fma(maximum, scale, -reference)) {}

  double exp_top() const { return std::exp(top * nats); }
};

template <typename S>
struct VectorLevels {
  Vec<S> scale, minus_reference;
  explicit VectorLevels(const Levels<S>& levels)
      : scale(static_cast<S>(levels.scale)), minus_reference(static_cast<S>(-levels.reference)) {}
  Vec<S> operator()(const Vec<S>& x) const { return at::vec::fmadd(x, scale, minus_reference); }
};

// The exponential of a level t <= 0 (or a rounding above): NaN stays NaN, -inf and all too small for S are 0.
template <typename S>
inline Vec<S> exp_level(const Vec<S>& t) {
  return t.exp();
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// 2^f on [0, 1], relative error below 1.5e-7 with its rounding: 1 + c1 f + ... + c5 f^5, a minimax fit with the
// constant held at 1 and the coefficients rounded to float one after the other.
constexpr float c1 = 0x1.62e4bap-1f, c2 = 0x1.ebdb6ap-3f, c3 = 0x1.c91c10p-5f;
constexpr float c4 = 0x1.277c1ep-7f, c5 = 0x1.e96900p-10f;

inline Vec<float> power_of_two(const Vec<float>& f) {
  Vec<float> p = at::vec::fmadd(Vec<float>(c5), f, Vec<float>(c4));
  p = at::vec::fmadd(p, f, Vec<float>(c3));
  p = at::vec::fmadd(p, f, Vec<float>(c2));
  p = at::vec::fmadd(p, f, Vec<float>(c1));
  return at::vec::fmadd(p, f, Vec<float>(1));
}
#endif

// 2^t = 2^(t - ⌊t⌋) · 2^⌊t⌋
#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> exp_level(const Vec<float>& t) {
  // `reduce` is t - ⌊t⌋, and 0 at -inf; `scalef` multiplies by 2^⌊t⌋, down through the denormals to 0.
  const Vec<float> f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(power_of_two(f), t);
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline Vec<float> exp_level(const Vec<float>& t) {
  // ⌊t⌋ goes into the exponent's bits; below 2^-126 there are none left, and the result is 0.
  const __m256 raised = _mm256_max_ps(_mm256_set1_ps(-127.0f), t);  // NaN stays: the second operand wins
  const __m256 whole = _mm256_floor_ps(raised);
  const __m256 p = power_of_two(Vec<float>(_mm256_sub_ps(raised, whole)));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));  // at -127 the exponent's bits are 0, and so is the product
}
#endif

}  // namespace minirlhf::cpu
