// several machines: a worker serves the devices of its machine by ggml's RPC backend, a client uses them as if they were its own

#include "equip-internal.h"

#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <vector>

template <typename T>
static T * rpc_function(const char * name) {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
    void * res = reg ? ggml_backend_reg_get_proc_address(reg, name) : nullptr;
    if (!res) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "this build cannot use other machines: build it with -DGGML_RPC=ON in CMAKE_ARGS");
    }
    return (T *) res;
}

static std::atomic<equip_lost_worker> on_lost;

// upstream aborts where a worker is gone, on a thread where nobody could catch anything
static void on_abort(const char * message) {
    const equip_lost_worker callback = on_lost;
    if (callback && strstr(message, "Remote RPC server")) {
        callback("a worker has ended, or the connection to it has: start it again");
    }
    fprintf(stderr, "%s\n", message);
}

int equip_rpc_add(const char * workers, equip_lost_worker lost) {
    return equip_guard_status([&]() -> int {
        equip_init();

        static std::mutex               mutex;
        static std::vector<std::string> added;

        std::lock_guard<std::mutex> lock(mutex);

        auto * add = rpc_function<decltype(ggml_backend_rpc_add_server)>("ggml_backend_rpc_add_server");
        for (const auto & endpoint : string_split<std::string>(workers ? workers : "", ',')) {
            if (std::find(added.begin(), added.end(), endpoint) != added.end()) {
                continue;
            }
            if (added.size() >= GGML_RPC_MAX_SERVERS) {
                equip_fail(EQUIP_ERR_USAGE, "there are more than %d workers: give fewer", GGML_RPC_MAX_SERVERS);
            }
            ggml_backend_reg_t reg = nullptr;
            try {
                const equip_abort_scope scope;
                reg = add(endpoint.c_str());
            } catch (const std::exception & err) {
                equip_fail(EQUIP_ERR_BACKEND, "no worker answers at %s (%s): start one there with equip rpc", endpoint.c_str(), err.what());
            }
            if (!reg) {
                equip_fail(EQUIP_ERR_BACKEND, "the worker at %s has no device: start it again", endpoint.c_str());
            }
            ggml_backend_register(reg);
            equip_note_process();
            added.push_back(endpoint);
        }
        if (!added.empty() && lost) {
            on_lost = lost;
            ggml_set_abort_callback(on_abort);
        }
        return 0;
    });
}

int equip_rpc_serve(const char * endpoint, int32_t n_threads) {
    return equip_guard_status([&]() -> int {
        equip_init();

        auto * start = rpc_function<decltype(ggml_backend_rpc_start_server)>("ggml_backend_rpc_start_server");

        // as upstream's rpc-server: the CPU where there is nothing better
        auto devices = equip_devices();
        if (devices.empty()) {
            devices.push_back(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
        }

        start(endpoint, nullptr, n_threads > 0 ? n_threads : equip_default_threads(), devices.size(), devices.data());

        equip_fail(EQUIP_ERR_BACKEND, "the worker has ended: it could not listen at %s, or was cut off from the network", endpoint);
    });
}
