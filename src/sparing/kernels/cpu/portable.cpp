#define SPARING_SET portable
#include "table.hpp"
