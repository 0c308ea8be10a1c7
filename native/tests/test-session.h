// a context of llama.h under a policy, as the tests drive it
#pragma once

#include "llama-kv-policy.h"
#include "test-check.h"
#include "test-common.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

static std::atomic<int> n_left { -1 }; // nodes until the compute is aborted, -1: never

static bool abort_now(void *) {
    return n_left >= 0 && n_left-- == 0;
}

struct session {
    llama_context * ctx;
    llama_batch     batch;
    int             n_vocab;

    // policy: nullptr leaves it to the environment
    session(llama_model * model, const char * policy, int n_ubatch = 32, int n_seq = 1, bool fa = false, bool unified = false, int n_ctx = 4096,
            ggml_type type_k = GGML_TYPE_F32, ggml_type type_v = GGML_TYPE_F32) {
        llama_kv_policy_set_next(policy);

        llama_context_params params = llama_context_default_params();
        params.n_ctx           = n_ctx;
        params.n_batch         = 512;
        params.n_ubatch        = n_ubatch;
        params.n_seq_max       = n_seq;
        // on a busy machine two threads wait for each other at every node, and take ten times as long
        const char * n_threads = getenv("EQUIP_TEST_THREADS");
        params.n_threads       = n_threads ? atoi(n_threads) : 2;
        params.n_threads_batch = params.n_threads;
        params.kv_unified      = unified;
        params.type_k          = type_k;
        params.type_v          = type_v;
        params.no_perf         = false;
        params.abort_callback  = abort_now;
        params.offload_kqv     = !getenv("EQUIP_TEST_KV_ON_HOST"); // whatever device has the layers
        params.flash_attn_type = fa ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;

        ctx     = llama_init_from_model(model, params);
        batch   = llama_batch_init(512, 0, 1);
        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

        llama_kv_policy_set_next(nullptr);
    }

    session(const session &) = delete;

    ~session() {
        llama_batch_free(batch);
        llama_free(ctx);
    }

    llama_memory_t mem() const { return llama_get_memory(ctx); }

    // token ids are a function of position and sequence, so that two sessions see the same text
    llama_token text(int pos, int seq) const { return (llama_token) ((7919ll*(pos + 1ll) + 104729ll*seq + (int64_t) pos*pos) % n_vocab); }

    int decode(int pos, int n, int seq = 0) {
        batch.n_tokens = n;
        for (int i = 0; i < n; ++i) {
            batch.token[i]     = text(pos + i, seq);
            batch.pos[i]       = pos + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = seq;
            batch.logits[i]    = i == n - 1;
        }
        return llama_decode(ctx, batch);
    }

    // the text of another sequence in sequence 0
    int decode_as(int pos, int n, int seq) {
        batch.n_tokens = n;
        for (int i = 0; i < n; ++i) {
            batch.token[i]     = text(pos + i, seq);
            batch.pos[i]       = pos + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = i == n - 1;
        }
        return llama_decode(ctx, batch);
    }

    // one token for each of n sequences, in one batch
    int decode_all(int pos, int n_seq) {
        batch.n_tokens = n_seq;
        for (int s = 0; s < n_seq; ++s) {
            batch.token[s]     = text(pos, s);
            batch.pos[s]       = pos;
            batch.n_seq_id[s]  = 1;
            batch.seq_id[s][0] = s;
            batch.logits[s]    = true;
        }
        return llama_decode(ctx, batch);
    }

    // the same token for two sequences
    int decode_same(int pos, int s0, int s1) {
        batch.n_tokens = 2;
        for (int s = 0; s < 2; ++s) {
            batch.token[s]     = text(pos, 0);
            batch.pos[s]       = pos;
            batch.n_seq_id[s]  = 1;
            batch.seq_id[s][0] = s ? s1 : s0;
            batch.logits[s]    = true;
        }
        return llama_decode(ctx, batch);
    }

    std::vector<float> logits(int i = -1) const {
        const float * data = llama_get_logits_ith(ctx, i);
        return std::vector<float>(data, data + n_vocab);
    }

    std::vector<int> kept(int seq = 0) const {
        std::vector<int> pos(8192);
        pos.resize(llama_kv_policy_get_kept(ctx, seq, pos.data(), nullptr, (int) pos.size()));
        return pos;
    }

    llama_kv_policy_stats stats(int seq = 0) const {
        llama_kv_policy_stats res = {};
        llama_kv_policy_get_stats(ctx, seq, &res);
        return res;
    }
};

// largest difference relative to the range of a
static double diff(const std::vector<float> & a, const std::vector<float> & b) {
    double max = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        max = std::max(max, std::fabs((double) a[i] - b[i]));
    }
    const auto range = std::minmax_element(a.begin(), a.end());
    return max/(*range.second - *range.first);
}
