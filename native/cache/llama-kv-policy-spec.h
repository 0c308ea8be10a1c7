#pragma once

#include "llama-kv-formula.h"
#include "llama-kv-victim.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

// why a policy cannot be had: one sentence, which names settings, and an enum llama_kv_policy_status
struct llama_kv_policy_refusal : std::runtime_error {
    llama_kv_policy_refusal(int status, const std::string & sentence) : std::runtime_error(sentence), status(status) {}

    int status;
};

// the text form of a policy and the registry of those that exist

enum llama_kv_positions_kind {
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

    std::unique_ptr<llama_kv_victim> (*victim)() = nullptr; // scope token, without scores; nullptr: the oldest token that is not protected
    std::unique_ptr<llama_kv_formula>   (*formula)()   = nullptr; // by scores; beside `victim`: at the other scopes

    uint32_t evict_every = 1;     // victims per choice
    bool     eager       = false; // all victims of a choice go at once
    int64_t  recent      = -1;    // newest tokens that are never evicted, by default; -1 = max(16, budget/4)

    bool reads_weights() const { return formula && formula()->needs().weights; }

    // tokens of a page, by default; 0: tokens go, not pages
    uint32_t page_size() const { return formula ? formula()->needs().page_size : 0; }
};

const std::vector<llama_kv_policy_desc> & llama_kv_policy_registry();

struct llama_kv_policy_spec {
    static constexpr int64_t MAX_TOKENS = 1 << 30; // slot arithmetic is done in 32 bits

    // off the CPU a tile of queries costs several operations
    static constexpr int64_t SCORE_QUERIES_DEVICE = 64;

    static constexpr int64_t DEFAULT_BUDGET = 4096; // most tokens where none are asked for

    static constexpr int64_t DEFAULT_WARMUP = 64;

    static constexpr int64_t POOL_AUTO = 0; // a pool where there can be one, as large as llama_kv_policy_plan finds right

    const llama_kv_policy_desc * desc = nullptr; // nullptr: policy "none"

    int64_t budget = -1; // tokens per sequence; 0 = trained context, -1 = llama_kv_policy_plan's default
    int64_t sinks  =  4;
    int64_t recent = -1; // -1 = the policy's default

    int64_t pool   = -1; // tokens that all sequences of a unified cache may keep together; -1 = each has a stream of its own

    int64_t rotate_every = -1; // evictions; -1 = default_rotate_every()

    std::string scope; // empty: the policy's default

    int64_t score_queries = -1; // the last queries of a ubatch that count; 0 = all, -1 = all on the CPU, 64 elsewhere
    int64_t evict_every   = -1; // victims per choice; -1 = the policy's default

    double  filter        = -1.0; // share of the tokens that later layers leave out (llama-kv-filter.h); 0 = none, -1 = not given
    int64_t filter_layers = -1;   // the last ones of the cache; -1 = half of them
    int64_t filter_warmup = -1;   // single tokens before the first that is left out; -1 = DEFAULT_WARMUP

    std::vector<std::pair<std::string, double>> params; // numbers of the formula that were given

    // the policy's formula with these numbers; has_formula() or not
    std::unique_ptr<llama_kv_formula> make_formula() const;

    int64_t cpu_attn = -1; // our own CPU kernel for single tokens; -1 = with every policy but `none`

    int64_t adapt_threads = -1; // fewer threads where other programs are busy; -1 = with every policy but `none`

    const char * positions_name() const;

    std::string get_scope() const { return scope.empty() ? desc->scopes[0] : scope; }

    // victims are chosen by a llama_kv_formula
    bool has_formula() const { return desc->formula && !(desc->victim && get_scope() == "token"); }

    // keys are rotated, in batches of rotate_every evictions
    bool rotates_by_debt() const { return positions != LLAMA_KV_POSITIONS_TRUE && update != LLAMA_KV_UPDATE_SHIFT; }

    // tokens that go at once where pages do, else 1
    int64_t get_page_size() const { return desc->formula ? std::max<int64_t>(1, make_formula()->needs().page_size) : 1; }

    // one sentence: why these settings have no pool, or empty
    std::string why_no_pool() const;

    // one sentence: why a token cannot be left out of some layers beside these settings, or empty
    std::string why_no_filter() const;

    // victims come from the middle
    bool is_interior() const { return desc->victim || desc->formula; }

    // newest tokens that are never evicted; where the budget implies them, the one that was just written
    uint32_t n_recent(uint32_t budget) const;

    // the largest number of evictions whose debts change the logits less than rotating at each step does, by the roundings of the
    //   stored keys; measured, see docs/positions.md
    uint32_t default_rotate_every(bool quantized) const { return quantized && is_interior() ? 32 : 8; }

    llama_kv_positions_kind positions = LLAMA_KV_POSITIONS_DEFAULT;
    llama_kv_update         update    = LLAMA_KV_UPDATE_INPLACE;
};

// "NAME[:key=value,...]"; throws llama_kv_policy_refusal
llama_kv_policy_spec llama_kv_policy_parse(const std::string & text);

// throws llama_kv_policy_refusal if so many tokens cannot hold what must be kept, or are not whole pages; lowered: why there are so few
void llama_kv_policy_check_budget(const llama_kv_policy_spec & spec, int64_t budget, const std::string & lowered = "");

// the same text again, with every setting that the policy takes and every parameter of its formula; those that change nothing but
//   the speed (cpu_attn, adapt_threads) only where they were given
std::string llama_kv_policy_text(const llama_kv_policy_spec & spec);
