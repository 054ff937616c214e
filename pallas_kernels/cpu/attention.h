// Common parts of row and panel attention: addresses of keys and values, and the online softmax.

#ifndef MUXJAX_CPU_ATTENTION_H_
#define MUXJAX_CPU_ATTENTION_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "panel.h"
#include "vectors.h"

namespace muxjax {

constexpr int64_t kTokens = 64;  // tokens of the context per block
constexpr int64_t kLanes = 128;  // elements in a row of the pool
constexpr float kMasked = -1e30f;  // score of masked positions

struct Geometry {
  int64_t heads, kv_heads, head_dim, padded;  // padded: head size in the pool
  int64_t rows, rows_per_token;               // rows of a page; rows of a token
  int64_t layer, blocks;                      // page offset of the layer; blocks per table
  float scale, softcap;                       // softcap 0: none
  int64_t window;                             // 0: none

  int64_t Group() const { return heads / kv_heads; }  // query heads per key/value head
  int64_t Width() const { return (head_dim + kPanel - 1) / kPanel * kPanel; }
};

// A unit of work: queries [first, first + count) of one sequence, and the query heads of the
// key/value heads [head, head + heads). For each key/value head, its rows are queries times heads
// of the group.
struct WorkItem {
  int32_t seq, head, heads, first, count;
};

// The sequences of a step: their queries, and their keys and values in a pool of type `Number`.
template <typename Number>
struct Sequences {
  const Geometry& g;
  const float* q;
  const Number* kv;
  const int32_t *tables, *lens, *starts;
  float* out;

  // Query i of the step, in the item's sequence, is at position i + Shift(item).
  int64_t Shift(const WorkItem& item) const { return lens[item.seq] - starts[item.seq + 1]; }

  // Positions [FirstVisible, End) are visible to at least one of the item's queries.
  int64_t FirstVisible(const WorkItem& item) const { return Lowest(item.first + Shift(item)); }
  int64_t End(const WorkItem& item) const {
    return std::min<int64_t>(lens[item.seq], item.first + item.count + Shift(item));
  }

  // The first position visible to a query at `position`.
  int64_t Lowest(int64_t position) const {
    return g.window ? std::max<int64_t>(0, position - g.window + 1) : 0;
  }

  // Bit mask of the 64 tokens starting at `token`: those visible to the query of a row of the item.
  uint64_t VisibleMask(const WorkItem& item, int64_t row, int64_t token) const {
    const int64_t position = std::min<int64_t>(
        lens[item.seq] - 1, item.first + row / g.Group() + Shift(item));
    const int64_t from = std::max<int64_t>(0, Lowest(position) - token);
    const int64_t to = std::min<int64_t>(kTokens, position + 1 - token);
    const uint64_t below_end = to <= 0 ? 0 : to == 64 ? ~0ull : (1ull << to) - 1;
    return from >= 64 ? 0 : below_end & ~((1ull << from) - 1);
  }

  // The keys of the item's first head in a token; the next heads and the values follow.
  const Number* Keys(const WorkItem& item, int64_t token) const {
    const int64_t tokens_in_page = g.rows / g.rows_per_token;
    const int64_t page = tables[item.seq * g.blocks + token / tokens_in_page] + g.layer;
    const int64_t row = page * g.rows + token % tokens_in_page * g.rows_per_token;
    return kv + row * kLanes + item.head * g.padded;
  }
  // Offset from a head's keys to its values.
  int64_t ValueOffset() const { return g.kv_heads * g.padded; }

  // Reads one element of each cache line of the tokens [token, end) in memory order, to trigger the
  // hardware prefetcher. The computation reads a block in another order and would wait for each
  // line; prefetch instructions help less (docs/measurements/cpu-kernels.md).
  void TouchLines(const WorkItem& item, int64_t token, int64_t end) const {
    constexpr int64_t kLine = 64 / sizeof(Number);
    const int64_t numbers = item.heads * g.padded;
    for (int64_t t = token; t < end; ++t) {
      const volatile Number* keys = Keys(item, t);
      for (int64_t i = 0; i < numbers; i += kLine) (void)keys[i];
      for (int64_t i = 0; i < numbers; i += kLine) (void)keys[ValueOffset() + i];
    }
  }

  // Offset of a row of the item in `q` and `out`, where the heads of a query are contiguous.
  int64_t RowOffset(const WorkItem& item, int64_t head, int64_t row) const {
    const int64_t query = item.first + row / g.Group();
    return (query * g.heads + (item.head + head) * g.Group() + row % g.Group()) * g.head_dim;
  }
};

// Online softmax: sums of values weighted by the softmax of scores, 64 scores of a row at a time.
class OnlineSoftmax {
 public:
  void Begin(int64_t rows, int64_t width) {
    width_ = width;
    out_.assign(rows * width, 0.0f);
    maximum_.assign(rows, kMasked);
    denominator_.assign(rows, 0.0f);
  }

  // The row's sums so far. The caller adds the values times the weights of the last UpdateWeights.
  float* Sums(int64_t row) { return out_.data() + row * width_; }

  // Replaces a row's scores by weights, 0 for tokens that are not visible. Rescales its sums to the
  // new maximum.
  void UpdateWeights(float* scores, int64_t row, uint64_t visible, float softcap) {
    if (softcap != 0) {
      for (int64_t i = 0; i < kTokens; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
    }
    if (visible == 0) {
      std::fill_n(scores, kTokens, 0.0f);
      return;
    }
    __m512 highest = _mm512_set1_ps(kMasked);
    for (int64_t i = 0; i < kTokens; i += 16) {
      const __mmask16 mask = visible >> i;
      highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_loadu_ps(scores + i));
    }
    const float old = maximum_[row];
    const float maximum = std::max(old, _mm512_reduce_max_ps(highest));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < kTokens; i += 16) {
      const __mmask16 mask = visible >> i;
      const __m512 score = _mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(maximum));
      const __m512 weight = _mm512_maskz_mov_ps(mask, Exp(score));
      sum = _mm512_add_ps(sum, weight);
      _mm512_storeu_ps(scores + i, weight);
    }
    const float decay = old == kMasked ? 0.0f : std::exp(old - maximum);
    denominator_[row] = denominator_[row] * decay + _mm512_reduce_add_ps(sum);
    maximum_[row] = maximum;
    if (decay != 1.0f) {
      for (int64_t i = 0; i < width_; ++i) Sums(row)[i] *= decay;
    }
  }

  // Writes the normalized sums of a row.
  void Finish(int64_t row, float* to, int64_t count) {
    const float by = 1.0f / std::max(denominator_[row], 1e-30f);
    for (int64_t i = 0; i < count; ++i) to[i] = Sums(row)[i] * by;
  }

 private:
  int64_t width_ = 0;
  std::vector<float> out_, maximum_, denominator_;
};

}  // namespace muxjax

#endif  // MUXJAX_CPU_ATTENTION_H_
