#include "ggml-cpu-probe.h"

#ifndef GGML_CPU_PROBE_MAIN
#    include "ggml-impl.h"
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#    define PROBE_X86
#    include <cpuid.h>
#    if !defined(_WIN32)
#        define PROBE_CHILD
#        include <cerrno>
#        include <csignal>
#        include <fcntl.h>
#        include <poll.h>
#        include <sys/resource.h>
#        include <sys/wait.h>
#        include <unistd.h>
#        if defined(__linux__)
#            include <sys/prctl.h>
#            include <sys/syscall.h>
#        endif
#    endif
#endif

#ifdef PROBE_X86

// instructions as bytes: any assembler takes them, and no function here is compiled for a set
// registers are left as they come; the child ends after them
#define TRY(bytes) [] { __asm__ volatile(".byte " bytes : : : "memory", "eax", "xmm0"); }

static void try_movbe() {
    uint32_t x = 0;
    __asm__ volatile(".byte 0x0f,0x38,0xf0,0x08" : : "a"(&x) : "memory", "ecx"); // movbe (%rax), %ecx
}

static void try_amx() {
#    if defined(__linux__) && defined(__x86_64__)
    const long arch_req_xcomp_perm = 0x1023;
    const long xfeature_xtiledata  = 18;
    if (syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) != 0) {
        _exit(1);
    }

    // palette 1; three tiles of 16 rows of 64 bytes
    alignas(64) static unsigned char config[64];
    alignas(64) static unsigned char tile[1024];
    config[0] = 1;
    for (int i = 0; i < 3; ++i) {
        config[16 + 2*i] = 64;
        config[48 +   i] = 16;
    }
    __asm__ volatile(".byte 0xc4,0xe2,0x78,0x49,0x00" : : "a"(config) : "memory"); // ldtilecfg (%rax)
    __asm__ volatile(".byte 0xc4,0xe2,0x7b,0x49,0xc0\n"      // tilezero %tmm0
                     ".byte 0xc4,0xe2,0x7b,0x4b,0x0c,0x08\n" // tileloadd (%rax,%rcx), %tmm1
                     ".byte 0xc4,0xe2,0x7b,0x4b,0x14,0x08\n" // tileloadd (%rax,%rcx), %tmm2
                     ".byte 0xc4,0xe2,0x6b,0x5e,0xc1\n"      // tdpbssd %tmm2, %tmm1, %tmm0
                     ".byte 0xc4,0xe2,0x7a,0x4b,0x04,0x08\n" // tilestored %tmm0, (%rax,%rcx)
                     ".byte 0xc4,0xe2,0x78,0x49,0xc0"        // tilerelease
                     : : "a"(tile), "c"((long) 64) : "memory");
#    endif
}

enum { EAX, EBX, ECX, EDX };

struct probe_row {
    const char * name;
    const char * flags; // a % stands for "" or "no-"
    uint32_t     leaf;
    uint32_t     subleaf;
    int          reg;
    uint32_t     bits;
    uint32_t     needs;
    void      (* run)();
};

#define AVX512 GGML_CPU_PROBE_AVX2 | GGML_CPU_PROBE_FMA | GGML_CPU_PROBE_F16C
#define AVX512F GGML_CPU_PROBE_AVX512F
#define AVX512B GGML_CPU_PROBE_AVX512F | GGML_CPU_PROBE_AVX512BW

