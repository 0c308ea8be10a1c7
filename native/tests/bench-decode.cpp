// decode speed of a bounded cache against a plain one of the same size, on whatever device the layers are
//
//   bench-decode MODEL [key=value ...]
//     budgets=1024,4096     tokens in the cache after a step
//     lanes="none@32768;streaming:positions=true;h2o:positions=true;host h2o:positions=true"
//                           what is compared with `none`: policies, to which the budget is added; `none` at another depth; with `host`
//                           the host chooses the victims where devices would, with `composed` devices do without kernels of ours
//     n=16 r=21 warmup=8    tokens per sample, samples per lane, tokens before the first sample
//     n_ubatch=512 threads=N fa=auto|0|1 type_k=f16 type_v=f16
//
// Lane `none` is plain decode at a fixed depth: one token, then the token is dropped again, outside the timing; so its n_kv
// is that of a cache bounded to the budget. The lanes take turns, sample by sample, and the ratios are those of samples of
// the same turn: their median, and the 95% interval of a percentile bootstrap of the median. A step ends when its logits
// have arrived. One JSON object per lane on stdout; host_us (step less graph compute) is meant for the CPU, where compute
// returns when it is done.
//
// uses llama.h and llama-kv-policy.h only

#include "llama-kv-policy.h"
#include "test-common.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <sstream>
#include <thread>

static std::vector<std::string> split(const std::string & s, char by) {
    std::vector<std::string> res;
    std::stringstream in(s);
    for (std::string word; std::getline(in, word, by); ) {
        res.push_back(word);
    }
    return res;
}

static double median(std::vector<double> v) {
    const size_t n = v.size();
    std::sort(v.begin(), v.end());
    return n % 2 ? v[n/2] : 0.5*(v[n/2 - 1] + v[n/2]);
}

struct interval { double lo, hi; };

static interval bootstrap(const std::vector<double> & v) {
    const int n_draws = 2000;

    uint32_t state = 12345;
    std::vector<double> medians;
    for (int i = 0; i < n_draws; ++i) {
        std::vector<double> draw;
        for (size_t j = 0; j < v.size(); ++j) {
            state = state*1664525u + 1013904223u;
            draw.push_back(v[(state >> 8) % v.size()]);
        }
        medians.push_back(median(draw));
    }
    std::sort(medians.begin(), medians.end());
    return { medians[n_draws*25/1000], medians[n_draws*975/1000] };
}

struct lane {
    std::string     name;
    std::string     policy;        // as it was resolved, or "none"
    llama_context * ctx    = nullptr;
    llama_pos       n_past = 0;
    int             n_kv   = 0;
    uint32_t        state  = 7;

    std::vector<double> us;        // per token, one per sample
    std::vector<double> host_us;
    std::vector<double> policy_us;

    int n_reused = 0;
    int n_steps  = 0;

    ~lane() { llama_free(ctx); }

    bool rewinds() const { return policy == "none"; }

    int n_vocab() const { return llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))); }

    llama_token next() {
        state = state*1664525u + 1013904223u;
        return (llama_token) ((state >> 8) % n_vocab());
    }

    int64_t policy_time() const {
        llama_kv_policy_stats stats = {};
        return llama_kv_policy_get_stats(ctx, 0, &stats) ? stats.t_host_us : 0;
    }

    void fill(int n, int n_chunk) {
        while (n_past < n) {
            std::vector<llama_token> tokens;
            for (int i = 0; i < std::min(n_chunk, n - n_past); ++i) {
                tokens.push_back(next());
            }
            decode(ctx, tokens.data(), (int) tokens.size(), n_past, false);
            n_past += (int) tokens.size();
        }
        llama_synchronize(ctx);
    }

    // nanoseconds
    int64_t step() {
        const llama_token token = next();

        const auto t0 = std::chrono::steady_clock::now();
        decode(ctx, &token, 1, n_past, false);
        const float * logits = llama_get_logits_ith(ctx, -1);
        const auto t1 = std::chrono::steady_clock::now();

        if (!logits || logits[0] != logits[0]) {
            die("no logits, or not a number");
        }

        n_past++;
        if (rewinds()) {
            n_past--;
            n_kv = (n_past + 256)/256*256;
            if (!llama_memory_seq_rm(llama_get_memory(ctx), 0, n_past, -1)) {
                die("llama_memory_seq_rm failed");
            }
        }
        return std::chrono::duration_cast<std::chrono::nanoseconds>(t1 - t0).count();
    }

    // as upstream pads it; asking takes over what a device has chosen, so it is not asked at each step
    int bounded_n_kv() const {
        const int n_kept = llama_kv_policy_get_kept(ctx, 0, nullptr, nullptr, 0);
        std::vector<int32_t> slots(n_kept);
        llama_kv_policy_get_kept(ctx, 0, nullptr, slots.data(), n_kept);
        return (*std::max_element(slots.begin(), slots.end()) + 256)/256*256;
    }

    void sample(int n) {
        const int     reused = llama_perf_context(ctx).n_reused;
        const int64_t graph  = llama_kv_policy_graph_us(ctx);
        const int64_t policy = policy_time();

        int64_t ns = 0;
        for (int i = 0; i < n; ++i) {
            ns += step();
        }
        us       .push_back(1e-3*ns/n);
        host_us  .push_back((1e-3*ns - (llama_kv_policy_graph_us(ctx) - graph))/n);
        policy_us.push_back((double) (policy_time() - policy)/n);

        n_reused += llama_perf_context(ctx).n_reused - reused;
        n_steps  += n;
    }
};

