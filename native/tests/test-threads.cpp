// how many threads compute the next graph: the rule alone, on machines that are simulated; under ASan and UBSan

#include "llama-kv-threads.h"
#include "test-check.h"

#include <algorithm>
#include <cmath>
#include <random>

// a machine with n_cpu processors on which other programs keep `others` of them busy, and a step that costs 12 ms on one thread
struct machine {
    int    n_cpu;
    double others = 0.0;
    double jitter = 0.02; // of what the system counts
    bool   fewer_is_slower = false; // threads that have no processor cost nothing here, so giving them up only loses

    std::mt19937 rng { 1 };

    // of a processor, for each thread that could run all the time
    double share(int n) const {
        return std::min(1.0, n_cpu/(n + others));
    }

    double step_us(int n) const {
        const double wait = n > 1 && !fewer_is_slower ? 30000.0*(1.0 - share(n)) : 0.0; // barriers, for the thread that is not running
        return 12000.0/n/share(n) + wait;
    }

    // one window; returns the threads of the next one
    int window(llama_kv_threads & threads, int n_max) {
        const int n = threads.current() > 0 ? threads.current() : n_max;
        for (double t = 0.0; t < 200e3; t += step_us(n)) {
            threads.step((int64_t) step_us(n));
        }
        const double seen = others*share(n) + std::normal_distribution<double>(0.0, jitter)(rng);
        return threads.decide(n_max, n_cpu, n*share(n), std::max(0.0, seen));
    }
};

static void test_idle() {
    for (int n_cpu : { 1, 2, 4, 8, 16 }) {
        machine          m { n_cpu };
        llama_kv_threads threads;
        for (int i = 0; i < 200; ++i) {
            CHECK(m.window(threads, n_cpu) == n_cpu, "%d processors, window %d", n_cpu, i);
        }
    }
}

// within three windows of a change, in both directions
static void test_follows() {
    for (int n_cpu : { 2, 4, 8, 16 }) {
        for (int n_others = 1; n_others <= n_cpu; ++n_others) {
            machine          m { n_cpu };
            llama_kv_threads threads;
            for (int i = 0; i < 10; ++i) {
                m.window(threads, n_cpu);
            }
            m.others = n_others;
            for (int i = 0; i < 3; ++i) {
                m.window(threads, n_cpu);
            }
            const int wanted = std::max(1, n_cpu - n_others);
            // it need not be exact at once: the more of ours spin, the less the others get, and the less is seen of them
            for (int i = 0; i < 20; ++i) {
                m.window(threads, n_cpu);
            }
            CHECK(threads.current() <= wanted + (n_others > 1 ? 1 : 0), "%d of %d busy: %d threads", n_others, n_cpu, threads.current());
            CHECK(threads.current() >= std::max(1, wanted - 1), "%d of %d busy: %d threads", n_others, n_cpu, threads.current());

            const int settled = threads.current();
            for (int i = 0; i < 100; ++i) {
                CHECK(std::abs(m.window(threads, n_cpu) - settled) <= 1, "%d of %d busy: it does not rest", n_others, n_cpu);
            }

            m.others = 0;
            for (int i = 0; i < 2; ++i) {
                m.window(threads, n_cpu);
            }
            CHECK(threads.current() == n_cpu, "free again: %d of %d threads", threads.current(), n_cpu);
        }
    }
}

// one busy program on two processors: the case that people have
static void test_two_processors() {
    machine          m { 2 };
    llama_kv_threads threads;
    m.window(threads, 2);
    m.others = 1.0;
    int n_windows = 0;
    while (m.window(threads, 2) != 1 && n_windows < 20) {
        n_windows++;
    }
    CHECK(n_windows <= 3, "%d windows", n_windows);
    for (int i = 0; i < 300; ++i) {
        CHECK(m.window(threads, 2) == 1, "window %d", i);
    }
}

// where it does not help it is taken back, and tried again less and less often
static void test_takes_back() {
    machine m { 2 };
    m.others          = 1.0;
    m.fewer_is_slower = true;

    llama_kv_threads threads;
    int n_fewer = 0;
    for (int i = 0; i < 600; ++i) {
        n_fewer += m.window(threads, 2) == 1;
    }
    CHECK(n_fewer > 0 && n_fewer <= 12, "%d of 600 windows with too few threads", n_fewer);
}

static void test_limits() {
    llama_kv_threads threads;
    CHECK(threads.current() == 0, "before the first graph");
    CHECK(threads.next(1) == 1, "one thread stays one");
    CHECK(threads.next(4) <= 4 && threads.current() >= 1, "%d", threads.current());
    CHECK(threads.next(2) <= 2, "a lower number is taken at once: %d", threads.current());
    CHECK(threads.decide(3, 2, 2.0, 100.0) >= 1, "others cannot use more than all: %d", threads.current());
}

int main() {
    test_idle();
    test_follows();
    test_two_processors();
    test_takes_back();
    test_limits();

    printf("%s\n", n_fail ? "FAILED" : "OK");
    return n_fail ? 1 : 0;
}
