// From feature pairs to anomaly map and score, reading every feature once.
//
//     distance_*  features -> d_l, the cosine distances of each level, both views added; a discriminator's probability
//                 comes from the network and is one more d_l
//     fold_map    d_l -> map = sum_l R_l d_l C_l^T (upsampling and blur in one banded matrix an axis), and its maximum
//     top_score   map -> mean of its largest pixels; only for the score rule "top"
//
// The definition is recontrast_edge/scoring.py; docs/kernels.md explains the design. The launch plan in
// recontrast_edge/kernels/__init__.py fills AnomalyMapParams and knows grids, blocks, shared memory and workspace.
// Sums are FP32 in an order that depends on the plan alone: the same features give the same bits, alone or in a batch.

#include "device.cuh"

constexpr int kMaxLevels = 8;
constexpr int kViews = 2;
constexpr int kSums = 3;  // dot product, |target|^2, |reconstruction|^2
constexpr int kUnroll = 4;  // channels a thread has in flight
constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kSplitsAtOnce = 8;  // parts of a tile's sums that a thread has in flight
constexpr int kFoldThreads = 128;
constexpr int kFoldColumns = 2;  // neighbouring map pixels of a fold thread, in each of kFoldRows rows
constexpr int kFoldRows = 4;
constexpr int kFoldTaps = 4;  // loads that a fold thread has in flight of each kind; taps come in multiples of this
constexpr int kTileWidth = kWarp * kFoldColumns;  // map pixels of a fold block
constexpr int kTileHeight = kFoldThreads / kWarp * kFoldRows;
constexpr int kTopThreads = 512;
constexpr int kTopBlocks = 16;  // an image
constexpr int kTopWarps = kTopThreads / kWarp;
constexpr int kTopSegments = kTopBlocks * kTopWarps;  // parts of a map, one a warp
constexpr int kTopLoads = 8;  // map pixels a thread of top_score has in flight
constexpr int kBins = 2048;
constexpr int kDigits = 3;  // of a key, upper first: 11, 11 and 10 bits
constexpr float kEps = 1e-8f;  // scoring.EPS
constexpr float kMaxFloat = 3.402823466e+38f;
constexpr unsigned int kAllLanes = 0xffffffffu;
constexpr unsigned int kNanKey = 0xffffffffu;

// Distances of a level; or, behind the last of them, what a discriminator in the network found, which is folded alike:
// `distances` is then the network's output, there are no features, and `first_block` lies behind the grid.
struct Level {
    const void* target[kViews];  // (N, channels, height, width)
    const void* reconstruction[kViews];
    float* partials;  // (N, tiles, kViews * splits, kSums, tile_pixels)
    float* distances;  // (N, height, width)
    unsigned int* arrivals;  // (N, tiles), zero between launches
    const int* row_first;  // (map_height / kFoldRows): first row of d_l that these map rows take
    const float4* row_weights;  // (map_height / kFoldRows, row_taps), a weight for each of the rows
    const int* tile_first;  // (map_width / kTileWidth): first column of d_l under a tile
    int channels;
    int height;
    int width;
    int row_taps;
    int column_taps;
    int tile_columns;  // of d_l under any tile
    int pixels_per_load;  // neighbours a thread reads at once: 16 or 8 bytes of them, or one
    int columns;  // threads of a block along the pixels, a power of two; the others go along the channels
    int tiles;  // blocks along the pixels
    int splits;  // blocks along the channels
    int split_channels;
    int first_block;  // of this level in the grid
};

struct AnomalyMapParams {
    Level level[kMaxLevels];
    float* map;  // (N, map_height, map_width)
    float* score;  // (N)
    // For each tile along the width: (column_taps of all levels, kTileWidth) weights, then (levels, kWarp) whole numbers,
    // the first column of d_l that a thread's pixels take, counted from the tile's.
    const float4* columns;
    unsigned int* max_key;  // (N), zero between launches; as the next, only for the rule "max"
    unsigned int* arrivals;  // (N), zero between launches
    unsigned int* histogram;  // (N, kBins), zero between launches; null for the rule "max", as the next ones
    unsigned int* candidates;  // (N, kTopSegments, segment_pixels): keys of each segment that may belong to the top
    unsigned int* candidate_counts;  // (N, kTopSegments)
    int levels;
    int fold_columns;  // tile_columns of all levels
    int fold_taps;  // column_taps of all levels
    int stages_columns;  // whether `columns` of a tile fit shared memory
    int map_height;
    int map_width;
    int top_count;
    int segment_pixels;  // a multiple of kTopLoads * kWarp
};

