#pragma once

#include "llama-kv-frame.h"
#include "llama-kv-sinks.h"

// rotate stored keys by their debts, on the device of each layer: rows with a debt are gathered, rotated and put back, once
// sorted by debt, so that rows with the same one share their trigonometry where the kernel knows how
// false if the compute failed: the cache is then inconsistent
bool llama_kv_rotate(llama_kv_rope & rope, llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers, uint32_t strm,
        const std::vector<llama_kv_frame::rotation> & rotations);

// the same with rotations of its own for each KV head: [n_layer], the slot of a rotation being slot*n_head_kv + head
bool llama_kv_rotate_heads(llama_kv_rope & rope, llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers, uint32_t strm,
        const std::vector<std::vector<llama_kv_rotation>> & rotations);
