// The product of quantized_linear.py: int8 codes times packed int8 weights, scaled in the epilogue.
//
// Threads take blocks of tokens times panels of 32 outputs. The codes of a block lie in the order
// in which a micro-kernel reads them, and stay in the second-level cache while the panels pass.

#include "int8_gemm_finish.h"
#include "int8_gemm_tiles.h"
#include "interface.h"
#include "memory.h"

namespace {

// ---- weight -------------------------------------------------------------------------------------
//
// A panel is [K/4][32][4] codes, K padded to a multiple of 64, then [32] uint32: -128 times the sum
// of each output's codes, where its sums start if the codes of activations are raised by 128.

constexpr int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

constexpr int64_t steps_of(int64_t channels) { return divide_up(channels, STEP); }

constexpr int64_t panel_bytes(int64_t channels) {
  return OUTPUTS * (steps_of(channels) * STEP + int64_t(sizeof(uint32_t)));
}

void pack_panel(const int8_t* codes, int64_t live, int64_t channels, int8_t* panel) {
  const int64_t padded = steps_of(channels) * STEP;
  uint32_t starts[OUTPUTS] = {};
  std::memset(panel, 0, OUTPUTS * padded);
  for (int64_t j = 0; j < live; ++j, codes += channels) {
    for (int64_t k = 0; k < channels; k += 4)
      std::memcpy(panel + k * OUTPUTS + j * 4, codes + k, std::min<int64_t>(4, channels - k));
    for (int64_t k = 0; k < channels; ++k) starts[j] -= uint32_t(128 * codes[k]);
  }
  std::memcpy(panel + OUTPUTS * padded, starts, sizeof starts);
}

void pack(const Weight& w, Parallel parallel) {
  const int64_t panels = divide_up(w.outputs, OUTPUTS);
  prefer_huge_pages(w.packed, panels * panel_bytes(w.channels));
  for_each_piece(panels, 1, w.threads, parallel, [&](int64_t panel, int64_t) {
    const int64_t first = panel * OUTPUTS, live = std::min<int64_t>(OUTPUTS, w.outputs - first);
    pack_panel(w.codes + first * w.channels, live, w.channels,
               w.packed + panel * panel_bytes(w.channels));
  });
}

// ---- codes --------------------------------------------------------------------------------------

constexpr int64_t SINGLE_THREADED = 1 << 16;  // codes: with fewer, threads are not worth their cost

// Bring one token's codes into its place among the rows of a tile.
void pack_row(const int8_t* codes, int64_t channels, const Kernel& kernel, uint8_t* to) {
  uint64_t flip;
  std::memset(&flip, kernel.flip, sizeof flip);
  const int64_t step_bytes = int64_t(kernel.rows) * STEP;
  for (int64_t step = 0; step < steps_of(channels); ++step, to += step_bytes, codes += STEP) {
    uint64_t words[STEP / 8] = {};
    const int64_t left = channels - step * STEP;
    if (left >= STEP)
      std::memcpy(words, codes, STEP);
    else
      std::memcpy(words, codes, left);
    for (uint64_t& word : words) word ^= flip;
    std::memcpy(to, words, STEP);
  }
}

void pack_codes(const Problem& p, const Kernel& kernel, Parallel parallel) {
  const int64_t tile_bytes = steps_of(p.channels) * STEP * kernel.rows;
  const int threads = p.tokens * p.channels < SINGLE_THREADED ? 1 : p.threads;
  prefer_huge_pages(p.scratch, p.tokens * steps_of(p.channels) * STEP);
  for_each_piece(p.tokens, kernel.rows, threads, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      pack_row(p.codes + token * p.codes_stride, p.channels, kernel,
               p.scratch + token / kernel.rows * tile_bytes + token % kernel.rows * STEP);
  });
}

// ---- product ------------------------------------------------------------------------------------

constexpr int LEAST_ROWS = 192, MOST_ROWS = 384;  // of a block: a multiple of those of any tile
constexpr int64_t BLOCK_BYTES = 512 << 10;        // of codes: half of a second-level cache
constexpr int64_t PASS_STEPS = 128;               // of a panel, 256 KB, which also stay there
constexpr int64_t PIECES = 4;                     // for each thread: all end at about a time

using Finish = decltype(&finish<Float32>);

struct Product {
  const Problem& p;
  const Kernel& kernel;
  const Finish write;
  const int64_t result_bytes;
  const int64_t steps = steps_of(p.channels);

