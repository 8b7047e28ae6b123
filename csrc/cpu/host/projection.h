// Rows and centroids as the pruned search multiplies them: along leading axes, in bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "byte_vectors.h"
#include "parallel.h"

namespace unicom::cpu {

// What rows and centroids are reduced to. The steps are of the rows' values; where they are too
// small for one, more centroids are marked for it.
struct Projection {
  const float* row_mean;       // [dim]
  const float* centroid_mean;  // [dim]
  const float* axes;  // [count][dim], of norm <= 1 as a matrix; nullptr: all of dim, as they are
  int64_t dim, count;
  float step;       // of the coordinates along the axes
  float rest_step;  // of the norm of what lies outside
  int32_t largest;  // size of a value, see NearestKernels
};

// Bytes of what is kept of a row.
int64_t projected_row_bytes(const Projection&);
void project_rows(const FloatRows& rows, const Projection&, uint8_t* projected, const Parallel&);

// The centroids `order` [count] of some, the first to be searched first. A later one is passed over
// for rows that were said to be certain of it:
//   moved  [count] not increasing: bounds of what each may have added to a cosine, as a share of the
//          norm of row - row mean, kLeastNorm at least; nullptr where rows are certain of nothing
int64_t ordered_centroid_bytes(int64_t count, const Projection&);
void order_centroids(const FloatRows& centroids, const int64_t* order, const float* moved,
                     const Projection&, void* packed, const Parallel&);
constexpr double kLeastNorm = 0.5;

constexpr int32_t kLimit = 1 << 30;  // no sum of products reaches it

inline float round_up_to_float(double x) {
  const float value = static_cast<float>(x);
  return value >= x ? value : std::nextafter(value, std::numeric_limits<float>::infinity());
}

// The bytes of a row: coordinates, then where there are axes in one unit the norm of the rest, four
// times.
inline int64_t rest_unit(const Projection& p) { return ceil_div(p.count, kValues); }
inline int64_t screen_units(const Projection& p) {
  return round_up(rest_unit(p) + (p.axes != nullptr ? 1 : 0), 4);
}
inline int64_t whole_bytes(const Projection& p) { return round_up(p.dim, 128); }

// What is kept of a row besides its bytes.
struct RowFacts {
  double length;  // norm of the row as it was given; 0 or not finite: it is not searched
  float lost;     // bound of the norm of what rounding took from the coordinates; +infinity: no
                  // bound of the rest fits a byte
  float kept;     // of the norm of the coordinates that are multiplied
  float norm;     // of the norm of row - row mean
  float shared;   // with x the unit row: x . centroid mean, which no score contains
};

// Views into the block that order_centroids fills. Centroids are in the order of the search.
struct OrderedCentroids {
  int64_t count, panel_count, units, bytes_each;
  double* unit;                               // what a sum of the screen counts in
  double* largest_norm;                       // bounds over centroids: of the coordinates
  double* largest_lost;                       // of what rounding took from them
  double* inverse_norm;                       // [count] by id, not by order
  ByteQuad* panels;                           // of the screen
  int32_t* start;                             // [lanes]
  uint8_t* whole;                             // [count][bytes_each]
  int32_t* whole_start;                       // [count]
  int32_t* id;                                // [count]
  float *scale, *bias, *norm, *lost, *moved;  // [count]
  int64_t bytes;

  OrderedCentroids(const void* packed, int64_t count, const Projection& p)
      : count(count),
        panel_count(ceil_div(count, kLanes)),
        units(screen_units(p)),
        bytes_each(whole_bytes(p)) {
    Arrays arrays(packed);
    const int64_t lanes = panel_count * kLanes;
    arrays.take(unit, 1);
    arrays.take(largest_norm, 1);
    arrays.take(largest_lost, 1);
    arrays.take(inverse_norm, count);
    arrays.take(panels, lanes * units + kBehindPanels);
    arrays.take(start, lanes);
    arrays.take(whole, count * bytes_each);
    arrays.take(whole_start, count);
    arrays.take(id, count);
    for (float** floats : {&scale, &bias, &norm, &lost, &moved}) arrays.take(*floats, count);
    bytes = arrays.bytes();
  }
};

}  // namespace unicom::cpu
