// Log-prob of the target, entropy, and exact KL to a reference, of every row of logits; and their gradients. In CUDA.
//
// With x the policy's logits, y the reference's, T the temperature, t the target, and the maxima m_p of x and m_q of y,
// a row of V columns is read once for
//
//   s_p = Σ exp((x - m_p) / T)                         s_q = Σ exp((y - m_q) / T)
//   u   = Σ exp((x - m_p) / T) (x - m_p)               v   = Σ exp((x - m_p) / T) ((x - m_p) - (y - m_q))
//
// and ends as
//
//   logprob = (x_t - m_p) / T - log s_p                entropy = log s_p - u / (s_p T)
//   ref_logprob = (y_t - m_q) / T - log s_q            KL = v / (s_p T) - log s_p + log s_q
//
// m + log s is never formed: it would round away the digits that a shift of all logits must not change. When a maximum
// moves, its sums move along (`move_to`). Source: Milakov & Gimelshein 2018, "Online normalizer calculation for
// softmax", algorithm 3.
//
//   thread   takes a chunk of 16-byte vectors into registers: the chunk's maximum, then one exponential an element
//   warp     shuffles: the largest maximum, then sums
//   block    one split of a row: the warps' sums through shared memory, in double
//   row      a thread of a second kernel adds the row's splits in order, in double
//
// Which column goes to which thread, and every order of summation, is a function of V and the type alone. So a row's
// result is bitwise the same wherever the row lies and whatever lies around it: a row that starts off a 16-byte boundary
// is read by the same vectors of columns, each cut out of two aligned ones.
#pragma once

#include "vectors.cuh"

namespace minirlhf::cuda {

constexpr int max_threads = 128;
constexpr int split_columns = 16384;  // of a row to a block
constexpr int64_t max_grid = 65535;       // blocks along x and y; beyond, blocks loop

// Vectors a thread takes at once, of each of the inputs: enough loads in flight, few enough registers.
template <bool with_ref>
constexpr int chunk_vectors = with_ref ? 2 : 4;

// Blocks that must fit on a multiprocessor together, for their loads to hide each other's waiting: at least five leave 96
// registers a thread, six leave 80. In double exp is a subroutine, and arithmetic is what takes the time.
template <typename T, bool with_ref>
constexpr int min_blocks = std::is_same_v<T, double> ? 3 : with_ref ? 5 : 6;

// exp(d / T) for d <= 0: NaN stays NaN, -inf gives 0.
template <typename R>
struct ScaledExp {
  R scale;

  __device__ R operator()(R d) const {
    if constexpr (std::is_same_v<R, double>) {
      return exp(d * scale);
    } else {
#ifdef __CUDA_ARCH__
      float power;
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(d * scale));  // 2 ulp; exp2f would add care for denormals
      return power;
#else
      return exp2f(d * scale);
#endif
    }
  }
};

template <typename R>
ScaledExp<R> scaled_exp(double temperature) {
  return {static_cast<R>((std::is_same_v<R, double> ? 1 : 1.4426950408889634) / temperature)};
}

// --- sums ------------------------------------------------------------------------------------------------------------

// What a thread knows of its columns. The sum of the policy's exponentials is n_p + s_p, and the reference's n_q + s_q.
// A maximum of -inf means: nothing but masked tokens yet, and all sums are 0.
template <typename R>
struct Sums {
  R m_p, n_p, s_p, u;
  R m_q, n_q, s_q, v;
};

// Of fp32 logits the exponentials of the maximum, which are 1, are counted apart from the others: where p_t is near 1,
// s_p - 1 keeps all its digits for the gradient. Halves round that away anyhow, and double has digits to spare.
template <typename T>
constexpr bool counts_maxima = std::is_same_v<T, float>;

template <typename R>
__device__ Sums<R> no_sums() {
  return {-inf<R>, 0, 0, 0, -inf<R>, 0, 0, 0};
}

