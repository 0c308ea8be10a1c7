#include "server-refuse.h"

#include "server-common.h"

#include "log.h"
#include "mtmd.h"

#include "../cache/llama-kv-policy.h"
#include "../src/llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

static const char * why_no_start(const common_params & params, const llama_context * ctx, const mtmd_context * mctx) {
    // without a policy the server is upstream's
    const char * env = getenv("LLAMA_KV_POLICY");
    if (!env || !*env || strcmp(env, "none") == 0) {
        return nullptr;
    }

    const llama_model & model = *llama_get_model(ctx);

    if (params.embedding && llama_pooling_type(ctx) == LLAMA_POOLING_TYPE_RANK && !model.cls && !model.cls_out) {
        return "this model has no head that scores documents: use a reranker, or leave --reranking out";
    }

    if (!params.embedding && !llama_get_memory(ctx)) {
        return "this model cannot write text token after token: give --embeddings, or use another model";
    }

    // the tokens of an image share a position there, or have two
    if (mctx && mtmd_decode_use_mrope(mctx) && strcmp(llama_kv_policy_name(ctx), "none") != 0) {
        return "images of this model have rows and columns as positions, for which a bounded cache has no place: "
               "leave --mmproj out, or use --policy none";
    }

    return nullptr;
}

bool server_can_start(const common_params & params, const llama_context * ctx, const mtmd_context * mctx) {
    const char * why = why_no_start(params, ctx, mctx);
    if (why) {
        LOG_ERR("%s: %s\n", __func__, why);
    }

    return why == nullptr;
}

bool server_can_draft(
        const llama_context * ctx_tgt, common_context_seq_rm_type type_tgt,
        const llama_context * ctx_dft, common_context_seq_rm_type type_dft, int32_t n_max) {
    // the token that was drafted from is read with its draft
    const int32_t n = llama_kv_policy_n_rewind(ctx_tgt);
    if (n_max >= n) {
        LOG_WRN("%s: no speculative decoding: a draft may have %d tokens, and the cache can take back %d for certain: "
                "give recent=%d or more, or shorter drafts\n", __func__, n_max, n, n_max + 1);
        return false;
    }

    if (ctx_dft && type_dft == COMMON_CONTEXT_SEQ_RM_TYPE_NO) {
        LOG_WRN("%s: no speculative decoding: the draft model cannot write text token after token: use another one\n", __func__);
        return false;
    }

    // the server brings it back by a checkpoint only where the target needs one too
    if (ctx_dft && type_dft == COMMON_CONTEXT_SEQ_RM_TYPE_FULL && type_tgt != COMMON_CONTEXT_SEQ_RM_TYPE_FULL) {
        LOG_WRN("%s: no speculative decoding: the draft model has a recurrent state, which cannot take tokens back: "
                "use a draft model without one\n", __func__);
        return false;
    }

    return true;
}

std::string server_why_not_read(const server_tokens & prompt, const llama_context * ctx, const mtmd_context * mctx) {
    const size_t n_batch  = llama_n_batch (ctx);
    const size_t n_ubatch = llama_n_ubatch(ctx);

    for (size_t i = 0; i < prompt.size();) {
        if (prompt[i] != LLAMA_TOKEN_NULL) {
            i++;
            continue;
        }

        const mtmd_input_chunk * chunk = prompt.find_chunk(i).get();

        const size_t n = mtmd_input_chunk_get_n_tokens(chunk);

        // llama_decode() asserts it of what it is given at once
        if (mtmd_decode_use_non_causal(mctx, chunk) && std::min(n, n_batch) > n_ubatch) {
            return string_format("an image of %zu tokens has to be read in one chunk, and a chunk has %zu: "
                                 "send a smaller one, or start the server with -ub %zu -b %zu", n, n_ubatch, n, std::max(n, n_batch));
        }

        i += std::max<size_t>(1, n);
    }

    return "";
}

bool server_lora_changes(const std::vector<common_adapter_lora_info> & now, const std::vector<common_adapter_lora_info> & next) {
    return !now.empty() && !are_lora_equal(now, next) && lora_should_clear_cache(now, next);
}
