// buffer: memory of a thread, on a boundary of a cache line.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

namespace fastres {

class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(::operator new(bytes, std::align_val_t(64)),
              [](void* p) { ::operator delete(p, std::align_val_t(64)); }) {}
  void* data() const { return data_.get(); }

 private:
  std::unique_ptr<void, void (*)(void*)> data_;
};

}  // namespace fastres