// The sums of one chunk relative to two maxima. In u and v a masked token would give 0 · inf. So where a sum is not
// finite the chunk is summed once more, `masked`: -inf becomes a finite number whose exponential is 0, and a token that
// is masked in the reference alone makes the KL infinite, even where its probability underflows to 0.
template <typename T, bool with_ref, bool masked, int vectors>
__device__ Sums<Real<T>> chunk_sums(const Vector (&x)[vectors], const Vector (&y)[vectors], Real<T> m_p, Real<T> m_q,
                                    ScaledExp<Real<T>> exp) {
  using R = Real<T>;
  const auto finite = [](R x) { return masked && x == -inf<R> ? very_low<R> : x; };
  Sums<R> sums{m_p, 0, 0, 0, m_q, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < vectors * width<T>; ++i) {
    const R x_i = value<T>(x[i / width<T>], i % width<T>), d_x = finite(x_i) - m_p, e = exp(d_x);
    if (counts_maxima<T> && x_i == m_p) sums.n_p += 1;
    else sums.s_p += e;
    sums.u += e * d_x;
    if constexpr (with_ref) {
      const R y_i = value<T>(y[i / width<T>], i % width<T>), d_y = finite(y_i) - m_q;
      if (counts_maxima<T> && y_i == m_q) sums.n_q += 1;
      else sums.s_q += exp(d_y);
      sums.v += masked && y_i == -inf<R> && x_i != -inf<R> ? inf<R> : e * (d_x - d_y);
    }
  }
  return sums;
}

// Moves sums to larger maxima.
template <bool with_ref, typename R, typename Exp>
__device__ void move_to(Sums<R>& sums, R m_p, R m_q, Exp exp) {
  const R move_p = sums.m_p == -inf<R> ? 0 : sums.m_p - m_p, shrink = exp(move_p);
  const R all = shrink * (sums.n_p + sums.s_p);
  if constexpr (with_ref) {
    const R move_q = sums.m_q == -inf<R> ? 0 : sums.m_q - m_q;
    if (sums.v != inf<R>) sums.v = shrink * sums.v + all * (move_p - move_q);
    if (move_q != 0) sums.s_q = exp(move_q) * (sums.n_q + sums.s_q), sums.n_q = 0;
    sums.m_q = m_q;
  }
  sums.u = shrink * sums.u + all * move_p;
  if (move_p != 0) sums.s_p = all, sums.n_p = 0;
  sums.m_p = m_p;
}

// Adds sums relative to the same maxima.
template <bool with_ref, typename R>
__device__ void add(Sums<R>& sums, const Sums<R>& more) {
  sums.n_p += more.n_p;
  sums.s_p += more.s_p;
  sums.u += more.u;
  if constexpr (!with_ref) return;
  sums.n_q += more.n_q;
  sums.s_q += more.s_q;
  sums.v += more.v;
}

// A thread's first column among those of its block, and how far it moves on.
template <typename T, int vectors>
__device__ int first_column() {
  return threadIdx.x / 32 * vectors * stride<T> + threadIdx.x % 32 * width<T>;
}
template <typename T, int vectors>
__device__ int block_stride() {
  static_assert(split_columns % (max_threads / 32 * vectors * stride<T>) == 0, "a chunk ends where its split ends");
  return blockDim.x / 32 * vectors * stride<T>;
}

