// Log-prob of the target, entropy and exact KL to a reference of every row of logits; and their gradients. On the CPU.
//
// A row is read once, in blocks of columns that stay in the first-level cache: first the block's maximum, then the
// exponentials. With x the policy's logits, y the reference's, T the temperature, and the running maxima m_p, m_q,
//
//   s_p = Σ exp((x - m_p) / T)                         s_q = Σ exp((y - m_q) / T)
//   u   = Σ exp((x - m_p) / T) (x - m_p) / T           v   = Σ exp((x - m_p) / T) ((x - m_p) - (y - m_q)) / T
//
// are summed in vector lanes within a block and in double across blocks, and a row ends as
//
//   logprob = (x_t - m_p) / T - log s_p                entropy = log s_p - u / s_p
//   ref_logprob = (y_t - m_q) / T - log s_q            KL = v / s_p - log s_p + log s_q
//
// m + log s is never formed: it would round away the digits that a shift of all logits must not change. The cut into
// blocks depends on the width alone, so a row's result does not depend on the rows around it or on the threads. (In
// tiles a row is cut at the tiles' edges too.)
// Source of the rescaled sums: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "exp.h"

namespace minirlhf::cpu {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t block_columns = 4096;       // a block of fp32 is 16 KiB: it and the reference's fit a 32 KiB cache
constexpr int64_t columns_per_task = 1 << 15;  // less is not worth waking a thread for

// Sums are held in float for logits of up to 32 bits, in double for double.
template <typename T>
using Lane = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What is known of a row after some of its columns. A maximum of -inf means: nothing but masked tokens yet, sums all 0.
struct RowState {
  double m_p = -inf, s_p = 0, u = 0, x_t = nan;  // a target that is never met leaves NaN
  double m_q = -inf, s_q = 0, v = 0, y_t = nan;
};
static_assert(sizeof(RowState) == state_size * sizeof(double));

// What the gradient needs of a row; the last two are outputs.
template <typename S>
struct Saved {
  S m_p, log_s_p, m_q, log_s_q, entropy, kl;
};
static_assert(sizeof(Saved<float>) == saved_size * sizeof(float));

// --- forward ---------------------------------------------------------------------------------------------------------

std::tuple<Vec<float>, Vec<float>> widened(const Vec<at::BFloat16>& x) { return at::vec::convert_bfloat16_float(x); }
std::tuple<Vec<float>, Vec<float>> widened(const Vec<at::Half>& x) { return at::vec::convert_half_float(x); }

// The last few columns, filled up to a whole vector with masked tokens, which add nothing to any sum.
template <typename S>
Vec<S> load_tail(const S* x, int64_t n) {
  return Vec<S>::set(Vec<S>(static_cast<S>(-inf)), Vec<S>::loadu(x, n), n);
}

// Columns as lanes: fp32 and fp64 where they lie, halves widened into `room`.
template <typename T>
const Lane<T>* as_lanes(const T* x, int64_t n, Lane<T>* room) {
  if constexpr (std::is_same_v<T, Lane<T>>) {
    return x;
  } else {
    int64_t i = 0;
    for (; i + Vec<T>::size() <= n; i += Vec<T>::size()) {
      const auto [low, high] = widened(Vec<T>::loadu(x + i));
      low.store(room + i);
      high.store(room + i + Vec<float>::size());
    }
    for (; i < n; ++i) room[i] = static_cast<float>(x[i]);
    return room;
  }
}

// The largest of n values. NaN may get lost here; it comes back through the exponential.
template <typename S>
S largest(const S* x, int64_t n) {
  using at::vec::clamp_min;  // of two numbers the larger, at one instruction
  constexpr int64_t width = Vec<S>::size();
  Vec<S> a(static_cast<S>(-inf)), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    a = clamp_min(Vec<S>::loadu(x + i), a);
    b = clamp_min(Vec<S>::loadu(x + i + width), b);
    c = clamp_min(Vec<S>::loadu(x + i + 2 * width), c);
    d = clamp_min(Vec<S>::loadu(x + i + 3 * width), d);
  }
  for (; i + width <= n; i += width) a = clamp_min(Vec<S>::loadu(x + i), a);
  if (i < n) a = clamp_min(load_tail(x + i, n - i), a);
  S each[width], top = static_cast<S>(-inf);
  clamp_min(clamp_min(a, b), clamp_min(c, d)).store(each);
  for (const S value : each) top = value > top ? value : top;
  return top;
}

