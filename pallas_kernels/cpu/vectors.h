// Vector operations on 16 floats: loads, exponential, sums and transposition.

#ifndef MUXJAX_CPU_VECTORS_H_
#define MUXJAX_CPU_VECTORS_H_

#include <immintrin.h>

#include <cstdint>

namespace muxjax {

using BFloat16Bits = uint16_t;  // the upper half of a float32

inline __m512 Load16(const float* from, __mmask16 some = 0xffff) {
  return _mm512_maskz_loadu_ps(some, from);
}
inline __m512 Load16(const BFloat16Bits* from, __mmask16 some = 0xffff) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// The mask of the first `count` of 16 elements, with `count` clamped to 0..16.
inline __mmask16 First(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

// e^x for x <= 0, to about one unit in the last place: x = n ln 2 + r, with a polynomial for e^r.
inline __m512 Exp(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  // Taylor series up to r^7: with |r| < 0.35, the remainder is below 1e-8.
  __m512 y = _mm512_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(y, n);
}

// Element t of the result is the sum of the 16 floats at from[t].
inline __m512 Sum16(const float (*from)[16]) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 x = _mm512_load_ps(from[2 * i]), y = _mm512_load_ps(from[2 * i + 1]);
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  // Each 128-bit lane of b[i] holds a part of the sums 4 i to 4 i + 3.
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                       _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// to[i][j] = from[j][i] for 16 rows of `count` <= 16 elements; null rows are zeros.
template <typename Number>
void Transpose16(const Number* const (&from)[16], int64_t count, float* to, int64_t step) {
  const __mmask16 some = (1u << count) - 1;
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    a[i] = from[i] ? Load16(from[i], some) : _mm512_setzero_ps();
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d c = _mm512_castps_pd(b[4 * i]), d = _mm512_castps_pd(b[4 * i + 1]);
    const __m512d e = _mm512_castps_pd(b[4 * i + 2]), f = _mm512_castps_pd(b[4 * i + 3]);
    a[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, e));
    a[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, e));
    a[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(d, f));
    a[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(d, f));
  }
  // a[4 g + j] holds columns j, j + 4, j + 8, j + 12 of rows 4 g to 4 g + 3, one column per lane.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 high23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    b[j] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    b[j + 8] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    b[j + 4] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    b[j + 12] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
  for (int64_t i = 0; i < count; ++i) _mm512_storeu_ps(to + i * step, b[i]);
}

}  // namespace muxjax

#endif  // MUXJAX_CPU_VECTORS_H_
