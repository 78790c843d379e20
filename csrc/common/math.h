// math: the elementary functions that formulas are written with, by one name for a number on a GPU
// (gpu_math.h) and for a tile of numbers on a CPU (tile_math.h): Math<V>::exp(v), tanh, erf,
// positive_part (NaN stays NaN), is_positive (1 or 0; 1 where NaN), of (a constant).
#pragma once

namespace fastres { template <class V> struct Math; }  // namespace fastres
