// Select and quantise a token at a time: nm_quantize.py's reference in C++.
//
// What is kept of a token stays in the cache until its largest magnitude is known. 2:4 is selected,
// measured and held in groups of four; other patterns, and the variance correction, go through
// nm_select's selection.

#include <cmath>

#include "codes.h"
#include "correction.h"
#include "floats.h"
#include "groups_of_four.h"
#include "interface.h"
#include "memory.h"
#include "selection.h"

namespace {

// ---- one token ----------------------------------------------------------------------------------

template <class T>
struct Token {
  using Bits = typename T::Bits;
  const Bits* x;
  const float *factor, *smooth;  // smooth is arranged, and so is factor for 2:4
  Bits* kept;                    // [channels], to be written
};

struct Selected {
  int32_t peak;      // the bits of the largest kept magnitude
  float correction;  // maybe not finite
};

float sum_of(const Floats (&parts)[4]) {
  const Floats all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += all[lane];
  return sum;
}

// Mark the two best channels of each group of a step, by the magnitude of value times factor.
template <class T, bool WEIGHTED>
INLINE void mark(const Groups<T>& groups, const float* factor, Ints (&marks)[4]) {
  Ints keys[4];
  for (int k = 0; k < 4; ++k) {
    Floats score = groups.channel(k);
    if (WEIGHTED) score *= load<Floats>(factor + k * LANES);
    keys[k] = Magnitude<Float32>::keys<Ints>(score, nullptr, 0, 0);
  }
  best_two(keys, marks);
}

// Keep two of every four channels, arranged.
template <class T, bool WEIGHTED, bool SMOOTH, bool NORMED>
Selected select_two_of_four(const Tokens& p, const Token<T>& token) {
  Peak<T, SMOOTH> peak;
  double before = 0, after = 0;
  for (int64_t start = 0; start < p.channels; start += BLOCK) {
    const int64_t end = std::min<int64_t>(start + BLOCK, p.channels);
    Floats squares[4] = {}, kept_squares[4] = {};
    for (int64_t at = start; at < end; at += STEP) {
      Groups<T> groups = Groups<T>::of(token.x + at);
      Ints marks[4];
      mark<T, WEIGHTED>(groups, token.factor + at, marks);
      if constexpr (NORMED) groups.add_squares(squares);
      groups.keep(marks);
      if constexpr (NORMED) groups.add_squares(kept_squares);
      groups.arrange(token.kept + at);
      peak.meet(groups, token.smooth + at);
    }
    before += sum_of(squares), after += sum_of(kept_squares);
  }
  const Pair energy{float(before / double(p.channels)), float(after / double(p.channels))};
  return {peak.float_bits(), NORMED ? scale_between(energy) : 1};
}

// Return the mean square of a row.
template <class T>
float mean_square(const typename T::Bits* row, int64_t channels) {
  double sum = 0;
  for (int64_t start = 0; start < channels; start += BLOCK) {
    const int64_t size = std::min<int64_t>(BLOCK, channels - start);
    Floats squares[4] = {};
    each_step(row + start, size, [&](auto step, int64_t) __attribute__((always_inline)) {
      Groups<T>::arranged(step).add_squares(squares);  // any order will do
    });
    sum += sum_of(squares);
  }
  return float(sum / double(channels));
}

// Keep N of every M channels, in order.
template <class T, class Score, bool SMOOTH>
Selected select_any(const Tokens& p, const Token<T>& token) {
  const auto select = select_whole_of<Score>(p.m);
  select_token<Score>(select, token.x, token.factor, token.kept, p.channels, p.n);
  const int32_t peak = peak_of<T, SMOOTH>(token.kept, token.smooth, p.channels);
  if (p.correction == NONE) return {peak, 1};
  if (p.correction == VARIANCE)
    return {peak, correction_scale<T>(token.x, token.kept, p.channels, VARIANCE)};
  const Pair energy{mean_square<T>(token.x, p.channels), mean_square<T>(token.kept, p.channels)};
  return {peak, scale_between(energy)};
}

// ---- choice -------------------------------------------------------------------------------------

template <class T>
using Select = Selected (*)(const Tokens&, const Token<T>&);

bool in_groups_of_four(const Tokens& p) {
  return p.n == 2 && p.m == 4 && p.channels % STEP == 0 && p.correction != VARIANCE;
}

template <class T, bool WEIGHTED, bool SMOOTH>
Select<T> select_of(const Tokens& p) {
  using Score = std::conditional_t<WEIGHTED, Weighted<T>, Magnitude<T>>;
  if (!in_groups_of_four(p)) return select_any<T, Score, SMOOTH>;
  return p.correction == NORM ? select_two_of_four<T, WEIGHTED, SMOOTH, true>
                              : select_two_of_four<T, WEIGHTED, SMOOTH, false>;
}

template <class T, bool SMOOTH>
Select<T> select_of(const Tokens& p) {
  return p.factor ? select_of<T, true, SMOOTH>(p) : select_of<T, false, SMOOTH>(p);
}

// ---- all tokens ---------------------------------------------------------------------------------

template <class T, bool SMOOTH>
void quantize_tokens(const Tokens& p, const RowCodes& to, Parallel parallel) {
  using Bits = typename T::Bits;
  const bool arranged = in_groups_of_four(p);
  const auto select = select_of<T, SMOOTH>(p);
  const auto encode_kept = arranged ? encode<T, SMOOTH, true> : encode<T, SMOOTH, false>;
  prefer_huge_pages(to.codes, p.tokens * p.channels);
  for_each_piece(p.tokens, piece_of(p), p.threads, parallel, [&](int64_t begin, int64_t end) {
    const Memory<Bits> kept = memory_for<Bits>(p.channels);
    for (int64_t i = begin; i < end; ++i) {
      const Bits* x = static_cast<const Bits*>(p.x) + i * p.x_stride;
      int8_t* codes = to.codes + i * p.channels;
      if (p.n == p.m || i % p.sequence < p.dense) {
        const int32_t peak = peak_of<T, SMOOTH>(x, to.smooth, p.channels);
        to.row_scale[i] = encode<T, SMOOTH, false>(x, peak, to.smooth, codes, p.channels);
        continue;
      }
      const Selected is = select(p, {x, factor_of(p, i), to.smooth, kept.get()});
      const float scale = encode_kept(kept.get(), is.peak, to.smooth, codes, p.channels);
      to.row_scale[i] = std::isfinite(is.correction) ? scale * is.correction : scale;
    }
  });
}

// Return rows of channels, each padded with zeros to whole steps and arranged; null for none.
Memory<float> arranged_rows(const float* rows, int64_t count, int64_t channels) {
  if (!rows) return nullptr;
  const int64_t padded = (channels + STEP - 1) / STEP * STEP;
  Memory<float> arranged = memory_for<float>(count * padded);
  for (int64_t row = 0; row < count; ++row) {
    float* to = arranged.get() + row * padded;
    each_step(rows + row * channels, channels, [&](const float* step, int64_t at) {
      const auto groups = Groups<Float32>::of(reinterpret_cast<const uint32_t*>(step));
      groups.arrange(reinterpret_cast<uint32_t*>(to + at));
    });
  }
  return arranged;
}

template <class T>
void run(Tokens p, RowCodes to, Parallel parallel) {
  const Memory<float> smooth = arranged_rows(to.smooth, 1, p.channels);
  to.smooth = smooth.get();
  Memory<float> factor;
  if (in_groups_of_four(p)) {
    factor = arranged_rows(p.factor, p.experts, p.channels);
    p.factor = factor.get();
  }
  (smooth ? quantize_tokens<T, true> : quantize_tokens<T, false>)(p, to, parallel);
}

}  // namespace

extern "C" {
void nm_quantize_float32(const Tokens* p, const RowCodes* to, Parallel parallel) {
  run<Float32>(*p, *to, parallel);
}
void nm_quantize_bfloat16(const Tokens* p, const RowCodes* to, Parallel parallel) {
  run<BFloat16>(*p, *to, parallel);
}
void nm_quantize_float16(const Tokens* p, const RowCodes* to, Parallel parallel) {
  run<Float16>(*p, *to, parallel);
}
}