  // Multiply the tokens [begin, end), the first of which starts a tile, with a panel.
  void block(int64_t begin, int64_t end, int64_t panel) const {
    alignas(64) int32_t sums[MOST_ROWS * OUTPUTS];
    const int8_t* codes = p.weight + panel * panel_bytes(p.channels);
    const int64_t first = panel * OUTPUTS;
    const Columns columns(p.weight_scale + first, p.bias ? p.bias + first : nullptr,
                          int(std::min<int64_t>(OUTPUTS, p.outputs - first)));
    const int64_t stride = steps > PASS_STEPS ? OUTPUTS : 0;  // a single pass: one tile's
    kernel.begin();
    for (int64_t step = 0; step < steps; step += PASS_STEPS) {
      const int64_t count = std::min(PASS_STEPS, steps - step);
      for (int64_t token = begin; token < end; token += kernel.rows) {
        const int live = int(std::min<int64_t>(kernel.rows, end - token));
        int32_t* part = sums + (token - begin) * stride;
        kernel.multiply(live, p.scratch + (token * steps + step * kernel.rows) * STEP,
                        codes + step * STEP * OUTPUTS, count,
                        step == 0 ? start(codes) : Start{part, OUTPUTS}, part);
        if (step + count == steps)
          write(part, live, p.row_scale + token, columns,
                static_cast<char*>(p.y) + (token * p.outputs + first) * result_bytes, p.outputs);
      }
    }
    kernel.end();
  }

  Start start(const int8_t* codes) const {
    alignas(64) static constexpr int32_t ZEROS[OUTPUTS] = {};
    if (!kernel.flip) return {ZEROS, 0};
    return {reinterpret_cast<const int32_t*>(codes + steps * STEP * OUTPUTS), 0};
  }

  // Return how many tokens a block has: whole tiles, about as many in each block, and blocks enough
  // for all threads.
  int64_t block_rows() const {
    const int64_t most = std::clamp<int64_t>(BLOCK_BYTES / (steps * STEP), LEAST_ROWS, MOST_ROWS);
    const int64_t tiles = divide_up(p.tokens, kernel.rows);
    const int64_t shares = divide_up(PIECES * p.threads, divide_up(p.outputs, OUTPUTS));
    const int64_t blocks = std::max(divide_up(p.tokens, most), std::min(shares, tiles));
    return divide_up(tiles, blocks) * kernel.rows;
  }
};

void multiply(const Problem& p, const Kernel& kernel, Finish write, int64_t result_bytes,
              Parallel parallel) {
  const Product product{p, kernel, write, result_bytes};
  const int64_t rows = product.block_rows(), panels = divide_up(p.outputs, OUTPUTS);
  prefer_huge_pages(p.y, p.tokens * p.outputs * result_bytes);
  pack_codes(p, kernel, parallel);
  const int64_t pieces = divide_up(p.tokens, rows) * panels;
  for_each_piece(pieces, 1, p.threads, parallel, [&](int64_t piece, int64_t) {
    const int64_t begin = piece / panels * rows;
    product.block(begin, std::min(begin + rows, p.tokens), piece % panels);
  });
}

// ---- kernels ------------------------------------------------------------------------------------

// Return a kernel by its number in int8_kernel.py, or null if it is not here, or may not run.
const Kernel* kernel_numbered(int number) {
  if (number == 0) return &PLAIN;
#ifdef HAS_VNNI
  if (number == 1) return &VNNI;
#endif
#ifdef HAS_AMX
  if (number == 2 && Tiles::permitted()) return &AMX;
#endif
  return nullptr;
}

const Kernel& kernel_for(const Problem& p) {
#if defined(HAS_AMX) && defined(HAS_VNNI)
  if (p.kernel == 2 && p.tokens <= VNNI_ROWS) return VNNI;  // AMX takes 32, and memory is slower
#endif
  return *kernel_numbered(p.kernel);
}

}  // namespace

extern "C" {

int32_t int8_has(int32_t kernel) { return kernel_numbered(kernel) != nullptr; }

void int8_pack(const Weight* weight, Parallel parallel) { pack(*weight, parallel); }

void int8_linear(const Problem* p, Parallel parallel) {
  const Kernel& kernel = kernel_for(*p);
  switch (p->type) {
    case 0: return multiply(*p, kernel, finish<Float32>, sizeof(Float32::Bits), parallel);
    case 1: return multiply(*p, kernel, finish<BFloat16>, sizeof(BFloat16::Bits), parallel);
    default: return multiply(*p, kernel, finish<Float16>, sizeof(Float16::Bits), parallel);
  }
}
}
