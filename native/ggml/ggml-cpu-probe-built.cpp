// compiled with the flags of the CPU backend that it belongs to, unlike ggml-cpu-probe.cpp

#include "ggml-cpu-probe.h"

uint32_t ggml_cpu_probe_built(void) {
    return 0
#ifdef __SSE4_2__
        | GGML_CPU_PROBE_SSE42
#endif
#ifdef __POPCNT__
        | GGML_CPU_PROBE_POPCNT
#endif
#ifdef __LZCNT__
        | GGML_CPU_PROBE_LZCNT
#endif
#ifdef __MOVBE__
        | GGML_CPU_PROBE_MOVBE
#endif
#ifdef __BMI__
        | GGML_CPU_PROBE_BMI
#endif
#ifdef __BMI2__
        | GGML_CPU_PROBE_BMI2
#endif
#ifdef __GFNI__
        | GGML_CPU_PROBE_GFNI
#endif
#ifdef __AVX__
        | GGML_CPU_PROBE_AVX
#endif
#ifdef __AVX2__
        | GGML_CPU_PROBE_AVX2
#endif
#ifdef __FMA__
        | GGML_CPU_PROBE_FMA
#endif
#ifdef __F16C__
        | GGML_CPU_PROBE_F16C
#endif
#ifdef __AVXVNNI__
        | GGML_CPU_PROBE_AVXVNNI
#endif
#ifdef __AVXVNNIINT8__
        | GGML_CPU_PROBE_AVXVNNIINT8
#endif
#ifdef __AVX512F__
        | GGML_CPU_PROBE_AVX512F
#endif
#ifdef __AVX512CD__
        | GGML_CPU_PROBE_AVX512CD
#endif
#ifdef __AVX512BW__
        | GGML_CPU_PROBE_AVX512BW
#endif
#ifdef __AVX512DQ__
        | GGML_CPU_PROBE_AVX512DQ
#endif
#ifdef __AVX512VL__
        | GGML_CPU_PROBE_AVX512VL
#endif
#ifdef __AVX512IFMA__
        | GGML_CPU_PROBE_AVX512IFMA
#endif
#ifdef __AVX512VBMI__
        | GGML_CPU_PROBE_AVX512VBMI
#endif
#ifdef __AVX512VBMI2__
        | GGML_CPU_PROBE_AVX512VBMI2
#endif
#ifdef __AVX512VNNI__
        | GGML_CPU_PROBE_AVX512VNNI
#endif
#ifdef __AVX512BITALG__
        | GGML_CPU_PROBE_AVX512BITALG
#endif
#ifdef __AVX512VPOPCNTDQ__
        | GGML_CPU_PROBE_AVX512VPOPCNTDQ
#endif
#ifdef __AVX512BF16__
        | GGML_CPU_PROBE_AVX512BF16
#endif
#ifdef __AVX512FP16__
        | GGML_CPU_PROBE_AVX512FP16
#endif
#ifdef __AMX_INT8__
        | GGML_CPU_PROBE_AMX
#endif
        ;
}
