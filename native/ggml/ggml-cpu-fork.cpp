#include "ggml-cpu-fork.h"

// libgomp keeps the threads of its last parallel region. A forked process inherits the record of them, but not the threads, and its
// first region waits for them for ever. So they end before each fork, and the next region, in either process, starts new ones

#if defined(GGML_USE_OPENMP) && defined(__GNUC__) && __GNUC__ >= 9 && !defined(__clang__) && !defined(_WIN32)

#include <omp.h>
#include <pthread.h>

// only those of the thread that forks, which alone goes on in the child; inside a region nothing happens
static void end_threads() {
    omp_pause_resource_all(omp_pause_soft);
}

void ggml_cpu_prepare_forks(void) {
    pthread_atfork(end_threads, nullptr, nullptr);
}

#else

void ggml_cpu_prepare_forks(void) {}

#endif