// in the order of enum ggml_cpu_probe_set; needs: what a compiler's flag for the set brings along
static const probe_row rows[] = {
    { "sse4.2",          "-m%sse4.2",          1, 0, ECX, 1u << 20, 0,                                              TRY("0x66,0x0f,0x38,0x37,0xc0")           }, // pcmpgtq %xmm0, %xmm0
    { "popcnt",          "-m%popcnt",          1, 0, ECX, 1u << 23, 0,                                              TRY("0xf3,0x0f,0xb8,0xc0")                }, // popcnt %eax, %eax
    { "lzcnt",           "-m%lzcnt",  0x80000001, 0, ECX, 1u <<  5, 0,                                              TRY("0xf3,0x0f,0xbd,0xc0")                }, // lzcnt %eax, %eax
    { "movbe",           "-m%movbe",           1, 0, ECX, 1u << 22, 0,                                              try_movbe                                 },
    { "bmi",             "-m%bmi",             7, 0, EBX, 1u <<  3, 0,                                              TRY("0xc4,0xe2,0x78,0xf3,0xc8")           }, // blsr %eax, %eax
    { "bmi2",            "-m%bmi2",            7, 0, EBX, 1u <<  8, 0,                                              TRY("0xc4,0xe2,0x7a,0xf5,0xc0")           }, // pext %eax, %eax, %eax
    { "gfni",            "-m%gfni",            7, 0, ECX, 1u <<  8, 0,                                              TRY("0x66,0x0f,0x38,0xcf,0xc0")           }, // gf2p8mulb %xmm0, %xmm0
    { "avx",             "-m%avx",             1, 0, ECX, 1u << 28, GGML_CPU_PROBE_SSE42,                           TRY("0xc5,0xfc,0x58,0xc0")                }, // vaddps %ymm0, %ymm0, %ymm0
    { "avx2",            "-m%avx2",            7, 0, EBX, 1u <<  5, GGML_CPU_PROBE_AVX,                             TRY("0xc5,0xfd,0xfe,0xc0")                }, // vpaddd %ymm0, %ymm0, %ymm0
    { "fma",             "-m%fma",             1, 0, ECX, 1u << 12, GGML_CPU_PROBE_AVX,                             TRY("0xc4,0xe2,0x7d,0xa8,0xc0")           }, // vfmadd213ps %ymm0, %ymm0, %ymm0
    { "f16c",            "-m%f16c",            1, 0, ECX, 1u << 29, GGML_CPU_PROBE_AVX,                             TRY("0xc4,0xe2,0x7d,0x13,0xc0")           }, // vcvtph2ps %xmm0, %ymm0
    { "avxvnni",         "-m%avxvnni",         7, 1, EAX, 1u <<  4, GGML_CPU_PROBE_AVX2,                            TRY("0xc4,0xe2,0x7d,0x50,0xc0")           }, // {vex} vpdpbusd %ymm0, %ymm0, %ymm0
    { "avxvnniint8",     "-m%avxvnniint8",     7, 1, EDX, 1u <<  4, GGML_CPU_PROBE_AVX2,                            TRY("0xc4,0xe2,0x7f,0x50,0xc0")           }, // vpdpbssd %ymm0, %ymm0, %ymm0
    { "avx512f",         "-m%avx512f",         7, 0, EBX, 1u << 16, AVX512,                                         TRY("0x62,0xf1,0x7c,0x48,0x58,0xc0")      }, // vaddps %zmm0, %zmm0, %zmm0
    { "avx512cd",        "-m%avx512cd",        7, 0, EBX, 1u << 28, AVX512F,                                        TRY("0x62,0xf2,0x7d,0x48,0x44,0xc0")      }, // vplzcntd %zmm0, %zmm0
    { "avx512bw",        "-m%avx512bw",        7, 0, EBX, 1u << 30, AVX512F,                                        TRY("0x62,0xf1,0x7d,0x48,0xfc,0xc0")      }, // vpaddb %zmm0, %zmm0, %zmm0
    { "avx512dq",        "-m%avx512dq",        7, 0, EBX, 1u << 17, AVX512F,                                        TRY("0x62,0xf2,0xfd,0x48,0x40,0xc0")      }, // vpmullq %zmm0, %zmm0, %zmm0
    { "avx512vl",        "-m%avx512vl",        7, 0, EBX, 1u << 31, AVX512F,                                        TRY("0x62,0xf3,0x7d,0x28,0x25,0xc0,0x00") }, // vpternlogd $0, %ymm0, %ymm0, %ymm0
    { "avx512ifma",      "-m%avx512ifma",      7, 0, EBX, 1u << 21, AVX512F,                                        TRY("0x62,0xf2,0xfd,0x48,0xb4,0xc0")      }, // vpmadd52luq %zmm0, %zmm0, %zmm0
    { "avx512vbmi",      "-m%avx512vbmi",      7, 0, ECX, 1u <<  1, AVX512B,                                        TRY("0x62,0xf2,0x7d,0x48,0x8d,0xc0")      }, // vpermb %zmm0, %zmm0, %zmm0
    { "avx512vbmi2",     "-m%avx512vbmi2",     7, 0, ECX, 1u <<  6, AVX512B,                                        TRY("0x62,0xf3,0x7d,0x48,0x71,0xc0,0x01") }, // vpshldd $1, %zmm0, %zmm0, %zmm0
    { "avx512vnni",      "-m%avx512vnni",      7, 0, ECX, 1u << 11, AVX512F,                                        TRY("0x62,0xf2,0x7d,0x48,0x50,0xc0")      }, // vpdpbusd %zmm0, %zmm0, %zmm0
    { "avx512bitalg",    "-m%avx512bitalg",    7, 0, ECX, 1u << 12, AVX512B,                                        TRY("0x62,0xf2,0x7d,0x48,0x54,0xc0")      }, // vpopcntb %zmm0, %zmm0
    { "avx512vpopcntdq", "-m%avx512vpopcntdq", 7, 0, ECX, 1u << 14, AVX512F,                                        TRY("0x62,0xf2,0x7d,0x48,0x55,0xc0")      }, // vpopcntd %zmm0, %zmm0
    { "avx512bf16",      "-m%avx512bf16",      7, 1, EAX, 1u <<  5, AVX512B,                                        TRY("0x62,0xf2,0x7e,0x48,0x52,0xc0")      }, // vdpbf16ps %zmm0, %zmm0, %zmm0
    { "avx512fp16",      "-m%avx512fp16",      7, 0, EDX, 1u << 23, AVX512B | GGML_CPU_PROBE_AVX512DQ | GGML_CPU_PROBE_AVX512VL, TRY("0x62,0xf5,0x7c,0x48,0x58,0xc0") }, // vaddph %zmm0, %zmm0, %zmm0
    { "amx", "-m%amx-tile -m%amx-int8",        7, 0, EDX, 3u << 24, 0,                                              try_amx                                   },
};

