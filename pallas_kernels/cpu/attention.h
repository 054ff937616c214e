// What both ways to attend have in common: where keys and values lie, and the running softmax.

#ifndef MUXJAX_CPU_ATTENTION_H_
#define MUXJAX_CPU_ATTENTION_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "panel.h"
#include "vectors.h"

namespace muxjax {

constexpr int64_t kTokens = 64;  // of the context at a time
constexpr int64_t kLanes = 128;  // numbers in a row of the pool
constexpr float kMasked = -1e30f;

struct Geometry {
  int64_t heads, kv_heads, head_dim, padded;  // of the model; padded: as in the pool
  int64_t rows, rows_per_token;               // of a page
  int64_t layer, blocks;                      // pages after a block's first; blocks of a table
  float scale, softcap;                       // softcap 0: none
  int64_t window;                             // 0: none

  int64_t Shared() const { return heads / kv_heads; }  // query heads of a key/value head
  int64_t Width() const { return (head_dim + kPanel - 1) / kPanel * kPanel; }
};

// Queries [first, first + count) of the step, which are one sequence's, and the query heads that
// share the key/value heads [head, head + heads). Its rows are queries times heads that share a
// key/value head; those of the next key/value head come after them.
struct Piece {
  int32_t seq, head, heads, first, count;
};

// The step's sequences: their queries, and their keys and values in a pool of `Number`s.
template <typename Number>
struct Sequences {
  const Geometry& g;
  const float* q;
  const Number* kv;
  const int32_t *tables, *lens, *starts;
  float* out;

  // The position of the step's query i of the piece's sequence is i + Shift().
  int64_t Shift(const Piece& piece) const { return lens[piece.seq] - starts[piece.seq + 1]; }

  // Positions [FirstSeen, End) are what the piece's queries see.
  int64_t FirstSeen(const Piece& piece) const { return Lowest(piece.first + Shift(piece)); }
  int64_t End(const Piece& piece) const {
    return std::min<int64_t>(lens[piece.seq], piece.first + piece.count + Shift(piece));
  }

  // The first position that a query sees, whose own is given.
  int64_t Lowest(int64_t own) const {
    return g.window ? std::max<int64_t>(0, own - g.window + 1) : 0;
  }

  // Of the 64 tokens from `token` on those that the query of a row of the piece sees, as bits.
  uint64_t Seen(const Piece& piece, int64_t row, int64_t token) const {
    const int64_t own = std::min<int64_t>(
        lens[piece.seq] - 1, piece.first + row / g.Shared() + Shift(piece));
    const int64_t from = std::max<int64_t>(0, Lowest(own) - token);
    const int64_t to = std::min<int64_t>(kTokens, own + 1 - token);
    const uint64_t below_end = to <= 0 ? 0 : to == 64 ? ~0ull : (1ull << to) - 1;
    return from >= 64 ? 0 : below_end & ~((1ull << from) - 1);
  }

  // The keys of the piece's first head in a token; the next heads' follow, and the values.
  const Number* Keys(const Piece& piece, int64_t token) const {
    const int64_t tokens_in_page = g.rows / g.rows_per_token;
    const int64_t page = tables[piece.seq * g.blocks + token / tokens_in_page] + g.layer;
    const int64_t row = page * g.rows + token % tokens_in_page * g.rows_per_token;
    return kv + row * kLanes + piece.head * g.padded;
  }
  int64_t ToValues() const { return g.kv_heads * g.padded; }

  // Reads a number of each line of the tokens [token, end), in the order of memory, before they are
  // worked on: the processor then sees what comes next and fetches it ahead. What works on a block
  // reads it in another order, and waits for each line: decoding took more than twice as long so,
  // and prefetch instructions for the next block in between helped half as much.
  void Touch(const Piece& piece, int64_t token, int64_t end) const {
    constexpr int64_t kLine = 64 / sizeof(Number);
    const int64_t numbers = piece.heads * g.padded;
    for (int64_t t = token; t < end; ++t) {
      const volatile Number* keys = Keys(piece, t);
      for (int64_t i = 0; i < numbers; i += kLine) (void)keys[i];
      for (int64_t i = 0; i < numbers; i += kLine) (void)keys[ToValues() + i];
    }
  }

  // Where a row of the piece stands among queries and outputs: a query's heads lie together.
  int64_t Place(const Piece& piece, int64_t head, int64_t row) const {
    const int64_t query = piece.first + row / g.Shared();
    return (query * g.heads + (piece.head + head) * g.Shared() + row % g.Shared()) * g.head_dim;
  }
};

// Sums of values weighted by the softmax of scores that come 64 at a time, for some rows.
class Running {
 public:
  void Begin(int64_t rows, int64_t width) {
    width_ = width;
    out_.assign(rows * width, 0.0f);
    maximum_.assign(rows, kMasked);
    denominator_.assign(rows, 0.0f);
  }

  // The row's sums so far, to which the values are added that the last weights belong to.
  float* Sums(int64_t row) { return out_.data() + row * width_; }

  // Scores of a row for the tokens that it sees become weights, 0 for those that it does not see;
  // what the row has so far is scaled down to fit.
  void Weigh(float* scores, int64_t row, uint64_t seen, float softcap) {
    if (softcap != 0) {
      for (int64_t i = 0; i < kTokens; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
    }
    if (seen == 0) {
      std::fill_n(scores, kTokens, 0.0f);
      return;
    }
    __m512 highest = _mm512_set1_ps(kMasked);
    for (int64_t i = 0; i < kTokens; i += 16) {
      const __mmask16 mask = seen >> i;
      highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_loadu_ps(scores + i));
    }
    const float old = maximum_[row];
    const float maximum = std::max(old, _mm512_reduce_max_ps(highest));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < kTokens; i += 16) {
      const __mmask16 mask = seen >> i;
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