int main(int argc, char ** argv) {
    if (argc < 2) {
        die("usage: bench-decode MODEL [key=value ...]");
    }
    const test_options opt(argc, argv, 2);

    llama_model * model = load_model(argv[1]);

    std::string devices;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        devices += (devices.empty() ? "" : "|") + std::string(ggml_backend_dev_name(ggml_backend_dev_get(i)));
    }

    const int n_ubatch = opt.num("n_ubatch", 512);
    const int n        = opt.num("n", 16);
    const int n_rounds = opt.num("r", 21);
    const int threads  = opt.num("threads", std::max(1, (int) std::thread::hardware_concurrency()/2));

    const std::string fa = opt.str("fa", "auto");

    for (const auto & budget_text : split(opt.str("budgets", "1024,4096"), ',')) {
        const int budget = atoi(budget_text.c_str());

        std::vector<std::string> names = split(opt.str("lanes", "streaming:positions=true;streaming:positions=cache"), ';');
        names.insert(names.begin(), "none");

        std::vector<std::unique_ptr<lane>> lanes;
        for (const auto & name : names) {
            auto l = std::make_unique<lane>();
            l->name = name;

            const bool is_host     = name.rfind("host ", 0) == 0;
            const bool is_composed = name.rfind("composed ", 0) == 0;

            const std::string text = name.substr(is_host || is_composed ? name.find(' ') + 1 : 0);
            const bool is_none = text.rfind("none", 0) == 0;
            const int  n_depth = is_none && text.size() > 5 ? atoi(text.c_str() + 5) : budget;

            const auto at = std::min(text.find(':'), text.size());
            l->policy = is_none ? "none" : text.substr(0, at) + ":budget=" + budget_text + (at < text.size() ? "," + text.substr(at + 1) : "");

            llama_context_params params = llama_context_default_params();
            params.n_ctx           = n_depth + n_ubatch;
            params.n_batch         = n_ubatch;
            params.n_ubatch        = n_ubatch;
            params.n_threads       = threads;
            params.n_threads_batch = threads;
            params.no_perf         = false;
            params.type_k          = type_from_name(opt.str("type_k", "f16"));
            params.type_v          = type_from_name(opt.str("type_v", "f16"));
            params.flash_attn_type = fa == "auto" ? LLAMA_FLASH_ATTN_TYPE_AUTO : fa == "0" ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_ENABLED;

            if (is_host) {
                setenv("LLAMA_KV_CHOICE", "host", 1);
            }
            if (is_composed) {
                setenv("LLAMA_KV_SCORES", "graph", 1);
            }
            llama_kv_policy_set_next(l->policy.c_str());
            l->ctx = llama_init_from_model(model, params);
            unsetenv("LLAMA_KV_CHOICE");
            unsetenv("LLAMA_KV_SCORES");
            if (!l->ctx) {
                die(l->policy + ": " + (llama_kv_policy_error() ? llama_kv_policy_error() : "cannot create a context"));
            }

            l->fill(n_depth - 1, n_ubatch);
            for (int i = 0; i < opt.num("warmup", 8); ++i) {
                l->step();
            }
            l->n_kv = l->rewinds() ? l->n_kv : l->bounded_n_kv();
            lanes.push_back(std::move(l));
        }

        for (const auto & l : lanes) {
            if (l->n_kv != lanes[0]->n_kv && !l->rewinds()) {
                die("n_kv differs: " + std::to_string(l->n_kv) + " and " + std::to_string(lanes[0]->n_kv));
            }
        }

        for (int i = 0; i < n_rounds; ++i) {
            for (auto & l : lanes) {
                l->sample(n);
            }
        }

        for (const auto & l : lanes) {
            printf("{\"lane\": \"%s\", \"policy\": \"%s\", \"budget\": %d, \"n_kv\": %d, \"devices\": \"%s\", \"threads\": %d, "
                   "\"flash_attn\": %s, \"type_k\": \"%s\", \"type_v\": \"%s\", \"us_per_token\": %.2f, \"host_us\": %.2f, \"policy_us\": %.2f, "
                   "\"graphs_reused\": %d, \"steps\": %d",
                   l->name.c_str(), l->policy.c_str(), budget, l->n_kv, devices.c_str(), threads,
                   llama_kv_policy_flash_attn(l->ctx) ? "true" : "false", opt.str("type_k", "f16").c_str(), opt.str("type_v", "f16").c_str(),
                   median(l->us), median(l->host_us), median(l->policy_us), l->n_reused, l->n_steps);
            if (l != lanes[0]) {
                std::vector<double> ratios;
                for (size_t i = 0; i < l->us.size(); ++i) {
                    ratios.push_back(l->us[i]/lanes[0]->us[i]);
                }
                const interval ci = bootstrap(ratios);
                printf(", \"ratio_vs\": {\"baseline\": \"none\", \"time_ratio_median\": %.4f, \"ci95\": [%.4f, %.4f], \"n_pairs\": %zu}",
                       median(ratios), ci.lo, ci.hi, ratios.size());
            }
            printf("}\n");
            fflush(stdout);
        }
    }

    llama_model_free(model);
    return 0;
}
