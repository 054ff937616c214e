// Products of activations with a matrix in panels: y[t][o] = sum over i of x[t][i] w[o][i].
//
// w is [O / 32, I / p, 32, p], with p elements in 32 bits (panel.h). Sums are float32, or exact in
// int32. An output is summed in the same order for any number of rows, so a request's results do
// not depend on its batch.

#include <cmath>
#include <cstring>
#include <vector>

#include "panel.h"
#include "parallel.h"

namespace muxjax {
namespace {

namespace ffi = xla::ffi;
using ffi::Buffer;
using ffi::Error;
using ffi::Result;

constexpr int64_t kBlocksPerItem = 8;  // blocks of rows in a work item
constexpr int64_t kSerial = 1 << 15;   // maximum words of x that one thread packs alone

// A block of rows: its first row and its number of rows.
struct Block {
  int64_t first, rows;
  Block(int64_t block, int64_t count)
      : first(FirstRow(block, count)), rows(FirstRow(block + 1, count) - first) {}
};

// Parallel loop over panels, and with many rows over groups of their blocks, so that no thread is
// idle when panels are few. The next panel is prefetched during the second and third block of a
// panel; the first block is bound by memory (docs/measurements/cpu-kernels.md).
//
// Calls times(block, panel, weights of the panel, prefetch, ahead); see TimesPanel.
template <typename Times>
void Multiply(ffi::ThreadPool& pool, int64_t rows, const uint32_t* w, int64_t units,
              int64_t panels, const Times& times) {
  const int64_t blocks = Blocks(rows), groups = (blocks + kBlocksPerItem - 1) / kBlocksPerItem;
  ForEach(pool, panels * groups, [&](int64_t item) {
    const int64_t panel = item / groups, group = item % groups;
    const uint32_t* weights = w + panel * units * kPanel;
    const int64_t first = blocks * group / groups, end = blocks * (group + 1) / groups;
    const char* prefetch = reinterpret_cast<const char*>(weights + units * kPanel);
    for (int64_t index = first; index < end; ++index) {
      const bool fetches = groups == 1 && panel + 1 < panels && (index == 1 || index == 2);
      times(Block(index, rows), panel, weights, index == 2 ? prefetch + 64 * units : prefetch,
            !fetches ? 0 : blocks == 2 ? 2 : 1);
    }
  });
}

// Multiply for types whose sums need no conversion.
template <typename Kind>
void MultiplyFloats(ffi::ThreadPool& pool, const uint32_t* x, int64_t rows, const void* w,
                    int64_t units, int64_t panels, float* y) {
  const int64_t step = panels * kPanel;
  Multiply(pool, rows, static_cast<const uint32_t*>(w), units, panels,
           [&](Block block, int64_t panel, const uint32_t* weights, const char* prefetch,
               int64_t ahead) {
             TimesPanel<Kind>(x + block.first * units, block.rows, weights, units, prefetch, ahead,
                              y + block.first * step + panel * kPanel, step);
           });
}

// Calls prepare(row, to, step) for each row; word u of the row must be written to to[u * step].
template <typename Prepare>
void Pack(ffi::ThreadPool& pool, int64_t rows, int64_t units, uint32_t* words,
          const Prepare& prepare) {
  const auto pack_block = [&](int64_t index) {
    const Block block(index, rows);
    for (int64_t row = 0; row < block.rows; ++row) {
      prepare(block.first + row, words + block.first * units + row, block.rows);
    }
  };
  if (rows * units <= kSerial) {
    for (int64_t index = 0; index < Blocks(rows); ++index) pack_block(index);
  } else {
    ForEach(pool, Blocks(rows), pack_block);
  }
}

// Memory for the packed x. Each calling thread reuses its memory between calls.
uint32_t* Words(int64_t count) {
  thread_local std::vector<uint32_t> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

struct Sizes {
  int64_t rows, inputs, panels, units;
};

template <typename X, typename W>
Sizes SizesOf(const X& x, const W& w) {
  const auto xs = x.dimensions(), ws = w.dimensions();
  return {xs[0], xs[1], ws[0], ws[1]};
}

template <typename Kind, typename X, typename W, typename Y>
Error CheckShapes(const X& x, const W& w, Y& y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 4 || ys.size() != 2 || ws[2] != kPanel ||
      ws[3] != Kind::kInUnit || xs[1] != ws[1] * ws[3] || ys[0] != xs[0] ||
      ys[1] != ws[0] * kPanel) {
    return Error::InvalidArgument("product: shapes do not match");
  }
  return Error::Success();
}

Error ProductF32(ffi::ThreadPool pool, Buffer<ffi::F32> x, Buffer<ffi::F32> w,
                 Result<Buffer<ffi::F32>> y) {
  if (auto error = CheckShapes<Float32>(x, w, y); error.failure()) return error;
  const Sizes s = SizesOf(x, w);
  uint32_t* words = Words(s.rows * s.units);
  const auto* numbers = reinterpret_cast<const uint32_t*>(x.typed_data());
  Pack(pool, s.rows, s.units, words, [&](int64_t row, uint32_t* to, int64_t step) {
    const uint32_t* from = numbers + row * s.inputs;
    for (int64_t u = 0; u < s.units; ++u) to[u * step] = from[u];
  });
  MultiplyFloats<Float32>(pool, words, s.rows, w.untyped_data(), s.units, s.panels,
                          y->typed_data());
  return Error::Success();
}

Error ProductBF16(ffi::ThreadPool pool, Buffer<ffi::F32> x, Buffer<ffi::BF16> w,
                  Result<Buffer<ffi::F32>> y) {
  if (auto error = CheckShapes<BFloat16>(x, w, y); error.failure()) return error;
  const Sizes s = SizesOf(x, w);
  uint32_t* words = Words(s.rows * s.units);
  const float* numbers = x.typed_data();
  Pack(pool, s.rows, s.units, words, [&](int64_t row, uint32_t* to, int64_t step) {
    const float* from = numbers + row * s.inputs;
    alignas(32) uint32_t rounded[8];
    for (int64_t u = 0; u < s.units; u += 8) {
      const int64_t left = std::min<int64_t>(8, s.units - u);
      const __m512 some = _mm512_maskz_loadu_ps((1u << (2 * left)) - 1, from + 2 * u);
      _mm256_store_si256(reinterpret_cast<__m256i*>(rounded), (__m256i)_mm512_cvtneps_pbh(some));
      for (int64_t i = 0; i < left; ++i) to[(u + i) * step] = rounded[i];
    }
  });
  MultiplyFloats<BFloat16>(pool, words, s.rows, w.untyped_data(), s.units, s.panels,
                           y->typed_data());
  return Error::Success();
}

// Rotates blocks of 64 elements by Sylvester's Hadamard matrix: six rounds of sums and differences.
void Rotate64(const float* from, float* to, int64_t count) {
  const __m512 scale = _mm512_set1_ps(0.125f);
  for (int64_t i = 0; i < count; i += 64) {
    __m512 a = _mm512_loadu_ps(from + i), b = _mm512_loadu_ps(from + i + 16);
    __m512 c = _mm512_loadu_ps(from + i + 32), d = _mm512_loadu_ps(from + i + 48);
    const __m512 ac = _mm512_add_ps(a, c), bd = _mm512_add_ps(b, d);
    const __m512 a_c = _mm512_sub_ps(a, c), b_d = _mm512_sub_ps(b, d);
    __m512 all[4] = {_mm512_add_ps(ac, bd), _mm512_sub_ps(ac, bd), _mm512_add_ps(a_c, b_d),
                     _mm512_sub_ps(a_c, b_d)};
    for (int r = 0; r < 4; ++r) {
      __m512 v = all[r];
      __m512 other = _mm512_shuffle_f32x4(v, v, 0x4e);
      v = _mm512_mask_sub_ps(_mm512_add_ps(v, other), 0xff00, other, v);
      other = _mm512_shuffle_f32x4(v, v, 0xb1);
      v = _mm512_mask_sub_ps(_mm512_add_ps(v, other), 0xf0f0, other, v);
      other = _mm512_permute_ps(v, 0x4e);
      v = _mm512_mask_sub_ps(_mm512_add_ps(v, other), 0xcccc, other, v);
      other = _mm512_permute_ps(v, 0xb1);
      v = _mm512_mask_sub_ps(_mm512_add_ps(v, other), 0xaaaa, other, v);
      _mm512_storeu_ps(to + i + 16 * r, _mm512_mul_ps(v, scale));
    }
  }
}

// Rotate64 for blocks of any power of two.
void Rotate(int64_t block, const float* from, float* to, int64_t count) {
  if (block == 64) return Rotate64(from, to, count);
  std::memcpy(to, from, count * sizeof(float));
  const float scale = 1.0f / std::sqrt(static_cast<float>(block));
  for (int64_t i = 0; i < count; i += block) {
    for (int64_t half = block / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < block; ++j) {
        if (j & half) continue;
        const float a = to[i + j], b = to[i + j + half];
        to[i + j] = a + b;
        to[i + j + half] = a - b;
      }
    }
    for (int64_t j = 0; j < block; ++j) to[i + j] *= scale;
  }
}

struct RowScale {
  float scale;     // of the row's elements
  int32_t excess;  // 128 times the sum of the row's elements, to be subtracted (Int8)
};

// Rounds a rotated row to int8: word u, of four elements, is written to to[u * step].
RowScale RoundRow(const float* from, int64_t count, uint32_t* to, int64_t step) {
  const auto load = [&](int64_t i) {
    return _mm512_maskz_loadu_ps((1u << std::min<int64_t>(16, count - i)) - 1, from + i);
  };
  __m512 most = _mm512_setzero_ps();
  __mmask16 nans = 0;  // separate, because the maximum may ignore NaN
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 some = load(i);
    nans |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, _mm512_abs_ps(some));
  }
  const float highest = nans ? NAN : _mm512_reduce_max_ps(most);
  const float scale = highest == 0 ? 1.0f : highest / 127;
  __m512i sum = _mm512_setzero_si512();
  alignas(16) uint32_t rounded[4];
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load(i), _mm512_set1_ps(1 / scale)));
    sum = _mm512_add_epi32(sum, whole);
    _mm_store_si128(reinterpret_cast<__m128i*>(rounded), _mm512_cvtepi32_epi8(whole));
    for (int64_t j = 0; j < 4 && i + 4 * j < count; ++j) to[(i / 4 + j) * step] = rounded[j];
  }
  return {scale, 128 * _mm512_reduce_add_epi32(sum)};
}

