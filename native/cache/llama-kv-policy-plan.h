#pragma once

#include "llama-kv-policy-spec.h"

#include "llama.h"

// a policy's text against a model and a context: every default, size and refusal comes from here

struct llama_cparams;
struct llama_model;

// what of a context decides about its cache
struct llama_kv_policy_shape {
    int64_t  n_ctx     = 0; // most tokens of a sequence; 0: no limit
    uint32_t n_ubatch  = 0; // 0: the default that follows from the budget
    uint32_t n_batch   = 0; // 0: any
    uint32_t n_seq_max = 1;
    bool     unified   = false;
    bool     offload   = true; // the cache lies where its layers do
    ggml_type type_k = GGML_TYPE_F16;
    ggml_type type_v = GGML_TYPE_F16;

    const llama_cparams * cparams = nullptr; // of a context that is being made: with it, more is known of update=shift

    llama_kv_policy_shape() = default;
    explicit llama_kv_policy_shape(const llama_context_params & params);
};

struct llama_kv_policy_plan {
    llama_kv_policy_spec spec; // nothing is left open

    uint32_t n_ubatch = 0;
    int64_t  n_slots  = 0; // per stream, chunk headroom included: of a sequence, or of the pool
    int64_t  kv_bytes = 0; // of all sequences, sliding-window layers included

    std::vector<std::string> notes; // what was changed of what was asked for

    uint32_t budget()   const { return (uint32_t) spec.budget; }
    uint32_t n_tokens() const { return budget() + n_ubatch; }
};

// spec: as parsed; without a policy the budget stands for the context. Throws llama_kv_policy_refusal
llama_kv_policy_plan llama_kv_policy_make_plan(const llama_model & model, const llama_kv_policy_shape & shape, const llama_kv_policy_spec & spec);

// the property that rules out positions by rank, as far as it shows before a graph is built; empty if there is none
std::string llama_kv_policy_why_no_ranks(const llama_model & model);

// one sentence: what keeps the policy from choosing by its formula with this model; empty if nothing does
std::string llama_kv_policy_why_no_formula(const llama_kv_policy_spec & spec, const llama_model & model);
