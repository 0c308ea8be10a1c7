#pragma once

#include "llama-kv-ledger.h"
#include "llama-kv-sinks.h"

#include <functional>

// copies of whole rows of K and V, byte for byte

struct llama_kv_run { uint32_t src; uint32_t dst; uint32_t n; };

// neighbouring moves as one
std::vector<llama_kv_run> llama_kv_runs(const std::vector<llama_kv_ledger::move> & moves);

// quantised rows as 16-bit words: Vulkan misplaces the views of a copy between quantised types, Metal has no such copy
ggml_tensor * llama_kv_words(ggml_tensor * rows);

// the slots [slot, slot + n) of K, or of V; transposed: element j of a row is at j*n_slots + slot
// of all heads, or of one of n_head
ggml_tensor * llama_kv_rows(ggml_context * ctx, ggml_tensor * t, uint32_t slot, uint32_t n, bool transposed = false, uint32_t i_head = 0, uint32_t n_head = 1);

// sources lie above the budget and destinations below, so no order is needed; the caller has synchronised
bool llama_kv_move(llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers, uint32_t strm,
        const std::vector<llama_kv_ledger::move> & moves, bool v_trans);

// the same with moves of its own for each KV head; moves_of: by index of the layer and head
// once per chunk: through host memory, where the rows of a device are read and written as a whole
using llama_kv_moves_of = std::function<const std::vector<llama_kv_ledger::move> & (size_t i_layer, uint32_t i_head)>;

void llama_kv_move_heads(const std::vector<llama_kv_layer> & layers, uint32_t strm, const llama_kv_moves_of & moves_of, bool v_trans);
