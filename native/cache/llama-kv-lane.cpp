// what llama-server asks of its lanes; declared in llama-ext.h

#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-ext.h"
#include "llama-model.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <string>

static const llama_kv_policy * policy_of(const llama_context * ctx) {
    return ctx ? llama_kv_policy_of(ctx->get_memory()) : nullptr;
}

// ranks stay below the budget, however long the text is
static bool is_endless(const llama_context * ctx) {
    const auto * policy = policy_of(ctx);

    return policy && strcmp(policy->positions_name(), "true") != 0;
}

int32_t llama_n_ctx_lane(const llama_context * ctx, const llama_context * ctx_dft, int32_t n) {
    if (!policy_of(ctx)) {
        return n;
    }

    // callers add batches and drafts to it
    int64_t res = is_endless(ctx) ? INT32_MAX - (1 << 20) : n;

    // the cache of a draft model is not bounded, and the server ends where it is full: where all lanes share it, each has its part
    if (ctx_dft) {
        const auto & cparams = ctx_dft->get_cparams();

        res = std::min<int64_t>(res, cparams.n_ctx_seq/(cparams.kv_unified ? cparams.n_seq_max : 1));
    }

    return (int32_t) res;
}

const char * llama_n_ctx_lane_why(const llama_context * ctx, const llama_context * ctx_dft) {
    static thread_local std::string res;

    res.clear();
    if (is_endless(ctx)) {
        res = ctx_dft ? "; the context of a draft model is not bounded" : "";
    } else if (policy_of(ctx)) {
        const char * why = llama_kv_policy_no_ranks(&ctx->get_model());

        res = why ? "; this model has " + std::string(why) + ", so a text ends at the trained context"
                  : "; positions=true ends at the trained context: use positions=cache or positions=auto";
    }

    return res.c_str();
}

int32_t llama_n_predict_lane(const llama_context * ctx, int32_t n) {
    // a model that repeats itself would go on for ever
    return n == -1 && is_endless(ctx) ? (int32_t) ctx->get_model().hparams.n_ctx_train : n;
}

llama_kept llama_get_kept(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * policy = policy_of(ctx);

    if (!policy) {
        const auto n_ctx = ctx->n_ctx_seq();
        const auto * mem = ctx->get_memory();

        return { "none", n_ctx, mem ? mem->seq_pos_max(seq_id) + 1 : 0, 0, -1 };
    }

    if (!policy->has_seq(seq_id)) {
        return { policy->get_spec().desc->name, 0, 0, 0, -1 };
    }

    // what a chunk still owes counts as evicted; it is not carried out here, so that asking changes nothing
    const int64_t n_kept = std::min(policy->n_used(seq_id), policy->n_budget(seq_id));

    return { policy->get_spec().desc->name, policy->n_budget(seq_id), n_kept, policy->n_evicted(seq_id) + policy->n_used(seq_id) - n_kept,
        policy->is_pool() ? policy->n_evicted_pool(seq_id) : -1 };
}
