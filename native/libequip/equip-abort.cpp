// upstream's assertions as exceptions: where no number that a file can claim was checked before, the process still lives

#include "equip-internal.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

static thread_local int n_open = 0;

static std::mutex            callback_mutex;
static int                   n_users          = 0;
static ggml_abort_callback_t foreign_callback = nullptr;

// "/a/b/src/x.cpp:12: GGML_ASSERT(n > 0) failed" -> "GGML_ASSERT(n > 0) failed (x.cpp:12)"
static std::string without_folder(const std::string & message) {
    const size_t colon = message.find(": ");
    if (colon == std::string::npos) {
        return message;
    }
    const std::string place = message.substr(0, colon);
    const size_t      slash = place.find_last_of("/\\");
    return message.substr(colon + 2) + " (" + (slash == std::string::npos ? place : place.substr(slash + 1)) + ")";
}

static void on_abort(const char * message) {
    if (n_open > 0) {
        // through frames of C too: they have unwind tables on the platforms that this library is built for
        throw std::runtime_error(without_folder(message));
    }
    if (foreign_callback) {
        foreign_callback(message);
    } else {
        fprintf(stderr, "%s\n", message);
    }
}

equip_abort_scope::equip_abort_scope() {
    std::lock_guard<std::mutex> lock(callback_mutex);
    if (n_users++ == 0) {
        foreign_callback = ggml_set_abort_callback(on_abort);
    }
    ++n_open;
}

equip_abort_scope::~equip_abort_scope() {
    std::lock_guard<std::mutex> lock(callback_mutex);
    --n_open;
    if (--n_users == 0) {
        ggml_set_abort_callback(foreign_callback);
    }
}
