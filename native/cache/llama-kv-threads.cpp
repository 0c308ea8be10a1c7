#include "llama-kv-threads.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>

#ifdef __linux__
#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#endif

static const double WINDOW = 0.2; // seconds; the system counts in hundredths
static const double SLOWER = 1.05;

static const int HOLD_MIN =  25; // windows
static const int HOLD_MAX = 300;

#ifdef __linux__

// seconds that this process has used so far, and that the processors were busy which this thread may use; n_cpu: how many these are
static bool read_load(double & own, double & busy, int & n_cpu) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
        return false;
    }

    FILE * file = fopen("/proc/stat", "r");
    if (!file) {
        return false;
    }

    // time at a lower priority gives way, unless this process has one itself
    const bool is_nice = getpriority(PRIO_PROCESS, 0) > 0;

    unsigned long long ticks = 0;
    char line[512];
    n_cpu = 0;
    while (fgets(line, sizeof(line), file) && strncmp(line, "cpu", 3) == 0) {
        int i = 0;
        unsigned long long user, nice, system, idle, iowait, irq, softirq, steal;
        if (sscanf(line, "cpu%d %llu %llu %llu %llu %llu %llu %llu %llu", &i, &user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal) != 9 ||
            i < 0 || i >= CPU_SETSIZE || !CPU_ISSET(i, &allowed)) {
            continue;
        }
        ticks += user + (is_nice ? nice : 0) + system + irq + softirq + steal;
        n_cpu++;
    }
    fclose(file);

    timespec time;
    if (n_cpu == 0 || clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time) != 0) {
        return false;
    }
    own  = time.tv_sec + 1e-9*time.tv_nsec;
    busy = (double) ticks/sysconf(_SC_CLK_TCK);

    return true;
}

#else

static bool read_load(double & /*own*/, double & /*busy*/, int & /*n_cpu*/) {
    return false;
}

#endif

int llama_kv_threads::decide(int n_max, int n_cpu, double own, double others) {
    const int64_t us = n_steps > 0 ? sum_us/n_steps : 0;

    sum_us  = 0;
    n_steps = 0;

    n = n == 0 ? n_max : std::min(n, n_max);

    // where all processors are busy, others would use more of them if they had not to share: each thread gets what one of ours gets
    if (own > 0.0 && own + others > 0.95*n_cpu) {
        others /= std::min(1.0, own/n);
    }

    const int target = std::max(1, std::min(n_max, (int) std::floor(n_cpu - others + 0.5)));

    if (n_hold > 0) {
        n_hold--;
    }

    if (n_before > 0 && us > 0) {
        const bool is_slower = us > SLOWER*us_before;

        if (is_slower && target < n_before) {
            n      = std::min(n_before, n_max);
            n_hold = hold;
            hold   = std::min(2*hold, HOLD_MAX);
        } else {
            hold   = HOLD_MIN;
        }
        n_before = 0;
    }

    if (target > n) {
        n        = target;
        n_before = 0;
        n_loaded = 0;
    } else if (target == n) {
        n_loaded = 0;
    } else if (++n_loaded > 1 && n_hold == 0) {
        // the first such window may have begun before the load did
        n_before  = us > 0 ? n : 0;
        us_before = us;
        n         = target;
        n_loaded  = 0;
    }

    return n;
}

int llama_kv_threads::next(int n_max) {
    using namespace std::chrono;
    const double now = duration<double>(steady_clock::now().time_since_epoch()).count();

    if (n > 0 && now - t_begin < WINDOW) {
        return n = std::min(n, n_max);
    }

    double own, busy;
    int    n_cpu;
    if (n_max <= 1 || !read_load(own, busy, n_cpu)) {
        return n = n_max;
    }

    if (n == 0 || t_begin < 0.0) {
        n = n_max;
    } else {
        const double n_own = (own - own_begin)/(now - t_begin);
        decide(n_max, n_cpu, n_own, std::max(0.0, (busy - busy_begin)/(now - t_begin) - n_own));
    }

    t_begin    = now;
    own_begin  = own;
    busy_begin = busy;

    return n;
}

void llama_kv_threads::step(int64_t us) {
    sum_us += us;
    n_steps++;
}
