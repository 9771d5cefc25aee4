// What both kernels need and plain CUDA C++ lacks without the toolkit's headers.
//
// No header is included anywhere: a GPU machine with only NVRTC compiles these sources. Kernels keep all their shared
// memory in one dynamically sized block, so that the launch plan (recontrast_edge/kernels/__init__.py) states every byte.
// A host build (tests/kernels/host_cuda.h) supplies its own versions of these functions.
#pragma once

#ifdef __CUDACC__

// The block's shared memory, as large as the launch asked for.
__device__ __forceinline__ void* block_memory()
{
    extern __shared__ uint4 shared_bytes[];
    return shared_bytes;
}

// Two FP16 numbers, low half first, as FP32; exact.
__device__ __forceinline__ float2 half2_bits_to_float2(unsigned int bits)
{
    float2 value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(value.x), "=f"(value.y)
        : "r"(bits));
    return value;
}

// FP32 to FP16, to nearest even.
__device__ __forceinline__ unsigned short float_to_half_bits(float value)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#endif
