#define DEEPALIGN_ISA portable
#include "isa_begin.h"
#include "vec_portable.h"

#include "table.h"
#include "isa_end.h"
