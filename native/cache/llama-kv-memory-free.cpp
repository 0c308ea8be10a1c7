#include "llama-kv-memory-free.h"

#include "llama-kv-policy.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#if defined(__linux__)
#    include <sys/resource.h>
#    include <unistd.h>
#elif defined(__APPLE__)
#    include <mach/mach.h>
#    include <unistd.h>
#endif

#if defined(__linux__)

// the number behind a key at a line's beginning, or the file's first one (key ""); -1 if there is none, or "max"
static int64_t read_number(const char * path, const char * key) {
    char      line[256];
    long long res  = -1;
    FILE *    file = fopen(path, "r");

    while (file && res < 0 && fgets(line, sizeof(line), file)) {
        const size_t n = strlen(key);
        if (strncmp(line, key, n) != 0 || sscanf(line + n, "%lld", &res) != 1) {
            res = -1;
        }
    }
    if (file) {
        fclose(file);
    }
    return res;
}

// a container may be allowed less than the machine has; pages of files count as used, but can be dropped
static int64_t left_in_group(const char * max, const char * used, const char * stat, const char * key) {
    const int64_t n_max  = read_number(max,  "");
    const int64_t n_used = read_number(used, "");

    return n_max < 0 || n_used < 0 ? INT64_MAX : std::max<int64_t>(0, n_max - n_used + std::max<int64_t>(0, read_number(stat, key)));
}

static int64_t host_free() {
    const int64_t kib = read_number("/proc/meminfo", "MemAvailable:");
    int64_t       res = kib < 0 ? INT64_MAX : kib*1024;

    const std::string group = "/sys/fs/cgroup/";
    res = std::min(res, left_in_group((group + "memory.max").c_str(), (group + "memory.current").c_str(), (group + "memory.stat").c_str(), "inactive_file "));
    const std::string v1 = group + "memory/memory.";
    res = std::min(res, left_in_group((v1 + "limit_in_bytes").c_str(), (v1 + "usage_in_bytes").c_str(), (v1 + "stat").c_str(), "total_inactive_file "));

    // ulimit -v
    rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
        const int64_t n_pages = std::max<int64_t>(0, read_number("/proc/self/statm", ""));
        res = std::min(res, std::max<int64_t>(0, (int64_t) limit.rlim_cur - n_pages*sysconf(_SC_PAGESIZE)));
    }

    return res == INT64_MAX ? 0 : std::max<int64_t>(1, res);
}

#elif defined(__APPLE__)

static int64_t host_free() {
    vm_statistics64_data_t vm;
    mach_msg_type_number_t count = HOST_VM_INFO64_COUNT;

    if (host_statistics64(mach_host_self(), HOST_VM_INFO64, (host_info64_t) &vm, &count) != KERN_SUCCESS) {
        return 0;
    }
    return ((int64_t) vm.free_count + vm.inactive_count + vm.purgeable_count)*sysconf(_SC_PAGESIZE);
}

#else

// what ggml says: on Windows that is right
static int64_t host_free() {
    size_t free  = 0;
    size_t total = 0;
    if (ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) {
        ggml_backend_dev_memory(cpu, &free, &total);
    }
    return (int64_t) free;
}

#endif

int64_t llama_kv_memory_free(ggml_backend_dev_t dev) {
    if (!dev) {
        return host_free();
    }

    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(dev, &free, &total);

    return (int64_t) free;
}

int64_t llama_kv_policy_memory_free(void) {
    return host_free();
}
