// a batch of several ubatches must equal one call per ubatch: same kept tokens in the same slots, same logits
//
//   batch-equiv MODEL SPEC [key=value ...]
//     SPEC           as in LLAMA_KV_POLICY
//     n_batch        tokens per llama_decode in the first context; the second gets n_ubatch tokens per call
//     rounds=N       batches; each is followed by three single tokens
//     n_ctx, n_ubatch, threads, fa, type_k, type_v
//
// uses llama.h and llama-kv-policy.h only; prints one line per round and returns 1 at the first difference

#include "llama-kv-policy.h"
#include "test-common.h"

#include <algorithm>
#include <cmath>

static std::vector<std::pair<llama_pos, int32_t>> get_kept(const llama_context * ctx) {
    const int32_t n = llama_kv_policy_get_kept(ctx, 0, nullptr, nullptr, 0);
    std::vector<llama_pos> pos(n);
    std::vector<int32_t>   slot(n);
    llama_kv_policy_get_kept(ctx, 0, pos.data(), slot.data(), n);
    std::vector<std::pair<llama_pos, int32_t>> res;
    for (int32_t i = 0; i < n; ++i) {
        res.emplace_back(pos[i], slot[i]);
    }
    return res;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        die("usage: batch-equiv MODEL SPEC [key=value ...]");
    }
    const test_options opt(argc, argv, 3);

    llama_model * model    = load_model(argv[1]);
    const int     n_vocab  = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const int     n_ubatch = opt.num("n_ubatch", 64);
    const int     n_batch  = opt.num("n_batch", 4*n_ubatch);

    llama_context * ctx[2];
    for (auto & c : ctx) {
        llama_kv_policy_set_next(argv[2]);
        c = make_context(model, opt);
        if (strcmp(llama_kv_policy_name(c), "none") == 0) {
            die("the policy is not active");
        }
    }

    uint32_t state  = 7;
    int      n_past = 0;

    const auto next_tokens = [&](int n) {
        std::vector<llama_token> res;
        for (int i = 0; i < n; ++i) {
            state = state*1664525u + 1013904223u;
            res.push_back((llama_token) ((state >> 8) % n_vocab));
        }
        return res;
    };

    const auto compare = [&](int round, const char * what) {
        if (get_kept(ctx[0]) != get_kept(ctx[1])) {
            die("round " + std::to_string(round) + ", " + what + ": the kept sets or slots differ");
        }
        const float * a = llama_get_logits_ith(ctx[0], -1);
        const float * b = llama_get_logits_ith(ctx[1], -1);
        float diff = 0.0f;
        for (int i = 0; i < n_vocab; ++i) {
            diff = std::max(diff, std::isfinite(a[i]) ? std::fabs(a[i] - b[i]) : INFINITY);
        }
        const float range = *std::max_element(b, b + n_vocab) - *std::min_element(b, b + n_vocab);
        printf("round %d, %s: kept %zu, difference %.2e of the logit range\n", round, what, get_kept(ctx[0]).size(), diff/range);
        if (!(diff <= 1e-6f*range)) {
            die("the logits differ");
        }
    };

    for (int round = 0; round < opt.num("rounds", 5); ++round) {
        const std::vector<llama_token> tokens = next_tokens(n_batch);

        decode(ctx[0], tokens.data(), n_batch, n_past, false);
        for (int i = 0; i < n_batch; i += n_ubatch) {
            const int n = std::min(n_ubatch, n_batch - i);
            decode(ctx[1], tokens.data() + i, n, n_past + i, false);
        }
        n_past += n_batch;
        compare(round, "after the batch");

        const std::vector<llama_token> single = next_tokens(3);
        for (const llama_token t : single) {
            decode(ctx[0], &t, 1, n_past, false);
            decode(ctx[1], &t, 1, n_past, false);
            n_past++;
        }
        compare(round, "after three single tokens");
    }

    for (auto & c : ctx) {
        llama_free(c);
    }
    llama_model_free(model);
    return 0;
}