static_assert(sizeof(rows)/sizeof(rows[0]) == GGML_CPU_PROBE_N_SETS, "one row per set");

static uint32_t announced_sets() {
    uint32_t res = 0;
    for (int i = 0; i < GGML_CPU_PROBE_N_SETS; ++i) {
        uint32_t regs[4] = { 0, 0, 0, 0 };
        if (__get_cpuid_count(rows[i].leaf, rows[i].subleaf, &regs[EAX], &regs[EBX], &regs[ECX], &regs[EDX]) &&
                (regs[rows[i].reg] & rows[i].bits) == rows[i].bits) {
            res |= 1u << i;
        }
    }
    return res;
}

// for tests: sets that are announced and fault
static uint32_t stub_sets() {
    uint32_t res = 0;
    if (const char * text = getenv("EQUIP_PROBE_FAULT")) {
        while (*text) {
            const size_t n = strcspn(text, ",");
            for (int i = 0; i < GGML_CPU_PROBE_N_SETS; ++i) {
                if (strlen(rows[i].name) == n && strncmp(rows[i].name, text, n) == 0) {
                    res |= 1u << i;
                }
            }
            text += n + (text[n] == ',');
        }
    }
    return res;
}

#    ifdef PROBE_CHILD

// between fork and _exit: async-signal-safe calls alone
[[noreturn]] static void child(uint32_t sets, uint32_t stubs, int fd) {
    // the program's handlers must not see the faults, and no core is written for them
    struct sigaction by_default;
    memset(&by_default, 0, sizeof(by_default));
    by_default.sa_handler = SIG_DFL;
    static const int faults[] = { SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP, SIGSYS };
    for (int sig : faults) {
        sigaction(sig, &by_default, nullptr);
    }
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);

    const struct rlimit no_core = { 0, 0 };
    setrlimit(RLIMIT_CORE, &no_core);
#        if defined(__linux__)
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
#        endif

    for (int i = 0; i < GGML_CPU_PROBE_N_SETS; ++i) {
        if (stubs & (1u << i)) {
            kill(getpid(), SIGSEGV);
        } else if (sets & (1u << i)) {
            rows[i].run();
        }
    }
    _exit(write(fd, "k", 1) == 1 ? 0 : 1);
}

enum class outcome { works, dies, hangs, unknown };

// the answer comes through a pipe: a program may ignore SIGCHLD or wait for all children itself
static outcome try_once(uint32_t sets, uint32_t stubs) {
    int fd[2];
    if (pipe(fd) != 0) {
        return outcome::unknown;
    }
    fcntl(fd[0], F_SETFD, FD_CLOEXEC);
    fcntl(fd[1], F_SETFD, FD_CLOEXEC);

    const pid_t pid = fork();
    if (pid == 0) {
        child(sets, stubs, fd[1]);
    }
    close(fd[1]);

    outcome res = outcome::unknown;
    if (pid > 0) {
        const int limit_ms = 2000;

        struct pollfd answer = { fd[0], POLLIN, 0 };
        int  n_ready;
        do {
            n_ready = poll(&answer, 1, limit_ms);
        } while (n_ready < 0 && errno == EINTR);

        char byte;
        res = n_ready == 0 ? outcome::hangs : read(fd[0], &byte, 1) == 1 ? outcome::works : outcome::dies;
        if (res == outcome::hangs) {
            kill(pid, SIGKILL);
        }
        while (waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
        }
    }
    close(fd[0]);
    return res;
}

