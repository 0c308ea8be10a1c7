#pragma once

#include "ggml-backend.h"
#include "ggml-kv-score.h"

#include <vector>

// the nodes of ggml-kv-score.h, and their code for the CPU

// this backend runs them: it says so, or host memory and LLAMA_KV_SCORES=node do
bool llama_kv_has_score_node(ggml_backend_buffer_type_t buft);

struct llama_kv_score_weights {
    std::vector<ggml_tensor *> q;     // per layer, neighbours in the sums
    std::vector<ggml_tensor *> sinks; // or empty
    ggml_tensor * const * keys;       // [n_layer]; stays where it is as long as the graph
    ggml_tensor * mask;
    ggml_tensor * sums;
    float   scale;
    float   soft_cap;
    int32_t stream; // the first one
};

ggml_tensor * llama_kv_score_weights_node(ggml_context * ctx, const llama_kv_score_weights & what);

struct llama_kv_score_choice {
    ggml_tensor * planes;
    ggml_tensor * now;
    ggml_tensor * history;
    ggml_tensor * rows; // or nullptr
    int32_t birth;      // the kind that births are
    bool    negative;   // the largest product of the kinds before them goes first
};

ggml_tensor * llama_kv_score_choice_node(ggml_context * ctx, ggml_tensor * victims, const llama_kv_score_choice & what, int32_t n_per, int32_t stream,
        int32_t n_stream, int32_t clock);

// a kernel covers the node
bool llama_kv_score_covers(ggml_backend_buffer_type_t buft, const ggml_tensor * node);
