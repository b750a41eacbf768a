#define SPARING_SET avx2
#include "table.hpp"
