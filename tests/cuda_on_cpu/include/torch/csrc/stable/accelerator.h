// In the place of PyTorch's: a CPU has one device and no stream.
#pragma once

#include <cstdint>

namespace torch::stable::accelerator {

using DeviceIndex = int32_t;

struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex) {}
};

struct Stream {
  void* nativeHandle() const { return nullptr; }
};

inline Stream getCurrentStream(DeviceIndex) { return {}; }

}  // namespace torch::stable::accelerator
