// Every kernel, as C++.
#include "cuda_emulation.h"

#include "../../csrc/cuda/logits.cu"
#include "../../csrc/cuda/nearest.cu"
#include "../../csrc/cuda/pack.cu"
#include "../../csrc/cuda/product.cu"
#include "../../csrc/cuda/samples.cu"
#include "../../csrc/cuda/selection.cu"
#include "../../csrc/cuda/unpack.cu"
#include "../../csrc/cuda/update.cu"
