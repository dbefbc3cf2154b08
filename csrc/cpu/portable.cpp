// Compiled for the target's baseline (SSE2, NEON, ...); runs everywhere.
#define EPT_ISA portable
#define EPT_WIDTH 4
#define EPT_RANKS 4
#include "isa.h"
