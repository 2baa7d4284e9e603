// Small kernels, right and wrong, for the tests of simt.h. `cases NAME SEEDS`: exit status 0 if the kernel ran and its
// result is right; 1 with a message if the emulator found fault with it, or the result is wrong. SEEDS > 0: with each
// of that many seeds until one fails; SEEDS < 0: with each of them, whatever the others gave, and a message for each
// fault.
#ifdef MINIRLHF_SIMT
#include "simt.h"
#endif

#include <map>
#include <memory>
#include <string>

constexpr unsigned kFull = 0xffffffffu;

void expect(bool right, const char* what) {
  if (!right) throw std::runtime_error(std::string("wrong result: ") + what);
}

// ------------------------------------------------------------------------------------------------ shared memory

enum Missing { nothing, after_write, after_read };

// Each block sums its row, twice, through the same scratch: a barrier is needed after writing and after reading.
template <Missing missing>
__global__ void __launch_bounds__(256) row_sums(const float* x, float* sums, int columns) {
  MINIRLHF_SHARED(float, partial, 8);
  for (int repeat = 0; repeat < 2; ++repeat) {
    float sum = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += x[blockIdx.x * columns + i];
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(kFull, sum, distance);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    if (missing != after_write) __syncthreads();
    float total = 0;
    for (int w = 0; w < 8; ++w) total += partial[w];
    if (missing != after_read) __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
  }
}

template <Missing missing>
void row_sums_case() {
  constexpr int kRows = 5, kColumns = 1000;
  std::vector<float> x(kRows * kColumns), sums(kRows, -1);
  for (int i = 0; i < kRows * kColumns; ++i) x[i] = static_cast<float>(i % 7 + i / kColumns);
  MINIRLHF_LAUNCH((row_sums<missing>), kRows, 256, nullptr, x.data(), sums.data(), kColumns);
  for (int r = 0; r < kRows; ++r) {
    float sum = 0;
    for (int i = 0; i < kColumns; ++i) sum += x[r * kColumns + i];
    expect(sums[r] == sum, "a row's sum");
  }
}

enum Order { none, shuffle_only, warp_barrier };

// Lane i hands its number to lane i + 1 through shared memory.
template <Order order>
__global__ void neighbours(int* out) {
  MINIRLHF_SHARED(int, slots, 64);
  slots[threadIdx.x] = threadIdx.x;
  if (order == shuffle_only) __shfl_sync(kFull, 0, 0);
  if (order == warp_barrier) __syncwarp();
  const int warp = threadIdx.x / 32 * 32;
  out[threadIdx.x] = slots[warp + (threadIdx.x + 1) % 32];
}

template <Order order>
void neighbours_case() {
  int out[64];
  MINIRLHF_LAUNCH(neighbours<order>, 1, 64, nullptr, out);
  for (int i = 0; i < 64; ++i) expect(out[i] == i / 32 * 32 + (i + 1) % 32, "the neighbour's number");
}

