// Tasks on PyTorch's threads, and memory that lasts as long as a call.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "engine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace hyperconv {
namespace {

// Numbers between the parts of a room, which AddressSanitizer lets nobody touch.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kGap = 64;
#else
constexpr int64_t kGap = 0;
#endif

// Uninitialised memory for `count` numbers at a multiple of 64 bytes, or failed().
template <class T>
class Room {
 public:
  Room() = default;
  explicit Room(int64_t count) { take(count); }
  ~Room() { std::free(data_); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  // Once; of a room that is dealt out by part(), into how many parts.
  void take(int64_t count, int parts = 0) {
    if (count <= 0) return;
    count += parts * kGap;
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    failed_ = !data_;
    next_ = data_;
  }
  // The next `count` numbers of a room that was taken.
  T* part(int64_t count) {
    T* const part = next_;
    next_ += count + kGap;
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(part + count, kGap * sizeof(T));
#endif
    return part;
  }
  T* get() const { return data_; }
  bool failed() const { return failed_; }

 private:
  T *data_ = nullptr, *next_ = nullptr;
  bool failed_ = false;
};

// Calls worker(next) on up to `threads` threads, each of which takes tasks by next() until it gives -1.
// Which thread gets which task is left to chance: no result may depend on it.
template <class Worker>
void run_tasks(int64_t tasks, int threads, ParallelFor parallel_for, const Worker& worker) {
  struct Shared {
    const Worker* worker;
    int64_t tasks, taken;
  } shared = {&worker, tasks, 0};
  auto body = [](int64_t, int64_t, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    auto next = [&s]() -> int64_t {
      const int64_t task = __atomic_fetch_add(&s.taken, 1, __ATOMIC_RELAXED);
      return task < s.tasks ? task : -1;
    };
    (*s.worker)(next);
  };
  const int64_t workers = tasks < threads ? tasks : threads;
  if (workers > 1 && parallel_for && parallel_for(0, workers, 1, body, &shared) == 0) return;
  body(0, 1, &shared);
}

}  // namespace
}  // namespace hyperconv
