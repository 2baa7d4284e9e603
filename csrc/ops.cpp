// The op's schemas, and the module that says how this build was made.
//
// CPU and CUDA implement each schema in a file of their own; Python (minirlhf/fused.py) adds shapes for tracing
// and the link from forward to backward.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <map>
#include <string>

TORCH_LIBRARY(minirlhf, m) {
  // stats (K, ...): logprob, entropy and, given a reference, ref_logprob and kl. saved (N, 6): what the gradient needs.
  m.def("token_stats(Tensor logits, Tensor targets, Tensor? ref_logits, float temperature, int ignore_index) "
        "-> (Tensor stats, Tensor saved)");
  m.def("token_stats_backward(Tensor grad_stats, Tensor logits, Tensor targets, Tensor? ref_logits, Tensor saved, "
        "float temperature, int ignore_index, bool policy_grad, bool ref_grad) -> (Tensor, Tensor)");

  // The same in tiles of columns, for logits that are never held whole: begin at column 0, go on, finish; then a tile
  // of logits turns into its gradient in place.
  m.def("token_stats_update_(Tensor(a!) state, Tensor logits, Tensor targets, Tensor? ref_logits, int first_column, "
        "float temperature, int ignore_index) -> ()");
  m.def("token_stats_finish(Tensor state, Tensor targets, bool with_ref, float temperature, int ignore_index, "
        "ScalarType dtype) -> (Tensor stats, Tensor saved)");
  m.def("token_stats_gradient_(Tensor(a!) logits, Tensor(b!)? ref_logits, Tensor grad_stats, Tensor targets, "
        "Tensor saved, int first_column, float temperature, int ignore_index, bool policy_grad, bool ref_grad) -> ()");

  // The network's activation, on the CPU only: its own in torch is a fifth of a training step there.
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");

  // Attention of whole sequences, from the product that holds queries, keys and values. On the CPU only.
  m.def("attention(Tensor qkv, int heads, Tensor? attend) -> Tensor");
  m.def("attention_backward(Tensor grad, Tensor qkv, int heads, Tensor? attend) -> Tensor");

  // A weight laid out for products of some rows, and a linear layer that reads it. On the CPU only.
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, Tensor bias) -> Tensor");
  // Attention of a new token a row over what is kept of those before it, and keeping it too. On the CPU only.
  m.def("decode_attention_(Tensor(a!) store, Tensor qkv, Tensor positions) -> Tensor");
  // The whole network for a new token a row: logits. On the CPU only.
  m.def("decode_step_(Tensor[] layers, Tensor[] around, Tensor(a!)[] stores, Tensor tokens, Tensor positions) -> Tensor");
}

namespace {

std::string instruction_set() {
#if defined(CPU_CAPABILITY_AVX512)
  return "AVX512";
#elif defined(CPU_CAPABILITY_AVX2)
  return "AVX2";
#else
  return "default";
#endif
}

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("facts", [] {
    return std::map<std::string, std::string>{{"compiler", compiler()}, {"instruction set", instruction_set()}};
  });
}
