#include "equip-internal.h"

#ifndef _WIN32
#    include <unistd.h>
#endif

static int64_t this_process() {
#ifdef _WIN32
    return 0; // nothing forks
#else
    return (int64_t) getpid();
#endif
}

static std::atomic<int64_t> finder { -1 };

void equip_note_process() {
    finder = this_process();
}

bool equip_is_cut_off() {
    const int64_t process = finder;
    return process >= 0 && process != this_process() && !equip_devices().empty();
}

void equip_check_fork() {
    if (equip_is_cut_off()) {
        equip_fail(EQUIP_ERR_BACKEND, "this process was forked from one that had found a GPU or a worker, which a fork cannot use: "
                "start a process of its own (in Python: multiprocessing's method spawn)");
    }
}