// ---------------------------------------------------------------------------------------------------------------------
// Keys: unsigned numbers in the order of the floats, with every NaN above infinity, so that no maximum loses one.

__device__ __forceinline__ unsigned int key_of(float value)
{
    if (value != value) {
        return kNanKey;
    }
    const unsigned int bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(unsigned int key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// ---------------------------------------------------------------------------------------------------------------------
// Distances

__device__ __forceinline__ void unpack(uint4 raw, float (&value)[8])
{
    const unsigned int words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = half2_bits_to_float2(words[i]);
        value[2 * i] = pair.x;
        value[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ void unpack(uint2 raw, float (&value)[4])
{
    const float2 low = half2_bits_to_float2(raw.x);
    const float2 high = half2_bits_to_float2(raw.y);
    value[0] = low.x;
    value[1] = low.y;
    value[2] = high.x;
    value[3] = high.y;
}

__device__ __forceinline__ void unpack(unsigned short raw, float (&value)[1])
{
    value[0] = half2_bits_to_float2(raw).x;
}

__device__ __forceinline__ void unpack(float4 raw, float (&value)[4])
{
    value[0] = raw.x;
    value[1] = raw.y;
    value[2] = raw.z;
    value[3] = raw.w;
}

__device__ __forceinline__ void unpack(float raw, float (&value)[1])
{
    value[0] = raw;
}

template <typename Raw, int kPixels>
__device__ __forceinline__ void add_channel(Raw target, Raw reconstruction, float (&sums)[kSums][kPixels])
{
    float t[kPixels];
    float r[kPixels];
    unpack(target, t);
    unpack(reconstruction, r);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
        sums[0][i] += t[i] * r[i];
        sums[1][i] += t[i] * t[i];
        sums[2][i] += r[i] * r[i];
    }
}

// The three sums over one block's share of the channels, for one tile of one view: features -> `sums` in shared memory,
// (rows, kSums, tile_pixels).
template <typename Raw, int kPixels>
__device__ __forceinline__ void sum_channels(
    const Level& level, const void* target, const void* reconstruction, int image, int tile, int split, float* shared_sums)
{
    const int column = threadIdx.x % level.columns;
    const int row = threadIdx.x / level.columns;
    const int rows = kThreads / level.columns;
    const int loads = level.height * level.width / kPixels;  // per channel
    const int load = tile * level.columns + column;
    const int begin = split * level.split_channels;
    const int end = min(begin + level.split_channels, level.channels);

    float sums[kSums][kPixels] = {};
    if (load < loads) {
        const size_t offset = static_cast<size_t>(image) * level.channels * loads + load;
        const Raw* t = static_cast<const Raw*>(target) + offset;
        const Raw* r = static_cast<const Raw*>(reconstruction) + offset;
        int channel = begin + row;
        // All loads of a round are issued before the first is used: 2 * kUnroll of them hide the memory's latency.
        for (; channel + (kUnroll - 1) * rows < end; channel += kUnroll * rows) {
            Raw t_raw[kUnroll];
            Raw r_raw[kUnroll];
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                const size_t at = static_cast<size_t>(channel + i * rows) * loads;
                t_raw[i] = __ldcs(t + at);
                r_raw[i] = __ldcs(r + at);
            }
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                add_channel<Raw, kPixels>(t_raw[i], r_raw[i], sums);
            }
        }
        for (; channel < end; channel += rows) {
            const size_t at = static_cast<size_t>(channel) * loads;
            add_channel<Raw, kPixels>(__ldcs(t + at), __ldcs(r + at), sums);
        }
    }
    const int tile_pixels = level.columns * kPixels;
    float* own = shared_sums + row * kSums * tile_pixels + column * kPixels;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
            own[k * tile_pixels + i] = sums[k][i];
        }
    }
}

