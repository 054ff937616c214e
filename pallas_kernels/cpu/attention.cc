// Paged attention on the CPU: ragged causal queries over the pool's pages, for prefill and decode.
//
// A work item computes several queries of one sequence, for one key/value head or all, with all
// query heads of the group, so that their keys and values are read once. It iterates over the
// context in blocks of 64 tokens with an online softmax (Milakov and Gimelshein 2018;
// FlashAttention, Dao et al. 2022).
// Memory past a sequence's end is never read.

#include <cstring>

#include "attention_panels.h"
#include "attention_rows.h"
#include "parallel.h"

namespace muxjax {
namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::Buffer;
using ffi::Error;
using ffi::Result;

constexpr int64_t kMaxRows = 96;  // approximate rows (queries times heads) of a work item

// Builds the work items of the first `queries` queries. Outputs of empty sequences become zero.
template <typename Number>
std::vector<WorkItem> BuildItems(const Sequences<Number>& all, int64_t seqs, int64_t queries,
                          int64_t threads) {
  const Geometry& g = all.g;
  const int64_t width = g.heads * g.head_dim, some = std::max<int64_t>(1, kMaxRows / g.Group());
  std::vector<WorkItem> items;
  for (int32_t seq = 0; seq < seqs; ++seq) {
    const int64_t first = all.starts[seq], end = all.starts[seq + 1];
    // In decode, an empty sequence has a query, whose output is zeros.
    if (all.lens[seq] < 1) {
      const int64_t left = std::min(end, queries) - first;
      if (left > 0) std::memset(all.out + first * width, 0, left * width * sizeof(float));
      continue;
    }
    // All key/value heads of a token are contiguous in the pool, so one item reads them together.
    // With few sequences, heads are split so that every thread has an item.
    const bool split_heads = end - first > 1 || seqs < 2 * threads;
    const auto heads = static_cast<int32_t>(split_heads ? 1 : g.kv_heads);
    for (int64_t at = first; at < end; at += some) {
      const auto count = static_cast<int32_t>(std::min(some, end - at));
      for (int32_t head = 0; head < g.kv_heads; head += heads) {
        items.push_back({seq, head, heads, static_cast<int32_t>(at), count});
      }
    }
  }
  return items;
}

template <typename Number>
void Attend(ffi::ThreadPool& pool, const Sequences<Number>& all, int64_t seqs, int64_t queries) {
  const int64_t width = all.g.heads * all.g.head_dim;
  const int64_t used = std::min<int64_t>(all.starts[seqs], queries);
  std::memset(all.out + used * width, 0, (queries - used) * width * sizeof(float));
  const std::vector<WorkItem> items = BuildItems(all, seqs, queries, pool.num_threads());
  const PanelAttention<Number> panels(all);
  const RowAttention<Number> rows(all);
  ForEach(pool, items.size(), [&](int64_t index) {
    const WorkItem& item = items[index];
    if (item.count == 1 && all.g.Group() <= kMaxGroup) {
      rows.Run(item);
    } else {
      panels.Run(item);
    }
  });
}

Error PagedAttention(ffi::ThreadPool pool, Buffer<ffi::F32> q, AnyBuffer kv,
                     Buffer<ffi::S32> tables, Buffer<ffi::S32> lens, Buffer<ffi::S32> starts,
                     Buffer<ffi::S32> layer, Result<Buffer<ffi::F32>> out, int64_t kv_heads,
                     int64_t padded, int64_t rows_per_token, float scale, float softcap,
                     int64_t window) {
  const auto qs = q.dimensions(), ts = tables.dimensions(), ps = kv.dimensions();
  if (qs.size() != 3 || ts.size() != 2 || ps.size() != 3 || ps[2] != kLanes || kv_heads < 1 ||
      qs[1] % kv_heads || padded < qs[2] || rows_per_token > ps[1] ||
      static_cast<int64_t>(starts.element_count()) != ts[0] + 1) {
    return Error::InvalidArgument("paged attention: shapes do not match");
  }
  const Geometry g{qs[1],  kv_heads, qs[2], padded, ps[1], rows_per_token, layer.typed_data()[0],
                   ts[1], scale,    softcap, window};
  const auto attend = [&](const auto* numbers) {
    Attend(pool, Sequences<std::decay_t<decltype(*numbers)>>{
                     g, q.typed_data(), numbers, tables.typed_data(), lens.typed_data(),
                     starts.typed_data(), out->typed_data()},
           ts[0], qs[0]);
    return Error::Success();
  };
  if (kv.element_type() == ffi::F32) return attend(static_cast<const float*>(kv.untyped_data()));
  if (kv.element_type() == ffi::BF16) {
    return attend(static_cast<const BFloat16Bits*>(kv.untyped_data()));
  }
  return Error::InvalidArgument("paged attention needs a pool of float32 or bfloat16");
}

}  // namespace
}  // namespace muxjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(muxjax_paged_attention, muxjax::PagedAttention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
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
