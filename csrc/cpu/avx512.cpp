// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma; runs only where the processor has them.
#define EPT_ISA avx512
#define EPT_WIDTH 16
#define EPT_RANKS 8
#include "isa.h"
