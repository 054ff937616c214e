// Attention of a single query, as in decode. Reads keys and values in place, once for all query
// heads of a group.

#ifndef MUXJAX_CPU_ATTENTION_ROWS_H_
#define MUXJAX_CPU_ATTENTION_ROWS_H_

#include "attention.h"

namespace muxjax {

constexpr int64_t kMaxGroup = 8;  // query heads per key/value head, each with sums in two registers

#define MUXJAX_EACH_HEAD(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

template <typename Number>
class RowAttention {
 public:
  explicit RowAttention(const Sequences<Number>& sequences)
      : all_(sequences), g_(sequences.g), width_(g_.Width()) {}

  void Run(const WorkItem& item) const {
#define MUXJAX_CASE(r) \
  if (g_.Group() == r + 1) return RunFor<r + 1>(item);
    MUXJAX_EACH_HEAD(MUXJAX_CASE)
#undef MUXJAX_CASE
  }

 private:
  // Scratch memory of a thread. Queries are scaled and padded with zeros.
  struct Scratch {
    std::vector<float> queries;
    OnlineSoftmax softmax;
    alignas(64) float scores[kMaxGroup][kTokens];
    alignas(64) float parts[kMaxGroup][16][16];
  };

  // Not inlined: the compiler would look up the thread-local address in the innermost loop.
  __attribute__((noinline)) static Scratch& ThreadScratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  template <int group>
  void RunFor(const WorkItem& item) const {
    Scratch& s = ThreadScratch();
    const int64_t rows = item.heads * group, end = all_.End(item), first = all_.FirstVisible(item);
    s.softmax.Begin(rows, width_);
    s.queries.assign(rows * width_, 0.0f);
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = all_.q + all_.RowOffset(item, row / group, row % group);
      float* to = s.queries.data() + row * width_;
      for (int64_t i = 0; i < g_.head_dim; ++i) to[i] = from[i] * g_.scale;
    }
    for (int64_t token = first; token < end; token += kTokens) {
      const int64_t tokens = std::min(kTokens, end - token);
      all_.TouchLines(item, token, token + tokens);
      const uint64_t visible = all_.VisibleMask(item, 0, token);
      const Number* keys[kTokens];
      for (int64_t t = 0; t < tokens; ++t) keys[t] = all_.Keys(item, token + t);
      for (int64_t head = 0; head < item.heads; ++head) {
        Score<group>(s.queries.data() + head * group * width_, keys, head * g_.padded, tokens, s);
        for (int64_t row = 0; row < group; ++row) {
          s.softmax.UpdateWeights(s.scores[row], head * group + row, visible, g_.softcap);
        }
        AddValues<group>(keys, all_.ValueOffset() + head * g_.padded, tokens, head * group, s);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      s.softmax.Finish(row, all_.out + all_.RowOffset(item, row / group, row % group), g_.head_dim);
    }
  }

  // Products of the queries with each token's key at keys[t] + offset.
  template <int group>
  void Score(const float* q, const Number* const* keys, int64_t offset, int64_t tokens,
             Scratch& s) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const Number* key = keys[t] + offset;
#define MUXJAX_BEGIN(r) [[maybe_unused]] __m512 sum##r = _mm512_setzero_ps();
#define MUXJAX_ADD(r) \
  if constexpr (r < group) sum##r = _mm512_fmadd_ps(_mm512_loadu_ps(q + r * width_ + i), k, sum##r);
#define MUXJAX_STORE(r) \
  if constexpr (r < group) _mm512_store_ps(s.parts[r][t % 16], sum##r);
      MUXJAX_EACH_HEAD(MUXJAX_BEGIN)
      int64_t i = 0;
      for (; i + 16 <= g_.head_dim; i += 16) {
        const __m512 k = Load16(key + i);
        MUXJAX_EACH_HEAD(MUXJAX_ADD)
      }
      if (i < g_.head_dim) {
        const __m512 k = Load16(key + i, First(g_.head_dim - i));
        MUXJAX_EACH_HEAD(MUXJAX_ADD)
      }
      MUXJAX_EACH_HEAD(MUXJAX_STORE)
#undef MUXJAX_BEGIN
#undef MUXJAX_ADD
#undef MUXJAX_STORE
      if (t % 16 == 15 || t + 1 == tokens) {
        for (int64_t row = 0; row < group; ++row) {
          _mm512_store_ps(s.scores[row] + t / 16 * 16, Sum16(s.parts[row]));
        }
      }
    }
  }

  // Adds each token's value at keys[t] + offset, times the rows' weights.
  template <int group>
  void AddValues(const Number* const* keys, int64_t offset, int64_t tokens, int64_t row,
                 Scratch& s) const {
    for (int64_t i = 0; i < g_.head_dim; i += 32) {
      const __mmask16 low = First(g_.head_dim - i), high = First(g_.head_dim - i - 16);
      float* sums = s.softmax.Sums(row) + i;
#define MUXJAX_BEGIN(r)                                 \
  [[maybe_unused]] __m512 low##r, high##r;              \
  if constexpr (r < group) {                           \
    low##r = _mm512_loadu_ps(sums + r * width_);        \
    high##r = _mm512_loadu_ps(sums + r * width_ + 16);  \
  }
#define MUXJAX_ADD(r)                                         \
  if constexpr (r < group) {                                 \
    const __m512 weight = _mm512_set1_ps(s.scores[r][t]);     \
    low##r = _mm512_fmadd_ps(weight, first, low##r);          \
    high##r = _mm512_fmadd_ps(weight, second, high##r);       \
  }
#define MUXJAX_STORE(r)                                 \
  if constexpr (r < group) {                           \
    _mm512_storeu_ps(sums + r * width_, low##r);        \
    _mm512_storeu_ps(sums + r * width_ + 16, high##r);  \
  }
      MUXJAX_EACH_HEAD(MUXJAX_BEGIN)
      for (int64_t t = 0; t < tokens; ++t) {
        const __m512 first = Load16(keys[t] + offset + i, low);
        const __m512 second = Load16(keys[t] + offset + i + 16, high);
        MUXJAX_EACH_HEAD(MUXJAX_ADD)
      }
      MUXJAX_EACH_HEAD(MUXJAX_STORE)
#undef MUXJAX_BEGIN
#undef MUXJAX_ADD
#undef MUXJAX_STORE
    }
  }

  const Sequences<Number>& all_;
  const Geometry& g_;
  const int64_t width_;
};

}  // namespace muxjax

#endif  // MUXJAX_CPU_ATTENTION_ROWS_H_
