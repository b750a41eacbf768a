// A pool for regions of some tens of microseconds, hundreds of them a second, on machines that other processes use too.
//
// A barrier that spins costs a scheduler tick (milliseconds) whenever a foreign process holds the core of one of its
// threads. Nothing here waits for a thread that did not start: the caller works through the pieces itself, helpers take
// pieces as they come, and the region ends when no piece is left and every helper that entered it has left it.
// A helper looks for the next region for as long as the gap between two operators usually lasts, then sleeps.
#include "threads.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace sparing {
namespace {

constexpr auto kPatience = std::chrono::microseconds(60);  // a helper's, before it sleeps

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Pool {
  std::mutex owner;  // one region at a time; a second caller works alone
  std::atomic<uint64_t> ticket{0};  // odd while a region is open
  std::atomic<int64_t> next{0};
  std::atomic<int> inside{0}, seats{0}, sleeping{0};
  int64_t count = 0;
  void (*piece)(void*, int64_t) = nullptr;
  void* context = nullptr;
  std::mutex lock;
  std::condition_variable wake;
  int helpers = 0;

  void work() {
    for (int64_t i; (i = next.fetch_add(1)) < count;) piece(context, i);
  }

  void help() {
    uint64_t seen = 0;
    for (;;) {
      seen = wait_after(seen);
      inside.fetch_add(1);
      // Only now is the region sure not to end under us; it may have ended, or have all the helpers it wants.
      if (ticket.load() == seen && seats.fetch_sub(1) > 0) work();
      inside.fetch_sub(1);
    }
  }

  uint64_t wait_after(uint64_t seen) {
    auto news = [&](uint64_t now) { return now != seen && now % 2 == 1; };
    auto deadline = std::chrono::steady_clock::now() + kPatience;
    for (int round = 0;; ++round) {
      uint64_t now = ticket.load();
      if (news(now)) return now;
      relax();
      if (round % 32 == 31 && std::chrono::steady_clock::now() > deadline) break;
    }
    std::unique_lock<std::mutex> guard(lock);
    sleeping.fetch_add(1);
    uint64_t now;
    wake.wait(guard, [&] { return news(now = ticket.load()); });
    sleeping.fetch_sub(1);
    return now;
  }

  void run(int64_t pieces, int threads, void (*f)(void*, int64_t), void* with) {
    for (; helpers < threads - 1; ++helpers) std::thread([this] { help(); }).detach();
    count = pieces, piece = f, context = with;
    next.store(0);
    seats.store(threads - 1);
    ticket.fetch_add(1);
    if (sleeping.load() > 0) {
      std::lock_guard<std::mutex> guard(lock);  // a helper between its last look and its sleep would miss the call
      wake.notify_all();
    }
    work();
    ticket.fetch_add(1);
    for (int round = 0; inside.load() != 0; ++round) {
      if (round < 4096)
        relax();
      else
        std::this_thread::yield();
    }
  }
};

// Helpers live as long as the process and are never joined. A forked child has none: it starts a pool of its own.
Pool* pool = new Pool;

}  // namespace

void share(int64_t count, int threads, void (*piece)(void*, int64_t), void* context) {
  static const int on_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  (void)on_fork;
  if (threads > 1 && count > 1 && pool->owner.try_lock()) {
    std::lock_guard<std::mutex> guard(pool->owner, std::adopt_lock);
    pool->run(count, threads < count ? threads : int(count), piece, context);
    return;
  }
  for (int64_t i = 0; i < count; ++i) piece(context, i);
}

}  // namespace sparing
