// Operations on rows of activations between products: norms, and norm and rotary embedding of
// heads.
//
// XLA:CPU compiles each operation to several kernels. With few rows, starting them takes longer
// than running them.

#include <cmath>

#include "parallel.h"
#include "vectors.h"

namespace muxjax {
namespace {

namespace ffi = xla::ffi;
using ffi::Buffer;
using ffi::Error;
using ffi::Result;

constexpr int64_t kSerial = 1 << 14;  // maximum elements that one thread processes alone

template <typename Work>
void ForRows(ffi::ThreadPool& pool, int64_t rows, int64_t width, const Work& work) {
  if (rows * width <= kSerial) {
    for (int64_t row = 0; row < rows; ++row) work(row);
  } else {
    ForEach(pool, rows, work);
  }
}

// Root-mean-square norm of one row (Zhang and Sennrich 2019).
void Norm(const float* from, const float* weight, int64_t count, float eps, float* to) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 some = Load16(from + i, First(count - i));
    squares = _mm512_fmadd_ps(some, some, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(count);
  const __m512 by = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 some = First(count - i);
    const __m512 scaled = _mm512_mul_ps(Load16(from + i, some), by);
    _mm512_mask_storeu_ps(to + i, some, _mm512_mul_ps(scaled, Load16(weight + i, some)));
  }
}

// Rotary position embedding of one head, in place, over pairs (i, i + half) (Su et al. 2021).
void Rotate(float* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 some = First(half - i);
    const __m512 a = Load16(head + i, some), b = Load16(head + half + i, some);
    const __m512 c = Load16(cos + i, some), s = Load16(sin + i, some);
    _mm512_mask_storeu_ps(head + i, some, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    _mm512_mask_storeu_ps(head + half + i, some, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

Error RmsNorm(ffi::ThreadPool pool, Buffer<ffi::F32> x, Buffer<ffi::F32> weight,
              Result<Buffer<ffi::F32>> y, float eps) {
  const int64_t width = weight.element_count();
  if (width < 1 || x.element_count() % width || y->element_count() != x.element_count()) {
    return Error::InvalidArgument("norm: shapes do not match");
  }
  const float *from = x.typed_data(), *by = weight.typed_data();
  float* to = y->typed_data();
  ForRows(pool, x.element_count() / width, width,
          [&](int64_t row) { Norm(from + row * width, by, width, eps, to + row * width); });
  return Error::Success();
}

Error Heads(ffi::ThreadPool pool, Buffer<ffi::F32> qkv, Buffer<ffi::F32> cos, Buffer<ffi::F32> sin,
            Buffer<ffi::F32> q_norm, Buffer<ffi::F32> k_norm, Result<Buffer<ffi::F32>> q,
            Result<Buffer<ffi::F32>> k, float eps) {
  const auto xs = qkv.dimensions(), qs = q->dimensions(), ks = k->dimensions();
  if (xs.size() != 2 || qs.size() != 3 || ks.size() != 3) {
    return Error::InvalidArgument("heads: shapes do not match");
  }
  const int64_t rows = xs[0], width = xs[1], heads = qs[1], kv_heads = ks[1], size = qs[2];
  const auto halves = static_cast<int64_t>(cos.element_count());
  const auto norms = static_cast<int64_t>(q_norm.element_count());
  if (qs[0] != rows || ks[0] != rows || ks[2] != size || size % 2 ||
      width != (heads + 2 * kv_heads) * size || halves != rows * size / 2 ||
      static_cast<int64_t>(sin.element_count()) != halves || (norms != 0 && norms != size) ||
      static_cast<int64_t>(k_norm.element_count()) != norms) {
    return Error::InvalidArgument("heads: shapes do not match");
  }
  const float *c = cos.typed_data(), *s = sin.typed_data();
  const float* numbers = qkv.typed_data();
  const auto rotate = [&](int64_t row, const float* from, int64_t count, const float* norm,
                          float* to) {
    for (int64_t head = 0; head < count; ++head, from += size, to += size) {
      if (norms) {
        Norm(from, norm, size, eps, to);
      } else {
        std::copy_n(from, size, to);
      }
      Rotate(to, c + row * size / 2, s + row * size / 2, size / 2);
    }
  };
  float *to_q = q->typed_data(), *to_k = k->typed_data();
  ForRows(pool, rows, width, [&](int64_t row) {
    const float* from = numbers + row * width;
    rotate(row, from, heads, q_norm.typed_data(), to_q + row * heads * size);
    rotate(row, from + heads * size, kv_heads, k_norm.typed_data(), to_k + row * kv_heads * size);
  });
  return Error::Success();
}

}  // namespace
}  // namespace muxjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(muxjax_rms_norm, muxjax::RmsNorm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(muxjax_heads, muxjax::Heads,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("eps"));
