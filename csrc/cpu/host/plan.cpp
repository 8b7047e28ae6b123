#include "plan.h"

namespace unicom::cpu {

namespace {

// See SourceRows; all columns need no bits.
std::vector<uint16_t> column_bits(const RowSource& rows) {
  if (rows.columns == nullptr || rows.dim == 0) return {};
  std::vector<uint16_t> bits(static_cast<size_t>(rows.columns[rows.dim - 1] / kLanes + 1));
  for (int64_t k = 0; k < rows.dim; ++k)
    bits[static_cast<size_t>(rows.columns[k] / kLanes)] |=
        static_cast<uint16_t>(1u << (rows.columns[k] % kLanes));
  return bits;
}

}  // namespace

int64_t kept_panel_bytes(const Problem& p) {
  const int64_t real_bytes = p.is_double() ? 8 : 4;
  return round_up(p.batch, kTile) * kLanes * real_bytes;
}

int64_t kept_panels(const Problem& p) {
  const int64_t panels = ceil_div(p.bound, kLanes) * p.centers;
  const int64_t bytes = kept_panel_bytes(p);
  if (p.keep_bytes == 0 || bytes == 0) return 0;
  const int64_t fit = p.keep_bytes / bytes;
  const int64_t together = panels_together(p);
  return fit >= panels ? panels : fit / together * together;
}

Plan::Plan(const Problem& p)
    : Problem(p),
      column_bits_(column_bits(p.embeddings)),
      embedding_rows(p.embeddings, column_bits_.data()),
      sampled(p.count != nullptr ? *p.count : p.bound),
      rounding(p.precision == Precision::kFp16 && !p.is_double() ? Rounding::kFloat16
                                                                 : Rounding::kNone),
      kept_panels(cpu::kept_panels(p)) {}

}  // namespace unicom::cpu
