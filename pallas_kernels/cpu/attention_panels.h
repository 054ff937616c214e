// Attention of several queries, which share the keys and values packed into panels.
//
// For each block of 64 tokens, keys are packed into two panels of 32 tokens, and values into panels
// of 32 elements of the head (panel.h), with zeros past the end of the sequence or head.

#ifndef MUXJAX_CPU_ATTENTION_PANELS_H_
#define MUXJAX_CPU_ATTENTION_PANELS_H_

#include "attention.h"

namespace muxjax {

template <typename Number>
class PanelAttention {
 public:
  explicit PanelAttention(const Sequences<Number>& sequences)
      : all_(sequences), g_(sequences.g), width_(g_.Width()) {}

  void Run(const WorkItem& item) const {
    Scratch& s = ThreadScratch();
    const int64_t rows = item.count * g_.Group(), end = all_.End(item);
    s.Reserve(g_, item.heads * rows, width_);
    for (int64_t head = 0; head < item.heads; ++head) PackQueries(item, head, rows, s);
    for (int64_t token = all_.FirstVisible(item) / kTokens * kTokens; token < end;
         token += kTokens) {
      const int64_t tokens = std::min(kTokens, end - token);
      all_.TouchLines(item, token, token + tokens);
      for (int64_t head = 0; head < item.heads; ++head) {
        PackBlock(item, head, token, tokens, s);
        for (int64_t block = 0; block < Blocks(rows); ++block) {
          const int64_t at = FirstRow(block, rows);
          Attend(item, head * rows, at, FirstRow(block + 1, rows) - at, token, tokens, s);
        }
      }
    }
    for (int64_t row = 0; row < item.heads * rows; ++row) {
      s.softmax.Finish(row, all_.out + all_.RowOffset(item, row / rows, row % rows), g_.head_dim);
    }
  }

 private:
  // Scratch memory of a thread.
  struct Scratch {
    std::vector<float> queries, keys, values, scores, packed, sums;
    OnlineSoftmax softmax;
    void Reserve(const Geometry& g, int64_t rows, int64_t width) {
      queries.resize(rows * g.head_dim);
      keys.resize(kTokens * g.head_dim);
      values.resize(kTokens * width);
      scores.resize(kRows * kTokens);
      packed.resize(kRows * kTokens);
      sums.resize(kRows * width);
      softmax.Begin(rows, width);
    }
  };

  static Scratch& ThreadScratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  static const uint32_t* Words(const std::vector<float>& numbers) {
    return reinterpret_cast<const uint32_t*>(numbers.data());
  }

  // Packs scaled queries into the blocks that TimesPanel reads.
  void PackQueries(const WorkItem& item, int64_t head, int64_t rows, Scratch& s) const {
    for (int64_t block = 0; block < Blocks(rows); ++block) {
      const int64_t at = FirstRow(block, rows), count = FirstRow(block + 1, rows) - at;
      for (int64_t row = 0; row < count; ++row) {
        const float* from = all_.q + all_.RowOffset(item, head, at + row);
        float* to = s.queries.data() + (head * rows + at) * g_.head_dim + row;
        for (int64_t i = 0; i < g_.head_dim; ++i) to[i * count] = from[i] * g_.scale;
      }
    }
  }

  // Packs keys and values of a block's tokens, with zeros for tokens that are not visible to the
  // item. Keys are zeros up to the next multiple of 16 tokens; later keys are unset and not read.
  void PackBlock(const WorkItem& item, int64_t head, int64_t token, int64_t tokens,
                 Scratch& s) const {
    const int64_t first = all_.FirstVisible(item) - token;
    const Number* keys[kTokens];
    for (int64_t t = 0; t < kTokens; ++t) {
      const bool visible = t >= first && t < tokens;
      keys[t] = visible ? all_.Keys(item, token + t) + head * g_.padded : nullptr;
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
                                ? Load16(keys[t] + all_.ValueOffset() + i, First(g_.head_dim - i))
                                : _mm512_setzero_ps();
        _mm512_storeu_ps(
            s.values.data() + (i / kPanel * kTokens + t) * kPanel + i % kPanel, some);
      }
    }
  }

  // Attends to the packed block with `count` rows, starting at `at`, of the head whose rows start
  // at `base`.
  void Attend(const WorkItem& item, int64_t base, int64_t at, int64_t count, int64_t token,
              int64_t tokens, Scratch& s) const {
    const auto* x = Words(s.queries) + (base + at) * g_.head_dim;
    for (int64_t panel = 0; panel * kPanel < tokens; ++panel) {
      TimesPanel<Float32>(x, count, Words(s.keys) + panel * g_.head_dim * kPanel, g_.head_dim,
                          nullptr, 0, s.scores.data() + panel * kPanel, kTokens);
    }
    for (int64_t row = 0; row < count; ++row) {
      float* scores = s.scores.data() + row * kTokens;
      const uint64_t visible = all_.VisibleMask(item, at + row, token);
      s.softmax.UpdateWeights(scores, base + at + row, visible, g_.softcap);
      for (int64_t i = 0; i < tokens; ++i) s.packed[i * count + row] = scores[i];
    }
    for (int64_t panel = 0; panel < width_ / kPanel; ++panel) {
      TimesPanel<Float32>(Words(s.packed), count, Words(s.values) + panel * kTokens * kPanel,
                          tokens, nullptr, 0, s.sums.data() + panel * kPanel, width_);
    }
    float* to = s.softmax.Sums(base + at);
    for (int64_t i = 0; i < count * width_; ++i) to[i] += s.sums[i];
  }

  const Sequences<Number>& all_;
  const Geometry& g_;
  const int64_t width_;
};

}  // namespace muxjax

#endif  // MUXJAX_CPU_ATTENTION_PANELS_H_
