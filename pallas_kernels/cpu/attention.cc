// Paged attention on the CPU: ragged causal queries over the pool's pages, prefill and decode alike.
//
// A piece of work is one sequence, one key/value head, and some of its queries: all query heads that
// share the head, so that its keys and values are read once for them. It walks the context in blocks
// of 64 tokens with a running softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al.
// 2022). Of each block the keys are laid out as two panels of 32 tokens, the values as panels of 32
// of the head's numbers (panel.h), zeros where the sequence or the head has none: what lies beyond a
// sequence's end is never read.

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

constexpr int64_t kTokens = 64;      // of the context at a time
constexpr int64_t kMaxRows = 96;     // queries times heads that share, in a piece of work; about
constexpr int64_t kLine = 16;        // numbers in a line of the cache
constexpr float kMasked = -1e30f;
constexpr int64_t kLanes = 128;      // numbers in a row of the pool

// e^x for x <= 0, to about one unit in the last place: x = n ln 2 + r, and a polynomial for e^r.
inline __m512 Exp(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  // Taylor's coefficients up to r^7: |r| < 0.35, so that the rest is under 1e-8.
  __m512 y = _mm512_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(y, n);
}

// to[i][j] = from[j][i] for 16 rows of `count` numbers at most 16; rows that are null are zeros.
void Transpose16(const float* const (&from)[16], int64_t count, float* to, int64_t step) {
  const __mmask16 some = (1u << count) - 1;
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    a[i] = from[i] ? _mm512_maskz_loadu_ps(some, from[i]) : _mm512_setzero_ps();
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
  // a[4 g + j] has of rows 4 g to 4 g + 3 the columns j, j + 4, j + 8, j + 12, each in a lane.
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

struct Geometry {
  int64_t heads, kv_heads, head_dim, padded;  // of the model; padded: as in the pool
  int64_t rows, rows_per_token;               // of a page
  int64_t layer, blocks;                      // pages after a block's first; blocks of a table
  float scale, softcap;                       // softcap 0: none
  int64_t window;                             // 0: none
};

// Queries [first, first + count) of the step, which are one sequence's, and the query heads that
// share the key/value heads [head, head + heads).
struct Piece {
  int32_t seq, head, heads, first, count;
};

// A thread's memory for one piece of work. Rows are queries times heads that share a key/value head;
// those of the piece's next key/value head come after them.
struct Scratch {
  std::vector<float> queries, keys, values, scores, packed, sums, out, maximum, denominator;
  void Reserve(const Geometry& g, int64_t rows, int64_t heads, int64_t width) {
    queries.resize(heads * rows * g.head_dim);
    keys.resize(kTokens * g.head_dim);
    values.resize(kTokens * width);
    scores.resize(kRows * kTokens);
    packed.resize(kRows * kTokens);
    sums.resize(kRows * width);
    out.assign(heads * rows * width, 0.0f);
    maximum.assign(heads * rows, kMasked);
    denominator.assign(heads * rows, 0.0f);
  }
};

class Attention {
 public:
  Attention(const Geometry& g, const float* q, const float* kv, const int32_t* tables,
            const int32_t* lens, const int32_t* starts, float* out)
      : g_(g), q_(q), kv_(kv), tables_(tables), lens_(lens), starts_(starts), out_(out),
        shared_(g.heads / g.kv_heads), width_((g.head_dim + kPanel - 1) / kPanel * kPanel),
        tokens_in_page_(g.rows / g.rows_per_token) {}

  int64_t QueriesOfPiece() const { return std::max<int64_t>(1, kMaxRows / shared_); }

  void Run(const Piece& piece) const {
    Begin(piece);
    for (int64_t token = FirstToken(piece); token < End(piece); token += kTokens) {
      Touch(piece, token);
      Block(piece, token);
    }
    Finish(piece);
  }

 private:
  // Reads a number of each line of a block, in the order of memory, before it is worked on: the
  // processor then sees what comes next and fetches it ahead. What works on a block reads it in
  // another order, and waits for each line: 16 sequences of 192 tokens took 21 ms so, 9.5 ms with
  // prefetches of the next block in between, and 7 ms this way (30 layers, 142 MB).
  void Touch(const Piece& piece, int64_t token) const {
    const int64_t numbers = piece.heads * g_.padded;
    for (int64_t t = token; t < std::min(End(piece), token + kTokens); ++t) {
      const volatile float* keys = Keys(piece, t);
      for (int64_t i = 0; i < numbers; i += kLine) (void)keys[i];
      for (int64_t i = 0; i < numbers; i += kLine) (void)keys[ToValues() + i];
    }
  }

  int64_t ToValues() const { return g_.kv_heads * g_.padded; }

  // The position of the step's query i of the piece's sequence is i + Shift().
  int64_t Shift(const Piece& piece) const { return lens_[piece.seq] - starts_[piece.seq + 1]; }

  // The first position that one of the piece's queries sees, rounded down to a block's; and the end.
  int64_t FirstToken(const Piece& piece) const { return FirstSeen(piece) / kTokens * kTokens; }
  int64_t FirstSeen(const Piece& piece) const {
    return g_.window ? std::max<int64_t>(0, piece.first + Shift(piece) - g_.window + 1) : 0;
  }
  int64_t End(const Piece& piece) const {
    return std::min<int64_t>(lens_[piece.seq], piece.first + piece.count + Shift(piece));
  }

  int64_t Rows(const Piece& piece) const { return piece.count * shared_; }

  static Scratch& Own() {
    thread_local Scratch scratch;
    return scratch;
  }

  void Begin(const Piece& piece) const {
    Own().Reserve(g_, Rows(piece), piece.heads, width_);
    for (int64_t head = 0; head < piece.heads; ++head) PackQueries(piece, head, Own());
  }

  void Block(const Piece& piece, int64_t token) const {
    const int64_t rows = Rows(piece), first = std::max(token, FirstSeen(piece));
    for (int64_t head = 0; head < piece.heads; ++head) {
      GatherBlock(piece, head, token, first, std::min(End(piece), token + kTokens));
      for (int64_t block = 0; block < Blocks(rows); ++block) {
        Attend(piece, head * rows, FirstRow(block, rows), FirstRow(block + 1, rows), token);
      }
    }
  }

  void Finish(const Piece& piece) const {
    const Scratch& s = Own();
    const int64_t rows = Rows(piece);
    for (int64_t head = 0; head < piece.heads; ++head) {
      for (int64_t row = 0; row < rows; ++row) {
        const float by = 1.0f / std::max(s.denominator[head * rows + row], 1e-30f);
        const float* from = s.out.data() + (head * rows + row) * width_;
        float* to = out_ + Place(piece, head, row);
        for (int64_t i = 0; i < g_.head_dim; ++i) to[i] = from[i] * by;
      }
    }
  }

  // Where a row of the piece stands among queries and outputs: a query's heads lie together.
  int64_t Place(const Piece& piece, int64_t head, int64_t row) const {
    const int64_t query = piece.first + row / shared_;
    return (query * g_.heads + (piece.head + head) * shared_ + row % shared_) * g_.head_dim;
  }

  // Rows [at, end) of the head whose rows begin at `base` see the block of tokens that is gathered.
  void Attend(const Piece& piece, int64_t base, int64_t at, int64_t end, int64_t token) const {
    Scratch& s = Own();
    const int64_t count = end - at;
    const auto* x = Words(s.queries) + (base + at) * g_.head_dim;
    const int64_t tokens = std::min(kTokens, End(piece) - token);
    for (int64_t panel = 0; panel * kPanel < tokens; ++panel) {
      TimesPanel<Float32>(x, count, Words(s.keys) + panel * g_.head_dim * kPanel, g_.head_dim,
                          nullptr, 0, s.scores.data() + panel * kPanel, kTokens);
    }
    for (int64_t row = 0; row < count; ++row) {
      const int64_t own =
          std::min<int64_t>(lens_[piece.seq] - 1, piece.first + (at + row) / shared_ + Shift(piece));
      float* scores = s.scores.data() + row * kTokens;
      Softmax(scores, base + at + row, own, token, s);
      for (int64_t i = 0; i < tokens; ++i) s.packed[i * count + row] = scores[i];
    }
    for (int64_t panel = 0; panel < width_ / kPanel; ++panel) {
      TimesPanel<Float32>(Words(s.packed), count, Words(s.values) + panel * kTokens * kPanel,
                          tokens, nullptr, 0, s.sums.data() + panel * kPanel, width_);
    }
    float* to = s.out.data() + (base + at) * width_;
    for (int64_t i = 0; i < count * width_; ++i) to[i] += s.sums[i];
  }

  static const uint32_t* Words(const std::vector<float>& numbers) {
    return reinterpret_cast<const uint32_t*>(numbers.data());
  }

  // Scaled, as TimesPanel takes them.
  void PackQueries(const Piece& piece, int64_t head, Scratch& s) const {
    const int64_t rows = piece.count * shared_;
    for (int64_t block = 0; block < Blocks(rows); ++block) {
      const int64_t at = FirstRow(block, rows), count = FirstRow(block + 1, rows) - at;
      for (int64_t row = 0; row < count; ++row) {
        const float* from = q_ + Place(piece, head, at + row);
        float* to = s.queries.data() + (head * rows + at) * g_.head_dim + row;
        for (int64_t i = 0; i < g_.head_dim; ++i) to[i * count] = from[i] * g_.scale;
      }
    }
  }

  // The keys of the piece's first head in a token; the next heads' follow.
  const float* Keys(const Piece& piece, int64_t token) const {
    const int64_t page = tables_[piece.seq * g_.blocks + token / tokens_in_page_] + g_.layer;
    const int64_t row = page * g_.rows + token % tokens_in_page_ * g_.rows_per_token;
    return kv_ + row * kLanes + piece.head * g_.padded;
  }

  // Keys and values of tokens [token, end), at most 64, zeros for those before `first`. Of keys, those
  // up to the next multiple of 16 are zeros; what lies beyond is left as it was and not looked at.
  void GatherBlock(const Piece& piece, int64_t head, int64_t token, int64_t first,
                   int64_t end) const {
    Scratch& s = Own();
    const float* keys[kTokens];
    for (int64_t t = 0; t < kTokens; ++t) {
      const bool is_there = token + t >= first && token + t < end;
      keys[t] = is_there ? Keys(piece, token + t) + head * g_.padded : nullptr;
    }
    const int64_t used = (end - token + 15) / 16 * 16;
    for (int64_t t = 0; t < used; t += 16) {
      float* to = s.keys.data() + t / kPanel * g_.head_dim * kPanel + t % kPanel;
      for (int64_t i = 0; i < g_.head_dim; i += 16) {
        const float* from[16];
        for (int64_t j = 0; j < 16; ++j) from[j] = keys[t + j] ? keys[t + j] + i : nullptr;
        Transpose16(from, std::min<int64_t>(16, g_.head_dim - i), to + i * kPanel, kPanel);
      }
    }
    for (int64_t t = 0; t < end - token; ++t) {
      for (int64_t i = 0; i < width_; i += 16) {
        const int64_t left = std::max<int64_t>(0, std::min<int64_t>(16, g_.head_dim - i));
        const __m512 some =
            keys[t] ? _mm512_maskz_loadu_ps((1u << left) - 1, keys[t] + ToValues() + i)
                    : _mm512_setzero_ps();
        _mm512_storeu_ps(
            s.values.data() + (i / kPanel * kTokens + t) * kPanel + i % kPanel, some);
      }
    }
  }

  // Scores of a row for a block become weights; what the row has so far is scaled down to fit.
  void Softmax(float* scores, int64_t row, int64_t own, int64_t token, Scratch& s) const {
    if (g_.softcap != 0) {
      for (int64_t i = 0; i < kTokens; ++i) {
        scores[i] = g_.softcap * std::tanh(scores[i] / g_.softcap);
      }
    }
    const int64_t lowest = g_.window ? std::max<int64_t>(0, own - g_.window + 1) : 0;
    // Bits of the tokens that this query sees.
    const int64_t from = std::max<int64_t>(0, lowest - token);
    const int64_t to = std::min<int64_t>(kTokens, own + 1 - token);
    const uint64_t below_end = to <= 0 ? 0 : to == 64 ? ~0ull : (1ull << to) - 1;
    const uint64_t seen = from >= 64 ? 0 : below_end & ~((1ull << from) - 1);
    if (seen == 0) {
      std::fill_n(scores, kTokens, 0.0f);
      return;
    }
    __m512 highest = _mm512_set1_ps(kMasked);
    for (int64_t i = 0; i < 4; ++i) {
      const __mmask16 mask = seen >> (16 * i);
      highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_loadu_ps(scores + 16 * i));
    }
    const float old = s.maximum[row];
    const float maximum = std::max(old, _mm512_reduce_max_ps(highest));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < 4; ++i) {
      const __mmask16 mask = seen >> (16 * i);
      const __m512 score = _mm512_loadu_ps(scores + 16 * i);
      const __m512 weight = _mm512_maskz_mov_ps(
          mask, Exp(_mm512_sub_ps(score, _mm512_set1_ps(maximum))));
      sum = _mm512_add_ps(sum, weight);
      _mm512_storeu_ps(scores + 16 * i, weight);
    }
    const float decay = old == kMasked ? 0.0f : std::exp(old - maximum);
    s.denominator[row] = s.denominator[row] * decay + _mm512_reduce_add_ps(sum);
    s.maximum[row] = maximum;
    if (decay != 1.0f) {
      float* out = s.out.data() + row * width_;
      for (int64_t i = 0; i < width_; ++i) out[i] *= decay;
    }
  }

  const Geometry& g_;
  const float *q_, *kv_;
  const int32_t *tables_, *lens_, *starts_;
  float* out_;
  const int64_t shared_, width_, tokens_in_page_;
};

