// All kernels in one translation unit: one fatbin, one module to load.

#include "anomaly_map.cu"
#include "preprocess.cu"
