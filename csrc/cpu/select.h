// The kernels of the instruction set in use.
#pragma once

#include "kernels.h"

namespace ept {

const Kernels& selected_kernels();

}  // namespace ept
