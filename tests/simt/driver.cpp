// Runs every kernel of csrc/cuda/token_stats.cuh on rows that start at every offset from a 16-byte boundary, in buffers
// that end with their last element, and compares with plain loops in double. A program of its own, so that it can be
// built with AddressSanitizer, and from a copy of the source with something wrong in it. Exit status 0 if all is right.
#include <cstdio>
#include <memory>
#include <random>
#include <string>

#include "cuda/token_stats.cuh"

#if SIMT_ASAN
#define POISON(begin, bytes) __asan_poison_memory_region(begin, bytes)
#define UNPOISON(begin, bytes) __asan_unpoison_memory_region(begin, bytes)
#else
#define POISON(begin, bytes) static_cast<void>(0)
#define UNPOISON(begin, bytes) static_cast<void>(0)
#endif

using namespace minirlhf;
using cuda::Real;

namespace {

constexpr int64_t kIgnored = -100;
constexpr int kStats = 4;
constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();
int failures = 0;

double wide(float x) { return x; }
double wide(double x) { return x; }
double wide(__half x) { return __half2float(x); }
double wide(__nv_bfloat16 x) { return __bfloat162float(x); }
void round_to(float& x, double value) { x = static_cast<float>(value); }
void round_to(double& x, double value) { x = value; }
void round_to(__half& x, double value) { x = __float2half(static_cast<float>(value)); }
void round_to(__nv_bfloat16& x, double value) { x = __float2bfloat16(static_cast<float>(value)); }

// Rows in a heap block that begins `offset` elements before the first and ends with the last: what lies before, between
// and after must not be touched. (AddressSanitizer guards whole 8 bytes before and between, every byte after.)
template <class T>
struct Matrix {
  int64_t n, columns, stride, offset;
  std::unique_ptr<T[]> memory;
  Matrix(int64_t n, int64_t columns, int64_t gap, int64_t offset)
      : n(n),
        columns(columns),
        stride(columns + gap),
        offset(offset),
        memory(new T[offset + (n - 1) * stride + columns]) {
    std::memset(static_cast<void*>(memory.get()), 0xff, (offset + (n - 1) * stride + columns) * sizeof(T));  // NaN
    guard(memory.get(), row(0));
    for (int64_t r = 0; r + 1 < n; ++r) guard(row(r) + columns, row(r + 1));
  }
  ~Matrix() { UNPOISON(memory.get(), (offset + (n - 1) * stride + columns) * sizeof(T)); }
  T* row(int64_t r) const { return memory.get() + offset + r * stride; }
  Rows rows() const { return {n, n, 0, stride}; }

  static void guard(T* begin, T* end) {
    if (begin == end) return;
    const auto up = [](T* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 7) / 8 * 8); };
    const auto down = [](T* p) { return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) / 8 * 8); };
    if (down(end) > up(begin)) POISON(up(begin), static_cast<size_t>(down(end) - up(begin)));
  }
};

struct Case {
  const char* type;
  int64_t columns, offset;
  bool with_ref;
  double temperature;
};

void compare(const Case& c, const char* what, int64_t row, int64_t column, double got, double want, double tolerance) {
  if (got == want || (std::isnan(got) && std::isnan(want)) || std::abs(got - want) <= tolerance) return;
  if (++failures <= 5) {
    std::printf("%s, V = %lld, offset %lld, %s, T = %g: %s[%lld, %lld] is %.9g, not %.9g\n", c.type,
                static_cast<long long>(c.columns), static_cast<long long>(c.offset),
                c.with_ref ? "with reference" : "alone", c.temperature, what, static_cast<long long>(row),
                static_cast<long long>(column), got, want);
  }
}

// The definitions, one after the other.
struct Truth {
  double stats[kStats] = {0, 0, 0, 0};
  std::vector<double> dx, dy;
};