__global__ void syncwarp_across_warps(int* out) {  // orders the lanes of one warp only
  MINIRLHF_SHARED(int, slots, 64);
  slots[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = slots[63 - threadIdx.x];
}

__global__ void two_writers() {
  MINIRLHF_SHARED(int, slot, 1);
  if (threadIdx.x % 40 == 0) slot[0] = threadIdx.x;
}

__global__ void never_written(int* out) {
  MINIRLHF_SHARED(int, slots, 4);
  if (threadIdx.x == 0) slots[0] = 1;
  __syncthreads();
  out[threadIdx.x] = slots[1];
}

__global__ void written_by_the_last_block(int* out) {  // shared memory does not outlive its block
  MINIRLHF_SHARED(int, slot, 1);
  if (blockIdx.x == 0) slot[0] = 1;
  out[0] = slot[0];
}

__global__ void outside_shared(int n) {
  MINIRLHF_SHARED(int, slots, 4);
  slots[n] = 1;
}

__global__ void reversed(int* out) {
  MINIRLHF_DYNAMIC_SHARED(int, slots);
  slots[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = slots[blockDim.x - 1 - threadIdx.x];
}

void reversed_case(int n, size_t bytes) {
  std::vector<int> out(n);
  MINIRLHF_LAUNCH_DYNAMIC(reversed, 1, n, bytes, nullptr, out.data());
  for (int i = 0; i < n; ++i) expect(out[i] == n - 1 - i, "reversed");
}

__global__ void too_much_shared() {
  MINIRLHF_SHARED(double, first, 6000);
  MINIRLHF_SHARED(double, second, 200);
  first[0] = 0;
  second[0] = 0;
}

// ----------------------------------------------------------------------------------------- barriers and deadlocks

__global__ void half_return() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}

__global__ void different_lines() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void uneven_loop() {  // warp 1 passes once more
  for (unsigned i = 0; i <= threadIdx.x / 32; ++i) __syncthreads();
}

__global__ void shuffle_against_barrier() {
  if (threadIdx.x == 3) __syncthreads();
  __shfl_xor_sync(kFull, 1, 1);
  if (threadIdx.x != 3) __syncthreads();
}

__global__ void half_a_warp_shuffles() {
  if (threadIdx.x < 16) __shfl_down_sync(kFull, 1, 1);
}

__global__ void shuffle_after_return() {
  if (threadIdx.x == 31) return;
  if (threadIdx.x == 0) __ballot_sync(kFull, 1);
}

__global__ void not_in_its_own_mask() { __syncwarp(0x0000ffffu); }

__global__ void whole_warp_of_48() { __ballot_sync(kFull, 1); }

__global__ void source_outside_mask() {
  if (threadIdx.x < 16) __shfl_xor_sync(0x0000ffffu, 1, 16);
}

__global__ void different_operations() {
  if (threadIdx.x < 16) {
    __shfl_down_sync(kFull, 1, 1);
  } else {
    __shfl_xor_sync(kFull, 1, 1);
  }
}

__global__ void trap() { __trap(); }

// ------------------------------------------------------------------------------------------------- global memory

__global__ void copy_ldg(const char* x, uint4* y) {
  y[threadIdx.x] = __ldg(reinterpret_cast<const uint4*>(x) + threadIdx.x);
}
__global__ void copy_plain(const char* x, uint4* y) { y[threadIdx.x] = reinterpret_cast<const uint4*>(x)[threadIdx.x]; }
__global__ void copy_floats(const char* x, float* y) {
  y[threadIdx.x] = reinterpret_cast<const float*>(x)[threadIdx.x];
}
__global__ void store(char* y) { __stcs(reinterpret_cast<float4*>(y) + threadIdx.x, make_float4(1, 2, 3, 4)); }

template <class Kernel, class T>
void copy_case(Kernel kernel, T* /*the kernel's element*/, int offset) {
  constexpr int kThreads = 32;
  const std::unique_ptr<char[]> x(new char[kThreads * sizeof(T) + offset]);  // exactly what is read
  std::vector<T> y(kThreads);
  for (size_t i = 0; i < kThreads * sizeof(T) + offset; ++i) x[i] = static_cast<char>(i);
  MINIRLHF_LAUNCH(kernel, 1, kThreads, nullptr, x.get() + offset, y.data());
  expect(std::memcmp(x.get() + offset, y.data(), kThreads * sizeof(T)) == 0, "a copy");
}

__global__ void sum_of(const float* x, int n, float* sum) {
  float total = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) total += x[i];
  for (int distance = 16; distance; distance /= 2) total += __shfl_down_sync(kFull, total, distance);
  if (threadIdx.x == 0) *sum = total;
}

void sum_case(int held, int read) {
  const std::unique_ptr<float[]> x(new float[held]);
  for (int i = 0; i < held; ++i) x[i] = 1;
  float sum = 0;
  MINIRLHF_LAUNCH(sum_of, 1, 32, nullptr, x.get(), read, &sum);
  expect(sum == read, "a sum");
}

// ------------------------------------------------------------------------------------------------------ warps

