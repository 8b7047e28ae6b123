// The steps of the operation for CPUs, one table of functions per instruction set and operand type.
// See layout.h for the memory layouts. Nothing here allocates, locks or throws.
#pragma once

#include <cstdint>

#include "layout.h"

namespace unicom::cpu {

// Memory that a kernel asks for while it multiplies, so that a later pass finds it in the caches:
// line by line all along the way, as many requests at once would wait for one another.
struct Span {
  const void* begin;
  int64_t bytes;
};
struct Ahead {
  const Span* spans = nullptr;
  int64_t count = 0;
};

// out[p][T t + m][lane] (+)= sum_u a(t, u, m) * b[p][u][lane], with tiles of T rows
// Unit u of row m of a tile lies at a[(u / group_units) * group_stride + m * group_units + u %
// group_units]: one unit and T of tile panels, or the units of a line of class panels.
template <class Unit>
struct Product {
  const Unit* a;
  int64_t a_tile_stride;
  int64_t group_units;
  int64_t group_stride;
  const Unit* b;
  int64_t b_panel_stride;
  RealOf<Unit>* out;
  int64_t out_panel_stride;
  int64_t rows, panels, units;  // rows of out, a multiple of six
  bool accumulate;
  Ahead ahead;
};

// A block of batch rows against a run of class panels.
template <class Unit>
struct CosineBlock {
  const Unit* rows;  // tile panels [tiles][units][6]
  int64_t row_tile_stride;
  const Unit* classes;  // vector panels [panels][panel_stride]
  int64_t panel_stride;
  int64_t units;
  int64_t tiles, panels;
};

template <class Unit>
struct LogitBlock : CosineBlock<Unit> {
  int64_t centers;         // panels for each sixteen classes; the run holds all of them
  const uint16_t* struck;  // [6 tiles][panels / centers] bits of the lanes that hold no negative
  RealOf<Unit> scale;
  RealOf<Unit> filter;  // negative cosines above this count as 0; +inf: none
  // Cosines that the forward pass writes and the backward pass reads instead of multiplying again,
  // for the first `kept` panels of the run, whole classes: [kept][...][6][16], tiles of one panel
  // side by side.
  RealOf<Unit>* cosines = nullptr;
  int64_t kept = 0;
  int64_t cosines_panel_stride = 0;
  bool past_caches = false;  // there are more of them than caches hold
};

constexpr double kNoCosine = -1e30;  // below every cosine: exp gives 0 and max ignores it

// sum over classes but the target of exp(scale * cosine), as sum * 2^exponent.
struct RowSum {
  double sum;
  int64_t exponent;
  double largest;  // largest cosine before the filter; kNoCosine when there was no class
};

// Most tiles and panels a logit block may have: its operands stay in the second-level cache.
constexpr int64_t kBlockTiles = 32;
constexpr int64_t kBlockPanels = 16;
constexpr int64_t kMaxCenters = kBlockPanels;

constexpr int64_t kRunningExponent = INT64_MIN;

// Adds to sums that go on from call to call: lane by lane in Real, and with `flush` to `result`.
// Lanes that were flushed are as at the start: sums 0, largest kNoCosine.
template <class Unit>
struct SumExp : LogitBlock<Unit> {
  int64_t exponent;       // the constant shift, in powers of two, or kRunningExponent
  RealOf<Unit>* sums;     // [6 tiles][16]
  RealOf<Unit>* largest;  // [6 tiles][16]
  bool flush;             // at the end of the call; within kFlushPanels panels
  RowSum* result;         // [6 tiles]
  Ahead ahead;
};

// Panels whose exponentials may be added in Real before they go to double.
constexpr int64_t kFlushPanels = 64;

// probability = factor * 2^-exponent * exp(scale * cosine)
struct RowScale {
  double factor;
  int64_t exponent;
};

template <class Unit>
struct Probabilities : LogitBlock<Unit> {
  const RowScale* row;  // [6 tiles]
  Unit* along_rows;     // vector panels over classes, summed over rows: [panels][row units][16]
  int64_t along_rows_stride;     // units per panel
  Unit* along_classes;           // vector panels over rows, summed over classes:
  int64_t along_classes_stride;  // [ceil(6 tiles / 16)][class units][16]
};

// The classes that may be the nearest of each row. With the sum p of class_start and the products
// of row r and class j, an integer, its score is
//   row_scale[r] * class_scale[j] * p + class_bias[j]
// A class whose score is above the row's floor becomes a candidate, and the floor rises to the
// score less the row's window. Candidates come in increasing order; the first ones may be below
// where the floor is in the end.
// Rows against panels in bytes; units: a multiple of four.
struct ByteBlock : CosineBlock<ByteQuad> {
  const int32_t* class_start;  // [16 panels] where the sums of products begin
};

struct Nearest : ByteBlock {
  const float* class_bias;  // [16 panels], -infinity for the padding
  const float* class_scale;
  const float* row_scale;  // [6 tiles]
  const float* window;     // [6 tiles]
  float* floor;  // [6 tiles]; starts at a lower bound of the best score, or +infinity for rows
                 // that do not count
  int64_t capacity;
  int32_t* candidate;  // [6 tiles][capacity]
  float* score;        // [6 tiles][capacity]
  int32_t* count;      // [6 tiles]; capacity + 1 where the candidates were too many
};

// A vector as bytes: whole multiples of a step, from -largest to largest.
struct ToBytes {
  const float* values;  // [count]
  float factor;         // what is rounded is factor * values - mean
  const float* mean;    // [count], or nullptr
  int64_t count;
  float step;  // values further out are cut; 0: that with which the largest one fits
  int32_t largest;
  int32_t shift;  // added to what is written
  uint8_t* bytes;
  int64_t padded;  // of them, a multiple of 16; zeros past count
};
struct Bytes {
  float step;
  float norm;   // of the vector, to rounding
  float lost;   // norm of what rounding took from it, to rounding
  int32_t sum;  // of what was written, without the shift
};

// A block of rows against the leading parts of centroids: a bit for each whose sum of products is
// above the row's limit.
struct Screen : ByteBlock {
  const int32_t* limit;  // [6 tiles]
  uint16_t* marks;       // [6 tiles][marks_stride] the lanes of each panel
  int64_t marks_stride;
};

// One row of bytes times some rows of a matrix of bytes.
struct ByteProducts {
  const uint8_t* row;     // [bytes]
  const uint8_t* matrix;  // [...][bytes], signed
  int64_t bytes;          // a multiple of 128
  const int32_t* wanted;  // [count] rows of the matrix
  int64_t count;
  int32_t* sums;  // [count]
};

// How operands that only kernels of one set read lie: tile panels, or squares.
struct TileLayout {
  int64_t rows;         // of a tile
  int64_t units;        // of a row that lie side by side; of tile panels 1
  int64_t class_units;  // the same where they are classes, which `lanes_to_units` has put so

