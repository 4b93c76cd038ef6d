// Swaps of a row's weights, one row after the other, so that all that a swap reads but the Gram matrix is in the cache.
#include <cmath>
#include <cstdint>
#include <vector>

using Index = int64_t;

// Weights and products are [rows, m, groups], the Gram matrix [m, groups, m, groups]: the same member of all groups is
// contiguous, and the loops over groups vectorise.
extern "C" void refine(const float* weights, const float* gram, const float* products, const float* tolerances,
                       bool* keep, Index rows, Index m, Index groups, int threads) {
  const Index inputs = m * groups, pairs = m * (m - 1) / 2;
  // G_pq of every pair within the groups.
  std::vector<float> inner(pairs * groups);
  for (Index p = 0, pair = 0; p < m; ++p)
    for (Index q = p + 1; q < m; ++q, ++pair)
      for (Index g = 0; g < groups; ++g)
        inner[pair * groups + g] = gram[(p * groups + g) * inputs + q * groups + g];

#pragma omp parallel num_threads(threads)
  {
    // By weight: its sign is + if it is kept, what w^2 G adds, and what a change of its state adds. By pair of a group:
    // what the change of both adds beyond that, infinite unless one of them is kept.
    std::vector<float> factors(inputs), squares(inputs), changes(inputs), both(pairs * groups), best(groups);
    std::vector<double> c(inputs);
#pragma omp for schedule(dynamic, 4)
    for (Index row = 0; row < rows; ++row) {
      const float* w = weights + row * inputs;
      bool* kept = keep + row * inputs;
      for (Index i = 0; i < inputs; ++i) {
        c[i] = products[row * inputs + i];
        factors[i] = kept[i] ? 2 * w[i] : -2 * w[i];
        squares[i] = w[i] * w[i] * gram[i * (inputs + 1)];
        changes[i] = factors[i] * (float)c[i] + squares[i];
      }
      for (Index p = 0, pair = 0; p < m; ++p)
        for (Index q = p + 1; q < m; ++q, ++pair)
          for (Index g = 0; g < groups; ++g) {
            const Index i = p * groups + g, j = q * groups + g, k = pair * groups + g;
            both[k] = kept[i] != kept[j] ? -2 * w[i] * w[j] * inner[k] : INFINITY;
          }
      while (true) {
        for (Index g = 0; g < groups; ++g) best[g] = INFINITY;
        for (Index p = 0, pair = 0; p < m; ++p)
          for (Index q = p + 1; q < m; ++q, ++pair) {
            const float *a = &changes[p * groups], *b = &changes[q * groups], *ab = &both[pair * groups];
#pragma omp simd
            for (Index g = 0; g < groups; ++g) {
              const float change = a[g] + b[g] + ab[g];
              best[g] = change < best[g] ? change : best[g];
            }
          }
        float lowest = INFINITY;
#pragma omp simd reduction(min : lowest)
        for (Index g = 0; g < groups; ++g) lowest = best[g] < lowest ? best[g] : lowest;
        Index group = 0;
        while (best[group] != lowest) ++group;
        Index out = group, into = group;
        lowest = INFINITY;
        for (Index p = 0, pair = 0; p < m; ++p)
          for (Index q = p + 1; q < m; ++q, ++pair) {
            const Index i = p * groups + group, j = q * groups + group;
            const float change = changes[i] + changes[j] + both[pair * groups + group];
            if (change < lowest) lowest = change, out = kept[i] ? i : j, into = kept[i] ? j : i;
          }
        // Rounding must not make a gain of a swap and of its undoing.
        const float *gram_out = gram + out * inputs, *gram_into = gram + into * inputs;
        const double a = w[out], b = w[into];
        const double change = 2 * (a * c[out] - b * c[into]) + a * a * gram_out[out] + b * b * gram_into[into] -
                              2 * a * b * gram_out[into];
        if (!(out != into && change < -tolerances[row])) break;
        kept[out] = false, kept[into] = true;
        factors[out] = -factors[out], factors[into] = -factors[into];
        for (Index p = 0, pair = 0; p < m; ++p)
          for (Index q = p + 1; q < m; ++q, ++pair) {
            const Index i = p * groups + group, j = q * groups + group, k = pair * groups + group;
            both[k] = kept[i] != kept[j] ? -2 * w[i] * w[j] * inner[k] : INFINITY;
          }
#pragma omp simd
        for (Index i = 0; i < inputs; ++i) {
          c[i] += (double)w[out] * gram_out[i] - (double)w[into] * gram_into[i];
          changes[i] = factors[i] * (float)c[i] + squares[i];
        }
      }
    }
  }
}
