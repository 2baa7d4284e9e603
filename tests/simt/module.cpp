// The ops of csrc/cuda/token_stats.cuh over numpy arrays: what token_stats.cu is over tensors. Shapes and types are
// checked in __init__.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // for optional

#include <optional>

#include "cuda/token_stats.cuh"

namespace py = pybind11;
using namespace minirlhf;
using Array = py::array;
using OptionalArray = std::optional<py::array>;

namespace {

// (N, V), or (A, B, V) whose rows lie two strides apart. A stride of 0 is kept.
Rows rows_of(const Array& x) {
  const auto stride = [&](int d) { return static_cast<int64_t>(x.strides(d) / x.itemsize()); };
  if (x.ndim() == 2) return {x.shape(0), x.shape(0) ? x.shape(0) : 1, 0, stride(0)};
  return {x.shape(0) * x.shape(1), x.shape(1) ? x.shape(1) : 1, stride(0), stride(1)};
}

template <class T>
T* pointer(const Array& a) {
  return a.size() ? static_cast<T*>(const_cast<void*>(a.data())) : nullptr;
}
template <class T>
T* pointer(const OptionalArray& a) {
  return a ? pointer<T>(*a) : nullptr;
}

// numpy has no bfloat16: its bits as uint16 stand for it.
template <class F>
void for_type(const Array& x, F f) {
  const char kind = x.dtype().kind();
  if (kind == 'f' && x.itemsize() == 4)
    f(float{});
  else if (kind == 'f' && x.itemsize() == 8)
    f(double{});
  else if (kind == 'f' && x.itemsize() == 2)
    f(__half{});
  else if (kind == 'u' && x.itemsize() == 2)
    f(__nv_bfloat16{});
  else
    throw py::type_error("logits must be float32, float64, float16, or the bits of bfloat16 as uint16");
}

template <class T>
cuda::Input<T> input(const Array& x, const Array& targets, const OptionalArray& y, int64_t first_column,
                     double temperature, int64_t ignore_index) {
  return {pointer<T>(x),
          rows_of(x),
          pointer<T>(y),
          y ? rows_of(*y) : Rows{},
          pointer<int64_t>(targets),
          x.shape(x.ndim() - 1),
          first_column,
          temperature,
          ignore_index};
}

// As cudaMalloc leaves it: here, all NaN.
template <class T>
std::vector<cuda::RowState> workspace(const Array& x) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  return std::vector<cuda::RowState>(rows_of(x).count * cuda::kept_splits<T>(x.shape(x.ndim() - 1)),
                                     {nan, nan, nan, nan, nan, nan, nan, nan});
}

void token_stats(Array stats, Array saved, Array x, Array targets, OptionalArray y, double temperature,
                 int64_t ignore_index) {
  for_type(x, [&](auto element) {
    using T = decltype(element);
    using S = cuda::Real<T>;
    cuda::launch_token_stats<T>(input<T>(x, targets, y, 0, temperature, ignore_index), workspace<T>(x).data(),
                                pointer<S>(stats), pointer<cuda::Saved<S>>(saved), nullptr);
  });
}

void gradient(OptionalArray dx, OptionalArray dy, Array grad_stats, Array x, Array targets, OptionalArray y,
              Array saved, int64_t first_column, double temperature, int64_t ignore_index) {
  for_type(x, [&](auto element) {
    using T = decltype(element);
    using S = cuda::Real<T>;
    cuda::launch_gradient<T>(input<T>(x, targets, y, first_column, temperature, ignore_index), pointer<S>(grad_stats),
                             pointer<cuda::Saved<S>>(saved), pointer<T>(dx), dx ? rows_of(*dx) : Rows{}, pointer<T>(dy),
                             dy ? rows_of(*dy) : Rows{}, nullptr);
  });
}

void update(Array state, Array x, Array targets, OptionalArray y, int64_t first_column, double temperature,
            int64_t ignore_index) {
  for_type(x, [&](auto element) {
    using T = decltype(element);
    cuda::launch_update<T>(input<T>(x, targets, y, first_column, temperature, ignore_index), workspace<T>(x).data(),
                           pointer<cuda::RowState>(state), nullptr);
  });
}

void finish(Array stats, Array saved, Array state, Array targets, bool with_ref, double temperature,
            int64_t ignore_index) {
  const auto launch = [&](auto s) {
    using S = decltype(s);
    cuda::launch_finish<S>(pointer<cuda::RowState>(state), pointer<int64_t>(targets), targets.size(), with_ref,
                           temperature, ignore_index, pointer<S>(stats), pointer<cuda::Saved<S>>(saved), nullptr);
  };
  stats.itemsize() == 8 ? launch(double{}) : launch(float{});
}

}  // namespace

PYBIND11_MODULE(simt_token_stats, m) {
  m.def("seed", [](uint64_t seed) { simt::machine.seed(seed); });
  m.def("token_stats", &token_stats);
  m.def("gradient", &gradient);
  m.def("update", &update);
  m.def("finish", &finish);
}
