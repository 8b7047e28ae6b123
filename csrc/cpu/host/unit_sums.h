// Sums of unit rows by centroid, and where they point.
#pragma once

#include "../../core/unit_sums.h"
#include "parallel.h"

namespace unicom::cpu {

// Rows that stay in their sum cost no more than a look at their index.
void add_unit_rows(const AddUnitRows&, const Parallel&);

void directions(const Directions&, const Parallel&);

}  // namespace unicom::cpu
