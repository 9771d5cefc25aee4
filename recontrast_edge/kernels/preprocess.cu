// From a camera's frame to the network's input: ROI, antialiased bilinear resize, centre crop, channel order, normalise.
//
//     preprocess_packed_*  BGR8, RGB8 or mono8, any pitch -> (3, height, width)
//     preprocess_nv12_*    NV12, any pitches              -> (3, height, width)
//
// The definition is recontrast_edge/preprocess.py. A block makes one tile: first the vertical resize of every source
// column under the tile, in shared memory, then the horizontal one. PreprocessPlan in
// recontrast_edge/kernels/__init__.py fills PreprocessParams and chooses the tile, so that it fits shared memory.

#include "device.cuh"

constexpr int kPreprocessThreads = 256;
constexpr int kWordBytes = 4;

struct PreprocessParams {
    const unsigned char* source;  // packed pixels, or NV12's luma
    const unsigned char* chroma;  // NV12: interleaved U and V at half the size
    void* out;  // (3, height, width)
    const int* row_first;  // (height): first source row, counted from the frame's first
    const float* row_weights;  // (height, row_taps)
    const int* column_first;  // (width): first source column, counted from the frame's first
    const float* column_weights;  // (width, column_taps)
    int source_pitch;  // bytes from row to row
    int chroma_pitch;
    int pixel_bytes;  // packed: 1 or 3
    int word_loads;  // packed: source and pitch are multiples of kWordBytes
    int width;
    int height;
    int row_taps;
    int column_taps;
    int tile_width;
    int tile_height;
    int channel[3];  // of the packed pixel, or of (B, G, R), that becomes this plane
    float scale[3];
    float offset[3];
    int luma_gain;  // NV12 to BGR, in units of 2^-16: see preprocess.nv12_to_bgr
    int red_v;
    int green_u;
    int green_v;
    int blue_u;
};

struct Tile {
    int left;
    int top;
    int columns;
    int rows;
    int first_source;  // source column under the tile's left edge
    int source_columns;
};

__device__ __forceinline__ Tile tile_of(const PreprocessParams& params)
{
    Tile tile;
    tile.left = blockIdx.x * params.tile_width;
    tile.top = blockIdx.y * params.tile_height;
    tile.columns = min(params.tile_width, params.width - tile.left);
    tile.rows = min(params.tile_height, params.height - tile.top);
    tile.first_source = params.column_first[tile.left];
    tile.source_columns = params.column_first[tile.left + tile.columns - 1] + params.column_taps - tile.first_source;
    return tile;
}

__device__ __forceinline__ void store(float* out, size_t index, float value)
{
    out[index] = value;
}

__device__ __forceinline__ void store(unsigned short* out, size_t index, float value)
{
    out[index] = float_to_half_bits(value);
}

// Horizontal resize of a tile whose rows lie in shared memory as (tile rows, pitch), pixels of `stride` floats, the first
// at `begin`; normalises and writes all three planes.
template <typename Out>
__device__ __forceinline__ void finish_tile(
    const PreprocessParams& params, const Tile& tile, const float* rows, int pitch, int begin, int stride)
{
    for (int i = threadIdx.x; i < tile.rows * tile.columns; i += kPreprocessThreads) {
        const int x = tile.left + i % tile.columns;
        const int y = i / tile.columns;
        const float* pixel = rows + y * pitch + begin + (params.column_first[x] - tile.first_source) * stride;
        const float* weights = params.column_weights + x * params.column_taps;
        const size_t at = static_cast<size_t>(tile.top + y) * params.width + x;
#pragma unroll
        for (int plane = 0; plane < 3; ++plane) {
            const float* value = pixel + params.channel[plane];
            float sum = 0.0f;
            for (int tap = 0; tap < params.column_taps; ++tap) {
                sum += weights[tap] * value[tap * stride];
            }
            const size_t plane_at = static_cast<size_t>(plane) * params.height * params.width + at;
            store(static_cast<Out*>(params.out), plane_at, sum * params.scale[plane] + params.offset[plane]);
        }
    }
}

