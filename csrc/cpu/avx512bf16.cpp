// Compiled as avx512.cpp and with -mavx512bf16; runs only where the processor has it.
#define EPT_ISA avx512bf16
#define EPT_WIDTH 16
#define EPT_RANKS 8
#include "isa.h"
