#define SPARING_SET avx512
#include "table.hpp"
