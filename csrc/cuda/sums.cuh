// The forward kernels: sums over a row in one pass, from threads to warps to blocks to rows. See token_stats.cuh.
#pragma once

#include "vectors.cuh"

namespace minirlhf::cuda {

constexpr int max_threads = 128;

// A row is cut into splits of whole chunks, one a block, all but the last of the same width.
struct Splits {
  int64_t count;
  int columns;
};

// Vectors a thread takes at once, of each of the inputs: enough loads in flight, few enough registers.
template <bool with_ref>
constexpr int chunk_vectors = with_ref ? 2 : 4;

// Blocks that must fit on a multiprocessor together, for their loads to hide each other's waiting: five leave 96
// registers a thread, six leave 80. In double, where exp is a subroutine and arithmetic takes the time, three do.
template <typename T, int blocks>
constexpr int min_blocks = std::is_same_v<T, double> ? 3 : blocks;

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

// --- one thread ------------------------------------------------------------------------------------------------------

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

// Columns of a warp's chunk. A split is a number of these, which its warps take in turns.
template <typename T, bool with_ref>
constexpr int chunk_columns = chunk_vectors<with_ref> * stride<T>;

template <typename T, bool with_ref>
__device__ int first_of_thread() {
  return threadIdx.x / 32 * chunk_columns<T, with_ref> + threadIdx.x % 32 * width<T>;
}
template <typename T, bool with_ref>
__device__ int block_stride() {
  return blockDim.x / 32 * chunk_columns<T, with_ref>;
}

// A thread's share of columns [0, end) of x and y.
template <typename T, bool with_ref>
__device__ Sums<Real<T>> thread_sums(const Part<const T>& x, const Part<const T>& y, int end,
                                     ScaledExp<Real<T>> exp) {
  using R = Real<T>;
  constexpr int vectors = chunk_vectors<with_ref>;
  Sums<R> sums = no_sums<R>();
  for (int column = first_of_thread<T, with_ref>(); column < end; column += block_stride<T, with_ref>()) {
    Chunk<T, vectors> chunk_x, chunk_y;
    chunk_x.ask(x, column);
    if constexpr (with_ref) chunk_y.ask(y, column);
    chunk_x.take(x, column);
    if constexpr (with_ref) chunk_y.take(y, column);

    // A NaN is passed over here; it comes back through the exponential.
    const R m_p = largest<T>(chunk_x.v, sums.m_p), m_q = with_ref ? largest<T>(chunk_y.v, sums.m_q) : sums.m_q;
    if (m_p != sums.m_p || m_q != sums.m_q) move_to<with_ref>(sums, m_p, m_q, exp);
    // Nothing but masked tokens yet: any finite maximum gives the exponentials 0, and -inf - -inf would give NaN.
    const R at_p = m_p == -inf<R> ? 0 : m_p, at_q = m_q == -inf<R> ? 0 : m_q;
    Sums<R> now = chunk_sums<T, with_ref, false>(chunk_x.v, chunk_y.v, at_p, at_q, exp);
    if (!isfinite(now.u) || !isfinite(now.v))
      now = chunk_sums<T, with_ref, true>(chunk_x.v, chunk_y.v, at_p, at_q, exp);
    add<with_ref>(sums, now);
  }
  return sums;
}

// --- one block -------------------------------------------------------------------------------------------------------

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

// The sums of `lanes` lanes, in each of them.
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

// The sums of a block's threads, in the lanes of its first warp: by lanes, then by warps in double.
template <bool with_ref, bool counted, typename R>
__device__ Sums<double> merge_block(Sums<R> mine, ScaledExp<R> exp) {
  MINIRLHF_SHARED(Sums<double>, warp_sums, max_threads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  merge_lanes<with_ref, counted, 32>(mine, exp);
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

// --- rows ------------------------------------------------------------------------------------------------------------

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

// What is known of a row after some columns, and some more.
template <bool with_ref>
__device__ RowState merged(const RowState& row, const RowState& part, ScaledExp<double> exp) {
  Sums<double> sums = sums_of(row), more = sums_of(part);
  const double m_p = max(sums.m_p, more.m_p), m_q = max(sums.m_q, more.m_q);
  move_to<with_ref>(sums, m_p, m_q, exp);
  move_to<with_ref>(more, m_p, m_q, exp);
  add<with_ref>(sums, more);
  return {sums.m_p, sums.s_p, sums.u, isnan(part.x_t) ? row.x_t : part.x_t,
          sums.m_q, sums.s_q, sums.v, isnan(part.y_t) ? row.y_t : part.y_t};
}

// What the gradient needs of a row: with means under the policy, mean_p of x - m_p, mean_kl of (x - m_p) - (y - m_q).
// mean_p is never positive: a positive sign, also of a zero, marks a target outside the vocabulary.
template <typename S>
struct Saved {
  S m_p, log_s_p, m_q, log_s_q, mean_p, mean_kl;
};

// Where the sums of whole rows go: into their statistics, each `rows` apart, and what is saved; or, a tile's, into what
// is known of the rows.
template <typename S>
struct Results {
  int64_t rows;
  bool has_ref;
  ScaledExp<double> exp;
  S* stats;
  Saved<S>* saved;
  RowState* state;  // null: statistics are wanted
  bool anew;        // the tile is a row's first

  template <bool with_ref>
  __device__ void take(int64_t row, const RowState& sums) const {
    if (state) {
      state[row] = anew ? sums : merged<with_ref>(state[row], sums, exp);
      return;
    }
    const double inverse_temperature = exp.scale, scaled = inverse_temperature / sums.s_p;
    const double log_s_p = sums.m_p == -inf<double> ? nan<double> : log(sums.s_p);
    const double log_s_q = sums.m_q == -inf<double> ? nan<double> : log(sums.s_q);
    const double kl = sums.v * scaled - log_s_p + log_s_q;
    const bool met = !isnan(sums.x_t) || !isnan(sums.y_t);
    Saved<S> rest{static_cast<S>(sums.m_p), static_cast<S>(log_s_p), 0, 0,
                  static_cast<S>(copysign(sums.u / sums.s_p, met ? -1.0 : 1.0)), 0};
    stats[row] = static_cast<S>((sums.x_t - sums.m_p) * inverse_temperature - log_s_p);
    stats[rows + row] = static_cast<S>(log_s_p - sums.u * scaled);
    if (has_ref) {
      stats[2 * rows + row] = static_cast<S>((sums.y_t - sums.m_q) * inverse_temperature - log_s_q);
      stats[3 * rows + row] = static_cast<S>(kl);
      rest.m_q = static_cast<S>(sums.m_q);
      rest.log_s_q = static_cast<S>(log_s_q);
      rest.mean_kl = static_cast<S>(isnan(kl) ? nan<double> : sums.v / sums.s_p);
    }
    saved[row] = rest;
  }

  __device__ void take_ignored(int64_t row) const {
    if (state) {
      state[row] = empty_row();
      return;
    }
    for (int k = 0; k < (has_ref ? 4 : 2); ++k) stats[k * rows + row] = 0;
    saved[row] = {};
  }
};

// Block (row, split) sums one split of a row. One that has the whole row finishes it. An ignored row is not read.
template <typename T, bool with_ref>
__global__ void __launch_bounds__(max_threads, min_blocks<T, with_ref ? 5 : 6>)
    sum_splits(Input<T> in, ScaledExp<Real<T>> exp, Splits splits, RowState* parts, Results<Real<T>> results) {
  const int64_t split = blockIdx.y, row = blockIdx.x, begin = split * splits.columns;
  const int64_t target = in.targets[row], t = target - in.first_column - begin;
  if (target == in.ignore_index) {
    if (splits.count == 1 && threadIdx.x == 0) results.take_ignored(row);
    return;
  }
  const auto x = part_of(in.x, in.x_rows, row, in.columns, begin);
  const auto y = part_of(in.y, in.y_rows, row, in.columns, begin);
  const int end = min(x.after, splits.columns);
  const bool met = threadIdx.x == 0 && t >= 0 && t < end;
  T x_t{}, y_t{};  // asked for now, looked at below: the first chunk's loads do not wait for them
  if (met) x_t = x.p[t];
  if (with_ref && met) y_t = y.p[t];
  const Sums<Real<T>> mine = thread_sums<T, with_ref>(x, y, end, exp);
  const Sums<double> all = merge_block<with_ref, counts_maxima<T>>(mine, exp);
  if (threadIdx.x != 0) return;
  const RowState part{all.m_p, all.s_p, all.u, met ? widened(x_t) : nan<double>,
                      all.m_q, all.s_q, all.v, with_ref && met ? widened(y_t) : nan<double>};
  if (splits.count == 1) results.template take<with_ref>(row, part);
  else parts[row * splits.count + split] = part;
}

// A thread a row: adds its parts in order. An ignored row has none.
template <typename S>
__global__ void finish_rows(const RowState* parts, int64_t splits, const int64_t* targets, int64_t ignore_index,
                            Results<S> results) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= results.rows) return;
  if (targets[row] == ignore_index) return results.take_ignored(row);
  RowState sums = parts[row * splits];
  for (int64_t i = 1; i < splits; ++i) sums = merged<true>(sums, parts[row * splits + i], results.exp);
  results.template take<true>(row, sums);
}

}  // namespace minirlhf::cuda
