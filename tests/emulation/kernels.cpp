// Every kernel, as C++.
#include "cuda_emulation.h"

#include "../../csrc/cuda/kernels/logits.cu"
#include "../../csrc/cuda/kernels/logits_hopper.cu"
#include "../../csrc/cuda/kernels/nearest.cu"
#include "../../csrc/cuda/kernels/pack.cu"
#include "../../csrc/cuda/kernels/product.cu"
#include "../../csrc/cuda/kernels/product_hopper.cu"
#include "../../csrc/cuda/kernels/row_updates.cu"
#include "../../csrc/cuda/kernels/samples.cu"
#include "../../csrc/cuda/kernels/select.cu"
#include "../../csrc/cuda/kernels/unpack.cu"
