// Work for all cores of XLA:CPU's own thread pool.

#ifndef MUXJAX_CPU_PARALLEL_H_
#define MUXJAX_CPU_PARALLEL_H_

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace muxjax {

// Indices [first, end) of which one thread takes the first and others the last, at most 2^32.
class Range {
 public:
  void Set(int64_t first, int64_t end) { ends_ = static_cast<uint64_t>(first) << 32 | end; }

  // The next index, or -1 when none is left.
  int64_t Take(bool last) {
    uint64_t ends = ends_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = ends >> 32, end = ends & 0xffffffff;
      if (first >= end) return -1;
      if (ends_.compare_exchange_weak(ends, last ? ends - 1 : ends + (1ull << 32),
                                      std::memory_order_relaxed)) {
        return last ? end - 1 : first;
      }
    }
  }

 private:
  alignas(64) std::atomic<uint64_t> ends_{0};
};

// Calls work(i) for each 0 <= i < count, on the caller's thread and on those of the pool, and
// returns when all are done. Each thread has its own part, which it goes through in order, so that
// it reads memory in order: two threads that take indices in turn read half as fast. Whoever has
// done its part takes from the ends of others', so that a thread that is late, or never comes
// because the pool is busy, holds nobody up.
template <typename Work>
void ForEach(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  constexpr int64_t kMost = 256;  // threads
  const int64_t threads = std::min<int64_t>({pool.num_threads(), count, kMost});
  if (threads < 2) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  struct State {
    explicit State(int64_t threads) : parts(new Range[threads]) {}
    std::unique_ptr<Range[]> parts;
    std::atomic<int64_t> done{0};
  };
  auto state = std::make_shared<State>(threads);
  for (int64_t t = 0; t < threads; ++t) {
    state->parts[t].Set(count * t / threads, count * (t + 1) / threads);
  }
  // `work` is the caller's: a thread that comes late finds no index, and does not touch it.
  auto run = [state, threads, &work](int64_t own) {
    int64_t finished = 0;
    for (int64_t t = 0; t < threads; ++t) {
      Range& part = state->parts[(own + t) % threads];
      for (int64_t i; (i = part.Take(t > 0)) >= 0; ++finished) work(i);
    }
    if (finished) state->done.fetch_add(finished, std::memory_order_release);
  };
  for (int64_t t = 1; t < threads; ++t) {
    pool.Schedule(std::function<void()>([run, t] { run(t); }));
  }
  run(0);
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 2000) {
      _mm_pause();
    } else {
      sched_yield();  // the other thread has lost its core
    }
  }
}

}  // namespace muxjax

#endif  // MUXJAX_CPU_PARALLEL_H_
