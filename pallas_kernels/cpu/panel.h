// The inner loop of all products: a block of rows of x times a panel of 32 outputs.
//
// A panel is stored as [units][32] words of 32 bits. A word holds the weights of one output for one
// unit of inputs: 1 float32, 2 bfloat16 or 4 int8 elements. A block has up to 12 rows of x and is
// stored as [units][rows] such words.

#ifndef MUXJAX_CPU_PANEL_H_
#define MUXJAX_CPU_PANEL_H_

#include <immintrin.h>

#include <cstdint>

namespace muxjax {

constexpr int64_t kPanel = 32;  // outputs in a panel: two registers
constexpr int64_t kRows = 12;   // maximum rows: registers hold 24 sums, 2 words of w and 1 of x

struct Float32 {
  static constexpr int64_t kInUnit = 1;
  using Sum = __m512;
  using Word = __m512;
  static Sum Zero() { return _mm512_setzero_ps(); }
  static Word Load(const uint32_t* w) { return _mm512_loadu_ps(w); }
  static Sum Add(Sum sum, Word w, uint32_t x) {
    return _mm512_fmadd_ps(w, _mm512_castsi512_ps(_mm512_set1_epi32(x)), sum);
  }
};

struct BFloat16 {
  static constexpr int64_t kInUnit = 2;
  using Sum = __m512;
  using Word = __m512bh;
  static Sum Zero() { return _mm512_setzero_ps(); }
  static Word Load(const uint32_t* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static Sum Add(Sum sum, Word w, uint32_t x) {
    return _mm512_dpbf16_ps(sum, w, (__m512bh)_mm512_set1_epi32(x));
  }
};

// The instruction multiplies unsigned by signed bytes, so 128 is added to the weights. This adds
// 128 times the sum of a row of x to each of its outputs, which the caller subtracts.
struct Int8 {
  static constexpr int64_t kInUnit = 4;
  using Sum = __m512i;
  using Word = __m512i;
  static Sum Zero() { return _mm512_setzero_si512(); }
  static Word Load(const uint32_t* w) {
    return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(-128));
  }
  static Sum Add(Sum sum, Word w, uint32_t x) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x));
  }
};

// Splits `count` rows into blocks of similar size: the number of blocks, and a block's first row.
inline int64_t Blocks(int64_t count) { return (count + kRows - 1) / kRows; }
inline int64_t FirstRow(int64_t block, int64_t count) { return count * block / Blocks(count); }

// Expands DO for each possible row of a block.
#define MUXJAX_EACH_ROW(DO) \
  DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

// Multiplies one block by a panel. The sums of row r are written to the 32 words at out[r * step].
// For each unit, the next `ahead` cache lines from `prefetch` are prefetched.
//
// Each sum is a separate variable and no function is called, because GCC 12 would keep an array of
// sums, or variables passed to a function, in memory instead of registers.
template <int rows, typename Kind>
void TimesRows(const uint32_t* x, const uint32_t* w, int64_t units, const char* prefetch,
               int64_t ahead, void* out, int64_t step) {
#define MUXJAX_BEGIN(r) [[maybe_unused]] auto low##r = Kind::Zero(), high##r = Kind::Zero();
#define MUXJAX_ADD(r)                           \
  if constexpr (r < rows) {                     \
    low##r = Kind::Add(low##r, first, x[r]);    \
    high##r = Kind::Add(high##r, second, x[r]); \
  }
#define MUXJAX_STORE(r)                                                             \
  if constexpr (r < rows) {                                                         \
    _mm512_storeu_si512(static_cast<uint32_t*>(out) + r * step, (__m512i)low##r);       \
    _mm512_storeu_si512(static_cast<uint32_t*>(out) + r * step + 16, (__m512i)high##r); \
  }
  MUXJAX_EACH_ROW(MUXJAX_BEGIN)
  for (int64_t u = 0; u < units; ++u, x += rows, w += kPanel) {
    const auto first = Kind::Load(w), second = Kind::Load(w + 16);
    MUXJAX_EACH_ROW(MUXJAX_ADD)
    if (ahead) {
      _mm_prefetch(prefetch, _MM_HINT_T1);
      if (ahead > 1) _mm_prefetch(prefetch + 64, _MM_HINT_T1);
      prefetch += 64 * ahead;
    }
  }
  MUXJAX_EACH_ROW(MUXJAX_STORE)
#undef MUXJAX_BEGIN
#undef MUXJAX_ADD
#undef MUXJAX_STORE
}

// TimesRows for a number of rows that is known at run time.
template <typename Kind>
void TimesPanel(const uint32_t* x, int64_t rows, const uint32_t* w, int64_t units,
                const char* prefetch, int64_t ahead, void* out, int64_t step) {
#define MUXJAX_CASE(r) \
  if (rows == r + 1) return TimesRows<r + 1, Kind>(x, w, units, prefetch, ahead, out, step);
  MUXJAX_EACH_ROW(MUXJAX_CASE)
#undef MUXJAX_CASE
}

}  // namespace muxjax

#endif  // MUXJAX_CPU_PANEL_H_
