// Threads that share out pieces of work: see threads.cpp.
#pragma once

#include <cstdint>

namespace sparing {

// Calls piece(context, i) once for each i in 0..count-1, on the caller and up to threads - 1 helpers; returns when all
// are done. Which thread takes which piece is not fixed, so a piece must write only what belongs to i.
void share(int64_t count, int threads, void (*piece)(void* context, int64_t i), void* context);

template <class F>
void share(int64_t count, int threads, F&& piece) {
  share(count, threads, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &piece);
}

}  // namespace sparing
