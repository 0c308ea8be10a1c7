#include "equip-internal.h"

#include "ggml-backend.h"

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

static std::atomic<int64_t> maker { -1 };

void equip_note_process() {
    maker = this_process();
}

bool equip_is_cut_off() {
    const int64_t process = maker;
    if (process < 0 || process == this_process()) {
        return false;
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const auto type = ggml_backend_dev_type(ggml_backend_dev_get(i));
        if (type != GGML_BACKEND_DEVICE_TYPE_CPU && type != GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            return true;
        }
    }
    return false;
}

void equip_check_fork() {
    if (equip_is_cut_off()) {
        equip_fail(EQUIP_ERR_BACKEND, "this process was forked from one that had found a GPU or a worker, which a fork cannot use: "
                "start a process of its own (in Python: multiprocessing's method spawn)");
    }
}
