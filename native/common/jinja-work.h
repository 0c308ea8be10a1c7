#pragma once

// bounds what a chat template may cost: macros that call themselves, loops without an end, values that contain themselves
// the engine is upstream's (common/jinja); patch 0018 says where it counts

#include <cstddef>

struct work_guard {
    static const size_t MAX_DEPTH = 500;
    static const size_t MAX_WORK  = 1000000; // and 300 for each value of the input

    // one level deeper; throws std::runtime_error
    work_guard();
    ~work_guard();

    // throws std::runtime_error when the work of this thread since the last reset is too much
    static void charge(size_t n);
    static void reset();

    // the input that is read in between counts towards the limit
    static void begin_input();
    static void end_input();
};
