// The backward kernel: gradients of both sets of logits in one pass over them. See token_stats.cuh.
//
// With upstream gradients g of the four statistics, a = (x - m_p) / T, b = (y - m_q) / T, means under the policy, and
// δ the target's indicator,
//
//   dx_i = [p_i (-g_logprob - g_entropy (a_i - mean a) + g_kl (a_i - b_i - mean (a - b))) + g_logprob δ_it] / T
//   dy_i = [g_kl (q_i - p_i) + g_ref_logprob (δ_it - q_i)] / T
//
// A term whose upstream gradient is 0 is left out, never multiplied by 0.
#pragma once

#include "sums.cuh"

namespace minirlhf::cuda {

template <typename R>
struct RowGradient {
  R m_p, log_s_p, w_p, mean_p;          // p_i / T = w_p exp(a_i); the means are those of T a and T (a - b)
  R m_q, log_s_q, mean_kl;
  R logprob, ref_logprob, slope, tilt;  // upstream; slope = -g_entropy / T, tilt = g_kl / T
  R ref_p, ref_q;                       // dy_i = ref_q exp(b_i) - ref_p exp(a_i)
  R impossible;                         // dx_i where p_i is 0
  R inverse_temperature;

  __device__ bool dx_is_zero() const { return logprob == 0 && slope == 0 && tilt == 0; }
  __device__ bool dy_is_zero() const { return ref_logprob == 0 && tilt == 0; }

  // p (start + ...), by selection where p is 0. The means are subtracted first: the rest may be small beside them.
  template <bool with_ref>
  __device__ R share(R p, R start, R d_x, R d_y) const {
    R bracket = fma(slope, d_x - mean_p, start);
    if (with_ref && tilt != 0) bracket = fma(tilt, d_x - d_y - mean_kl, bracket);
    return p == 0 ? impossible : p * bracket;
  }
  template <bool with_ref>
  __device__ R dx(R d_x, R d_y, R e_p) const {
    return share<with_ref>(w_p * e_p, -logprob, d_x, d_y);
  }
  __device__ R dy(R e_p, R e_q) const {
    const R of_q = ref_q * e_q;
    return tilt == 0 ? of_q : fma(-ref_p, e_p, of_q);
  }

