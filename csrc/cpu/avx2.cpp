// Compiled with -mavx2 -mfma; runs only where the processor has them.
#define EPT_ISA avx2
#define EPT_WIDTH 8
#define EPT_RANKS 4
#include "isa.h"