template <typename S>
double sum(const Vec<S>& lanes) {
  S each[Vec<S>::size()];
  lanes.store(each);
  double total = 0;
  for (const S value : each) total += value;
  return total;
}

// A block of one row: the same columns of policy and reference, and where the columns after them lie.
template <typename S>
struct Block {
  const S *x, *y;
  int64_t n;
  const char *next_x, *next_y;
  int64_t element_bytes;
};

// Calls f with each vector of levels. Meanwhile the next block is brought near: the exponentials leave the memory idle,
// and that block's maximum would have to wait for it.
template <bool with_ref, typename S, typename F>
void for_each_vector(const Block<S>& block, F f) {
  constexpr int64_t width = Vec<S>::size();
  int64_t i = 0;
  for (; i + width <= block.n; i += width) {
    __builtin_prefetch(block.next_x + i * block.element_bytes);
    if constexpr (with_ref) __builtin_prefetch(block.next_y + i * block.element_bytes);
    f(Vec<S>::loadu(block.x + i), with_ref ? Vec<S>::loadu(block.y + i) : Vec<S>(0));
  }
  if (i < block.n)
    f(load_tail(block.x + i, block.n - i), with_ref ? load_tail(block.y + i, block.n - i) : Vec<S>(0));
}

struct Sums {
  double s_p, u, s_q, v;
};

// A block's sums in units of the levels. Where a token is masked, or as good as masked by a hugely negative logit, u
// and v come out as NaN (0 · inf) or infinite. Then `masked` does it again from the logits themselves, by selection:
// masked in the policy a token adds nothing, masked in the reference alone it makes the KL infinite, even where its
// probability underflows to 0.
template <bool with_ref, bool masked, typename S>
Sums block_sums(const Block<S>& block, const Levels<S>& policy, const Levels<S>& reference) {
  Vec<S> s_p(0), u(0), s_q(0), v(0);
  const VectorLevels<S> level_p(policy), level_q(reference);
  const Vec<S> zero(0), infinite(static_cast<S>(inf)), nothing(static_cast<S>(-inf));
  const Vec<S> m_p(static_cast<S>(policy.maximum)), m_q(static_cast<S>(reference.maximum));
  for_each_vector<with_ref>(block, [&](const Vec<S>& x, const Vec<S>& y) {
    const Vec<S> t_p = level_p(x), e = exp_level(t_p);
    s_p = s_p + e;
    if constexpr (masked) u = u + Vec<S>::blendv(e * (x - m_p), zero, e == zero);
    else u = at::vec::fmadd(e, t_p, u);
    if constexpr (with_ref) {
      const Vec<S> t_q = level_q(y);
      s_q = s_q + exp_level(t_q);
      if constexpr (masked) {
        const Vec<S> term = Vec<S>::blendv(e * ((x - m_p) - (y - m_q)), zero, e == zero);
        v = v + Vec<S>::blendv(Vec<S>::blendv(term, infinite, y == nothing), zero, x == nothing);
      } else {
        v = at::vec::fmadd(e, t_p - t_q, v);
      }
    }
  });
  Sums sums{sum(s_p), sum(u), sum(s_q), sum(v)};
  if constexpr (masked) {  // as levels: t = scale (x - m) + top
    sums.u = policy.scale * sums.u + policy.top * sums.s_p;
    sums.v = policy.scale * sums.v + (policy.top - reference.top) * sums.s_p;
  }
  return sums;
}

// Σ exp(t) / exp(top) with its largest terms counted, not added. Where one token has nearly all the probability, the
// others are too small to be added to its 1 in float, and log s, which is small there, would lose its digits.
template <typename S>
double sum_with_counted_top(const S* x, int64_t n, const Levels<S>& levels, S largest) {
  Vec<S> rest(0), count(0);
  const VectorLevels<S> level(levels);
  const Vec<S> top(largest), zero(0), one(1);
  for_each_vector<false>(Block<S>{x, nullptr, n, nullptr, nullptr, 0}, [&](const Vec<S>& x_i, const Vec<S>&) {
    rest = rest + Vec<S>::blendv(exp_level(level(x_i)), zero, x_i == top);
    count = count + Vec<S>::blendv(zero, one, x_i == top);
  });
  return sum(count) + sum(rest) / levels.exp_top();
}

