// A parallel loop over the threads of XLA:CPU's pool.

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

// A range of indices [first, end), end < 2^32. Its thread pops from the front; other threads steal
// from the back.
class WorkRange {
 public:
  void Set(int64_t first, int64_t end) { ends_ = static_cast<uint64_t>(first) << 32 | end; }

  // Removes and returns an index, or -1 if the range is empty.
  int64_t Pop(bool back) {
    uint64_t ends = ends_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = ends >> 32, end = ends & 0xffffffff;
      if (first >= end) return -1;
      if (ends_.compare_exchange_weak(ends, back ? ends - 1 : ends + (1ull << 32),
                                      std::memory_order_relaxed)) {
        return back ? end - 1 : first;
      }
    }
  }

 private:
  alignas(64) std::atomic<uint64_t> ends_{0};
};

// Calls work(i) for each 0 <= i < count, on the caller's thread and the pool's, and returns when
// all calls have finished. Each thread processes a contiguous range in order, to read memory
// sequentially (docs/measurements/cpu-kernels.md). A thread that has finished its range steals from
// the ends of other ranges. A busy pool, whose threads start late or never, therefore delays no
// other thread.
template <typename Work>
void ForEach(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  constexpr int64_t kMaxThreads = 256;
  const int64_t threads = std::min<int64_t>({pool.num_threads(), count, kMaxThreads});
  if (threads < 2) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  struct State {
    explicit State(int64_t threads) : parts(new WorkRange[threads]) {}
    std::unique_ptr<WorkRange[]> parts;
    std::atomic<int64_t> done{0};
  };
  auto state = std::make_shared<State>(threads);
  for (int64_t t = 0; t < threads; ++t) {
    state->parts[t].Set(count * t / threads, count * (t + 1) / threads);
  }
  // `work` belongs to the caller and may be destroyed before a late thread starts. Such a thread
  // finds no index and does not use `work`.
  auto run = [state, threads, &work](int64_t thread) {
    int64_t finished = 0;
    for (int64_t t = 0; t < threads; ++t) {
      WorkRange& part = state->parts[(thread + t) % threads];
      for (int64_t i; (i = part.Pop(t > 0)) >= 0; ++finished) work(i);
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
      sched_yield();  // the other thread is not running
    }
  }
}

}  // namespace muxjax

#endif  // MUXJAX_CPU_PARALLEL_H_