template <class T>
Truth truth(const T* x, const T* y, int64_t columns, int64_t target, double temperature, const double* g) {
  Truth out;
  out.dx.assign(columns, 0);
  out.dy.assign(columns, 0);
  if (target == kIgnored) return out;
  const auto log_softmax = [&](const T* z) {
    double top = -kInfinity, sum = 0;
    std::vector<double> logs(columns);
    for (int64_t i = 0; i < columns; ++i) top = std::max(top, wide(z[i]));
    for (int64_t i = 0; i < columns; ++i) sum += std::exp((wide(z[i]) - top) / temperature);
    for (int64_t i = 0; i < columns; ++i) logs[i] = (wide(z[i]) - top) / temperature - std::log(sum);
    return logs;
  };
  const std::vector<double> log_p = log_softmax(x), log_q = y ? log_softmax(y) : std::vector<double>(columns, 0);
  const bool known = target >= 0 && target < columns;
  double entropy = 0, kl = 0;
  for (int64_t i = 0; i < columns; ++i) {
    if (log_p[i] == -kInfinity) continue;
    entropy -= std::exp(log_p[i]) * log_p[i];
    kl += std::exp(log_p[i]) * (log_p[i] - log_q[i]);
  }
  out.stats[0] = known ? log_p[target] : kNan;
  out.stats[1] = entropy;
  out.stats[2] = known ? log_q[target] : kNan;
  out.stats[3] = kl;
  for (int64_t i = 0; i < columns; ++i) {
    const double p = std::exp(log_p[i]), q = std::exp(log_q[i]), at_target = i == target;
    double dx = g[0] * (at_target - p);
    if (p > 0) dx -= g[1] * p * (log_p[i] + entropy);
    if (p > 0 && y) dx += g[3] * p * (log_p[i] - log_q[i] - kl);
    out.dx[i] = known || g[0] == 0 ? dx / temperature : kNan;
    out.dy[i] = (g[3] * (q - p) + g[2] * (at_target - q)) / temperature;
    if (!known && g[2] != 0) out.dy[i] = kNan;
  }
  return out;
}