// A block's sum relative to the row's maximum so far, by counting where the block holds it and little else.
template <typename S>
double settled(double sum, const S* x, int64_t n, const Levels<S>& levels, S largest, double maximum) {
  const bool peaked = sum < 2 && largest == maximum && maximum != -inf;
  return peaked ? sum_with_counted_top(x, n, levels, largest) : sum / levels.exp_top();
}

// Adds a block of columns to a row.
template <bool with_ref, typename S>
void absorb(RowState& row, const Block<S>& block, double inverse_temperature) {
  const S largest_p = largest(block.x, block.n), largest_q = with_ref ? largest(block.y, block.n) : S(0);
  const double m_p = std::max<double>(row.m_p, largest_p), m_q = std::max<double>(row.m_q, largest_q);
  // Nothing but masked tokens yet: any finite maximum gives the exponentials 0, and -inf - -inf would give NaN.
  const Levels<S> policy(m_p == -inf ? 0 : m_p, inverse_temperature), ref(m_q == -inf ? 0 : m_q, inverse_temperature);
  Sums now = block_sums<with_ref, false>(block, policy, ref);
  if (!std::isfinite(now.u) || !std::isfinite(now.v)) {
    const Sums again = block_sums<with_ref, true>(block, policy, ref);
    if (!std::isfinite(now.u)) now.u = again.u;  // else its bits would depend on what the reference masks
    if (!std::isfinite(now.v)) now.v = again.v;
  }

  // From levels to nats below the maximum: every t is `top` too high, so Σ e (t - top) = u - s top; in v both tops
  // enter. An infinite v stays: inf - inf, and later 0 · inf, would be NaN.
  const double top_p = policy.exp_top(), top_q = ref.exp_top();
  if (now.v != inf) now.v = (now.v - now.s_p * (policy.top - ref.top)) * policy.nats / top_p;
  now.u = (now.u - now.s_p * policy.top) * policy.nats / top_p;
  now.s_p = settled(now.s_p, block.x, block.n, policy, largest_p, m_p);
  if constexpr (with_ref) now.s_q = settled(now.s_q, block.y, block.n, ref, largest_q, m_q);

  // Move the old sums to the new maxima.
  const double move_p = row.m_p == -inf ? 0 : (row.m_p - m_p) * inverse_temperature;
  const double move_q = row.m_q == -inf ? 0 : (row.m_q - m_q) * inverse_temperature;
  const double shrink_p = std::exp(move_p);
  if (row.v != inf) row.v = shrink_p * (row.v + row.s_p * (move_p - move_q));
  row.v += now.v;
  row.u = shrink_p * (row.u + row.s_p * move_p) + now.u;
  row.s_p = shrink_p * row.s_p + now.s_p;
  row.s_q = std::exp(move_q) * row.s_q + now.s_q;
  row.m_p = m_p;
  row.m_q = m_q;
}

// Adds n columns, the first of which is column `first` of the row.
template <bool with_ref, typename T>
void absorb_columns(RowState& row, const T* x, const T* y, int64_t n, int64_t first, int64_t target,
                    double inverse_temperature) {
  using S = Lane<T>;
  alignas(64) S room_x[block_columns], room_y[with_ref ? block_columns : 1];
  for (int64_t begin = 0; begin < n; begin += block_columns) {
    const int64_t width = std::min(block_columns, n - begin);
    Block<S> block{as_lanes(x + begin, width, room_x), nullptr, width,
                   reinterpret_cast<const char*>(x + begin + width), nullptr, sizeof(T)};
    if constexpr (with_ref) {
      block.y = as_lanes(y + begin, width, room_y);
      block.next_y = reinterpret_cast<const char*>(y + begin + width);
    }
    absorb<with_ref>(row, block, inverse_temperature);
  }
  if (target >= first && target < first + n) {
    row.x_t = static_cast<double>(x[target - first]);
    if constexpr (with_ref) row.y_t = static_cast<double>(y[target - first]);
  }
}

