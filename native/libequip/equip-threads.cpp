#include "equip-internal.h"

#include "common.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <string>

#ifdef __linux__
#include <sched.h>
#endif

#ifdef __linux__

// physical cores among the processors that this process may run on; 0 if the system does not say
static int n_cores_allowed() {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
        return 0;
    }

    std::set<std::string> cores;
    for (int i = 0; i < CPU_SETSIZE; ++i) {
        if (!CPU_ISSET(i, &allowed)) {
            continue;
        }
        // the same line for all threads of a core
        std::ifstream file(equip_format("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", i));
        std::string   siblings;
        cores.insert(std::getline(file, siblings) ? siblings : std::to_string(i));
    }

    return (int) cores.size();
}

// processors that a group's quota is worth, 0 if it has none; path: of its folder
static double read_quota(const std::string & path) {
    double quota  = 0.0;
    double period = 0.0;

    // version 2: "max 100000" or "150000 100000"; version 1: a file each, -1 for no limit
    std::ifstream v2(path + "/cpu.max");
    if (!(v2 >> quota >> period)) {
        std::ifstream(path + "/cpu.cfs_quota_us")  >> quota;
        std::ifstream(path + "/cpu.cfs_period_us") >> period;
    }

    return quota > 0.0 && period > 0.0 ? quota/period : 0.0;
}

// the smallest quota of the groups that this process is in, 0 if there is none
static double cpu_quota() {
    const char *      env  = getenv("EQUIP_CGROUP_ROOT"); // tests
    const std::string root = env ? env : "/sys/fs/cgroup";

    double res = 0.0;
    const auto take = [&](const std::string & path) {
        const double quota = read_quota(path);
        res = quota > 0.0 && (res == 0.0 || quota < res) ? quota : res;
    };

    // "0::/a/b" (version 2) or "4:cpu,cpuacct:/a/b" (version 1)
    std::ifstream file(env ? root + "/self" : "/proc/self/cgroup");
    for (std::string line; std::getline(file, line); ) {
        const size_t first  = line.find(':');
        const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        const std::string names = line.substr(first + 1, second - first - 1);
        if (!names.empty() && (',' + names + ',').find(",cpu,") == std::string::npos) {
            continue;
        }
        const std::string mount = names.empty() ? root : root + "/" + names;
        for (std::string path = line.substr(second + 1); path.size() > 1; path.erase(path.rfind('/'))) {
            take(mount + path);
            take(root + "/cpu" + path);
        }
        // inside a container its own group is the root, whatever the path says
        take(mount);
        take(root + "/cpu");
    }

    return res;
}

#endif

int32_t equip_default_threads() {
    int32_t res = std::max(1, common_cpu_get_num_math());

#ifdef __linux__
    const int n_allowed = n_cores_allowed();
    if (n_allowed > 0) {
        res = std::min(res, n_allowed);
    }

    // threads wait for each other, so one that has used up its share holds up the rest: a fraction is not worth a thread
    const double quota = cpu_quota();
    if (quota > 0.0) {
        res = std::min(res, std::max(1, (int32_t) (quota + 0.25)));
    }
#endif

    return res;
}