template <class T>
void run(const char* type, int64_t columns, int64_t offset, bool with_ref, double temperature) {
  using S = Real<T>;
  const Case c{type, columns, offset, with_ref, temperature};
  const double rounding = sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 1e-5 : std::is_same_v<T, __half> ? 1e-3 : 4e-3;
  const double small = sizeof(T) == 8 ? 1e-12 : 1e-5;
  constexpr int64_t kRows = 5;
  std::mt19937_64 random(columns * 31 + offset);
  std::normal_distribution<double> normal;

  const std::unique_ptr<int64_t[]> targets(new int64_t[kRows]);
  for (int64_t r = 0; r < kRows; ++r) targets[r] = static_cast<int64_t>(random() % columns);
  targets[1] = kIgnored;  // all NaN, and not to be read
  targets[2] = columns - 1;
  targets[3] = columns + 1;  // outside: NaN, and no read out of bounds
  Matrix<T> x(kRows, columns, 3, offset), y(kRows, columns, 0, (offset + 1) % cuda::width<T>);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t i = 0; r != 1 && i < columns; ++i) {
      const bool masked = r == 2 && i + 1 < columns && (i < columns / 2 || random() % 4 == 0);
      round_to(x.row(r)[i], masked ? -kInfinity : 3 * normal(random));
      round_to(y.row(r)[i], masked ? -kInfinity : 3 * normal(random));
    }
  }
  const int count = with_ref ? 4 : 2;
  const std::unique_ptr<S[]> upstream(new S[count * kRows]);
  double g[kRows][kStats] = {};
  for (int64_t r = 0; r < kRows; ++r) {
    for (int k = 0; k < count; ++k) {
      upstream[k * kRows + r] = static_cast<S>(r == 4 && k != 0 ? 0 : normal(random));
      g[r][k] = upstream[k * kRows + r];
    }
  }
  std::vector<Truth> want;
  for (int64_t r = 0; r < kRows; ++r)
    want.push_back(truth(x.row(r), with_ref ? y.row(r) : nullptr, columns, targets[r], temperature, g[r]));

  const auto input = [&](int64_t first, int64_t width) {
    return cuda::Input<T>{
        x.row(0) + first, x.rows(), with_ref ? y.row(0) + first : nullptr, y.rows(), targets.get(), width, first,
        temperature,      kIgnored};
  };
  const auto parts = [](int64_t width) {
    return std::unique_ptr<cuda::RowState[]>(new cuda::RowState[kRows * cuda::kept_splits<T>(width)]);
  };
  const std::unique_ptr<S[]> stats(new S[count * kRows]);
  const std::unique_ptr<cuda::Saved<S>[]> saved(new cuda::Saved<S>[kRows]);
  const auto check_stats = [&](const char* what) {
    for (int64_t r = 0; r < kRows; ++r) {
      for (int k = 0; k < count; ++k) {
        const double w = want[r].stats[k];
        compare(c, what, k, r, stats[k * kRows + r], w, small * (1 + std::abs(w)));
        stats[k * kRows + r] = -1;
      }
    }
  };
  const auto check_gradient = [&](const char* what, const Matrix<T>& got, bool reference) {
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t i = 0; i < columns; ++i) {
        const double w = (reference ? want[r].dy : want[r].dx)[i];
        const double size = std::abs(g[r][0]) + std::abs(g[r][1]) + std::abs(g[r][2]) + std::abs(g[r][3]);
        // Of a half, what is below its smallest normal number is rounded to a multiple of 2^-24.
        compare(c, what, r, i, wide(got.row(r)[i]), w,
                rounding * std::abs(w) + small * size / temperature + (sizeof(T) == 2 ? 6e-8 : 0));
      }
    }
  };

  cuda::launch_token_stats<T>(input(0, columns), parts(columns).get(), stats.get(), saved.get(), nullptr);
  check_stats("stats");
  Matrix<T> dx(kRows, columns, 0, (offset + 2) % cuda::width<T>), dy(kRows, columns, 1, offset);
  cuda::launch_gradient<T>(input(0, columns), upstream.get(), saved.get(), dx.row(0), dx.rows(),
                           with_ref ? dy.row(0) : nullptr, dy.rows(), nullptr);
  check_gradient("dx", dx, false);
  if (with_ref) check_gradient("dy", dy, true);
  if constexpr (!std::is_same_v<T, S>) return;  // tiles are of float or double

  const std::unique_ptr<cuda::RowState[]> state(new cuda::RowState[kRows]);
  std::memset(static_cast<void*>(state.get()), 0xff, kRows * sizeof(cuda::RowState));
  const int64_t cut = columns / 3, ends[] = {0, cut, cut + 1 < columns ? cut + 1 : columns, columns};
  for (int tile = 0; tile < 3; ++tile) {
    const int64_t width = ends[tile + 1] - ends[tile];
    if (width == 0) continue;
    cuda::launch_update<T>(input(ends[tile], width), parts(width).get(), state.get(), nullptr);
  }
  cuda::launch_finish<S>(state.get(), targets.get(), kRows, with_ref, temperature, kIgnored, stats.get(),
                         saved.get(), nullptr);
  check_stats("stats of tiles");
  for (int tile = 0; tile < 3; ++tile) {
    const int64_t width = ends[tile + 1] - ends[tile];
    if (width == 0) continue;
    const auto in = input(ends[tile], width);
    cuda::launch_gradient<T>(in, upstream.get(), saved.get(), x.row(0) + ends[tile], x.rows(),
                             with_ref ? y.row(0) + ends[tile] : nullptr, y.rows(), nullptr);
  }
  check_gradient("dx in place", x, false);
  if (with_ref) check_gradient("dy in place", y, true);
}

template <class T>
void run_all(const char* type) {
  simt::machine.seed(1);
  for (const int64_t columns : {1, 2, 7, 33, 130, 1031, 5003})
    for (int64_t offset = 0; offset < cuda::width<T>; offset += columns > 2000 ? 3 : 1)
      for (const bool with_ref : {false, true}) run<T>(type, columns, offset, with_ref, with_ref ? 0.7 : 1.0);
  run<T>(type, cuda::sums_cut<T>(1 << 30).columns + 100, 1, true, 1.3);  // two splits a row
}

}  // namespace

int main() {
  try {
    run_all<float>("float32");
#ifndef SIMT_FLOAT_ONLY
    run_all<double>("float64");
    run_all<__half>("float16");
    run_all<__nv_bfloat16>("bfloat16");
#endif
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  if (failures) std::printf("%d wrong values\n", failures);
  return failures != 0;
}