// A row's end: its statistics, each `step` apart, and what its gradient will need.
template <typename S>
void finish(const RowState& row, bool with_ref, double inverse_temperature, S* stats, int64_t step, Saved<S>& saved) {
  const double log_s_p = row.m_p == -inf ? nan : std::log(row.s_p);
  const double entropy = log_s_p - row.u / row.s_p;
  stats[0] = static_cast<S>((row.x_t - row.m_p) * inverse_temperature - log_s_p);
  stats[step] = static_cast<S>(entropy);
  saved = {static_cast<S>(row.m_p), static_cast<S>(log_s_p), 0, 0, static_cast<S>(entropy), 0};
  if (!with_ref) return;
  const double log_s_q = row.m_q == -inf ? nan : std::log(row.s_q);
  const double kl = row.v / row.s_p - log_s_p + log_s_q;
  stats[2 * step] = static_cast<S>((row.y_t - row.m_q) * inverse_temperature - log_s_q);
  stats[3 * step] = static_cast<S>(kl);
  saved.m_q = static_cast<S>(row.m_q);
  saved.log_s_q = static_cast<S>(log_s_q);
  saved.kl = static_cast<S>(kl);
}

template <typename S>
void finish_ignored(bool with_ref, S* stats, int64_t step, Saved<S>& saved) {
  for (int64_t k = 0; k < (with_ref ? 4 : 2); ++k) stats[k * step] = 0;
  saved = {0, 0, 0, 0, 0, 0};
}

// --- backward --------------------------------------------------------------------------------------------------------

// With upstream gradients g of the four statistics, a_i = log p_i, b_i = log q_i and δ the target's indicator,
//
//   dx_i = [p_i (-g_logprob - g_entropy (a_i + H) + g_kl (a_i - b_i - KL)) + g_logprob δ_it] / T
//   dy_i = [g_kl (q_i - p_i) + g_ref_logprob (δ_it - q_i)] / T
//
// a_i + H is (x_i - m_p) / T + (H - log s_p), and a_i - b_i - KL is ((x_i - m_p) - (y_i - m_q)) / T + (log s_q -
// log s_p - KL): the factor of p_i is constant + slope (x_i - m_p) / T + tilt ((x_i - m_p) - (y_i - m_q)) / T, with the second
// halves in the constant.
struct Upstream {
  double logprob, entropy, ref_logprob, kl;
};

struct RowGradient {
  double m_p, log_s_p, m_q, log_s_q;  // p_i = exp((x_i - m_p) / T - log s_p)
  double constant, slope, tilt;       // a term whose upstream gradient is 0 is left out, never multiplied by 0
  double logprob;                     // what the target gets on top
  double ref_p, ref_q, ref_logprob;   // dy_i = (ref_p p_i + ref_q q_i + ref_logprob δ_it) / T

  template <typename S>
  RowGradient(const Saved<S>& saved, Upstream g)
      : m_p(saved.m_p), log_s_p(saved.log_s_p), m_q(saved.m_q), log_s_q(saved.log_s_q) {
    if (saved.kl == static_cast<S>(inf)) g.kl = 0;  // an infinite KL has no gradient to give
    constant = -g.logprob;
    if (g.entropy != 0) constant -= g.entropy * (saved.entropy - log_s_p);
    if (g.kl != 0) constant += g.kl * (log_s_q - log_s_p - saved.kl);
    slope = -g.entropy;
    tilt = g.kl;
    logprob = g.logprob;
    ref_p = -g.kl;
    ref_q = g.kl - g.ref_logprob;
    ref_logprob = g.ref_logprob;
  }

  bool is_zero() const { return constant == 0 && slope == 0 && tilt == 0 && logprob == 0; }
  bool ref_is_zero() const { return ref_p == 0 && ref_q == 0 && ref_logprob == 0; }
};

Vec<at::BFloat16> narrowed(const Vec<float>& low, const Vec<float>& high, at::BFloat16) {
  return at::vec::convert_float_bfloat16(low, high);
}
Vec<at::Half> narrowed(const Vec<float>& low, const Vec<float>& high, at::Half) {
  return at::vec::convert_float_half(low, high);
}

// Writes lanes as the logits' type; in place there is nothing to do.
template <typename T, typename S>
void store_lanes(T* out, const S* lanes, int64_t n) {
  if constexpr (std::is_same_v<T, S>) {
    if (out != lanes) std::copy(lanes, lanes + n, out);
  } else {
    int64_t i = 0;
    for (; i + Vec<T>::size() <= n; i += Vec<T>::size()) {
      narrowed(Vec<float>::loadu(lanes + i), Vec<float>::loadu(lanes + i + Vec<float>::size()), T()).store(out + i);
    }
    for (; i < n; ++i) out[i] = static_cast<T>(lanes[i]);
  }
}

