// Results of tensor cores as the threads hold them: of each row, two neighbours of every eight
// columns, in a team of four lanes.
#pragma once

#include "device.cuh"

namespace unicom::cuda {

// The lane without bit kLane gives its second word for the first of the lane that has it.
template <int kLane>
UNICOM_DEVICE void exchange_words(uint32_t& first, uint32_t& second, int member) {
  const bool has = (member & kLane) != 0;
  const uint32_t got = __shfl_xor_sync(kAllLanes, has ? first : second, kLane);
  (has ? first : second) = got;
}

// Sixteen bytes in one instruction, whatever the compiler makes of the values.
UNICOM_DEVICE void store_words(void* to, const Pack<uint32_t, 4>& words) {
#ifdef UNICOM_EMULATE_CUDA
  *static_cast<Pack<uint32_t, 4>*>(to) = words;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.values[0]), "r"(words.values[1]), "r"(words.values[2]),
               "r"(words.values[3])
               : "memory");
#endif
}

// Writes convert(i, result) of each of the thread's rows i of a tile. `to`: where the first of the
// warp's columns belongs. Results of two neighbours fill four bytes; a team transposes what it has
// of four parts of the columns, so that each lane has the whole of one, sixteen bytes.
template <class Unit, class T, class Convert>
UNICOM_DEVICE void store_fragments(T& tile, Unit* to, int64_t stride, const Convert& convert) {
  static_assert(T::kThreadCols % 8 == 0);
  const int member = lane_index() % 4;
  to += member * 8;
#pragma unroll
  for (int i = 0; i < T::kThreadRows; ++i) {
    Unit* const row = to + tile.row(i) * stride;
#pragma unroll
    for (int j = 0; j < T::kThreadCols; j += 8) {
      Pack<uint32_t, 4> words;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const Unit low = convert(i, tile.at(i, j + 2 * w));
        const Unit high = convert(i, tile.at(i, j + 2 * w + 1));
        words.values[w] = low.bits | static_cast<uint32_t>(high.bits) << 16;
      }
      exchange_words<1>(words.values[0], words.values[1], member);
      exchange_words<1>(words.values[2], words.values[3], member);
      exchange_words<2>(words.values[0], words.values[2], member);
      exchange_words<2>(words.values[1], words.values[3], member);
      store_words(row + j * 4, words);
    }
  }
}

}  // namespace unicom::cuda
