#pragma once

#include <cstdint>

// How many threads compute the next graph, where other programs are busy too.
//
// The threads of a graph wait for each other some hundred times per token. One that has no processor of its own holds up all
// the others, so a thread more than there are free processors costs far more than it gives.
class llama_kv_threads {
public:
    // for the next graph: n_max at most, and n_max always where the system does not tell its load (it does on Linux)
    int next(int n_max);

    // a graph of one token took this long with the threads that next() gave
    void step(int64_t us);

    // of the last graph, 0 before the first one
    int current() const { return n; }

    // the rule behind next(), once per window of time
    //   n_cpu: processors that this process may use; own, others: how many of them it and other programs used on average
    int decide(int n_max, int n_cpu, double own, double others);

private:
    int n = 0;

    // steps in the current window
    int64_t sum_us  = 0;
    int64_t n_steps = 0;

    // fewer threads are tried, and kept if the steps take no longer with them
    int     n_before  = 0; // 0: no trial
    int64_t us_before = 0; // per step

    int n_loaded = 0;  // windows in a row that called for fewer threads
    int n_hold   = 0;  // windows until the next trial
    int hold     = 25; // the next value of it, after a trial that was of no use

    // of the window's beginning, in seconds
    double t_begin    = -1.0;
    double own_begin  =  0.0;
    double busy_begin =  0.0;
};