// out = f(x, y) in vectors. `out` may be x or y.
template <typename S, typename F>
void map_vectors(S* out, const S* x, const S* y, int64_t n, F f) {
  constexpr int64_t width = Vec<S>::size();
  int64_t i = 0;
  for (; i + width <= n; i += width) f(Vec<S>::loadu(x + i), y ? Vec<S>::loadu(y + i) : Vec<S>(0)).store(out + i);
  if (i < n) f(load_tail(x + i, n - i), y ? load_tail(y + i, n - i) : Vec<S>(0)).store(out + i, n - i);
}

template <bool with_slope, bool with_tilt, typename S>
void policy_block(S* out, const S* x, const S* y, int64_t n, const RowGradient& row, double inverse_temperature) {
  const Levels<S> policy(row.m_p, inverse_temperature), ref(row.m_q, inverse_temperature);
  const VectorLevels<S> level_p(policy), level_q(ref);
  // exp(t) · share = p_i / T. The bracket is rewritten for levels, which stand `top` above x - m_p.
  const double share = std::exp(-row.log_s_p) / policy.exp_top() * inverse_temperature;
  const double constant = row.constant - (with_slope ? row.slope * policy.top * policy.nats : 0) -
                          (with_tilt ? row.tilt * (policy.top - ref.top) * policy.nats : 0);
  const Vec<S> constant_lanes(static_cast<S>(constant)), slope(static_cast<S>(row.slope * policy.nats)),
      tilt(static_cast<S>(row.tilt * policy.nats)), shared(static_cast<S>(share)),
      product(static_cast<S>(constant * share)), zero(0);
  map_vectors<S>(out, x, with_tilt ? y : nullptr, n, [&](const Vec<S>& x_i, const Vec<S>& y_i) {
    const Vec<S> t = level_p(x_i), e = exp_level(t);
    if constexpr (!with_slope && !with_tilt) return e * product;
    const Vec<S> p = e * shared;
    Vec<S> bracket = constant_lanes;
    if constexpr (with_slope) bracket = at::vec::fmadd(slope, t, bracket);
    if constexpr (with_tilt) bracket = at::vec::fmadd(tilt, t - level_q(y_i), bracket);
    return Vec<S>::blendv(p * bracket, zero, p == zero);  // a masked token's bracket is infinite
  });
}

template <bool with_p, typename S>
void reference_block(S* out, const S* x, const S* y, int64_t n, const RowGradient& row, double inverse_temperature) {
  const Levels<S> policy(row.m_p, inverse_temperature), ref(row.m_q, inverse_temperature);
  const VectorLevels<S> level_p(policy), level_q(ref);
  const Vec<S> of_p(static_cast<S>(row.ref_p * std::exp(-row.log_s_p) / policy.exp_top() * inverse_temperature));
  const Vec<S> of_q(static_cast<S>(row.ref_q * std::exp(-row.log_s_q) / ref.exp_top() * inverse_temperature));
  map_vectors<S>(out, x, y, n, [&](const Vec<S>& x_i, const Vec<S>& y_i) {
    const Vec<S> q = exp_level(level_q(y_i)) * of_q;
    if constexpr (!with_p) return q;  // a broken policy row says nothing about log q
    return at::vec::fmadd(exp_level(level_p(x_i)), of_p, q);
  });
}

// The target's own gradient, from unrounded numbers; 1 - p_t is -expm1(log p_t), which keeps its digits near p_t = 1.
double policy_target(double x_t, double y_t, const RowGradient& row, double inverse_temperature) {
  const double below = (x_t - row.m_p) * inverse_temperature, log_p = below - row.log_s_p, p = std::exp(log_p);
  double others = row.constant + row.logprob;
  if (row.slope != 0) others += row.slope * below;
  if (row.tilt != 0) others += row.tilt * (below - (y_t - row.m_q) * inverse_temperature);
  const double own = row.logprob == 0 ? 0 : row.logprob * -std::expm1(log_p);
  return (own + (p == 0 ? 0 : p * others)) * inverse_temperature;
}

