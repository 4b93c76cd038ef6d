// SparseGPT's choice in a block of columns. Rows are independent: a few are settled at a time, in the cache.
#include <algorithm>
#include <cstdint>
#include <vector>

using Index = int64_t;

// Columns, keep and errors are [length, rows], the factor the [length, length] corner of a matrix with longer rows.
extern "C" void choose(const float* columns, const float* factor, bool* keep, float* errors, Index length, Index rows,
                       Index factor_row, Index n, Index m, int threads) {
  constexpr Index TILE = 64;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> weights(length * TILE), scores(m * TILE);
#pragma omp for
    for (Index first = 0; first < rows; first += TILE) {
      const Index width = std::min(TILE, rows - first);
      for (Index j = 0; j < length; ++j)
        std::copy_n(columns + j * rows + first, width, &weights[j * TILE]);
      for (Index j = 0; j < length; ++j) {
        const float own = factor[j * (factor_row + 1)];
        if (j % m == 0)
          for (Index p = 0; p < m; ++p)
            for (Index r = 0; r < TILE; ++r) {
              const float score = weights[(j + p) * TILE + r] / factor[(j + p) * (factor_row + 1)];
              scores[p * TILE + r] = score * score;
            }
        // A member is kept that fewer than n others beat; of equal ones the first wins.
        int beaten_by[TILE] = {};
        const float* score = &scores[j % m * TILE];
        for (Index p = 0; p < m; ++p) {
          const float* other = &scores[p * TILE];
          if (p < j % m)
            for (Index r = 0; r < TILE; ++r) beaten_by[r] += other[r] >= score[r];
          else
            for (Index r = 0; r < TILE; ++r) beaten_by[r] += other[r] > score[r];
        }
        float error[TILE];
        for (Index r = 0; r < TILE; ++r) error[r] = beaten_by[r] < n ? 0 : weights[j * TILE + r] / own;
        for (Index k = j + 1; k < length; ++k)
          for (Index r = 0; r < TILE; ++r) weights[k * TILE + r] -= factor[j * factor_row + k] * error[r];
        std::copy_n(error, width, errors + j * rows + first);
        for (Index r = 0; r < width; ++r) keep[j * rows + first + r] = beaten_by[r] < n;
      }
    }
  }
}