// 1 - cos. Sums that overflowed FP32 give NaN: a distance that is not known must not look like one that is.
__device__ __forceinline__ float cosine_distance(float dot, float square_t, float square_r)
{
    if (!(fabsf(dot) <= kMaxFloat && square_t <= kMaxFloat && square_r <= kMaxFloat)) {
        return __uint_as_float(0x7fffffffu);
    }
    // Two divisions, because the product of two large norms overflows.
    return 1.0f - dot / fmaxf(sqrtf(square_t), kEps) / fmaxf(sqrtf(square_r), kEps);
}

// One tile's distances from the partial sums of all its blocks.
__device__ __forceinline__ void finish_tile(const Level& level, const float* partials, int image, int tile, int tile_pixels)
{
    const int pixels = level.height * level.width;
    for (int i = threadIdx.x; i < tile_pixels; i += kThreads) {
        const int pixel = tile * tile_pixels + i;
        if (pixel >= pixels) {
            break;
        }
        float distance = 0.0f;
        for (int view = 0; view < kViews; ++view) {
            float sums[kSums] = {};
            // All loads of a round are issued before the first is used: a trip to L2 costs as much as hundreds of sums.
            for (int first = 0; first < level.splits; first += kSplitsAtOnce) {
                const float* part = partials + static_cast<size_t>(view * level.splits + first) * kSums * tile_pixels + i;
                float loaded[kSplitsAtOnce][kSums];
#pragma unroll
                for (int split = 0; split < kSplitsAtOnce; ++split) {
#pragma unroll
                    for (int k = 0; k < kSums; ++k) {
                        // From L2, where the other blocks' writes are; this SM's L1 need not see them.
                        loaded[split][k] =
                            first + split < level.splits ? __ldcg(part + (split * kSums + k) * tile_pixels) : 0.0f;
                    }
                }
#pragma unroll
                for (int split = 0; split < kSplitsAtOnce; ++split) {
#pragma unroll
                    for (int k = 0; k < kSums; ++k) {
                        sums[k] += loaded[split][k];
                    }
                }
            }
            distance += cosine_distance(sums[0], sums[1], sums[2]);
        }
        level.distances[static_cast<size_t>(image) * pixels + pixel] = distance;
    }
}

struct Features16 {
    static constexpr int kWidest = 8;
    using Widest = uint4;
    using Half = uint2;
    using One = unsigned short;
};

struct Features32 {
    static constexpr int kWidest = 4;
    using Widest = float4;
    using One = float;
};

template <typename Features>
__device__ __forceinline__ void sum_features(
    const Level& level, int view, int image, int tile, int split, float* shared_sums)
{
    const void* target = level.target[view];
    const void* reconstruction = level.reconstruction[view];
    if (level.pixels_per_load == Features::kWidest) {
        sum_channels<typename Features::Widest, Features::kWidest>(
            level, target, reconstruction, image, tile, split, shared_sums);
        return;
    }
    if constexpr (Features::kWidest == 8) {
        if (level.pixels_per_load == 4) {
            sum_channels<typename Features::Half, 4>(level, target, reconstruction, image, tile, split, shared_sums);
            return;
        }
    }
    sum_channels<typename Features::One, 1>(level, target, reconstruction, image, tile, split, shared_sums);
}

