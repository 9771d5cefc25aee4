// The kernels' own source, built for the host, and a C interface to launch it and to compare its constants.

#include "host_cuda.h"

#include "kernels.cu"

#include <unistd.h>

#include <memory>
#include <numeric>
#include <random>

namespace {

// A block that waits for a thread which never comes would wait for ever.
constexpr unsigned int kDeadlockSeconds = 120;

template <typename Params>
struct Launch {
    void (*kernel)(Params);
    const Params* params;
    dim3 grid;
    std::vector<unsigned int> order;
    unsigned int teams;
};

template <typename Params>
struct Thread {
    const Launch<Params>* launch;
    host::Team* team;
    unsigned int team_index;
    unsigned int index;
};

template <typename Params>
void* run_thread(void* argument)
{
    const auto& thread = *static_cast<const Thread<Params>*>(argument);
    const Launch<Params>& launch = *thread.launch;
    host::team = thread.team;
    host::thread_index = {thread.index, 0, 0};
    for (std::size_t i = thread.team_index; i < launch.order.size(); i += launch.teams) {
        const unsigned int block = launch.order[i];
        host::block_index = {
            block % launch.grid.x, block / launch.grid.x % launch.grid.y, block / launch.grid.x / launch.grid.y};
        // What an earlier block has fenced orders nothing for this one.
        host::fenced = false;
        host::last_atomic = nullptr;
        if (thread.index == 0) {
            // NaN: reading shared memory before it is written must show.
            std::fill(thread.team->memory.begin(), thread.team->memory.end(), 0xff);
        }
        thread.team->barrier.wait();
        launch.kernel(*launch.params);
        thread.team->barrier.wait();
    }
    return nullptr;
}

template <typename Params>
int run(
    void (*kernel)(Params), const void* params, dim3 grid, unsigned int threads, std::size_t shared_bytes,
    unsigned int teams, unsigned int seed)
{
    Launch<Params> launch{kernel, static_cast<const Params*>(params), grid, {}, teams};
    launch.order.resize(static_cast<std::size_t>(grid.x) * grid.y * grid.z);
    std::iota(launch.order.begin(), launch.order.end(), 0u);
    std::shuffle(launch.order.begin(), launch.order.end(), std::mt19937(seed));
    host::grid_size = grid;
    host::misaligned = 0;

    std::vector<std::unique_ptr<host::Team>> team_list;
    std::vector<Thread<Params>> threads_list;
    threads_list.reserve(teams * threads);
    for (unsigned int team = 0; team < teams; ++team) {
        team_list.push_back(std::make_unique<host::Team>(threads, shared_bytes));
        for (unsigned int index = 0; index < threads; ++index) {
            threads_list.push_back({&launch, team_list.back().get(), team, index});
        }
    }
    alarm(kDeadlockSeconds);
    std::vector<pthread_t> handles(threads_list.size());
    for (std::size_t i = 0; i < handles.size(); ++i) {
        if (pthread_create(&handles[i], nullptr, run_thread<Params>, &threads_list[i]) != 0) {
            // The threads already there would wait for ever.
            std::abort();
        }
    }
    for (pthread_t handle : handles) {
        pthread_join(handle, nullptr);
    }
    alarm(0);
    return host::misaligned;
}

}  // namespace

extern "C" {

// Returns the number of misaligned vector loads, or -1 for an unknown kernel.
int host_launch(
    const char* name, const void* params, const unsigned int* grid, unsigned int threads, std::size_t shared_bytes,
    unsigned int teams, unsigned int seed)
{
    const dim3 size{grid[0], grid[1], grid[2]};
    const std::string kernel(name);
#define RUN_IF_NAMED(function) \
    if (kernel == #function) { \
        return run(function, params, size, threads, shared_bytes, teams, seed); \
    }
    RUN_IF_NAMED(distance_fp16)
    RUN_IF_NAMED(distance_fp32)
    RUN_IF_NAMED(fold_map)
    RUN_IF_NAMED(top_score)
    RUN_IF_NAMED(preprocess_packed_fp16)
    RUN_IF_NAMED(preprocess_packed_fp32)
    RUN_IF_NAMED(preprocess_nv12_fp16)
    RUN_IF_NAMED(preprocess_nv12_fp32)
#undef RUN_IF_NAMED
    return -1;
}

// The next launches leave out the __syncthreads or __threadfence at this place; line 0 leaves out none.
void host_leave_out(const char* file, int line)
{
    host::left_out_file = file;
    host::left_out_line = line;
}

// From the bits of a float, so that no NaN is changed on the way.
unsigned int host_key_of(unsigned int bits) { return key_of(__uint_as_float(bits)); }

float host_value_of(unsigned int key) { return value_of(key); }

// What the launch plan must know alike, in the order of tests/kernels/test_plan.py.
const long* host_constants()
{
    static const long constants[] = {
        kMaxLevels,
        kViews,
        kSums,
        kUnroll,
        kThreads,
        kFoldThreads,
        kFoldColumns,
        kFoldRows,
        kFoldTaps,
        kTileWidth,
        kTileHeight,
        kTopThreads,
        kTopBlocks,
        kTopSegments,
        kTopLoads,
        kBins,
        kPreprocessThreads,
        sizeof(Level),
        sizeof(AnomalyMapParams),
        sizeof(PreprocessParams),
        sizeof(TopShared),
        offsetof(Level, channels),
        offsetof(Level, first_block),
        offsetof(Level, tile_columns),
        offsetof(AnomalyMapParams, map),
        offsetof(AnomalyMapParams, max_key),
        offsetof(AnomalyMapParams, segment_pixels),
        offsetof(PreprocessParams, source_pitch),
        offsetof(PreprocessParams, channel),
        offsetof(PreprocessParams, blue_u),
    };
    return constants;
}

}  // extern "C"
