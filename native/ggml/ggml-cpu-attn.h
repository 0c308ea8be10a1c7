// attention of a few query tokens over a long KV cache, on the CPU: a faster GGML_OP_FLASH_ATTN_EXT that can also write out
// the attention weights that each key has received
//
// inert unless a node asks for it (ggml_cpu_attn_enable); whatever it does not cover is left to upstream's code

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// where the wishes of a node lie: behind what upstream uses
enum {
    GGML_CPU_ATTN_PARAM_MODE  = 12, // op_params, i32: ggml_cpu_attn_mode
    GGML_CPU_ATTN_PARAM_FIRST = 13, // op_params, i32: first query token whose weights count
    GGML_CPU_ATTN_PARAM_DECAY = 14, // op_params, f32: weights of the t-th last token are multiplied with decay^t
    GGML_CPU_ATTN_PARAM_SPAN  = 15, // op_params, i32: query tokens of a sequence, whose first and last ones these are; 0: all

    GGML_CPU_ATTN_SRC_SCORES  = 8,  // src: written, not read
    GGML_CPU_ATTN_SRC_GATE    = 9,  // src: f32 [1]
};

enum ggml_cpu_attn_mode {
    GGML_CPU_ATTN_OFF  = 0, // upstream's kernel
    GGML_CPU_ATTN_ON   = 1, // ours, for up to 8 query tokens
    GGML_CPU_ATTN_MANY = 2, // for up to 16: of several sequences in one cache, each of which reads keys of its own
};

// for whoever builds the graph; touches the tensor only, so that no symbol of the CPU backend is needed
static inline void ggml_cpu_attn_enable(struct ggml_tensor * node, enum ggml_cpu_attn_mode mode) {
    node->op_params[GGML_CPU_ATTN_PARAM_MODE] = mode;
}

// scores: f32 [>= n_kv, n_head_kv, n_seq], rows contiguous, in host memory. For each KV head and key: the softmax weight, summed
// over the query tokens from `first` on and over the query heads of the group. Elements [0, n_kv) of each row are overwritten.
// span: where several sequences share the keys, each has so many query tokens, one behind the other, and `first` and the decay are those
// of each
// the tensor is a source of the node, but holds the sums only after it: a reader must have the node among its own sources
static inline void ggml_cpu_attn_set_scores(struct ggml_tensor * node, struct ggml_tensor * scores, int32_t first, float decay, int32_t span) {
    union { float f; int32_t i; } u;
    u.f = decay;

    if (node->op_params[GGML_CPU_ATTN_PARAM_MODE] == GGML_CPU_ATTN_OFF) {
        ggml_cpu_attn_enable(node, GGML_CPU_ATTN_ON);
    }

    node->op_params[GGML_CPU_ATTN_PARAM_FIRST] = first;
    node->op_params[GGML_CPU_ATTN_PARAM_DECAY] = u.i;
    node->op_params[GGML_CPU_ATTN_PARAM_SPAN]  = span;
    node->src[GGML_CPU_ATTN_SRC_SCORES] = scores;
}

// gate: f32 [1], computed before the node. Where it is 0, nothing is attended to: the result is zero, and the scores are left as they are
static inline void ggml_cpu_attn_set_gate(struct ggml_tensor * node, struct ggml_tensor * gate) {
    node->src[GGML_CPU_ATTN_SRC_GATE] = gate;
}

// the node is ours: a matter of its shapes, types and parameters, so that the answer holds for every call of a graph
bool ggml_cpu_attn_eligible(const struct ggml_tensor * node);

// bytes of the work buffer; 0: not ours
size_t ggml_cpu_attn_work_size(const struct ggml_tensor * node, int n_threads);

// false: nothing was done, upstream's code goes on; the same answer in all threads
bool ggml_cpu_attn_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