// Grid: (blocks of all levels, N). A block sums some channels of one view's tile; the tile's last block to arrive adds
// the parts up, in their order and not in the order of arrival, and writes the distances.
template <typename Features>
__device__ __forceinline__ void distance(const AnomalyMapParams& params)
{
    int index = params.levels - 1;
    while (static_cast<int>(blockIdx.x) < params.level[index].first_block) {
        --index;
    }
    const Level& level = params.level[index];
    const int image = blockIdx.y;
    const int parts = kViews * level.splits;
    const int tile = (blockIdx.x - level.first_block) / parts;
    const int part = (blockIdx.x - level.first_block) % parts;
    const int tile_pixels = level.columns * level.pixels_per_load;
    const int rows = kThreads / level.columns;

    int* is_last = static_cast<int*>(block_memory());
    // Behind the flag, at the next multiple of 16 bytes.
    float* shared_sums = static_cast<float*>(block_memory()) + 4;
    sum_features<Features>(level, part / level.splits, image, tile, part % level.splits, shared_sums);
    __syncthreads();

    const size_t slot = static_cast<size_t>(image) * level.tiles + tile;
    float* partials = level.partials + slot * parts * kSums * tile_pixels;
    float* own = partials + static_cast<size_t>(part) * kSums * tile_pixels;
    for (int i = threadIdx.x; i < kSums * tile_pixels; i += kThreads) {
        float total = 0.0f;
        for (int row = 0; row < rows; ++row) {
            total += shared_sums[row * kSums * tile_pixels + i];
        }
        own[i] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // The block's part is visible to the whole device before the block says that it has arrived.
        __threadfence();
        // Wraps to zero at the last arrival: ready for the next launch.
        *is_last = atomicInc(level.arrivals + slot, parts - 1) == static_cast<unsigned int>(parts - 1);
        __threadfence();
    }
    __syncthreads();
    if (*is_last) {
        finish_tile(level, partials, image, tile, tile_pixels);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 3) distance_fp16(const __grid_constant__ AnomalyMapParams params)
{
    distance<Features16>(params);
}

extern "C" __global__ void __launch_bounds__(kThreads, 3) distance_fp32(const __grid_constant__ AnomalyMapParams params)
{
    distance<Features32>(params);
}

// ---------------------------------------------------------------------------------------------------------------------
// Map

__device__ __forceinline__ unsigned int warp_max(unsigned int key)
{
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        key = max(key, __shfl_xor_sync(kAllLanes, key, offset));
    }
    return key;
}

__device__ __forceinline__ unsigned int digit_of(unsigned int key, int digit)
{
    const int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;
    return (key >> shift) & (digit == 2 ? kBins / 2 - 1 : kBins - 1);
}

// Adds one to `bin`. Neighbouring pixels share bins, so a warp's equal bins become one addition. All lanes take part.
__device__ __forceinline__ void count(unsigned int* histogram, unsigned int bin, bool counted)
{
    if (!__any_sync(kAllLanes, counted)) {
        return;
    }
    const unsigned int same = __match_any_sync(kAllLanes, counted ? bin : kBins);
    const int leader = __ffs(same) - 1;
    if (counted && static_cast<int>(threadIdx.x % kWarp) == leader) {
        atomicAdd(histogram + bin, __popc(same));
    }
}

// R_l d_l for this warp's kFoldRows map rows and for every column of every level under the tile -> `folded`, a float4 of
// the rows for each column, level after level.
__device__ __forceinline__ void fold_rows(const AnomalyMapParams& params, int image, int tile, int rows, float4* folded)
{
    for (int index = threadIdx.x % kWarp; index < params.fold_columns; index += kWarp) {
        int column = index;
        int of = 0;
        while (column >= params.level[of].tile_columns) {
            column -= params.level[of].tile_columns;
            ++of;
        }
        const Level& level = params.level[of];
        const int width = level.width;
        const int last_row = level.height - 1;
        const int first_row = level.row_first[rows];
        const float4* weights = level.row_weights + rows * level.row_taps;
        // What lies past an edge has weight 0, and is read at the edge.
        const float* distances = level.distances + static_cast<size_t>(image) * level.height * width +
                                 min(level.tile_first[tile] + column, width - 1);
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        // Unrolled further, the compiler would issue the loads of a round one after the other's use.
        int tap = 0;
#pragma unroll 1
        do {
            float distance[kFoldTaps];
            float4 weight[kFoldTaps];
#pragma unroll
            for (int i = 0; i < kFoldTaps; ++i) {
                distance[i] = distances[min(first_row + tap + i, last_row) * width];
                weight[i] = weights[tap + i];
            }
#pragma unroll
            for (int i = 0; i < kFoldTaps; ++i) {
                sum.x += weight[i].x * distance[i];
                sum.y += weight[i].y * distance[i];
                sum.z += weight[i].z * distance[i];
                sum.w += weight[i].w * distance[i];
            }
            tap += kFoldTaps;
        } while (tap < level.row_taps);
        folded[index] = sum;
    }
}

