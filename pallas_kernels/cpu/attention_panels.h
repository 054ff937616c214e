// Attention of many queries: keys and values are laid out as panels once for all of them.
//
// Of each block of 64 tokens the keys become two panels of 32 tokens, the values panels of 32 of the
// head's numbers (panel.h), zeros where the sequence or the head has none.

#ifndef MUXJAX_CPU_ATTENTION_PANELS_H_
#define MUXJAX_CPU_ATTENTION_PANELS_H_

#include "attention.h"

namespace muxjax {

template <typename Number>
class PanelAttention {
 public:
  explicit PanelAttention(const Sequences<Number>& sequences)
      : all_(sequences), g_(sequences.g), width_(g_.Width()) {}

  void Run(const Piece& piece) const {
    Scratch& s = Own();
    const int64_t rows = piece.count * g_.Shared(), end = all_.End(piece);
    s.Reserve(g_, piece.heads * rows, width_);
    for (int64_t head = 0; head < piece.heads; ++head) PackQueries(piece, head, rows, s);
    for (int64_t token = all_.FirstSeen(piece) / kTokens * kTokens; token < end;
         token += kTokens) {
      const int64_t tokens = std::min(kTokens, end - token);
      all_.Touch(piece, token, token + tokens);
      for (int64_t head = 0; head < piece.heads; ++head) {
        Gather(piece, head, token, tokens, s);
        for (int64_t block = 0; block < Blocks(rows); ++block) {
          const int64_t at = FirstRow(block, rows);
          Attend(piece, head * rows, at, FirstRow(block + 1, rows) - at, token, tokens, s);
        }
      }
    }
    for (int64_t row = 0; row < piece.heads * rows; ++row) {
      s.running.Finish(row, all_.out + all_.Place(piece, row / rows, row % rows), g_.head_dim);
    }
  }

 private:
  // A thread's memory for one piece.
  struct Scratch {
    std::vector<float> queries, keys, values, scores, packed, sums;
    Running running;
    void Reserve(const Geometry& g, int64_t rows, int64_t width) {
      queries.resize(rows * g.head_dim);
      keys.resize(kTokens * g.head_dim);
      values.resize(kTokens * width);
      scores.resize(kRows * kTokens);
      packed.resize(kRows * kTokens);
      sums.resize(kRows * width);
      running.Begin(rows, width);
    }
  };

  static Scratch& Own() {
    thread_local Scratch scratch;
    return scratch;
  }

  static const uint32_t* Words(const std::vector<float>& numbers) {
    return reinterpret_cast<const uint32_t*>(numbers.data());
  }

  // Scaled, as TimesPanel takes them.
  void PackQueries(const Piece& piece, int64_t head, int64_t rows, Scratch& s) const {
    for (int64_t block = 0; block < Blocks(rows); ++block) {
      const int64_t at = FirstRow(block, rows), count = FirstRow(block + 1, rows) - at;
      for (int64_t row = 0; row < count; ++row) {
        const float* from = all_.q + all_.Place(piece, head, at + row);
        float* to = s.queries.data() + (head * rows + at) * g_.head_dim + row;
        for (int64_t i = 0; i < g_.head_dim; ++i) to[i * count] = from[i] * g_.scale;
      }
    }
  }

  // Keys and values of a block's tokens, zeros for those that no query of the piece sees. Of keys,
  // those up to the next multiple of 16 are zeros; what lies beyond is left as it was and not looked
  // at.
  void Gather(const Piece& piece, int64_t head, int64_t token, int64_t tokens, Scratch& s) const {
    const int64_t first = all_.FirstSeen(piece) - token;
    const Number* keys[kTokens];
    for (int64_t t = 0; t < kTokens; ++t) {
      const bool is_there = t >= first && t < tokens;
      keys[t] = is_there ? all_.Keys(piece, token + t) + head * g_.padded : nullptr;
    }
    for (int64_t t = 0; t < tokens; t += 16) {
      float* to = s.keys.data() + t / kPanel * g_.head_dim * kPanel + t % kPanel;
      for (int64_t i = 0; i < g_.head_dim; i += 16) {
        const Number* from[16];
        for (int64_t j = 0; j < 16; ++j) from[j] = keys[t + j] ? keys[t + j] + i : nullptr;
        Transpose16(from, std::min<int64_t>(16, g_.head_dim - i), to + i * kPanel, kPanel);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < width_; i += 16) {
        const __m512 some = keys[t]
                                ? Load16(keys[t] + all_.ToValues() + i, First(g_.head_dim - i))
                                : _mm512_setzero_ps();
        _mm512_storeu_ps(
            s.values.data() + (i / kPanel * kTokens + t) * kPanel + i % kPanel, some);
      }
    }
  }

  // `count` rows from `at` on, of the head whose rows begin at `base`, see the block that is gathered.
  void Attend(const Piece& piece, int64_t base, int64_t at, int64_t count, int64_t token,
              int64_t tokens, Scratch& s) const {
    const auto* x = Words(s.queries) + (base + at) * g_.head_dim;
    for (int64_t panel = 0; panel * kPanel < tokens; ++panel) {
      TimesPanel<Float32>(x, count, Words(s.keys) + panel * g_.head_dim * kPanel, g_.head_dim,
                          nullptr, 0, s.scores.data() + panel * kPanel, kTokens);
    }
    for (int64_t row = 0; row < count; ++row) {
      float* scores = s.scores.data() + row * kTokens;
      s.running.Weigh(scores, base + at + row, all_.Seen(piece, at + row, token), g_.softcap);
      for (int64_t i = 0; i < tokens; ++i) s.packed[i * count + row] = scores[i];
    }
    for (int64_t panel = 0; panel < width_ / kPanel; ++panel) {
      TimesPanel<Float32>(Words(s.packed), count, Words(s.values) + panel * kTokens * kPanel,
                          tokens, nullptr, 0, s.sums.data() + panel * kPanel, width_);
    }
    float* to = s.running.Sums(base + at);
    for (int64_t i = 0; i < count * width_; ++i) to[i] += s.sums[i];
  }

  const Sequences<Number>& all_;
  const Geometry& g_;
  const int64_t width_;
};

}  // namespace muxjax

#endif  // MUXJAX_CPU_ATTENTION_PANELS_H_