double reference_target(double x_t, double y_t, const RowGradient& row, double inverse_temperature) {
  const double log_q = (y_t - row.m_q) * inverse_temperature - row.log_s_q;
  double total = row.ref_logprob == 0 ? 0 : row.ref_logprob * -std::expm1(log_q);
  if (row.ref_p != 0)
    total += row.ref_p * (std::exp((x_t - row.m_p) * inverse_temperature - row.log_s_p) - std::exp(log_q));
  return total * inverse_temperature;
}

// Gradients of n columns of a row, the first of which is column `first`. Either of dx and dy may be null; dx may be x
// and dy may be y.
template <typename T>
void gradient_columns(T* dx, T* dy, const T* x, const T* y, int64_t n, int64_t first, int64_t target,
                      const RowGradient& row, double inverse_temperature) {
  using S = Lane<T>;
  const bool has_target = target >= first && target < first + n;
  const double x_t = has_target ? static_cast<double>(x[target - first]) : 0;  // read before they are overwritten
  const double y_t = has_target && y ? static_cast<double>(y[target - first]) : 0;
  // In place this may overwrite x before dy is computed: dx is all 0 only without the KL's gradient, and then dy does
  // not read x; and the other way round.
  if (dx && row.is_zero()) std::fill(dx, dx + n, T(0)), dx = nullptr;
  if (dy && row.ref_is_zero()) std::fill(dy, dy + n, T(0)), dy = nullptr;
  if (!dx && !dy) return;
  const bool with_slope = row.slope != 0, with_tilt = row.tilt != 0;

  alignas(64) S room_x[block_columns], room_y[block_columns], room_dy[block_columns];
  for (int64_t begin = 0; begin < n; begin += block_columns) {
    const int64_t width = std::min(block_columns, n - begin);
    const S* lanes_x = as_lanes(x + begin, width, room_x);
    const S* lanes_y = y && (dy || with_tilt) ? as_lanes(y + begin, width, room_y) : nullptr;
    if (dy) {  // first, since dx may take the place of x
      const auto block = row.ref_p != 0 ? reference_block<true, S> : reference_block<false, S>;
      block(room_dy, lanes_x, lanes_y, width, row, inverse_temperature);
    }
    if (dx) {
      const auto block = with_tilt ? (with_slope ? policy_block<true, true, S> : policy_block<false, true, S>)
                                   : (with_slope ? policy_block<true, false, S> : policy_block<false, false, S>);
      S* out = room_x;
      if constexpr (std::is_same_v<T, S>) out = dx + begin;
      block(out, lanes_x, lanes_y, width, row, inverse_temperature);
      store_lanes(dx + begin, out, width);
    }
    if (dy) store_lanes(dy + begin, room_dy, width);
  }
  if (!has_target) return;
  if (dx) dx[target - first] = static_cast<T>(policy_target(x_t, y_t, row, inverse_temperature));
  if (dy) dy[target - first] = static_cast<T>(reference_target(x_t, y_t, row, inverse_temperature));
}

// --- the ops ---------------------------------------------------------------------------------------------------------

#define MINIRLHF_DISPATCH(TYPE, ...)                                   \
  switch (TYPE) {                                                      \
    case at::kFloat: { using T = float; __VA_ARGS__(); break; }        \
    case at::kDouble: { using T = double; __VA_ARGS__(); break; }      \
    case at::kBFloat16: { using T = at::BFloat16; __VA_ARGS__(); break; } \
    default: { using T = at::Half; __VA_ARGS__(); }                    \
  }

template <typename F>
void for_each_row(int64_t rows, int64_t columns, F f) {
  const int64_t grain = std::max<int64_t>(1, columns_per_task / std::max<int64_t>(1, columns));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

void check_targets(const Tensor& targets, int64_t vocabulary, int64_t ignore_index) {
  const int64_t* t = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.numel(); ++i) {
    TORCH_CHECK_VALUE(t[i] == ignore_index || (t[i] >= 0 && t[i] < vocabulary), "target ", t[i],
                      " is outside the vocabulary [0, ", vocabulary, ")");
  }
}

