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

// Calls work(i) for each 0 <= i < count, on the caller's thread and on those of the pool, and
// returns when all are done. Whoever is free takes the next index, so that a thread that is late, or
// never comes because the pool is busy, holds nobody up.
template <typename Work>
void ForEach(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  auto state = std::make_shared<State>();
  // `work` is the caller's: a thread that comes late finds no index, and does not touch it.
  auto run = [state, count, &work] {
    int64_t finished = 0;
    for (int64_t i; (i = state->next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      work(i);
      ++finished;
    }
    if (finished) state->done.fetch_add(finished, std::memory_order_release);
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(run));
  run();
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