Error ProductInt8(ffi::ThreadPool pool, Buffer<ffi::F32> x, Buffer<ffi::S8> w,
                  Buffer<ffi::F32> scales, Result<Buffer<ffi::F32>> y, int64_t block) {
  if (auto error = CheckShapes<Int8>(x, w, y); error.failure()) return error;
  const Sizes s = SizesOf(x, w);
  if (block < 1 || (block & (block - 1)) || s.inputs % block ||
      static_cast<int64_t>(scales.element_count()) != s.panels * kPanel) {
    return Error::InvalidArgument("int8 product: scales or blocks do not match the shapes");
  }
  uint32_t* words = Words(s.rows * s.units);
  std::vector<RowScale> scales_of_rows(s.rows);
  const float* numbers = x.typed_data();
  Pack(pool, s.rows, s.units, words, [&](int64_t row, uint32_t* to, int64_t step) {
    thread_local std::vector<float> rotated;
    rotated.resize(s.inputs);
    Rotate(block, numbers + row * s.inputs, rotated.data(), s.inputs);
    scales_of_rows[row] = RoundRow(rotated.data(), s.inputs, to, step);
  });
  float* out = y->typed_data();
  const float* by = scales.typed_data();
  const int64_t step = s.panels * kPanel;
  Multiply(pool, s.rows, static_cast<const uint32_t*>(w.untyped_data()), s.units, s.panels,
           [&](Block block, int64_t panel, const uint32_t* weights, const char* prefetch,
               int64_t ahead) {
             alignas(64) int32_t sums[kRows * kPanel];
             TimesPanel<Int8>(words + block.first * s.units, block.rows, weights, s.units, prefetch,
                              ahead, sums, kPanel);
             for (int64_t row = 0; row < block.rows; ++row) {
               const RowScale row_scale = scales_of_rows[block.first + row];
               float* to = out + (block.first + row) * step + panel * kPanel;
               for (int64_t i = 0; i < kPanel; ++i) {
                 const int32_t sum = sums[row * kPanel + i] - row_scale.excess;
                 to[i] = static_cast<float>(sum) * row_scale.scale * by[panel * kPanel + i];
               }
             }
           });
  return Error::Success();
}

}  // namespace
}  // namespace muxjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(muxjax_product_f32, muxjax::ProductF32,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(muxjax_product_bf16, muxjax::ProductBF16,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(muxjax_product_int8, muxjax::ProductInt8,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("block"));
