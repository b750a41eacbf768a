#define SPARING_SET avx512_bf16
#include "table.hpp"