  // The target's own, with 1 - p_t as -expm1(log p_t), which keeps its digits where p_t is near 1.
  template <bool with_ref>
  __device__ R dx_target(R d_x, R d_y) const {
    const R log_p = d_x * inverse_temperature - log_s_p;
    const R rest = share<with_ref>(exp(log_p) * inverse_temperature, 0, d_x, d_y);
    return logprob == 0 ? rest : rest - logprob * expm1(log_p) * inverse_temperature;
  }
  __device__ R dy_target(R d_x, R d_y) const {
    const R log_q = d_y * inverse_temperature - log_s_q;
    const R first = ref_logprob == 0 ? 0 : -ref_logprob * expm1(log_q) * inverse_temperature;
    return tilt == 0 ? first : first + tilt * (exp(log_q) - exp(d_x * inverse_temperature - log_s_p));
  }
};

// From what was saved of a row and its upstream gradients, each `rows` apart.
template <typename R>
__device__ RowGradient<R> row_gradient(const Saved<R>& saved, const R* g, int64_t rows, bool with_ref,
                                       R inverse_temperature) {
  RowGradient<R> row{};
  row.m_p = saved.m_p, row.log_s_p = saved.log_s_p, row.mean_p = -fabs(saved.mean_p);
  row.w_p = exp(-saved.log_s_p) * inverse_temperature;
  row.m_q = saved.m_q, row.log_s_q = saved.log_s_q, row.mean_kl = saved.mean_kl;
  row.inverse_temperature = inverse_temperature;
  const R kl = with_ref && saved.mean_kl != inf<R> ? g[3 * rows] : 0;  // an infinite KL has no gradient to give
  row.logprob = g[0];
  row.ref_logprob = with_ref ? g[2 * rows] : 0;
  if (copysign(R(1), saved.mean_p) > 0) {  // the target is outside the vocabulary: no log-prob, no gradient of it
    if (row.logprob != 0) row.logprob = nan<R>;
    if (row.ref_logprob != 0) row.ref_logprob = nan<R>;
  }
  row.slope = -g[rows] * inverse_temperature;
  row.tilt = kl * inverse_temperature;
  row.ref_p = kl * row.w_p;
  row.ref_q = (kl - row.ref_logprob) * exp(-saved.log_s_q) * inverse_temperature;
  row.impossible = isnan(row.logprob) || (kl != 0 && isnan(saved.mean_kl)) ? nan<R> : 0;
  return row;
}

// The vectors of a split that are whole where `row` lies begin up to a vector before its columns, and end as early.
template <typename T>
__device__ void fill_zeros(const Part<T>& row, int columns) {
  const int shift = elements_past_boundary(row.p), end = min(row.after, columns - shift);
  for (int column = threadIdx.x * width<T> - shift; column < end; column += blockDim.x * width<T>)
    store(row, column, Vector{});
}

// Gradients of one split; dx.p or dy.p may be null, and may be the logits. A thread's vectors are aligned where dx lies
// (or dy if it alone is wanted), so that it can store them whole.
template <typename T, bool with_ref>
__device__ void split_gradient(const Part<T>& dx, const Part<T>& dy, const Part<const T>& x, const Part<const T>& y,
                               int columns, int target, bool in_place, const RowGradient<Real<T>>& row,
                               ScaledExp<Real<T>> exp) {
  using R = Real<T>;
  constexpr int vectors = chunk_vectors<with_ref>;
  const int shift = elements_past_boundary(dx.p ? dx.p : dy.p), end = min(x.after, columns - shift);
  const bool wants_x = !with_ref || dx.p || row.tilt != 0, wants_y = dy.p || row.tilt != 0;

  // The target's are asked for before, and looked at and written after, the thread that has it writes its vector.
  const int place = target + shift;
  const bool has_target = target >= max(-shift, -x.before) && target < end &&
                          place % block_stride<T, with_ref>() / chunk_columns<T, with_ref> == threadIdx.x / 32 &&
                          place / width<T> % 32 == threadIdx.x % 32;
  T target_x{}, target_y{};
  if (wants_x && has_target) target_x = x.p[target];
  if (with_ref && wants_y && has_target) target_y = y.p[target];
  for (int first = first_of_thread<T, with_ref>() - shift; first < end; first += block_stride<T, with_ref>()) {
    Chunk<T, vectors> chunk_x, chunk_y;
    wants_x ? chunk_x.ask(x, first, in_place) : chunk_x.clear();
    if (with_ref) wants_y ? chunk_y.ask(y, first, in_place) : chunk_y.clear();
    if (wants_x) chunk_x.take(x, first, in_place);
    if (with_ref && wants_y) chunk_y.take(y, first, in_place);
#pragma unroll
    for (int j = 0; j < vectors; ++j) {
      if (first + j * stride<T> >= end) break;
      R out_x[width<T>], out_y[width<T>];
#pragma unroll
      for (int i = 0; i < width<T>; ++i) {
        const R d_x = value<T>(chunk_x.v[j], i) - row.m_p, e_p = exp(d_x);
        const R d_y = with_ref ? value<T>(chunk_y.v[j], i) - row.m_q : 0;
        out_x[i] = row.template dx<with_ref>(d_x, d_y, e_p);
        if (with_ref && dy.p) out_y[i] = row.dy(e_p, exp(d_y));
      }
      if (dx.p) store(dx, first + j * stride<T>, packed<T>(out_x));
      if (with_ref && dy.p) store(dy, first + j * stride<T>, packed<T>(out_y));
    }
  }
  if (has_target) {
    const R d_x = widened(target_x) - row.m_p, d_y = with_ref ? widened(target_y) - row.m_q : 0;
    if (dx.p) dx.p[target] = narrowed<T>(row.template dx_target<with_ref>(d_x, d_y));
    if (with_ref && dy.p) dy.p[target] = narrowed<T>(row.dy_target(d_x, d_y));
  }
}

// Block (row, split) fills one split of a row's gradients. An ignored row is not read.
template <typename T, bool with_ref>
__global__ void __launch_bounds__(max_threads, min_blocks<T, 5>)
    fill_gradient(Input<T> in, ScaledExp<Real<T>> exp, Real<T> inverse_temperature, Splits splits,
                  const Real<T>* grad_stats, const Saved<Real<T>>* saved, T* dx_base, Rows dx_rows, T* dy_base,
                  Rows dy_rows) {
  const bool in_place = dx_base == in.x || (with_ref && dy_base == in.y);
  const int64_t split = blockIdx.y, r = blockIdx.x, begin = split * splits.columns;
  RowGradient<Real<T>> row{};  // of an ignored row: all 0
  if (in.targets[r] != in.ignore_index) {
    row = row_gradient(saved[r], grad_stats + r, in.x_rows.count, with_ref, inverse_temperature);
  }
  auto dx = part_of(dx_base, dx_rows, r, in.columns, begin), dy = part_of(dy_base, dy_rows, r, in.columns, begin);
  if (dx.p && row.dx_is_zero()) fill_zeros(dx, splits.columns), dx.p = nullptr;
  if (dy.p && row.dy_is_zero()) fill_zeros(dy, splits.columns), dy.p = nullptr;
  if (!dx.p && !dy.p) return;
  constexpr int64_t far = 1 << 30;
  const int target = static_cast<int>(max(-far, min(far, in.targets[r] - in.first_column - begin)));
  split_gradient<T, with_ref>(dx, dy, part_of(in.x, in.x_rows, r, in.columns, begin),
                              part_of(in.y, in.y_rows, r, in.columns, begin), splits.columns, target, in_place, row,
                              exp);
}

}  // namespace minirlhf::cuda