// Shared memory: (tile_height, bytes under the tile and up to 6 more) floats.
template <typename Out>
__device__ __forceinline__ void preprocess_packed(const PreprocessParams& params)
{
    const Tile tile = tile_of(params);
    float* rows = static_cast<float*>(block_memory());
    const int first_byte = tile.first_source * params.pixel_bytes;
    const int end_byte = first_byte + tile.source_columns * params.pixel_bytes;
    int begin = first_byte;
    int pitch = end_byte - first_byte;
    if (params.word_loads) {
        begin = first_byte / kWordBytes * kWordBytes;
        const int words = (end_byte - begin + kWordBytes - 1) / kWordBytes;
        pitch = words * kWordBytes;
        for (int i = threadIdx.x; i < tile.rows * words; i += kPreprocessThreads) {
            const int y = tile.top + i / words;
            const int word = i % words;
            const float* weights = params.row_weights + y * params.row_taps;
            const unsigned char* source =
                params.source + static_cast<size_t>(params.row_first[y]) * params.source_pitch + begin + word * kWordBytes;
            float sums[kWordBytes] = {};
#pragma unroll 4
            for (int tap = 0; tap < params.row_taps; ++tap) {
                const uchar4 bytes =
                    *reinterpret_cast<const uchar4*>(source + static_cast<size_t>(tap) * params.source_pitch);
                sums[0] += weights[tap] * bytes.x;
                sums[1] += weights[tap] * bytes.y;
                sums[2] += weights[tap] * bytes.z;
                sums[3] += weights[tap] * bytes.w;
            }
            float* own = rows + i / words * pitch + word * kWordBytes;
#pragma unroll
            for (int k = 0; k < kWordBytes; ++k) {
                own[k] = sums[k];
            }
        }
    } else {
        for (int i = threadIdx.x; i < tile.rows * pitch; i += kPreprocessThreads) {
            const int y = tile.top + i / pitch;
            const float* weights = params.row_weights + y * params.row_taps;
            const unsigned char* source =
                params.source + static_cast<size_t>(params.row_first[y]) * params.source_pitch + begin + i % pitch;
            float sum = 0.0f;
#pragma unroll 4
            for (int tap = 0; tap < params.row_taps; ++tap) {
                sum += weights[tap] * source[static_cast<size_t>(tap) * params.source_pitch];
            }
            rows[i] = sum;
        }
    }
    __syncthreads();
    finish_tile<Out>(params, tile, rows, pitch, first_byte - begin, params.pixel_bytes);
}

__device__ __forceinline__ float byte_of(int fixed_point)
{
    return static_cast<float>(min(max((fixed_point + 32768) >> 16, 0), 255));
}

// Shared memory: (tile_height, 3 * source columns under the tile) floats, pixels as (B, G, R).
template <typename Out>
__device__ __forceinline__ void preprocess_nv12(const PreprocessParams& params)
{
    const Tile tile = tile_of(params);
    float* rows = static_cast<float*>(block_memory());
    for (int i = threadIdx.x; i < tile.rows * tile.source_columns; i += kPreprocessThreads) {
        const int y = tile.top + i / tile.source_columns;
        const int column = tile.first_source + i % tile.source_columns;
        const float* weights = params.row_weights + y * params.row_taps;
        float sums[3] = {};
#pragma unroll 4
        for (int tap = 0; tap < params.row_taps; ++tap) {
            const int source_y = params.row_first[y] + tap;
            const unsigned char* uv =
                params.chroma + static_cast<size_t>(source_y / 2) * params.chroma_pitch + column / 2 * 2;
            const int luma =
                (params.source[static_cast<size_t>(source_y) * params.source_pitch + column] - 16) * params.luma_gain;
            const int u = uv[0] - 128;
            const int v = uv[1] - 128;
            sums[0] += weights[tap] * byte_of(luma + params.blue_u * u);
            sums[1] += weights[tap] * byte_of(luma + params.green_u * u + params.green_v * v);
            sums[2] += weights[tap] * byte_of(luma + params.red_v * v);
        }
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            rows[3 * i + k] = sums[k];
        }
    }
    __syncthreads();
    finish_tile<Out>(params, tile, rows, 3 * tile.source_columns, 0, 3);
}

extern "C" __global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_packed_fp16(const __grid_constant__ PreprocessParams params)
{
    preprocess_packed<unsigned short>(params);
}

extern "C" __global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_packed_fp32(const __grid_constant__ PreprocessParams params)
{
    preprocess_packed<float>(params);
}

extern "C" __global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_nv12_fp16(const __grid_constant__ PreprocessParams params)
{
    preprocess_nv12<unsigned short>(params);
}

extern "C" __global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_nv12_fp32(const __grid_constant__ PreprocessParams params)
{
    preprocess_nv12<float>(params);
}
