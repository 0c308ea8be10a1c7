#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// from now on a forked process can compute as its parent did, with several threads. Once per process
void ggml_cpu_prepare_forks(void);

#ifdef __cplusplus
}
#endif
