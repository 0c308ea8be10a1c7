#pragma once

#include "llama-kv-victim.h"

#include <cstdint>
#include <string>
#include <vector>

// the text form of a policy and the registry of those that exist

enum llama_kv_positions {
    LLAMA_KV_POSITIONS_DEFAULT, // the policy's own rule, where the model allows it
    LLAMA_KV_POSITIONS_TRUE,    // every token keeps its position
    LLAMA_KV_POSITIONS_CACHE,   // a token's position is its rank among the kept tokens
    LLAMA_KV_POSITIONS_AUTO,    // true, until a kept token would be further away than the trained context; cache from there on
};

enum llama_kv_update {
    LLAMA_KV_UPDATE_INPLACE, // the new token is written over the victim
    LLAMA_KV_UPDATE_GATHER,  // evict, copy the kept rows together, rotate all keys afresh
    LLAMA_KV_UPDATE_SHIFT,   // a cache of this size without a policy: the caller evicts with seq_rm and seq_add
};

struct llama_kv_policy_desc {
    const char * name;

    std::vector<const char *> scopes;    // the first one is the default
    std::vector<const char *> positions; // the first one is the default
    std::vector<const char *> updates;   // the first one is the default

    bool takes_recent; // false: the recent window is implied by the budget

    std::unique_ptr<llama_kv_victim> (*victim)(); // nullptr: the oldest token that is not protected
};

const std::vector<llama_kv_policy_desc> & llama_kv_policy_registry();

struct llama_kv_policy_spec {
    const llama_kv_policy_desc * desc = nullptr; // nullptr: policy "none"

    int64_t budget = -1; // tokens per sequence; 0 = trained context, -1 = min(trained context, 4096)
    int64_t sinks  =  4;
    int64_t recent = -1; // -1 = max(16, budget/4)

    int64_t rotate_every = -1; // evictions; -1 = default_rotate_every()

    // newest tokens that are never evicted; where the budget implies them, the one that was just written
    uint32_t n_recent(uint32_t budget) const;

    // the largest number of evictions whose debts change the logits less than rotating at each step does, by the roundings of the
    //   stored keys; measured, see docs/positions.md
    uint32_t default_rotate_every(bool quantized) const { return quantized && desc->victim ? 32 : 8; }

    llama_kv_positions positions = LLAMA_KV_POSITIONS_DEFAULT;
    llama_kv_update    update    = LLAMA_KV_UPDATE_INPLACE;
};

// "NAME[:key=value,...]"; throws std::invalid_argument with one sentence
llama_kv_policy_spec llama_kv_policy_parse(const std::string & text);
