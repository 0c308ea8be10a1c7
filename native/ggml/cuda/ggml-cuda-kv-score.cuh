// what ggml-cuda calls for the nodes of ggml-kv-score.h; builds for HIP and MUSA, which share its files, have no kernels for them

#pragma once

#include "ggml-kv-score.h"

struct ggml_backend_cuda_context;

#ifdef GGML_CUDA_KV_SCORE

bool ggml_cuda_kv_score_eligible(const ggml_tensor * node);

// false: it is none of ours
bool ggml_cuda_kv_score(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// nullptr: there are no kernels
static inline ggml_backend_kv_score_eligible_t ggml_backend_cuda_kv_score_eligible() { return ggml_cuda_kv_score_eligible; }

#else

static inline bool ggml_cuda_kv_score_eligible(const ggml_tensor *) { return false; }

static inline bool ggml_cuda_kv_score(ggml_backend_cuda_context &, ggml_tensor *) { return false; }

static inline ggml_backend_kv_score_eligible_t ggml_backend_cuda_kv_score_eligible() { return nullptr; }

#endif
