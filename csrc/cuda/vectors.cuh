// Rows of fp32, bf16, fp16 and fp64 numbers, read and written 16 bytes at a time wherever they begin.
//
// Vectors are cut by column, not by address: which columns make a vector does not depend on where the row lies. One off
// a 16-byte boundary is cut out of the two aligned ones that hold it; its neighbour loads them too, and finds them in
// the first-level cache. At a row's edges, where these would reach beyond the row, it is read element by element: no
// byte outside a row is touched.
#pragma once

#ifdef MINIRLHF_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MINIRLHF_SHARED(type, name, count) __shared__ type name[count]
#define MINIRLHF_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../rows.h"

namespace minirlhf::cuda {

// Arithmetic is in float for logits of up to 32 bits, in double for double.
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename R>
constexpr R inf = std::numeric_limits<R>::infinity();
template <typename R>
constexpr R nan = std::numeric_limits<R>::quiet_NaN();
template <typename R>
constexpr R very_low = std::numeric_limits<R>::lowest() / 2;

// 16 bytes as they lie in memory.
struct __attribute__((may_alias, aligned(16))) Vector {
  uint32_t word[4];
};

template <typename T>
constexpr int width = sizeof(Vector) / sizeof(T);  // columns of a vector

// --- elements --------------------------------------------------------------------------------------------------------

__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T narrowed(Real<T> x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else return x;
}

template <typename T>
__device__ T element(const Vector& v, int i) {
  const auto half = [&] { return static_cast<uint16_t>(v.word[i / 2] >> i % 2 * 16); };
  const auto whole = [&] { return static_cast<uint64_t>(v.word[2 * i + 1]) << 32 | v.word[2 * i]; };
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(v.word[i]);
  else if constexpr (std::is_same_v<T, double>) return __longlong_as_double(static_cast<long long>(whole()));
  else if constexpr (std::is_same_v<T, __half>) return __ushort_as_half(half());
  else return __ushort_as_bfloat16(half());
}

template <typename T>
__device__ Real<T> value(const Vector& v, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)  // the upper half of a float: one operation
    return __uint_as_float(i % 2 ? v.word[i / 2] & 0xffff0000u : v.word[i / 2] << 16);
  else return widened(element<T>(v, i));
}

// Numbers rounded to T.
template <typename T>
__device__ Vector packed(const Real<T> (&x)[width<T>]) {
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      v.word[i] = __float_as_uint(x[i]);
    } else if constexpr (std::is_same_v<T, double>) {
      v.word[i] = static_cast<uint32_t>(static_cast<uint64_t>(__double_as_longlong(x[i / 2])) >> i % 2 * 32);
    } else if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      v.word[i] = __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      v.word[i] = __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
    }
  }
  return v;
}

// The larger of each of two halves; a NaN only where both are.
template <typename T>
__device__ uint32_t larger_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t larger;
  if constexpr (std::is_same_v<T, __half>) asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  else asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
#else
  const Vector x{{a, b, 0, 0}};
  return packed<T>({max(value<T>(x, 0), value<T>(x, 2)), max(value<T>(x, 1), value<T>(x, 3))}).word[0];
#endif
}

// The largest of a chunk, but no less than `top`. A NaN is passed over.
template <typename T, int vectors>
__device__ Real<T> largest(const Vector (&x)[vectors], Real<T> top) {
  if constexpr (sizeof(T) == 2) {  // two by two, as they lie
    uint32_t pair = x[0].word[0];
#pragma unroll
    for (int i = 1; i < 4 * vectors; ++i) pair = larger_pair<T>(pair, x[i / 4].word[i % 4]);
    const Vector last{{pair, pair, pair, pair}};
    return max(max(top, value<T>(last, 0)), value<T>(last, 1));
  } else {
#pragma unroll
    for (int i = 0; i < vectors * width<T>; ++i) top = max(top, value<T>(x[i / width<T>], i % width<T>));
    return top;
  }
}

// --- rows ------------------------------------------------------------------------------------------------------------

// A row seen from one of its columns: p[-before] up to p[after - 1] belong to it. Enough of them are counted for any
// vector that begins near p, so that int will do for columns.
template <typename T>
struct Part {
  T* p;
  int before, after;
};

// Column `begin` of a row; null stays null.
template <typename T>
__device__ Part<T> part_of(T* base, const Rows& rows, int64_t row, int64_t columns, int64_t begin) {
  constexpr int64_t many = 1 << 30;
  const int64_t offset = rows.inner == rows.count ? row * rows.inner_stride : rows.offset(row);  // spares a division
  return {base ? base + offset + begin : nullptr, static_cast<int>(min(begin, many)),
          static_cast<int>(min(columns - begin, many))};
}