static bool works(uint32_t sets, uint32_t stubs) {
    outcome res = try_once(sets, stubs);
    if (res == outcome::hangs) {
        res = try_once(sets, stubs); // the machine may have been busy
    }
    return res == outcome::works || res == outcome::unknown; // where no child can be made, the announcement must do
}

#    endif

static ggml_cpu_probe_result probe() {
    ggml_cpu_probe_result res = { announced_sets(), 0, 0 };
#    ifdef PROBE_CHILD
    const uint32_t stubs = stub_sets();
    res.announced |= stubs;

    // one child for all of them, and only if it fails one for each
    if (!works(res.announced, stubs)) {
        for (int i = 0; i < GGML_CPU_PROBE_N_SETS; ++i) {
            const uint32_t set = 1u << i;
            if ((res.announced & set) && !works(set, stubs & set)) {
                res.faulting |= set;
            }
        }
    }
#    endif
    res.usable = res.announced & ~res.faulting;
    for (int i = 0; i < GGML_CPU_PROBE_N_SETS; ++i) { // what is needed stands before what needs it
        if (rows[i].needs & ~res.usable) {
            res.usable &= ~(1u << i);
        }
    }
    return res;
}

#else

static ggml_cpu_probe_result probe() {
    return { 0, 0, UINT32_MAX };
}

#endif

static ggml_cpu_probe_result probe_and_tell() {
    const ggml_cpu_probe_result res = probe();
#ifndef GGML_CPU_PROBE_MAIN
    for (int i = 0; i < GGML_CPU_PROBE_N_SETS; ++i) {
        if (res.faulting & (1u << i)) {
            GGML_LOG_WARN("%s: this processor announces %s, which does not work: what needs it is left out\n", __func__, ggml_cpu_probe_name(i));
        }
    }
#endif
    return res;
}

const ggml_cpu_probe_result * ggml_cpu_probe(void) {
    static const ggml_cpu_probe_result res = probe_and_tell();
    return &res;
}

const char * ggml_cpu_probe_name(int bit) {
#ifdef PROBE_X86
    return bit >= 0 && bit < GGML_CPU_PROBE_N_SETS ? rows[bit].name : nullptr;
#else
    (void) bit;
    return nullptr;
#endif
}

int ggml_cpu_probe_amx(void) {
    const ggml_cpu_probe_result * res = ggml_cpu_probe();
    return (res->announced & ~res->usable & GGML_CPU_PROBE_AMX) == 0;
}

const char * ggml_cpu_probe_refusal(uint32_t built) {
    const ggml_cpu_probe_result * res = ggml_cpu_probe();
    const uint32_t missing = built & ~res->usable & ~(uint32_t) GGML_CPU_PROBE_AMX;
    if (missing == 0) {
        return nullptr;
    }

    static thread_local char sentence[512];
#ifdef PROBE_X86
    // one is enough, and the first one does not need another
    int bit = 0;
    while (!(missing & (1u << bit))) {
        ++bit;
    }
    snprintf(sentence, sizeof(sentence),
        "this build uses the instruction set %s, which this processor %s: run install.py again, or set EQUIP_PORTABLE=1 for a build that runs on any",
        rows[bit].name, res->announced & (1u << bit) ? "announces but which does not work" : "does not have");
#endif
    return sentence;
}

#if defined(GGML_CPU_PROBE_MAIN) && defined(PROBE_X86)

// one line per announced set: its name, whether it works, and the flags that say so to a compiler
int main() {
    const ggml_cpu_probe_result * res = ggml_cpu_probe();
    for (int i = 0; i < GGML_CPU_PROBE_N_SETS; ++i) {
        const uint32_t set = 1u << i;
        if (!(res->announced & set)) {
            continue;
        }
        const bool usable = (res->usable & set) != 0;
        printf("%s %s ", rows[i].name, usable ? "works" : res->faulting & set ? "faults" : "needs");
        for (const char * c = rows[i].flags; *c; ++c) {
            if (*c != '%') {
                putchar(*c);
            } else if (!usable) {
                fputs("no-", stdout);
            }
        }
        putchar('\n');
    }
    return 0;
}

#elif defined(GGML_CPU_PROBE_MAIN)

int main() {
    return 0;
}

#endif