// A thread's share of the first split_columns columns of x and y.
template <typename T, bool with_ref>
__device__ Sums<Real<T>> thread_sums(const Part<const T>& x, const Part<const T>& y, ScaledExp<Real<T>> exp) {
  using R = Real<T>;
  constexpr int vectors = chunk_vectors<with_ref>;
  const int end = min(x.after, split_columns);
  Sums<R> sums = no_sums<R>();
  for (int column = first_column<T, vectors>(); column < end; column += block_stride<T, vectors>()) {
    Vector chunk_x[vectors], chunk_y[vectors];
    load_chunk(chunk_x, x, column);
    if constexpr (with_ref) load_chunk(chunk_y, y, column);

    // A NaN is passed over here; it comes back through the exponential.
    const R m_p = largest<T>(chunk_x, sums.m_p), m_q = with_ref ? largest<T>(chunk_y, sums.m_q) : sums.m_q;
    if (m_p != sums.m_p || m_q != sums.m_q) move_to<with_ref>(sums, m_p, m_q, exp);
    // Nothing but masked tokens yet: any finite maximum gives the exponentials 0, and -inf - -inf would give NaN.
    const R at_p = m_p == -inf<R> ? 0 : m_p, at_q = m_q == -inf<R> ? 0 : m_q;
    Sums<R> now = chunk_sums<T, with_ref, false>(chunk_x, chunk_y, at_p, at_q, exp);
    if (!isfinite(now.u) || !isfinite(now.v)) now = chunk_sums<T, with_ref, true>(chunk_x, chunk_y, at_p, at_q, exp);
    add<with_ref>(sums, now);
  }
  return sums;
}

