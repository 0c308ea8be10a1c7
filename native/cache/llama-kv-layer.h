#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

// one layer of a bounded cache
struct llama_kv_layer {
    uint32_t il;
    ggml_tensor * k;                     // [n_embd_k_gqa, n_slots, n_stream]
    ggml_tensor * v;                     // nullptr if V is not stored
    std::vector<ggml_tensor *> k_stream; // [n_stream] of [n_embd_k_gqa, n_slots]
    std::vector<ggml_tensor *> v_stream;
    uint32_t n_head;
    uint32_t n_head_kv;
};

bool llama_kv_has_layer(const std::vector<llama_kv_layer> & layers, int32_t il);

// the keys of several layers as one tensor, over their own memory: [n_embd_k_gqa, n_slots, n_stream, n_layer]
struct llama_kv_keys {
    ggml_context_ptr ctx;
    ggml_tensor *    t = nullptr; // nullptr: they do not lie at equal distances, are quantised, or their backend would not see what they share
};

// idx: of layers on one device
llama_kv_keys llama_kv_keys_of(const std::vector<llama_kv_layer> & layers, const std::vector<size_t> & idx);
