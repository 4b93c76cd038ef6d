// A linear layer whose 2:4 weight is packed: of 32 inputs there are 16 bfloat16 values, and 32 bits that say where they
// belong.
#if !defined(__AVX512BF16__) || !defined(__AVX512VBMI2__)
#error this CPU has no AVX-512 with BF16 and VBMI2
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>

static inline __m512i expanded(const uint16_t* values, uint32_t positions) {
  return _mm512_maskz_expand_epi16(positions, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values)));
}

static inline uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// So many tokens by so many rows of the weight, with a sum in a register for each pair.
template <int TOKENS, int ROWS>
static void tile(const uint16_t* x, const uint16_t* values, const uint32_t* positions, uint16_t* y, int64_t blocks,
                 int64_t out_features) {
  __m512 sums[ROWS][TOKENS];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) sums[r][t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    __m512bh weights[ROWS];
    for (int r = 0; r < ROWS; ++r)
      weights[r] = (__m512bh)expanded(values + (r * blocks + b) * 16, positions[r * blocks + b]);
    for (int t = 0; t < TOKENS; ++t) {
      const __m512bh inputs = (__m512bh)_mm512_loadu_si512(x + (t * blocks + b) * 32);
      for (int r = 0; r < ROWS; ++r) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], weights[r], inputs);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) y[t * out_features + r] = rounded(_mm512_reduce_add_ps(sums[r][t]));
}

template <int TOKENS>
static void rows(const uint16_t* x, const uint16_t* values, const uint32_t* positions, uint16_t* y, int64_t blocks,
                 int64_t out_features, int threads) {
  constexpr int ROWS = TOKENS > 4 ? 2 : 4;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < out_features; row += ROWS) {
    const uint16_t* v = values + row * blocks * 16;
    const uint32_t* p = positions + row * blocks;
    if (row + ROWS <= out_features)
      tile<TOKENS, ROWS>(x, v, p, y + row, blocks, out_features);
    else
      for (int64_t r = 0; row + r < out_features; ++r)
        tile<TOKENS, 1>(x, v + r * blocks * 16, p + r * blocks, y + row + r, blocks, out_features);
  }
}

// y [tokens, out_features] = x [tokens, in_features] times the transposed weight, for one to eight tokens.
extern "C" void product(const uint16_t* x, const uint16_t* values, const uint32_t* positions, uint16_t* y,
                        int64_t tokens, int64_t in_features, int64_t out_features, int threads) {
  constexpr decltype(&rows<1>) by_tokens[] = {rows<1>, rows<2>, rows<3>, rows<4>, rows<5>, rows<6>, rows<7>, rows<8>};
  by_tokens[tokens - 1](x, values, positions, y, in_features / 32, out_features, threads);
}

// The dense weight, [out_features, in_features].
extern "C" void unpack(const uint16_t* values, const uint32_t* positions, uint16_t* weight, int64_t in_features,
                       int64_t out_features, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < out_features * (in_features / 32); ++b)
    _mm512_storeu_si512(weight + b * 32, expanded(values + b * 16, positions[b]));
}
