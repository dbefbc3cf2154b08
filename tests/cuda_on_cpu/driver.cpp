// Runs one call of the library outside Python, where sanitizers work: driver INPUT OUTPUT. Every array is an allocation
// of exactly its size. Written and read by driver.py:
//   the function's name (32 bytes), the struct (its size, its bytes),
//   the arrays (their number; of each its size and its bytes),
//   the struct's addresses (their number; of each its place in the struct, its array, the bytes before it there)
// The answer: what the function returned, and every array's bytes afterwards.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "params.h"

namespace {

using Function = int (*)(const void*, void*);

std::ifstream input;

void read(void* target, size_t bytes) {
  input.read(static_cast<char*>(target), static_cast<std::streamsize>(bytes));
  if (!input) {
    std::fprintf(stderr, "driver: the input ends early\n");
    std::exit(2);
  }
}

int64_t read_int() {
  int64_t value;
  read(&value, sizeof value);
  return value;
}

Function find(const char* name) {
#define EPT_FUNCTION(function) \
  if (std::strcmp(name, #function) == 0) return reinterpret_cast<Function>(function)
  EPT_FUNCTION(ept_interleave);
  EPT_FUNCTION(ept_gather);
  EPT_FUNCTION(ept_core);
  EPT_FUNCTION(ept_dropout);
  EPT_FUNCTION(ept_fold);
  EPT_FUNCTION(ept_fold_grad);
#undef EPT_FUNCTION
  std::fprintf(stderr, "driver: there is no function %s\n", name);
  std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: driver INPUT OUTPUT\n");
    return 2;
  }
  input.open(argv[1], std::ios::binary);
  char name[32];
  read(name, sizeof name);
  std::vector<int64_t> params((read_int() + 7) / 8);
  char* bytes = reinterpret_cast<char*>(params.data());
  read(bytes, params.size() * 8);

  std::vector<std::unique_ptr<char[]>> arrays(read_int());
  std::vector<int64_t> sizes;
  for (auto& array : arrays) {
    sizes.push_back(read_int());
    array.reset(new char[sizes.back()]);
    read(array.get(), sizes.back());
  }
  for (int64_t addresses = read_int(); addresses > 0; --addresses) {
    const int64_t place = read_int(), array = read_int();
    const char* address = arrays[array].get() + read_int();
    std::memcpy(bytes + place, &address, sizeof address);
  }
  const int64_t code = find(name)(bytes, nullptr);

  std::ofstream output(argv[2], std::ios::binary);
  output.write(reinterpret_cast<const char*>(&code), sizeof code);
  for (size_t i = 0; i < arrays.size(); ++i) output.write(arrays[i].get(), static_cast<std::streamsize>(sizes[i]));
  output.flush();
  return output ? 0 : 2;
}
