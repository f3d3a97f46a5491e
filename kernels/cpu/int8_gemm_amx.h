// The eight tile registers of AMX, and what a kernel does with them.
//
// AMX_EMULATED puts plain C++ in the place of the instructions, so that the kernel around them can
// be tested on any machine, bit for bit.

#pragma once

#include <cstdint>
#include <cstring>

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;  // of a register, all of it

#if defined(AMX_EMULATED)
#define HAS_AMX

struct Tiles {
  static bool permitted() { return true; }
  static void configure() {}
  static void release() {}

  template <int TILE>
  static void load(const void* from, int64_t stride) {
    for (int i = 0; i < TILE_ROWS; ++i)
      std::memcpy(tiles()[TILE][i], static_cast<const char*>(from) + i * stride, TILE_BYTES);
  }

  template <int TILE>
  static void store(void* to, int64_t stride) {
    for (int i = 0; i < TILE_ROWS; ++i)
      std::memcpy(static_cast<char*>(to) + i * stride, tiles()[TILE][i], TILE_BYTES);
  }

  // SUMS[i][j] += the products of four codes of LEFT[i][k] with four of RIGHT[k][j], over all k
  template <int SUMS, int LEFT, int RIGHT>
  static void multiply() {
    for (int i = 0; i < TILE_ROWS; ++i)
      for (int j = 0; j < TILE_BYTES / 4; ++j) {
        int32_t sum;
        std::memcpy(&sum, tiles()[SUMS][i] + 4 * j, 4);
        for (int k = 0; k < TILE_ROWS; ++k)
          for (int byte = 0; byte < 4; ++byte)
            sum += tiles()[LEFT][i][4 * k + byte] * tiles()[RIGHT][k][4 * j + byte];
        std::memcpy(tiles()[SUMS][i] + 4 * j, &sum, 4);
      }
  }

 private:
  using Register = int8_t[TILE_ROWS][TILE_BYTES];

  static Register* tiles() {
    static thread_local Register registers[8];
    return registers;
  }
};

#elif defined(__AMX_INT8__) && defined(__linux__)
#define HAS_AMX

#include <sys/syscall.h>
#include <unistd.h>

// In assembly, for GCC's intrinsics take no template parameter as the number of a tile.
struct Tiles {
  // Linux saves the tiles of a process only after it has asked for that, once.
  static bool permitted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool given = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return given;
  }

  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};  // of a row of each tile
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) {
      shape.bytes[tile] = TILE_BYTES;
      shape.rows[tile] = TILE_ROWS;
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }

  static void release() { asm volatile("tilerelease"); }

  template <int TILE>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
  }

  template <int TILE>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
  }

  template <int SUMS, int LEFT, int RIGHT>
  static void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
  }
};

#endif