template <typename T>
__device__ int elements_past_boundary(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % width<T>);
}

// Columns outside the row are -inf: a masked token, which adds nothing.
template <typename T>
__device__ Vector load_edge(const Part<const T>& row, int column) {
  Real<T> x[width<T>];
#pragma unroll
  for (int i = 0; i < width<T>; ++i) {
    const bool inside = column + i >= -row.before && column + i < row.after;
    x[i] = inside ? widened(row.p[column + i]) : -inf<Real<T>>;
  }
  return packed<T>(x);
}

// The vector that begins `skew` elements into `low` and goes on in `high`: an operation a word, since skew is constant.
template <typename T, int skew>
__device__ Vector cut(const Vector& low, const Vector& high) {
  constexpr int whole = skew * sizeof(T) / 4, bits = skew * sizeof(T) % 4 * 8;
  const auto word = [&](int i) { return i < 4 ? low.word[i] : high.word[i - 4]; };
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.word[i] = word(whole + i);
    if constexpr (bits > 0) v.word[i] = v.word[i] >> bits | word(whole + i + 1) << (32 - bits);
  }
  return v;
}

template <typename T, int vectors, int skew = 1>
__device__ void cut_all(Vector (&low)[vectors], const Vector (&high)[vectors], int wanted) {
  if constexpr (skew < width<T>) {
    if (skew != wanted) return cut_all<T, vectors, skew + 1>(low, high, wanted);
#pragma unroll
    for (int j = 0; j < vectors; ++j) low[j] = cut<T, skew>(low[j], high[j]);
  }
}

// A warp takes a chunk of consecutive columns: lane i vectors i, i + 32, ..., so that its loads are each in one piece.
template <typename T>
constexpr int stride = 32 * width<T>;

// The vectors of a thread's chunk, which begin at `column`, column + stride, ...: first all are asked for, then taken as
// they come. `own_only`: reads nothing but these columns, for rows that other threads write at the same time.
template <typename T, int vectors>
struct Chunk {
  Vector v[vectors], next[vectors];  // between the two, the aligned vectors that hold them

  // All zeros, of what is not wanted.
  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < vectors; ++j) v[j] = {};
  }

  __device__ void ask(const Part<const T>& row, int column, bool own_only = false) {
    const Place place(row, column, own_only);
    if (place.whole()) {
#pragma unroll
      for (int j = 0; j < vectors; ++j) {
        v[j] = place.aligned(j)[0];
        if (place.skew) next[j] = place.aligned(j)[1];
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < vectors; ++j) {
      v[j] = place.inside(j) ? place.aligned(j)[0] : Vector{};
      next[j] = place.inside(j) && place.skew ? place.aligned(j)[1] : Vector{};
    }
  }

  __device__ void take(const Part<const T>& row, int column, bool own_only = false) {
    const Place place(row, column, own_only);
    if (place.skew) cut_all<T>(v, next, place.skew);
    if (place.whole()) return;
#pragma unroll
    for (int j = 0; j < vectors; ++j) {
      if (!place.inside(j)) v[j] = load_edge(row, column + j * stride<T>);
    }
  }

 private:
  struct Place {
    const Part<const T>& row;
    int skew, first, reach;
    bool own_only;
    __device__ Place(const Part<const T>& row, int column, bool own_only)
        : row(row), skew(elements_past_boundary(row.p + column)), first(column - skew),
          reach(skew ? 2 * width<T> : width<T>), own_only(own_only) {}
    __device__ bool inside(int j) const {
      return first + j * stride<T> >= -row.before && first + j * stride<T> + reach <= row.after && !(own_only && skew);
    }
    __device__ bool whole() const { return inside(0) && inside(vectors - 1); }
    __device__ const Vector* aligned(int j) const {
      return reinterpret_cast<const Vector*>(row.p + first + j * stride<T>);
    }
  };
};

// Whole where that is aligned and inside the row.
template <typename T>
__device__ void store(const Part<T>& row, int column, const Vector& v) {
  if (column >= -row.before && column + width<T> <= row.after && elements_past_boundary(row.p + column) == 0) {
    *reinterpret_cast<Vector*>(row.p + column) = v;
    return;
  }
#pragma unroll
  for (int i = 0; i < width<T>; ++i) {
    if (column + i >= -row.before && column + i < row.after) row.p[column + i] = element<T>(v, i);
  }
}

}  // namespace minirlhf::cuda
