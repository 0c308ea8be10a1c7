// decode speed of many sequences: in a pool, in streams of their own, and in llama.cpp's unified cache without a policy
//
//   bench-pool MODEL [key=value ...]
//     lanes=8 depth=256     sequences, and tokens of each
//     budget=4096 pool=4096 of the bounded ones; streams=N: budget of a stream (default: depth)
//     policy=streaming n=16 r=11 n_ubatch=512 threads=N fa=1 type_k=f16 type_v=f16
//
// A sample is n steps, each one token of every sequence in one batch. The variants take turns, sample by sample; the ratios are those of
// samples of the same turn: their median and range. Without a policy the tokens of a sample are dropped again, outside the timing.

#include "llama-kv-policy.h"
#include "test-common.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>

struct variant {
    std::string     name;
    llama_context * ctx  = nullptr;
    int             n_past = 0;

    std::vector<double> us; // per token

    ~variant() { llama_free(ctx); }

    void step(llama_batch & batch, int n_seq, int n, int n_vocab) {
        batch.n_tokens = 0;
        for (int s = 0; s < n_seq; ++s) {
            for (int i = 0; i < n; ++i) {
                const int j = batch.n_tokens++;
                batch.token[j]     = (llama_token) ((7919ll*(n_past + i + 1) + 104729ll*s) % n_vocab);
                batch.pos[j]       = n_past + i;
                batch.n_seq_id[j]  = 1;
                batch.seq_id[j][0] = s;
                batch.logits[j]    = i == n - 1;
            }
        }
        if (llama_decode(ctx, batch) != 0) {
            die(name + ": decode failed");
        }
        llama_synchronize(ctx);
        n_past += n;
    }
};

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size()/2];
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        die("usage: bench-pool MODEL [key=value ...]");
    }
    const test_options o(argc, argv, 2);

    const int n_seq = o.num("lanes", 8), depth = o.num("depth", 256), n = o.num("n", 16), r = o.num("r", 11);
    const int n_pool = o.num("pool", 4096), budget = o.num("budget", 4096), n_stream = o.num("streams", depth);

    llama_model * model = load_model(argv[1]);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    std::vector<std::unique_ptr<variant>> all;

    const auto add = [&](const char * name, const std::string & policy, bool unified, int n_ctx) {
        llama_kv_policy_set_next(policy.c_str());

        llama_context_params p = llama_context_default_params();
        p.n_ctx           = n_ctx;
        p.n_batch         = 2048;
        p.n_ubatch        = o.num("n_ubatch", 512);
        p.n_seq_max       = n_seq;
        p.kv_unified      = unified;
        p.n_threads       = o.num("threads", (int) std::thread::hardware_concurrency());
        p.n_threads_batch = p.n_threads;
        p.type_k          = type_from_name(o.str("type_k", "f16"));
        p.type_v          = type_from_name(o.str("type_v", "f16"));
        p.flash_attn_type = o.num("fa", 1) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;

        auto v = std::make_unique<variant>();
        v->name = name;
        v->ctx  = llama_init_from_model(model, p);
        if (!v->ctx) {
            die(v->name + ": no context: " + (llama_kv_policy_error() ? llama_kv_policy_error() : "?"));
        }
        llama_kv_policy_set_next(nullptr);
        all.push_back(std::move(v));
    };

    const std::string policy = o.str("policy", "streaming");
    const std::string more   = policy + (policy.find(':') == std::string::npos ? ":" : ",");

    add("pool",    more + "budget=" + std::to_string(budget) + ",pool=" + std::to_string(n_pool), true, 1 << 20);
    add("streams", more + "budget=" + std::to_string(n_stream), false, (1 << 20)/n_seq*n_seq);
    add("none",    "none", true, (depth + n + 64)*n_seq);

    llama_batch batch = llama_batch_init(2048, 0, 1);

    for (auto & v : all) {
        while (v->n_past < depth) {
            v->step(batch, n_seq, std::min(depth - v->n_past, 2048/n_seq), n_vocab);
        }
    }

    for (int i = -1; i < r; ++i) {
        for (auto & v : all) {
            const auto t0 = std::chrono::steady_clock::now();
            for (int j = 0; j < n; ++j) {
                v->step(batch, n_seq, 1, n_vocab);
            }
            const double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - t0).count()/n/n_seq;
            if (i >= 0) {
                v->us.push_back(us);
            }
            if (v->name == "none") {
                for (int s = 0; s < n_seq; ++s) {
                    llama_memory_seq_rm(llama_get_memory(v->ctx), s, depth, -1);
                }
                v->n_past = depth;
            }
        }
    }

    for (const auto & v : all) {
        std::vector<double> ratio;
        for (int i = 0; i < r; ++i) {
            ratio.push_back(all[0]->us[i]/v->us[i]);
        }
        llama_kv_policy_stats st = {};
        llama_kv_policy_get_stats(v->ctx, 0, &st);
        printf("{\"variant\": \"%s\", \"tokens_per_second\": %.1f, \"speed_of_pool\": %.3f, \"from\": %.3f, \"to\": %.3f, \"n_kept\": %d, \"graphs_reused\": %d}\n",
                v->name.c_str(), 1e6/median(v->us), 1.0/median(ratio), 1.0/ *std::max_element(ratio.begin(), ratio.end()),
                1.0/ *std::min_element(ratio.begin(), ratio.end()), st.n_used, llama_perf_context(v->ctx).n_reused);
    }

    llama_batch_free(batch);
    all.clear();
    llama_model_free(model);

    return 0;
}
