// The sizes of the structures that Python mirrors, which it compares when it loads a library: see native.py.
#pragma once

#include <cstdint>

#define EXPORT_SIZE(name) \
  std::int64_t size_of_##name() { return sizeof(name); }