// Over each `lanes` consecutive lanes, a power of two.
template <int lanes, typename R>
__device__ R lanes_sum(R x) {
#pragma unroll
  for (int other = lanes / 2; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

template <int lanes, typename R>
__device__ R lanes_max(R x) {
#pragma unroll
  for (int other = lanes / 2; other > 0; other /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, other));
  return x;
}

template <bool with_ref, bool counted, int lanes, typename R, typename Exp>
__device__ void merge_lanes(Sums<R>& sums, Exp exp) {
  move_to<with_ref>(sums, lanes_max<lanes>(sums.m_p), with_ref ? lanes_max<lanes>(sums.m_q) : R(0), exp);
  if constexpr (counted) sums.n_p = lanes_sum<lanes>(sums.n_p);
  sums.s_p = lanes_sum<lanes>(sums.s_p);
  sums.u = lanes_sum<lanes>(sums.u);
  if constexpr (!with_ref) return;
  if constexpr (counted) sums.n_q = lanes_sum<lanes>(sums.n_q);
  sums.s_q = lanes_sum<lanes>(sums.s_q);
  sums.v = lanes_sum<lanes>(sums.v);
}

// What is known of a row after some of its columns. A target that was never met leaves NaN.
struct RowState {
  double m_p, s_p, u, x_t;
  double m_q, s_q, v, y_t;
};

__device__ inline Sums<double> sums_of(const RowState& row) {
  return {row.m_p, 0, row.s_p, row.u, row.m_q, 0, row.s_q, row.v};
}

__device__ inline RowState empty_row() {
  return {-inf<double>, 0, 0, nan<double>, -inf<double>, 0, 0, nan<double>};
}

template <typename T>
struct Input {
  const T* x;  // the policy's logits
  Rows x_rows;
  const T* y;  // the reference's, or null
  Rows y_rows;
  const int64_t* targets;
  int64_t columns;       // V, or those of a tile
  int64_t first_column;  // of the tile; else 0
  double temperature;
  int64_t ignore_index;
};

// The sums of a block's threads, in the lanes of its first warp: by lanes, then by warps in double.
template <bool with_ref, bool counted, typename R>
__device__ Sums<double> merge_block(Sums<R> mine, ScaledExp<R> exp) {
  MINIRLHF_SHARED(Sums<double>, warp_sums, max_threads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  merge_lanes<with_ref, counted, 32>(mine, exp);
  __syncthreads();  // the last row's have been read
  if (lane == 0) {
    warp_sums[warp] = Sums<double>{mine.m_p, 0, double(mine.n_p) + mine.s_p, mine.u,
                                   mine.m_q, 0, double(mine.n_q) + mine.s_q, mine.v};
  }
  __syncthreads();
  Sums<double> all = no_sums<double>();
  if (warp != 0) return all;
  if (lane < warps) all = warp_sums[lane];
  merge_lanes<with_ref, false, max_threads / 32>(all, exp);
  return all;
}

// Block (row, split) sums one split of a row. An ignored row is not read.
template <typename T, bool with_ref>
__global__ void __launch_bounds__(max_threads, min_blocks<T, with_ref>)
    sum_splits(Input<T> in, ScaledExp<Real<T>> exp, int64_t splits, RowState* parts) {
  for (int64_t split = blockIdx.y; split < splits; split += gridDim.y) {
    for (int64_t row = blockIdx.x; row < in.x_rows.count; row += gridDim.x) {
      const int64_t target = in.targets[row], begin = split * split_columns, t = target - in.first_column - begin;
      if (target == in.ignore_index) continue;
      const auto x = part_of(in.x, in.x_rows, row, in.columns, begin);
      const auto y = part_of(in.y, in.y_rows, row, in.columns, begin);
      RowState& part = parts[row * splits + split];
      if (threadIdx.x == 0) {
        const bool met = t >= 0 && t < min(x.after, split_columns);
        part.x_t = met ? widened(x.p[t]) : nan<double>;
        part.y_t = met && with_ref ? widened(y.p[t]) : nan<double>;
      }
      const Sums<Real<T>> mine = thread_sums<T, with_ref>(x, y, exp);
      const Sums<double> all = merge_block<with_ref, counts_maxima<T>>(mine, exp);
      if (threadIdx.x == 0) {
        part.m_p = all.m_p, part.s_p = all.s_p, part.u = all.u;
        part.m_q = all.m_q, part.s_q = all.s_q, part.v = all.v;
      }
    }
  }
}

// Adds a row's parts in order.
__device__ inline RowState merged(RowState row, const RowState* parts, int64_t count, ScaledExp<double> exp) {
  Sums<double> sums = sums_of(row);
  for (int64_t i = 0; i < count; ++i) {
    const RowState part = parts[i];
    Sums<double> more = sums_of(part);
    const double m_p = max(sums.m_p, more.m_p), m_q = max(sums.m_q, more.m_q);
    move_to<true>(sums, m_p, m_q, exp);
    move_to<true>(more, m_p, m_q, exp);
    add<true>(sums, more);
    if (!isnan(part.x_t)) row.x_t = part.x_t;
    if (!isnan(part.y_t)) row.y_t = part.y_t;
  }
  return {sums.m_p, sums.s_p, sums.u, row.x_t, sums.m_q, sums.s_q, sums.v, row.y_t};
}

template <typename F>
__device__ void for_each_row(int64_t rows, F f) {
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += int64_t(gridDim.x) * blockDim.x)
    f(row);
}

// A tile's sums go into what is known of its rows.
template <typename S>
__global__ void update_rows(RowState* state, bool anew, const RowState* parts, int64_t splits,
                                   const int64_t* targets, int64_t rows, int64_t ignore_index, ScaledExp<double> exp) {
  for_each_row(rows, [&](int64_t row) {
    const RowState before = anew || targets[row] == ignore_index ? empty_row() : state[row];
    state[row] = merged(before, parts + row * splits, targets[row] == ignore_index ? 0 : splits, exp);
  });
}

// What the gradient needs of a row. The mean of (x - m_p) / T under the policy is never positive: a positive sign, also
// of a zero, marks a target outside the vocabulary.
template <typename S>
struct Saved {
  S m_p, log_s_p, m_q, log_s_q, mean_p, mean_kl;
};

// A row's end: its statistics, each `rows` apart, and what is saved.
template <typename S>
__global__ void finish_rows(const RowState* parts, int64_t splits, const int64_t* targets, int64_t rows, bool with_ref,
                            int64_t ignore_index, ScaledExp<double> exp, S* stats, Saved<S>* saved) {
  for_each_row(rows, [&](int64_t row) {
    double logprob = 0, entropy = 0, ref_logprob = 0, kl = 0;
    Saved<S> rest{0, 0, 0, 0, 0, 0};
    if (targets[row] != ignore_index) {
      const RowState sums = merged(empty_row(), parts + row * splits, splits, exp);
      const double inverse_temperature = exp.scale, scaled = inverse_temperature / sums.s_p;
      const double log_s_p = sums.m_p == -inf<double> ? nan<double> : log(sums.s_p);
      const double log_s_q = sums.m_q == -inf<double> ? nan<double> : log(sums.s_q);
      logprob = (sums.x_t - sums.m_p) * inverse_temperature - log_s_p;
      entropy = log_s_p - sums.u * scaled;
      ref_logprob = (sums.y_t - sums.m_q) * inverse_temperature - log_s_q;
      kl = sums.v * scaled - log_s_p + log_s_q;
      rest.m_p = static_cast<S>(sums.m_p);
      rest.log_s_p = static_cast<S>(log_s_p);
      const bool met = !isnan(sums.x_t) || !isnan(sums.y_t);
      rest.mean_p = static_cast<S>(copysign(sums.u * scaled, met ? -1.0 : 1.0));
      if (with_ref) {
        rest.m_q = static_cast<S>(sums.m_q);
        rest.log_s_q = static_cast<S>(log_s_q);
        rest.mean_kl = static_cast<S>(isnan(kl) ? nan<double> : sums.v * scaled);
      }
    }
    stats[row] = static_cast<S>(logprob);
    stats[rows + row] = static_cast<S>(entropy);
    if (with_ref) {
      stats[2 * rows + row] = static_cast<S>(ref_logprob);
      stats[3 * rows + row] = static_cast<S>(kl);
    }
    saved[row] = rest;
  });
}

// --- gradient --------------------------------------------------------------------------------------------------------

// With upstream gradients g of the four statistics, a = (x - m_p) / T, b = (y - m_q) / T, means under the policy, and δ
// the target's indicator,
//
//   dx_i = [p_i (-g_logprob - g_entropy (a_i - mean a) + g_kl (a_i - b_i - mean (a - b))) + g_logprob δ_it] / T
//   dy_i = [g_kl (q_i - p_i) + g_ref_logprob (δ_it - q_i)] / T
//
// A term whose upstream gradient is 0 is left out, never multiplied by 0.
template <typename R>
struct RowGradient {
  R m_p, log_s_p, w_p;         // p_i = w_p exp(a_i)
  R m_q, log_s_q;
  R logprob, ref_logprob, kl;  // upstream
  R constant, slope, tilt;     // T dx_i = p_i (constant + slope (x_i - m_p) + tilt ((x_i - m_p) - (y_i - m_q)))
  R others;                    // the constant without the log-prob's part
  R ref_p, ref_q;              // dy_i = ref_q exp(b_i) - ref_p exp(a_i)
  R impossible;                // dx_i where p_i is 0
  R inverse_temperature;

  __device__ bool dx_is_zero() const { return constant == 0 && slope == 0 && tilt == 0; }
  __device__ bool dy_is_zero() const { return kl == 0 && ref_logprob == 0; }

  // p (start + ...) / T, by selection where p is 0.
  __device__ R share(R p, R start, R d_x, R d_y) const {
    R bracket = fma(slope, d_x, start);
    if (tilt != 0) bracket = fma(tilt, d_x - d_y, bracket);
    return p == 0 ? impossible : p * bracket * inverse_temperature;
  }
  __device__ R dx(R d_x, R d_y, R e_p) const { return share(w_p * e_p, constant, d_x, d_y); }
  __device__ R dy(R e_p, R e_q) const {
    const R of_q = ref_q * e_q;
    return ref_p == 0 ? of_q : fma(-ref_p, e_p, of_q);
  }

  // The target's own, with 1 - p_t as -expm1(log p_t), which keeps its digits where p_t is near 1.
  __device__ R dx_target(R d_x, R d_y) const {
    const R log_p = d_x * inverse_temperature - log_s_p, rest = share(exp(log_p), others, d_x, d_y);
    return logprob == 0 ? rest : rest - logprob * expm1(log_p) * inverse_temperature;
  }
  __device__ R dy_target(R d_x, R d_y) const {
    const R log_q = d_y * inverse_temperature - log_s_q;
    R sum = ref_logprob == 0 ? 0 : -ref_logprob * expm1(log_q);
    if (kl != 0) sum += kl * (exp(log_q) - exp(d_x * inverse_temperature - log_s_p));
    return sum * inverse_temperature;
  }
};

// From what was saved of a row and its upstream gradients, each `rows` apart.
template <typename R>
__device__ RowGradient<R> row_gradient(const Saved<R>& saved, const R* g, int64_t rows, bool with_ref,
                                       double inverse_temperature) {
  RowGradient<R> row{};
  row.m_p = saved.m_p, row.log_s_p = saved.log_s_p, row.w_p = exp(-saved.log_s_p);
  row.m_q = saved.m_q, row.log_s_q = saved.log_s_q;
  row.inverse_temperature = static_cast<R>(inverse_temperature);
  row.logprob = g[0];
  const double entropy = g[rows];
  if (with_ref) row.ref_logprob = g[2 * rows];
  if (with_ref && saved.mean_kl != inf<R>) row.kl = g[3 * rows];  // an infinite KL has no gradient to give
  if (copysign(R(1), saved.mean_p) > 0) {  // the target is outside the vocabulary: no log-prob, no gradient of it
    if (row.logprob != 0) row.logprob = nan<R>;
    if (row.ref_logprob != 0) row.ref_logprob = nan<R>;
  }
  double others = 0;
  if (entropy != 0) others -= entropy * fabs(saved.mean_p);
  if (row.kl != 0) others -= static_cast<double>(row.kl) * saved.mean_kl;
  row.others = static_cast<R>(others);
  row.constant = static_cast<R>(others - row.logprob);
  row.slope = static_cast<R>(-entropy * inverse_temperature);
  row.tilt = static_cast<R>(row.kl * inverse_temperature);
  row.impossible = isnan(row.constant) ? nan<R> : 0;
  row.ref_p = row.kl == 0 ? 0 : row.kl * row.w_p * row.inverse_temperature;
  row.ref_q = (row.kl - row.ref_logprob) * exp(-saved.log_s_q) * row.inverse_temperature;
  return row;
}

template <typename T>
__device__ void fill_zeros(const Part<T>& row) {
  const int shift = elements_past_boundary(row.p), end = min(row.after, split_columns - shift);
  for (int column = threadIdx.x * width<T> - shift; column < end; column += blockDim.x * width<T>)
    store(row, column, Vector{});
}

// Gradients of one split; dx.p or dy.p may be null, and may be the logits. A thread's vectors are aligned where dx lies
// (or dy if it alone is wanted), so that it can store them whole.
template <typename T, bool with_ref>
__device__ void split_gradient(const Part<T>& dx, const Part<T>& dy, const Part<const T>& x, const Part<const T>& y,
                               int target, bool in_place, const RowGradient<Real<T>>& row, ScaledExp<Real<T>> exp) {
  using R = Real<T>;
  constexpr int vectors = chunk_vectors<with_ref>;
  const int shift = elements_past_boundary(dx.p ? dx.p : dy.p), end = min(x.after, split_columns - shift);
  const bool wants_x = dx.p || row.kl != 0, wants_y = with_ref && (dy.p || row.tilt != 0);

  // The target's are read before, and written after, the thread that has it writes its vector.
  const int place = target + shift;
  const bool has_target = target >= max(-shift, -x.before) && target < end && place / width<T> % 32 == threadIdx.x % 32 &&
                          place % block_stride<T, vectors>() / (vectors * stride<T>) == threadIdx.x / 32;
  T target_dx, target_dy;
  if (has_target) {
    const R d_x = widened(x.p[target]) - row.m_p, d_y = with_ref ? widened(y.p[target]) - row.m_q : 0;
    target_dx = narrowed<T>(row.dx_target(d_x, d_y));
    target_dy = narrowed<T>(row.dy_target(d_x, d_y));
  }
  for (int first = first_column<T, vectors>() - shift; first < end; first += block_stride<T, vectors>()) {
    Vector chunk_x[vectors] = {}, chunk_y[vectors] = {};
    if (wants_x) load_chunk(chunk_x, x, first, in_place);
    if (wants_y) load_chunk(chunk_y, y, first, in_place);
#pragma unroll
    for (int j = 0; j < vectors; ++j) {
      if (first + j * stride<T> >= end) break;
      R out_x[width<T>], out_y[width<T>];
#pragma unroll
      for (int i = 0; i < width<T>; ++i) {
        const R d_x = value<T>(chunk_x[j], i) - row.m_p, e_p = exp(d_x);
        const R d_y = with_ref ? value<T>(chunk_y[j], i) - row.m_q : 0;
        out_x[i] = row.dx(d_x, d_y, e_p);
        if (with_ref && dy.p) out_y[i] = row.dy(e_p, exp(d_y));
      }
      if (dx.p) store(dx, first + j * stride<T>, packed<T>(out_x));
      if (with_ref && dy.p) store(dy, first + j * stride<T>, packed<T>(out_y));
    }
  }
  if (has_target && dx.p) dx.p[target] = target_dx;
  if (has_target && dy.p) dy.p[target] = target_dy;
}

// Block (row, split) fills one split of a row's gradients. An ignored row is not read.
template <typename T, bool with_ref>
__global__ void __launch_bounds__(max_threads, min_blocks<T, with_ref>)
    fill_gradient(Input<T> in, ScaledExp<Real<T>> exp, double inverse_temperature, int64_t splits,
                  const Real<T>* grad_stats, const Saved<Real<T>>* saved, T* dx_base, Rows dx_rows, T* dy_base,
                  Rows dy_rows) {
  const bool in_place = dx_base == in.x || (with_ref && dy_base == in.y);
  for (int64_t split = blockIdx.y; split < splits; split += gridDim.y) {
    const int64_t begin = split * split_columns;
    for (int64_t r = blockIdx.x; r < in.x_rows.count; r += gridDim.x) {
      RowGradient<Real<T>> row{};  // of an ignored row: all 0
      if (in.targets[r] != in.ignore_index) {
        row = row_gradient(saved[r], grad_stats + r, in.x_rows.count, with_ref, inverse_temperature);
      }
      Part<T> dx = part_of(dx_base, dx_rows, r, in.columns, begin), dy = part_of(dy_base, dy_rows, r, in.columns, begin);
      if (dx.p && row.dx_is_zero()) fill_zeros(dx), dx.p = nullptr;
      if (dy.p && row.dy_is_zero()) fill_zeros(dy), dy.p = nullptr;
      if (!dx.p && !dy.p) continue;
      constexpr int64_t far = 1 << 30;
      const int target = static_cast<int>(max(-far, min(far, in.targets[r] - in.first_column - begin)));
      split_gradient<T, with_ref>(dx, dy, part_of(in.x, in.x_rows, r, in.columns, begin),
                                  part_of(in.y, in.y_rows, r, in.columns, begin), target, in_place, row, exp);
    }
  }
}

// --- launches --------------------------------------------------------------------------------------------------------
//
// All pointers are to device memory. Each returns the first error of its launches; no rows, no launch.
//
//   workspace    RowState[rows * splits(columns)], uninitialised
//   state        RowState[rows], what is known of the rows
//   stats        Real<T>[K][rows], K = 2 or, with a reference, 4
//   saved        Saved<Real<T>>[rows]
//   grad_stats   Real<T>[K][rows]

inline int64_t splits(int64_t columns) { return (columns + split_columns - 1) / split_columns; }

// A row narrower than a block's chunk is given fewer threads.
inline int threads_of(int64_t columns) { return columns <= 1024 ? 32 : columns <= 4096 ? 128 : max_threads; }

inline dim3 grid_of(int64_t rows, int64_t parts) {
  return dim3(static_cast<unsigned>(std::min(rows, max_grid)), static_cast<unsigned>(std::min(parts, max_grid)));
}

constexpr int row_threads = 64;  // of the kernels with a thread a row
inline dim3 row_grid(int64_t rows) { return grid_of((rows + row_threads - 1) / row_threads, 1); }

template <typename T>
cudaError_t launch_sums(const Input<T>& in, RowState* workspace, cudaStream_t stream) {
  const dim3 grid = grid_of(in.x_rows.count, splits(in.columns));
  const auto kernel = in.y ? sum_splits<T, true> : sum_splits<T, false>;
  MINIRLHF_LAUNCH(kernel, grid, threads_of(in.columns), stream, in, scaled_exp<Real<T>>(in.temperature),
                  splits(in.columns), workspace);
  return cudaGetLastError();
}

// From states[rows * parts] to the statistics; parts = 1 for a state that was updated tile by tile.
template <typename S>
cudaError_t launch_finish(const RowState* states, int64_t parts, const int64_t* targets, int64_t rows, bool with_ref,
                          double temperature, int64_t ignore_index, S* stats, Saved<S>* saved, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  MINIRLHF_LAUNCH(finish_rows<S>, row_grid(rows), row_threads, stream, states, parts, targets, rows, with_ref,
                  ignore_index, scaled_exp<double>(temperature), stats, saved);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_token_stats(const Input<T>& in, RowState* workspace, Real<T>* stats, Saved<Real<T>>* saved,
                               cudaStream_t stream) {
  const int64_t rows = in.x_rows.count;
  if (rows == 0) return cudaSuccess;
  if (const cudaError_t error = launch_sums(in, workspace, stream)) return error;
  return launch_finish(workspace, splits(in.columns), in.targets, rows, in.y != nullptr, in.temperature,
                       in.ignore_index, stats, saved, stream);
}

// A tile of columns; the first (first_column = 0) begins the state anew.
template <typename T>
cudaError_t launch_update(const Input<T>& in, RowState* workspace, RowState* state, cudaStream_t stream) {
  const int64_t rows = in.x_rows.count;
  if (rows == 0) return cudaSuccess;
  if (const cudaError_t error = launch_sums(in, workspace, stream)) return error;
  MINIRLHF_LAUNCH(update_rows<double>, row_grid(rows), row_threads, stream, state, in.first_column == 0, workspace,
                  splits(in.columns), in.targets, rows, in.ignore_index, scaled_exp<double>(in.temperature));
  return cudaGetLastError();
}

// dx and dy: either may be null, and either may be the logits themselves.
template <typename T>
cudaError_t launch_gradient(const Input<T>& in, const Real<T>* grad_stats, const Saved<Real<T>>* saved, T* dx,
                            Rows dx_rows, T* dy, Rows dy_rows, cudaStream_t stream) {
  if (in.x_rows.count == 0 || (!dx && !dy)) return cudaSuccess;
  const int64_t parts = splits(in.columns + width<T> - 1);  // the vectors may begin before the row
  const auto kernel = in.y ? fill_gradient<T, true> : fill_gradient<T, false>;
  MINIRLHF_LAUNCH(kernel, grid_of(in.x_rows.count, parts), threads_of(in.columns), stream, in,
                  scaled_exp<Real<T>>(in.temperature), 1 / in.temperature, parts, grad_stats, saved, dx, dx_rows, dy, dy_rows);
  return cudaGetLastError();
}

}  // namespace minirlhf::cuda