// A gradient to be filled. The first touch of its pages costs more than all our arithmetic; huge pages are 512 times
// fewer of them.
Tensor fresh_gradient(const Tensor& like) {
  Tensor out = at::empty(like.sizes(), like.options());
#ifdef __linux__
  constexpr uintptr_t huge = 1 << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) + huge - 1) / huge * huge;
  const auto end = (reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) + out.nbytes()) / huge * huge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#endif
  return out;
}

std::tuple<Tensor, Tensor> token_stats(const Tensor& logits, const Tensor& targets, const OptionalTensor& ref_logits,
                                       double temperature, int64_t ignore_index) {
  check_logits(logits, targets, ref_logits, temperature);
  check_targets(targets, logits.size(-1), ignore_index);
  const Input x = as_rows(logits), y = ref_logits ? as_rows(*ref_logits) : Input{};
  const bool with_ref = ref_logits.has_value();
  const int64_t count = x.rows.count, columns = logits.size(-1);
  const auto options = logits.options().dtype(stats_type(logits.scalar_type()));
  Tensor stats = at::empty(stats_shape(targets, with_ref), options), saved = at::empty({count, saved_size}, options);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const double inverse_temperature = 1 / temperature;

  MINIRLHF_DISPATCH(logits.scalar_type(), [&] {
    using S = Lane<T>;
    S* out = stats.mutable_data_ptr<S>();
    auto* rest = reinterpret_cast<Saved<S>*>(saved.mutable_data_ptr<S>());
    const T *px = static_cast<const T*>(x.data()), *py = static_cast<const T*>(y.data());
    for_each_row(count, columns, [&](int64_t i) {
      if (target[i] == ignore_index) return finish_ignored(with_ref, out + i, count, rest[i]);
      RowState row;
      const auto absorb = py ? absorb_columns<true, T> : absorb_columns<false, T>;
      absorb(row, px + x.rows.offset(i), py ? py + y.rows.offset(i) : nullptr, columns, 0, target[i],
             inverse_temperature);
      finish(row, with_ref, inverse_temperature, out + i, count, rest[i]);
    });
  });
  return {stats, saved};
}

// Fills dx and dy, either of which may be null, for every row. They may be the logits themselves.
template <typename T>
void gradient_rows(T* dx, Rows to_x, T* dy, Rows to_y, const Input& x, const Input& y, const Tensor& grad_stats,
                   const Tensor& targets, const Tensor& saved, int64_t columns, int64_t first, double temperature,
                   int64_t ignore_index) {
  const double inverse_temperature = 1 / temperature;
  using S = Lane<T>;
  const int64_t count = x.rows.count;
  const bool with_ref = y.tensor.defined();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const S* g = grad_stats.const_data_ptr<S>();
  const auto* rest = reinterpret_cast<const Saved<S>*>(saved.const_data_ptr<S>());
  const T *px = static_cast<const T*>(x.data()), *py = static_cast<const T*>(y.data());
  for_each_row(count, columns, [&](int64_t i) {
    T* dx_i = dx ? dx + to_x.offset(i) : nullptr;
    T* dy_i = dy ? dy + to_y.offset(i) : nullptr;
    if (target[i] == ignore_index) {
      if (dx_i) std::fill(dx_i, dx_i + columns, T(0));
      if (dy_i) std::fill(dy_i, dy_i + columns, T(0));
      return;
    }
    const Upstream upstream{g[i], g[count + i], with_ref ? g[2 * count + i] : 0, with_ref ? g[3 * count + i] : 0};
    const RowGradient row(rest[i], upstream);
    gradient_columns(dx_i, dy_i, px + x.rows.offset(i), with_ref ? py + y.rows.offset(i) : nullptr, columns, first,
                     target[i], row, inverse_temperature);
  });
}

