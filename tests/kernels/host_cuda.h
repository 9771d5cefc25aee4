// CUDA's execution model on the host, as far as the kernels use it: the threads of a block are real threads, so that a
// thread sanitizer sees every barrier, shuffle and fence, and an address sanitizer every access.
//
// Blocks run on one or more teams of threads at a time. Teams share nothing but what the kernel shares: atomics are
// relaxed, as on the GPU, and only __threadfence orders a block's writes before another's reads.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

struct dim3 {
    unsigned int x, y, z;
};
struct alignas(8) uint2 {
    unsigned int x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct alignas(4) uchar4 {
    unsigned char x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace host {

constexpr int kWarp = 32;

class Barrier {
public:
    explicit Barrier(unsigned int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
    ~Barrier() { pthread_barrier_destroy(&barrier_); }
    Barrier(const Barrier&) = delete;
    void wait() { pthread_barrier_wait(&barrier_); }

private:
    pthread_barrier_t barrier_;
};

struct Warp {
    Barrier barrier{kWarp};
    // Two, in turn: a lane may write its next value while others still read this one.
    std::uint32_t values[2][kWarp];
};

// The threads that run one block after the other, and their shared memory.
struct Team {
    Team(unsigned int threads, std::size_t shared_bytes)
        : barrier(threads), warps(threads / kWarp), memory(std::max<std::size_t>(shared_bytes, 1))
    {
    }
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<unsigned char> memory;
};

inline thread_local Team* team;
inline thread_local int parity;
inline thread_local dim3 thread_index;
inline thread_local dim3 block_index;
inline thread_local bool fenced;
inline thread_local unsigned int* last_atomic;
inline dim3 grid_size;
inline std::atomic<int> misaligned{0};
// Line of the source whose __syncthreads or __threadfence is left out, to prove that its absence is noticed.
inline int left_out_line = 0;
inline std::string left_out_file;

inline bool left_out(const char* file, int line)
{
    if (line != left_out_line) {
        return false;
    }
    const std::string path(file);
    return path.size() >= left_out_file.size() &&
           path.compare(path.size() - left_out_file.size(), std::string::npos, left_out_file) == 0;
}

inline void block_barrier(const char* file, int line)
{
    if (!left_out(file, line)) {
        team->barrier.wait();
    }
}

// The thread sanitizer knows no fences. As in the memory model, a fence makes the thread's next atomic a release, and
// an acquire of the atomic before it.
inline void device_fence(const char* file, int line)
{
    if (left_out(file, line)) {
        return;
    }
    fenced = true;
    if (last_atomic != nullptr) {
        __atomic_load_n(last_atomic, __ATOMIC_ACQUIRE);
    }
}

template <typename T>
inline const std::uint32_t* exchange(T value)
{
    static_assert(sizeof(T) == sizeof(std::uint32_t));
    Warp& warp = team->warps[thread_index.x / kWarp];
    std::uint32_t* values = warp.values[parity];
    parity ^= 1;
    std::memcpy(&values[thread_index.x % kWarp], &value, sizeof value);
    warp.barrier.wait();
    return values;
}

template <typename T>
inline T lane_value(const std::uint32_t* values, int lane)
{
    T value;
    std::memcpy(&value, &values[lane], sizeof value);
    return value;
}

template <typename T>
inline T aligned_load(const T* address)
{
    if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) {
        misaligned.fetch_add(1, std::memory_order_relaxed);
    }
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <typename Next>
inline unsigned int update(unsigned int* address, Next next)
{
    unsigned int old = __atomic_load_n(address, __ATOMIC_RELAXED);
    // The sanitizer wants the memory order as a constant.
    if (fenced) {
        while (!__atomic_compare_exchange_n(address, &old, next(old), true, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
        }
    } else {
        while (!__atomic_compare_exchange_n(address, &old, next(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    }
    fenced = false;
    last_atomic = address;
    return old;
}

}  // namespace host

using std::max;
using std::min;

template <typename T>
inline T __ldcs(const T* address)
{
    return host::aligned_load(address);
}
template <typename T>
inline T __ldcg(const T* address)
{
    return *address;
}

inline unsigned int atomicAdd(unsigned int* address, unsigned int value)
{
    return host::update(address, [=](unsigned int old) { return old + value; });
}
inline unsigned int atomicExch(unsigned int* address, unsigned int value)
{
    return host::update(address, [=](unsigned int) { return value; });
}
inline unsigned int atomicInc(unsigned int* address, unsigned int limit)
{
    return host::update(address, [=](unsigned int old) { return old >= limit ? 0 : old + 1; });
}
inline unsigned int atomicMax(unsigned int* address, unsigned int value)
{
    return host::update(address, [=](unsigned int old) { return std::max(old, value); });
}

template <typename T>
inline T __shfl_xor_sync(unsigned int, T value, int mask)
{
    return host::lane_value<T>(host::exchange(value), (host::thread_index.x % host::kWarp) ^ mask);
}
template <typename T>
inline T __shfl_up_sync(unsigned int, T value, int offset)
{
    const int lane = host::thread_index.x % host::kWarp;
    return host::lane_value<T>(host::exchange(value), lane >= offset ? lane - offset : lane);
}
inline int __any_sync(unsigned int, int predicate)
{
    const std::uint32_t* values = host::exchange(predicate);
    return std::any_of(values, values + host::kWarp, [](std::uint32_t value) { return value != 0; });
}
inline unsigned int __ballot_sync(unsigned int, int predicate)
{
    const std::uint32_t* values = host::exchange(predicate);
    unsigned int lanes = 0;
    for (int lane = 0; lane < host::kWarp; ++lane) {
        lanes |= static_cast<unsigned int>(values[lane] != 0) << lane;
    }
    return lanes;
}
inline unsigned int __match_any_sync(unsigned int, unsigned int value)
{
    const std::uint32_t* values = host::exchange(value);
    unsigned int same = 0;
    for (int lane = 0; lane < host::kWarp; ++lane) {
        same |= static_cast<unsigned int>(values[lane] == value) << lane;
    }
    return same;
}

inline int __ffs(unsigned int bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned int bits) { return __builtin_popcount(bits); }
inline unsigned int __float_as_uint(float value)
{
    unsigned int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned int bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// device.cuh has these for the GPU.
inline void* block_memory() { return host::team->memory.data(); }
inline float half_bits_to_float(unsigned short bits)
{
    _Float16 value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
}
inline float2 half2_bits_to_float2(unsigned int bits)
{
    return {half_bits_to_float(bits & 0xffffu), half_bits_to_float(bits >> 16)};
}
inline unsigned short float_to_half_bits(float value)
{
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

#define threadIdx host::thread_index
#define blockIdx host::block_index
#define gridDim host::grid_size
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() host::block_barrier(__FILE__, __LINE__)
#define __threadfence() host::device_fence(__FILE__, __LINE__)