__global__ void shuffles(int* out) {  // 7 numbers a thread
  const int i = threadIdx.x, lane = i % 32;
  int* o = out + 7 * i;
  o[0] = __shfl_sync(kFull, i, 5);
  o[1] = __shfl_sync(kFull, i, lane + 3, 8);
  o[2] = __shfl_up_sync(kFull, i, 2);
  o[3] = __shfl_down_sync(kFull, i, 2, 16);
  o[4] = __shfl_xor_sync(kFull, i, 5);
  o[5] = static_cast<int>(__shfl_xor_sync(kFull, i + 0.5, 1));
  o[6] =
      100 * __any_sync(kFull, lane == 7) + 10 * __all_sync(kFull, lane == 7) + (__ballot_sync(kFull, lane < 4) == 15);
  if (lane < 8) o[6] += 1000 * __popc(__ballot_sync(0xffu, 1));  // part of a warp, and the rest does not wait
  if (lane >= 8) o[6] += 1000 * __shfl_sync(0xffffff00u, lane, 9);
}

void shuffles_case() {
  std::vector<int> out(7 * 64);
  MINIRLHF_LAUNCH(shuffles, 1, 64, nullptr, out.data());
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, warp = i - lane;
    const int* o = out.data() + 7 * i;
    expect(o[0] == warp + 5, "__shfl_sync");
    expect(o[1] == i / 8 * 8 + (lane + 3) % 8, "__shfl_sync in segments");
    expect(o[2] == (lane >= 2 ? i - 2 : i), "__shfl_up_sync");
    expect(o[3] == (lane % 16 < 14 ? i + 2 : i), "__shfl_down_sync in segments");
    expect(o[4] == (i ^ 5), "__shfl_xor_sync");
    expect(o[5] == (i ^ 1), "__shfl_xor_sync of a double");
    expect(o[6] == 101 + 1000 * (lane < 8 ? 8 : 9), "votes");
  }
}