Error PagedAttention(ffi::ThreadPool pool, Buffer<ffi::F32> q, Buffer<ffi::F32> kv,
                     Buffer<ffi::S32> tables, Buffer<ffi::S32> lens, Buffer<ffi::S32> starts,
                     Buffer<ffi::S32> layer, Result<Buffer<ffi::F32>> out, int64_t kv_heads,
                     int64_t padded, int64_t rows_per_token, float scale, float softcap,
                     int64_t window) {
  const auto qs = q.dimensions(), ts = tables.dimensions(), ps = kv.dimensions();
  if (qs.size() != 3 || ts.size() != 2 || ps.size() != 3 || ps[2] != kLanes || kv_heads < 1 ||
      qs[1] % kv_heads || padded < qs[2] || rows_per_token > ps[1] ||
      static_cast<int64_t>(starts.element_count()) != ts[0] + 1) {
    return Error::InvalidArgument("paged attention of shapes that do not fit each other");
  }
  const Geometry g{qs[1],  kv_heads, qs[2], padded, ps[1], rows_per_token, layer.typed_data()[0],
                   ts[1], scale,    softcap, window};
  const int32_t* begins = starts.typed_data();
  const int64_t seqs = ts[0], queries = qs[0], width = g.heads * g.head_dim;
  const Attention attention(g, q.typed_data(), kv.typed_data(), tables.typed_data(),
                            lens.typed_data(), begins, out->typed_data());
  std::vector<Piece> pieces;
  const int64_t some = attention.QueriesOfPiece();
  for (int32_t seq = 0; seq < seqs; ++seq) {
    // An empty row has a query in decode, which gives zeros.
    if (lens.typed_data()[seq] < 1) {
      const int64_t end = std::min<int64_t>(begins[seq + 1], queries);
      if (begins[seq] < end) {
        std::memset(out->typed_data() + begins[seq] * width, 0,
                    (end - begins[seq]) * width * sizeof(float));
      }
      continue;
    }
    // Heads lie beside each other in the pool and are read together, unless there are too few
    // sequences for that to give every thread some.
    const bool apart = begins[seq + 1] - begins[seq] > 1 || seqs < 2 * pool.num_threads();
    const auto together = static_cast<int32_t>(apart ? 1 : kv_heads);
    for (int64_t at = begins[seq]; at < begins[seq + 1]; at += some) {
      const auto count = static_cast<int32_t>(std::min<int64_t>(some, begins[seq + 1] - at));
      for (int32_t head = 0; head < kv_heads; head += together) {
        pieces.push_back({seq, head, together, static_cast<int32_t>(at), count});
      }
    }
  }
  const int64_t used = std::min<int64_t>(begins[seqs], queries);
  std::memset(out->typed_data() + used * width, 0, (queries - used) * width * sizeof(float));
  ForEach(pool, pieces.size(), [&](int64_t index) { attention.Run(pieces[index]); });
  return Error::Success();
}

}  // namespace
}  // namespace muxjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(muxjax_paged_attention, muxjax::PagedAttention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<int64_t>("padded")
                                  .Attr<int64_t>("rows_per_token")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
