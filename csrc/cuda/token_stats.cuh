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
//   row      a thread of a second kernel adds the row's splits in order, in double; a row of one split needs none
//
// Which column goes to which thread, and every order of summation, is a function of V and the type alone. So a row's
// result is bitwise the same wherever the row lies and whatever lies around it: a row that starts off a 16-byte
// boundary is read by the same vectors of columns, each cut out of two aligned ones.
#pragma once

#include "gradient.cuh"
#include "sums.cuh"

namespace minirlhf::cuda {

// The launches below take pointers to device memory and return the first error; without rows nothing is launched.
//
//   workspace    RowState[rows * splits<T>(columns)], uninitialised; null will do for one split
//   state        RowState[rows], what is known of the rows
//   stats        Real<T>[K][rows], K = 2 or, with a reference, 4
//   saved        Saved<Real<T>>[rows]
//   grad_stats   Real<T>[K][rows]

constexpr int64_t max_grid = 65535;  // blocks along x and y; beyond, blocks loop

constexpr int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// How rows are cut: a function of their width and type alone, into whole strides of a block, so that all its warps have
// as much to do. Five strides, 40 KiB, outweigh what a block has to do around them, and are few enough that a handful of
// rows keeps a GPU busy.
template <typename T>
Splits cut_of(int64_t columns) {
  constexpr int64_t block = max_threads / 32 * chunk_columns<T, false>;
  static_assert(block % (max_threads / 32 * chunk_columns<T, true>) == 0);
  const int64_t strides = std::max<int64_t>(1, pieces(columns, block)), count = pieces(strides, 5);
  return {count, static_cast<int>(pieces(strides, count) * block)};
}
template <typename T>
int64_t splits(int64_t columns) {
  return cut_of<T>(columns).count;
}

// A row that a single warp takes at once is given no more.
template <typename T>
int threads_of(int64_t columns) {
  return columns <= chunk_columns<T, false> ? 32 : max_threads;
}

inline dim3 grid_of(int64_t rows, int64_t parts) {
  return dim3(static_cast<unsigned>(std::min(rows, max_grid)), static_cast<unsigned>(std::min(parts, max_grid)));
}

constexpr int row_threads = 64;  // of the kernels with a thread a row
inline dim3 row_grid(int64_t rows) { return grid_of(pieces(rows, row_threads), 1); }

// The sums of rows of several splits, or the outcome of rows of one.
template <typename T>
cudaError_t launch_sums(const Input<T>& in, RowState* workspace, const Outcome<Real<T>>& outcome, cudaStream_t stream) {
  const Splits cut = cut_of<T>(in.columns);
  const auto kernel = cut.count == 1 ? (in.y ? sum_splits<T, true, true> : sum_splits<T, false, true>)
                                     : (in.y ? sum_splits<T, true, false> : sum_splits<T, false, false>);
  MINIRLHF_LAUNCH(kernel, grid_of(in.x_rows.count, cut.count), threads_of<T>(in.columns), stream, in,
                  scaled_exp<Real<T>>(in.temperature), cut, workspace, outcome);
  if (const cudaError_t error = cudaGetLastError()) return error;
  if (cut.count == 1) return cudaSuccess;
  MINIRLHF_LAUNCH(finish_rows<Real<T>>, row_grid(outcome.rows), row_threads, stream, workspace, cut.count, in.targets,
                  in.ignore_index, outcome);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_token_stats(const Input<T>& in, RowState* workspace, Real<T>* stats, Saved<Real<T>>* saved,
                               cudaStream_t stream) {
  const int64_t rows = in.x_rows.count;
  if (rows == 0) return cudaSuccess;
  const ScaledExp<double> exp = scaled_exp<double>(in.temperature);
  return launch_sums<T>(in, workspace, {stats, saved, nullptr, false, in.y != nullptr, rows, exp}, stream);
}

// A tile of columns; the first (first_column = 0) begins the state anew.
template <typename T>
cudaError_t launch_update(const Input<T>& in, RowState* workspace, RowState* state, cudaStream_t stream) {
  const int64_t rows = in.x_rows.count;
  if (rows == 0) return cudaSuccess;
  const ScaledExp<double> exp = scaled_exp<double>(in.temperature);
  return launch_sums<T>(in, workspace, {nullptr, nullptr, state, in.first_column == 0, in.y != nullptr, rows, exp},
                        stream);
}

// From the state that all tiles have gone into to the statistics.
template <typename S>
cudaError_t launch_finish(const RowState* states, const int64_t* targets, int64_t rows, bool with_ref,
                          double temperature, int64_t ignore_index, S* stats, Saved<S>* saved, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const Outcome<S> outcome{stats, saved, nullptr, false, with_ref, rows, scaled_exp<double>(temperature)};
  MINIRLHF_LAUNCH(finish_rows<S>, row_grid(rows), row_threads, stream, states, int64_t{1}, targets, ignore_index,
                  outcome);
  return cudaGetLastError();
}

// dx and dy: either may be null, and either may be the logits themselves.
template <typename T>
cudaError_t launch_gradient(const Input<T>& in, const Real<T>* grad_stats, const Saved<Real<T>>* saved, T* dx,
                            Rows dx_rows, T* dy, Rows dy_rows, cudaStream_t stream) {
  if (in.x_rows.count == 0 || (!dx && !dy)) return cudaSuccess;
  const Splits cut = cut_of<T>(in.columns + width<T> - 1);  // the first vector may begin before the row
  const auto kernel = in.y ? fill_gradient<T, true> : fill_gradient<T, false>;
  MINIRLHF_LAUNCH(kernel, grid_of(in.x_rows.count, cut.count), threads_of<T>(in.columns), stream, in,
                  scaled_exp<Real<T>>(in.temperature), static_cast<Real<T>>(1 / in.temperature), cut, grad_stats, saved,
                  dx, dx_rows, dy, dy_rows);
  return cudaGetLastError();
}

}  // namespace minirlhf::cuda
