// which instruction sets of this processor work: what CPUID announces is tried in a child process before it is trusted
//
// x86-64 and i386 with gcc or clang; nothing is tried on Windows, and other architectures know no sets here
// it lies in ggml-base, which is built without -march, and runs before any code that needs one of the sets

#pragma once

#include <stdint.h>

#ifdef GGML_CPU_PROBE_MAIN // a program of its own, made at configure time
#    define GGML_API         extern
#    define GGML_BACKEND_API extern
#else
#    include "ggml-backend.h"
#endif

#ifdef __cplusplus
extern "C" {
#endif

// what ggml's code asks for, and what a compiler uses of its own accord under -march=native
enum ggml_cpu_probe_set {
    GGML_CPU_PROBE_SSE42           = 1 << 0,
    GGML_CPU_PROBE_POPCNT          = 1 << 1,
    GGML_CPU_PROBE_LZCNT           = 1 << 2,
    GGML_CPU_PROBE_MOVBE           = 1 << 3,
    GGML_CPU_PROBE_BMI             = 1 << 4,
    GGML_CPU_PROBE_BMI2            = 1 << 5,
    GGML_CPU_PROBE_GFNI            = 1 << 6,
    GGML_CPU_PROBE_AVX             = 1 << 7,
    GGML_CPU_PROBE_AVX2            = 1 << 8,
    GGML_CPU_PROBE_FMA             = 1 << 9,
    GGML_CPU_PROBE_F16C            = 1 << 10,
    GGML_CPU_PROBE_AVXVNNI         = 1 << 11,
    GGML_CPU_PROBE_AVXVNNIINT8     = 1 << 12,
    GGML_CPU_PROBE_AVX512F         = 1 << 13,
    GGML_CPU_PROBE_AVX512CD        = 1 << 14,
    GGML_CPU_PROBE_AVX512BW        = 1 << 15,
    GGML_CPU_PROBE_AVX512DQ        = 1 << 16,
    GGML_CPU_PROBE_AVX512VL        = 1 << 17,
    GGML_CPU_PROBE_AVX512IFMA      = 1 << 18,
    GGML_CPU_PROBE_AVX512VBMI      = 1 << 19,
    GGML_CPU_PROBE_AVX512VBMI2     = 1 << 20,
    GGML_CPU_PROBE_AVX512VNNI      = 1 << 21,
    GGML_CPU_PROBE_AVX512BITALG    = 1 << 22,
    GGML_CPU_PROBE_AVX512VPOPCNTDQ = 1 << 23,
    GGML_CPU_PROBE_AVX512BF16      = 1 << 24,
    GGML_CPU_PROBE_AVX512FP16      = 1 << 25,
    GGML_CPU_PROBE_AMX             = 1 << 26, // tiles and their int8 products
};

#define GGML_CPU_PROBE_N_SETS 27

struct ggml_cpu_probe_result {
    uint32_t announced; // by CPUID
    uint32_t faulting;  // announced; the child that tried it died or did not end
    uint32_t usable;    // announced, works, and so does all that it requires
};

// tried once per process; EQUIP_PROBE_FAULT=avx512bf16,amx (for tests) takes these for announced, and lets their children fault
GGML_API const struct ggml_cpu_probe_result * ggml_cpu_probe(void);

// as compilers call it (-mavx512bf16); NULL behind the last bit
GGML_API const char * ggml_cpu_probe_name(int bit);

// why code that was compiled for these sets cannot run here, in one sentence, or NULL if it can
// without AMX, which nothing uses before ggml_cpu_probe_amx() was asked
GGML_API const char * ggml_cpu_probe_refusal(uint32_t built);

// 0 if AMX is announced but does not work
GGML_API int ggml_cpu_probe_amx(void);

// the sets that the CPU backend was compiled for; this function alone lies in that backend's own library
GGML_BACKEND_API uint32_t ggml_cpu_probe_built(void);

#ifdef __cplusplus
}
#endif