  // Units that a row takes, and where the first of a run of them lies.
  int64_t padded(int64_t count) const { return round_up(count, units); }
  int64_t at(int64_t row, int64_t unit, int64_t count) const {
    return row / rows * rows * padded(count) + unit / units * units * rows + row % rows * units +
           unit % units;
  }
};

template <class Unit>
struct Kernels {
  using Real = RealOf<Unit>;

  TileLayout tile;

  // Gathers rows ids[first], ... up to sixteen of a list of `total`, divides each by its norm and
  // packs them as one vector panel; lanes past the list and values past dim are zero. A null ids
  // means rows first, first + 1, ... A zero row packs as zeros and has inverse norm 0.
  void (*pack_panel)(const SourceRows&, const int64_t* ids, int64_t first, int64_t total, Rounding,
                     Real* scratch /* [16][height] */, Unit* panel, double* inverse_norm);

  // sums[k] += value k of all sixteen lanes of a panel, for k < height.
  void (*add_lanes)(const Unit* panel, int64_t height, double* sums);

  // Row id of the source divided by its norm, in Real without rounding, zeros past dim up to
  // height. Returns the inverse norm; a zero row gives zeros and 0.
  double (*unit_row)(const SourceRows&, int64_t id, Real* row, int64_t height);

  // Six unit rows [6][height] to what the forward product takes as its tile `index`, in tiles of
  // which a row has tile.padded(units).
  void (*pack_tile)(const Real* rows, int64_t height, int64_t units, Rounding, int64_t index,
                    Unit* tiles);

  // Weighted unit rows to tiles over dimensions, summed over rows, tile_stride apart.
  // Handles rows [first, first + count); first is even, rows past the last are zero.
  void (*pack_weighted)(const Real* rows, int64_t height, const double* weight, int64_t first,
                        int64_t count, int64_t tile_stride, Unit* tiles);

  // A class panel re-ordered so that a product can sum over its classes: 16 / values units for each
  // of `height` rows, which lie tile.class_units apart. Identity for unpaired operands (nullptr
  // then: read the panel itself).
  void (*lanes_to_units)(const Unit* panel, int64_t height, Unit* out);

  void (*product)(const Product<Unit>&);
  void (*sum_exp)(const SumExp<Unit>&);
  void (*probabilities)(const Probabilities<Unit>&);

  // Dot product in double, in the same order of summation everywhere.
  double (*dot)(const Real* a, const Real* b, int64_t count);

  // Derivative of the normalisation for one gradient panel, in rows: for each lane
  //   rows[lane][k] = scale[lane] * (g_k - (g . u) u_k),   u the packed unit vector.
  void (*unit_backward)(const Real* gradient, const Unit* panel, int64_t dim, const double* scale,
                        Real* rows /* [16][height] */);

  // Rows [count][height] of the columns that a source selects to whole rows:
  // out[r][columns[k]] = rows[r][k].
  void (*spread_rows)(const Real* rows, int64_t height, int64_t count, const SourceRows& columns,
                      Real* out, int64_t out_stride);
};

constexpr int64_t kMarkedPanels = 4;
constexpr int64_t kMoreMarks = 4;

struct NearestKernels {
  TileLayout tile;  // of rows
  int32_t largest;  // values that they multiply are from -largest to largest; in tiles it is added
  void (*nearest)(const Nearest&);
  void (*screen)(const Screen&);
  // Writes the marked lanes of `panels` panels, the first of which begins at `first`; returns how
  // many they are. Reads groups of kMarkedPanels, and writes up to kMoreMarks more than there are.
  int64_t (*list_marks)(const uint16_t* marks, int64_t panels, int32_t first, int32_t* out);
  void (*byte_products)(const ByteProducts&);
  Bytes (*to_bytes)(const ToBytes&);
};

struct KernelSet {
  const char* name;
  const Kernels<float>* fp32;
  const Kernels<BfPair>* bf16;
  const Kernels<double>* fp64;
  const NearestKernels* nearest;
  const struct UpdateKernels* update;  // row_steps.h
};

// The kernels in use: the best this CPU can run, unless set_capability chose another.
const KernelSet& kernels();

// Names of the instruction sets this CPU can run, best last.
int capabilities(const char** names /* [5] */);
const char* capability();
bool set_capability(const char* name);  // also "emulated_avx512" and "emulated_amx", for tests

}  // namespace unicom::cpu
