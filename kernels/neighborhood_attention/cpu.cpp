// Neighborhood attention and its gradients, in float32; tensors of other kinds are read and written as they lie.
//
// Neighbouring columns lie in a vector's lanes, so the keys at one offset from all of them are one unaligned load, and
// the position bias at that offset is one number. A tile of a few rows shares those loads. Lanes whose windows are
// shifted at a border meet a few offsets more, which are masked. Dilation only spaces the offsets out.
//
// Backward computes the probabilities anew from the log-sum-exp, once with queries in the lanes, for their gradients,
// and once with keys, which meet the queries that see them: every gradient is gathered, in one order whatever the
// number of threads. Only the bias table needs partial sums, one table a band, added in the bands' order.
#include "../structures.h"
#include "backward.h"
#include "forward.h"

using namespace tile;

extern "C" {

EXPORT_SIZE(Problem)
EXPORT_SIZE(View)

// The result and the gradients of query, key and value are dense and have the kinds of these and of value.
int na_forward(const Problem* p, const View* query, const View* key, const View* value, const float* extra_key,
               const float* extra_value, const float* bias, void* out, float* lse) {
  return !forward(*p, *query, *key, *value, {extra_key, extra_value}, bias, out, lse);
}

int na_backward(const Problem* p, const View* query, const View* key, const View* value, const View* grad_out,
                const float* extra_key, const float* extra_value, const float* bias, const void* out, const float* lse,
                const float* grad_lse, void* grad_query, void* grad_key, void* grad_value, float* grad_extra_key,
                float* grad_extra_value, float* grad_bias) {
  const Sizes sizes(*p);
  const int64_t bands = Side(*p, false).bands.size(), numbers = p->batch * p->heads * sizes.tokens;
  const Scratch memory = scratch(2 * numbers), parts = scratch(bias ? p->batch * p->heads * bands * sizes.bias : 0);
  if (!memory || !parts) return 1;
  float *own_lse = memory.get(), *mean = own_lse + numbers;
  simd::with_kind(grad_out->kind, [&](auto* grad) {
    simd::with_kind(value->kind, [&](auto* result) {
      using Element = std::remove_pointer_t<decltype(grad)>;
      prepare<Element, std::remove_pointer_t<decltype(result)>>(*p, *grad_out, out, lse, grad_lse, own_lse, mean);
    });
  });
  const Gradients gradients{*p, *query, *key, *value, *grad_out, {extra_key, extra_value}, bias, own_lse, mean, sizes};
  if (!gradients.of_query(grad_query, parts.get()) || !gradients.of_key(grad_key, grad_value)) return 1;
  if (p->extra && !gradients.of_extra(grad_extra_key, grad_extra_value)) return 1;
  for (int64_t i = 0; bias && i < p->heads * sizes.bias; ++i) {
    const int64_t h = i / sizes.bias;
    double sum = 0;
    for (int64_t b = 0; b < p->batch; ++b) {
      for (int64_t band = 0; band < bands; ++band) {
        sum += parts.get()[((b * p->heads + h) * bands + band) * sizes.bias + i % sizes.bias];
      }
    }
    grad_bias[i] = static_cast<float>(sum);
  }
  return 0;
}
}