// The folded rows times C_l^T, all levels added: a thread's pixels.
__device__ __forceinline__ void fold_columns(
    const AnomalyMapParams& params, const float4* folded, const float2* weight, const int* column_first,
    float (&value)[kFoldRows][kFoldColumns])
{
    for (int index = 0; index < params.levels; ++index) {
        const Level& level = params.level[index];
        const float4* column = folded + column_first[index * kWarp];
#pragma unroll 1
        for (int tap = 0; tap < level.column_taps; tap += kFoldTaps) {
#pragma unroll
            for (int i = 0; i < kFoldTaps; ++i) {
                const float4 d = column[tap + i];
                const float2 w = weight[(tap + i) * kWarp];
                value[0][0] += w.x * d.x;
                value[0][1] += w.y * d.x;
                value[1][0] += w.x * d.y;
                value[1][1] += w.y * d.y;
                value[2][0] += w.x * d.z;
                value[2][1] += w.y * d.z;
                value[3][0] += w.x * d.w;
                value[3][1] += w.y * d.w;
            }
        }
        folded += level.tile_columns;
        weight += level.column_taps * kWarp;
    }
}

// Grid: (tiles along the width, tiles along the height, N). A warp makes kFoldRows rows of a tile, a thread kFoldColumns
// pixels of each. Shared memory: a key each warp, the tile's `columns` if they fit, then for each warp its `folded`.
extern "C" __global__ void __launch_bounds__(kFoldThreads, 8) fold_map(const __grid_constant__ AnomalyMapParams params)
{
    constexpr int kWarps = kFoldThreads / kWarp;
    const int image = blockIdx.z;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const int left = (blockIdx.x * kWarp + lane) * kFoldColumns;
    const int rows = blockIdx.y * kWarps + warp;
    const int top = rows * kFoldRows;
    unsigned int* warp_keys = static_cast<unsigned int*>(block_memory());
    float4* tile_columns = static_cast<float4*>(block_memory()) + 1;
    const int weights = params.fold_taps * kTileWidth / 4;
    const int size = weights + params.levels * kWarp / 4;
    const float4* columns = params.columns + blockIdx.x * size;
    float4* folded = tile_columns + (params.stages_columns ? size : 0) + warp * params.fold_columns;

    for (int first = threadIdx.x; params.stages_columns && first < size; first += kFoldTaps * kFoldThreads) {
        float4 loaded[kFoldTaps];
#pragma unroll
        for (int i = 0; i < kFoldTaps; ++i) {
            loaded[i] = columns[min(first + i * kFoldThreads, size - 1)];
        }
#pragma unroll
        for (int i = 0; i < kFoldTaps; ++i) {
            if (first + i * kFoldThreads < size) {
                tile_columns[first + i * kFoldThreads] = loaded[i];
            }
        }
    }
    if (top < params.map_height) {
        fold_rows(params, image, blockIdx.x, rows, folded);
    }
    __syncthreads();

    float value[kFoldRows][kFoldColumns] = {};
    if (top < params.map_height && left < params.map_width) {
        // Written out for both, so that the compiler knows which memory it reads.
        if (params.stages_columns) {
            fold_columns(
                params, folded, reinterpret_cast<const float2*>(tile_columns) + lane,
                reinterpret_cast<const int*>(tile_columns + weights) + lane, value);
        } else {
            fold_columns(
                params, folded, reinterpret_cast<const float2*>(columns) + lane,
                reinterpret_cast<const int*>(columns + weights) + lane, value);
        }
    }

    const int width = params.map_width;
    float* map = params.map + static_cast<size_t>(image) * params.map_height * width + left;
    unsigned int key = 0;  // below every number's
#pragma unroll
    for (int row = 0; row < kFoldRows; ++row) {
        const int y = top + row;
        if (y < params.map_height && width % kFoldColumns == 0 && left < width) {
            reinterpret_cast<float2*>(map + y * width)[0] = {value[row][0], value[row][1]};
        }
#pragma unroll
        for (int i = 0; i < kFoldColumns; ++i) {
            const bool is_there = y < params.map_height && left + i < width;
            if (is_there && width % kFoldColumns != 0) {
                map[y * width + i] = value[row][i];
            }
            const unsigned int own = is_there ? key_of(value[row][i]) : 0;
            if (params.histogram != nullptr) {
                count(params.histogram + image * kBins, digit_of(own, 0), is_there);
            }
            key = max(key, own);
        }
    }
    if (params.histogram != nullptr) {
        return;
    }
    key = warp_max(key);
    if (lane == 0) {
        warp_keys[warp] = key;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int other = 1; other < kWarps; ++other) {
            key = max(key, warp_keys[other]);
        }
        atomicMax(params.max_key + image, key);
        __threadfence();
        const unsigned int last = gridDim.x * gridDim.y - 1;
        if (atomicInc(params.arrivals + image, last) == last) {
            __threadfence();
            params.score[image] = value_of(atomicExch(params.max_key + image, 0u));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Mean of the largest pixels: a radix select on the keys finds the smallest of them, exactly.

struct TopShared {
    unsigned int histogram[kBins];
    unsigned int candidate_counts[kTopSegments];
    unsigned int warp_counts[kTopWarps];
    float warp_sums[kTopWarps];
    unsigned int bin;
    unsigned int wanted;
    int is_last;
};

// The bin that holds the `wanted`-th largest key, and how many are wanted of that bin, -> shared.bin, shared.wanted.
__device__ __forceinline__ void find_bin(TopShared& shared, unsigned int wanted)
{
    constexpr int kOwn = kBins / kTopThreads;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    // A thread owns kOwn bins; thread 0 the highest ones.
    const unsigned int* own_bins = shared.histogram + kBins - 1 - kOwn * threadIdx.x;
    unsigned int own = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        own += own_bins[-i];
    }
    unsigned int up_to_here = own;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const unsigned int higher = __shfl_up_sync(kAllLanes, up_to_here, offset);
        up_to_here += lane >= offset ? higher : 0;
    }
    if (lane == kWarp - 1) {
        shared.warp_counts[warp] = up_to_here;
    }
    __syncthreads();
    unsigned int above = up_to_here - own;
    for (int higher_warp = 0; higher_warp < warp; ++higher_warp) {
        above += shared.warp_counts[higher_warp];
    }
    if (above < wanted && wanted <= above + own) {
        int i = 0;
        while (above + own_bins[-i] < wanted) {
            above += own_bins[-i];
            ++i;
        }
        shared.bin = kBins - 1 - kOwn * threadIdx.x - i;
        shared.wanted = wanted - above;
    }
    __syncthreads();
}