__global__ void indices(int* seen) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  ++seen[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

void indices_case() {
  std::vector<int> seen(2 * 3 * 4 * 5 * 3 * 2);
  MINIRLHF_LAUNCH(indices, dim3(2, 3, 4), dim3(5, 3, 2), nullptr, seen.data());
  for (int n : seen) expect(n == 1, "each thread of the grid once");
}

__global__ void who(int* order, int* n) {
  order[(*n)++] = blockIdx.x * blockDim.x + threadIdx.x;
  __syncthreads();
  order[(*n)++] = blockIdx.x * blockDim.x + threadIdx.x;
}

void print_order() {
  int order[2 * 4 * 8], n = 0;
  MINIRLHF_LAUNCH(who, 4, 8, nullptr, order, &n);
  for (int i = 0; i < n; ++i) std::printf("%d ", order[i]);
}

__global__ void nested() { MINIRLHF_LAUNCH(trap, 1, 1, nullptr); }

// --------------------------------------------------------------------------------------------------------- main

template <class... A>
void run(void (*kernel)(A...), unsigned threads, A... arguments) {
  MINIRLHF_LAUNCH(kernel, 2, threads, nullptr, arguments...);
}

void convert(const std::string& what) {  // every bit pattern of a short, or floats from stdin, to stdout
  if (what == "widen") {
    for (unsigned i = 0; i < 65536; ++i) {
      const float both[2] = {__bfloat162float({static_cast<unsigned short>(i)}),
                             __half2float({static_cast<unsigned short>(i)})};
      std::fwrite(both, sizeof both, 1, stdout);
    }
    return;
  }
  for (float f; std::fread(&f, sizeof f, 1, stdin) == 1;) {
    const unsigned short both[2] = {__float2bfloat16(f).x, __float2half(f).x};
    std::fwrite(both, sizeof both, 1, stdout);
  }
}

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const int seeds = argc > 2 ? std::atoi(argv[2]) : 1;
  int out[256];
  const std::map<std::string, void (*)(int*)> cases{
      {"row sums", [](int*) { row_sums_case<nothing>(); }},
      {"no barrier after writing", [](int*) { row_sums_case<after_write>(); }},
      {"no barrier after reading", [](int*) { row_sums_case<after_read>(); }},
      {"__syncwarp", [](int*) { neighbours_case<warp_barrier>(); }},
      {"no __syncwarp", [](int*) { neighbours_case<none>(); }},
      {"a shuffle for a __syncwarp", [](int*) { neighbours_case<shuffle_only>(); }},
      {"__syncwarp across warps", [](int* o) { run(syncwarp_across_warps, 64, o); }},
      {"two writers", [](int*) { run(two_writers, 64); }},
      {"never written", [](int* o) { run(never_written, 8, o); }},
      {"written by another block", [](int* o) { run(written_by_the_last_block, 1, o); }},
      {"past the end of shared", [](int*) { run(outside_shared, 1, 4); }},
      {"before the start of shared", [](int*) { run(outside_shared, 1, -1); }},
      {"dynamic", [](int*) { reversed_case(100, 400); }},
      {"past the end of dynamic", [](int*) { reversed_case(100, 396); }},
      {"too much shared", [](int*) { run(too_much_shared, 1); }},
      {"half return", [](int*) { run(half_return, 64); }},
      {"different lines", [](int*) { run(different_lines, 64); }},
      {"uneven loop", [](int*) { run(uneven_loop, 64); }},
      {"shuffle against barrier", [](int*) { run(shuffle_against_barrier, 32); }},
      {"half a warp shuffles", [](int*) { run(half_a_warp_shuffles, 32); }},
      {"shuffle after return", [](int*) { run(shuffle_after_return, 32); }},
      {"not in its own mask", [](int*) { run(not_in_its_own_mask, 32); }},
      {"whole warp of 48", [](int*) { run(whole_warp_of_48, 48); }},
      {"source outside mask", [](int*) { run(source_outside_mask, 32); }},
      {"different operations", [](int*) { run(different_operations, 32); }},
      {"trap", [](int*) { run(trap, 1); }},
      {"nested", [](int*) { run(nested, 1); }},
      {"__ldg", [](int*) { copy_case(copy_ldg, static_cast<uint4*>(nullptr), 0); }},
      {"__ldg off by 4", [](int*) { copy_case(copy_ldg, static_cast<uint4*>(nullptr), 4); }},
      {"load", [](int*) { copy_case(copy_plain, static_cast<uint4*>(nullptr), 16); }},
      {"load off by 8", [](int*) { copy_case(copy_plain, static_cast<uint4*>(nullptr), 8); }},
      {"float", [](int*) { copy_case(copy_floats, static_cast<float*>(nullptr), 4); }},
      {"float off by 2", [](int*) { copy_case(copy_floats, static_cast<float*>(nullptr), 2); }},
      {"store",
       [](int* o) { run(store, 2, reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(o) + 15) / 16 * 16)); }},
      {"store off by 4",
       [](int* o) { run(store, 2, reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(o) + 15) / 16 * 16 + 4)); }},
      {"sum", [](int*) { sum_case(1000, 1000); }},
      {"one past the end", [](int*) { sum_case(1000, 1001); }},
      {"shuffles", [](int*) { shuffles_case(); }},
      {"indices", [](int*) { indices_case(); }},
      {"order", [](int*) { print_order(); }},
      {"1025 threads", [](int*) { run(trap, 1025); }},
      {"no thread", [](int*) { run(trap, 0); }},
      {"no block", [](int*) { MINIRLHF_LAUNCH(trap, 0, 1, nullptr); }},
      {"signed overflow", [](int*) { expect(std::atoi("2147483647") + std::atoi("1") < 0, "overflow"); }},
      {"again after a failure",
       [](int*) {
         try {
           run(half_return, 64);
         } catch (const simt::Error&) {
           row_sums_case<nothing>();
           return;
         }
         expect(false, "half return passed");
       }},
  };
  if (name == "widen" || name == "narrow") return convert(name), 0;
  int status = 0;
  for (int seed = 0; seed < std::abs(seeds); ++seed) {
    try {
      simt::machine.seed(seed);
      cases.at(name)(out);
      if (name == "order") std::printf("\n");
    } catch (const std::exception& e) {
      std::printf("%s\n", e.what());
      status = 1;
      if (seeds > 0) break;
    }
  }
  return status;
}