std::tuple<Tensor, Tensor> token_stats_backward(const Tensor& grad_stats, const Tensor& logits, const Tensor& targets,
                                                const OptionalTensor& ref_logits, const Tensor& saved,
                                                double temperature, int64_t ignore_index, bool policy_grad,
                                                bool ref_grad) {
  check_logits(logits, targets, ref_logits, temperature);
  check_targets(targets, logits.size(-1), ignore_index);
  check_backward(grad_stats, logits, targets, saved, ref_logits.has_value(), ref_grad);
  const Input x = as_rows(logits), y = ref_logits ? as_rows(*ref_logits) : Input{};
  const int64_t columns = logits.size(-1);
  Tensor dx = policy_grad ? fresh_gradient(logits) : at::empty({0}, logits.options());
  Tensor dy = ref_grad ? fresh_gradient(*ref_logits) : at::empty({0}, logits.options());
  const Rows packed{x.rows.count, std::max<int64_t>(1, x.rows.count), 0, columns};
  MINIRLHF_DISPATCH(logits.scalar_type(), [&] {
    gradient_rows<T>(policy_grad ? dx.mutable_data_ptr<T>() : nullptr, packed,
                     ref_grad ? dy.mutable_data_ptr<T>() : nullptr, packed, x, y, grad_stats, targets, saved, columns,
                     0, temperature, ignore_index);
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
  const Input x = as_rows(logits), y = ref_logits ? as_rows(*ref_logits) : Input{};
  const int64_t* target = targets.const_data_ptr<int64_t>();
  auto* rows = reinterpret_cast<RowState*>(state.mutable_data_ptr<double>());
  const double inverse_temperature = 1 / temperature;
  MINIRLHF_DISPATCH(logits.scalar_type(), [&] {
    const T *px = static_cast<const T*>(x.data()), *py = static_cast<const T*>(y.data());
    for_each_row(x.rows.count, logits.size(1), [&](int64_t i) {
      if (first_column == 0) rows[i] = RowState{};
      if (target[i] == ignore_index) return;
      const auto absorb = py ? absorb_columns<true, T> : absorb_columns<false, T>;
      absorb(rows[i], px + x.rows.offset(i), py ? py + y.rows.offset(i) : nullptr, logits.size(1), first_column,
             target[i], inverse_temperature);
    });
  });
}

std::tuple<Tensor, Tensor> token_stats_finish(const Tensor& state, const Tensor& targets, bool with_ref,
                                              double temperature, int64_t ignore_index, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "dtype must be float32 or float64, got ", dtype);
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, "targets must be int64, got ", targets.scalar_type());
  TORCH_CHECK_VALUE(targets.is_contiguous(), "targets must be contiguous, got strides ", targets.strides());
  const int64_t count = targets.numel();
  check_companion("state", state, at::kDouble, {count, state_size}, targets.device());
  const auto options = state.options().dtype(dtype);
  Tensor stats = at::empty(stats_shape(targets, with_ref), options), saved = at::empty({count, saved_size}, options);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const auto* rows = reinterpret_cast<const RowState*>(state.const_data_ptr<double>());
  MINIRLHF_DISPATCH(dtype, [&] {
    using S = Lane<T>;
    S* out = stats.mutable_data_ptr<S>();
    auto* rest = reinterpret_cast<Saved<S>*>(saved.mutable_data_ptr<S>());
    for (int64_t i = 0; i < count; ++i) {
      if (target[i] == ignore_index) finish_ignored(with_ref, out + i, count, rest[i]);
      else finish(rows[i], with_ref, 1 / temperature, out + i, count, rest[i]);
    }
  });
  return {stats, saved};
}

void token_stats_gradient_(const Tensor& logits, const OptionalTensor& ref_logits, const Tensor& grad_stats,
                           const Tensor& targets, const Tensor& saved, int64_t first_column, double temperature,
                           int64_t ignore_index, bool policy_grad, bool ref_grad) {
  check_logits(logits, targets, ref_logits, temperature);
  check_tile(logits, ref_logits, first_column);
  check_backward(grad_stats, logits, targets, saved, ref_logits.has_value(), ref_grad);
  const Input x = as_rows(logits), y = ref_logits ? as_rows(*ref_logits) : Input{};
  MINIRLHF_DISPATCH(logits.scalar_type(), [&] {
    gradient_rows<T>(policy_grad ? logits.mutable_data_ptr<T>() : nullptr, x.rows,
                     ref_grad ? ref_logits->mutable_data_ptr<T>() : nullptr, y.rows, x, y, grad_stats, targets, saved,
                     logits.size(1), first_column, temperature, ignore_index);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(minirlhf, CPU, m) {
  m.impl("token_stats", &token_stats);
  m.impl("token_stats_backward", &token_stats_backward);
  m.impl("token_stats_update_", &token_stats_update_);
  m.impl("token_stats_finish", &token_stats_finish);
  m.impl("token_stats_gradient_", &token_stats_gradient_);
}

}  // namespace minirlhf::cpu