// The keys of kTopLoads pixels of each lane from `start` on, a warp's width apart; 0 from `end` on.
__device__ __forceinline__ void load_keys(const float* map, int start, int end, unsigned int (&keys)[kTopLoads])
{
    const int first = start + threadIdx.x % kWarp;
    if (start + kTopLoads * kWarp <= end) {
        // Apart from the comparisons with the end, between which the loads would wait for each other.
        float value[kTopLoads];
#pragma unroll
        for (int i = 0; i < kTopLoads; ++i) {
            value[i] = map[first + i * kWarp];
        }
#pragma unroll
        for (int i = 0; i < kTopLoads; ++i) {
            keys[i] = key_of(value[i]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kTopLoads; ++i) {
        keys[i] = first + i * kWarp < end ? key_of(map[first + i * kWarp]) : 0;
    }
}

// This warp's keys whose upper digit is `bin` or above -> its segment of the candidates, in the order of the pixels, so
// that sums of them are the same in every run.
__device__ __forceinline__ void collect(const AnomalyMapParams& params, int image, int segment, unsigned int bin)
{
    const int lane = threadIdx.x % kWarp;
    const int pixels = params.map_height * params.map_width;
    const float* map = params.map + static_cast<size_t>(image) * pixels;
    const int end = min((segment + 1) * params.segment_pixels, pixels);
    const size_t slot = static_cast<size_t>(image) * kTopSegments + segment;
    unsigned int* candidates = params.candidates + slot * params.segment_pixels;
    unsigned int collected = 0;
    for (int start = segment * params.segment_pixels; start < end; start += kTopLoads * kWarp) {
        unsigned int keys[kTopLoads];
        load_keys(map, start, end, keys);
#pragma unroll
        for (int i = 0; i < kTopLoads; ++i) {
            // No pixel has key 0.
            const bool is_candidate = keys[i] != 0 && digit_of(keys[i], 0) >= bin;
            const unsigned int lanes = __ballot_sync(kAllLanes, is_candidate);
            if (is_candidate) {
                candidates[collected + __popc(lanes & ((1u << lane) - 1u))] = keys[i];
            }
            collected += __popc(lanes);
        }
    }
    if (lane == 0) {
        params.candidate_counts[slot] = collected;
    }
}

// Calls `visit` with each candidate of the image, 0 for lanes that have none; all lanes of a warp together.
template <typename Visit>
__device__ __forceinline__ void for_candidates(
    const AnomalyMapParams& params, const TopShared& shared, int image, Visit visit)
{
    const unsigned int* candidates =
        params.candidates + static_cast<size_t>(image) * kTopSegments * params.segment_pixels;
    for (int segment = threadIdx.x / kWarp; segment < kTopSegments; segment += kTopWarps) {
        const unsigned int* own = candidates + static_cast<size_t>(segment) * params.segment_pixels;
        const unsigned int there = shared.candidate_counts[segment];
        for (unsigned int start = threadIdx.x % kWarp; start - threadIdx.x % kWarp < there; start += kTopLoads * kWarp) {
            unsigned int keys[kTopLoads];
#pragma unroll
            for (int i = 0; i < kTopLoads; ++i) {
                // From L2, where the other blocks' writes are.
                keys[i] = start + i * kWarp < there ? __ldcg(own + start + i * kWarp) : 0u;
            }
#pragma unroll
            for (int i = 0; i < kTopLoads; ++i) {
                visit(keys[i]);
            }
        }
    }
}

// Grid: (kTopBlocks, N). fold_map has counted the upper digit. Every warp collects the candidates of its part of the map;
// the last block to arrive counts the other digits among them, in two passes, and adds up in a third.
extern "C" __global__ void __launch_bounds__(kTopThreads) top_score(const __grid_constant__ AnomalyMapParams params)
{
    TopShared& shared = *static_cast<TopShared*>(block_memory());
    const int image = blockIdx.y;
    unsigned int* counted = params.histogram + image * kBins;

    for (int bin = threadIdx.x; bin < kBins; bin += kTopThreads) {
        shared.histogram[bin] = counted[bin];
    }
    __syncthreads();
    find_bin(shared, params.top_count);
    unsigned int prefix = shared.bin;
    unsigned int wanted = shared.wanted;
    collect(params, image, blockIdx.x * kTopWarps + threadIdx.x / kWarp, prefix);
    __syncthreads();
    if (threadIdx.x == 0) {
        // As in `distance`: what the block has collected is visible before it says that it has arrived.
        __threadfence();
        shared.is_last = atomicInc(params.arrivals + image, kTopBlocks - 1) == kTopBlocks - 1;
        __threadfence();
    }
    __syncthreads();
    if (!shared.is_last) {
        return;
    }
    for (int bin = threadIdx.x; bin < kBins; bin += kTopThreads) {
        counted[bin] = 0;
    }
    for (int segment = threadIdx.x; segment < kTopSegments; segment += kTopThreads) {
        shared.candidate_counts[segment] = __ldcg(params.candidate_counts + image * kTopSegments + segment);
    }
    for (int digit = 1; digit < kDigits; ++digit) {
        const int prefix_shift = digit == 1 ? 21 : 10;
        for (int bin = threadIdx.x; bin < kBins; bin += kTopThreads) {
            shared.histogram[bin] = 0;
        }
        __syncthreads();
        for_candidates(params, shared, image, [&](unsigned int key) {
            count(shared.histogram, digit_of(key, digit), key != 0 && key >> prefix_shift == prefix);
        });
        __syncthreads();
        find_bin(shared, wanted);
        prefix = prefix << (digit == 1 ? 11 : 10) | shared.bin;
        wanted = shared.wanted;
    }

    // `prefix` is now the smallest key of the top; `wanted` of the pixels that have it belong to the top.
    float sum = 0.0f;
    for_candidates(params, shared, image, [&](unsigned int key) { sum += key > prefix ? value_of(key) : 0.0f; });
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (threadIdx.x % kWarp == 0) {
        shared.warp_sums[threadIdx.x / kWarp] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = static_cast<float>(wanted) * value_of(prefix);
        for (int warp = 0; warp < kTopWarps; ++warp) {
            total += shared.warp_sums[warp];
        }
        params.score[image] = total / params.top_count;
    }
}
