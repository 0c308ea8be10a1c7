#pragma once

#include <cstdint>
#include <string>
#include <vector>

// the text form of a policy and the registry of those that exist

enum llama_kv_positions {
    LLAMA_KV_POSITIONS_DEFAULT, // the policy's own rule, where the model allows it
    LLAMA_KV_POSITIONS_TRUE,    // every token keeps its position
    LLAMA_KV_POSITIONS_CACHE,   // a token's position is its rank among the kept tokens
};

struct llama_kv_policy_desc {
    const char * name;

    std::vector<const char *> scopes;    // the first one is the default
    std::vector<const char *> positions; // the first one is the default
    std::vector<const char *> updates;   // the first one is the default

    bool takes_recent; // false: the recent window is implied by the budget
};

const std::vector<llama_kv_policy_desc> & llama_kv_policy_registry();

struct llama_kv_policy_spec {
    const llama_kv_policy_desc * desc = nullptr; // nullptr: policy "none"

    int64_t budget = -1; // tokens per sequence; 0 = trained context, -1 = min(trained context, 4096)
    int64_t sinks  =  4;

    llama_kv_positions positions = LLAMA_KV_POSITIONS_DEFAULT;
};

// "NAME[:key=value,...]"; throws std::invalid_argument with one sentence
llama_kv_policy_spec llama_kv_policy_parse(const std::string & text);
