// The pool of kernels/cpu/threads.cpp by itself, for ThreadSanitizer (tools/variants.py): regions of all sizes, from
// several callers at once, through its helpers' sleep, and in a forked child. Prints what it counted.
#include "../../src/sparing/kernels/cpu/threads.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

// Plain writes to what belongs to a piece: if a region ended before its helpers, the sums would race with them.
int64_t regions(int rounds, int threads) {
  int64_t wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    int64_t count = 1 + round * 7 % 61;
    std::vector<int64_t> out(count, 0);
    sparing::share(count, 1 + round % threads, [&](int64_t i) { out[i] += i + round; });
    for (int64_t i = 0; i < count; ++i) wrong += out[i] != i + round;
    if (round % 64 == 63) std::this_thread::sleep_for(std::chrono::microseconds(200));  // helpers fall asleep
  }
  return wrong;
}

}  // namespace

int main() {
  int64_t wrong = regions(3000, 4);
  std::vector<int64_t> found(3, 0);
  std::vector<std::thread> callers;
  for (int64_t& own : found) callers.emplace_back([&own] { own = regions(2000, 4); });
  for (std::thread& caller : callers) caller.join();
  for (int64_t own : found) wrong += own;
  int status = 0;
  if (pid_t child = fork(); child == 0) {
    _exit(regions(200, 3) != 0);
  } else {
    waitpid(child, &status, 0);
  }
  std::printf("%lld pieces wrong, the child returned %d\n", (long long)wrong, status);
  return wrong != 0 || status != 0;
}
