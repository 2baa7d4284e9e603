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
//   row      where there are several splits, a thread of a second kernel adds them in order, in double
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
//   workspace    RowState[rows * kept_splits(columns)], uninitialised
//   state        RowState[rows], what is known of the rows
//   stats        Real<T>[K][rows], K = 2 or, with a reference, 4
//   saved        Saved<Real<T>>[rows]
//   grad_stats   Real<T>[K][rows]

constexpr int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// How rows are cut: a function of their width and type alone. A split is a number of block strides, of which all but a
// row's last find work for every warp. `most` of them are enough to outweigh what a block does around them, and few
// enough that the last blocks of a launch, which have the GPU to themselves, take little of its time.
template <typename T>
Splits cut_of(int64_t columns, int64_t most) {
  constexpr int64_t step = max_threads / 32 * chunk_columns<T, false>;  // 8 KiB; with a reference, two block strides
  const int64_t count = pieces(columns, most * step);
  return {count, static_cast<int>(pieces(pieces(columns, step), count) * step)};
}

// Of sums 128 KiB: splits have to be put together, which a row of up to 65536 halves is spared.
template <typename T>
Splits sums_cut(int64_t columns) {
  return cut_of<T>(columns, 16);
}
template <typename T>
int64_t kept_splits(int64_t columns) {
  const int64_t count = sums_cut<T>(columns).count;
  return count == 1 ? 0 : count;
}

// A row narrower than a block's chunk is given fewer threads.
inline int threads_of(int64_t columns) { return columns <= 1024 ? 32 : max_threads; }

// Up to 2³¹ - 1 rows and 65535 splits, of 4 billion columns. Of more the launch fails, and says so.
inline dim3 grid_of(int64_t rows, int64_t parts) {
  constexpr int64_t too_many = int64_t{1} << 31;
  return dim3(static_cast<unsigned>(std::min(rows, too_many)), static_cast<unsigned>(std::min(parts, too_many)));
}

constexpr int row_threads = 64;  // of the kernel with a thread a row

// From states[rows * parts] on; parts = 1 for a state that was updated tile by tile.
template <typename S>
cudaError_t launch_finish(const RowState* states, int64_t parts, const int64_t* targets, int64_t ignore_index,
                          const Results<S>& results, cudaStream_t stream) {
  if (results.rows == 0) return cudaSuccess;
  MINIRLHF_LAUNCH(finish_rows<S>, grid_of(pieces(results.rows, row_threads), 1), row_threads, stream, states, parts,
                  targets, ignore_index, results);
  return cudaGetLastError();
}

template <typename S>
cudaError_t launch_finish(const RowState* state, const int64_t* targets, int64_t rows, bool with_ref,
                          double temperature, int64_t ignore_index, S* stats, Saved<S>* saved, cudaStream_t stream) {
  const Results<S> results{rows, with_ref, scaled_exp<double>(temperature), stats, saved, nullptr, false};
  return launch_finish(state, 1, targets, ignore_index, results, stream);
}

template <typename T>
cudaError_t launch_sums(const Input<T>& in, RowState* workspace, const Results<Real<T>>& results, cudaStream_t stream) {
  if (results.rows == 0) return cudaSuccess;
  const Splits cut = sums_cut<T>(in.columns);
  const auto kernel = in.y ? sum_splits<T, true> : sum_splits<T, false>;
  MINIRLHF_LAUNCH(kernel, grid_of(results.rows, cut.count), threads_of(in.columns), stream, in,
                  scaled_exp<Real<T>>(in.temperature), cut, workspace, results);
  if (const cudaError_t error = cudaGetLastError()) return error;
  if (cut.count == 1) return cudaSuccess;  // the blocks have finished their rows
  return launch_finish(workspace, cut.count, in.targets, in.ignore_index, results, stream);
}

template <typename T>
cudaError_t launch_token_stats(const Input<T>& in, RowState* workspace, Real<T>* stats, Saved<Real<T>>* saved,
                               cudaStream_t stream) {
  const auto exp = scaled_exp<double>(in.temperature);
  return launch_sums<T>(in, workspace, {in.x_rows.count, in.y != nullptr, exp, stats, saved, nullptr, false}, stream);
}

// A tile of columns; the first (first_column = 0) begins the state anew.
template <typename T>
cudaError_t launch_update(const Input<T>& in, RowState* workspace, RowState* state, cudaStream_t stream) {
  const auto exp = scaled_exp<double>(in.temperature);
  const bool anew = in.first_column == 0;
  return launch_sums<T>(in, workspace, {in.x_rows.count, in.y != nullptr, exp, nullptr, nullptr, state, anew}, stream);
}

// dx and dy: either may be null, and either may be the logits themselves.
template <typename T>
cudaError_t launch_gradient(const Input<T>& in, const Real<T>* grad_stats, const Saved<Real<T>>* saved, T* dx,
                            Rows dx_rows, T* dy, Rows dy_rows, cudaStream_t stream) {
  if (in.x_rows.count == 0 || (!dx && !dy)) return cudaSuccess;
  const Splits cut = cut_of<T>(in.columns + width<T> - 1, 8);  // the first vector may begin before the row
  const auto kernel = in.y ? fill_gradient<T, true> : fill_gradient<T, false>;
  MINIRLHF_LAUNCH(kernel, grid_of(in.x_rows.count, cut.count), threads_of(in.columns), stream, in,
                  scaled_exp<Real<T>>(in.temperature), static_cast<Real<T>>(1 / in.temperature), cut, grad_stats, saved,
                  dx, dx_rows, dy, dy_rows);
  return cudaGetLastError();
}

}  // namespace minirlhf::cuda
