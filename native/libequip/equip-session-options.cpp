#include "equip-internal.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

static const int64_t MAX_TOKENS = 1 << 30; // slot arithmetic is done in 32 bits

static int64_t pad256(int64_t n) {
    return (n + 255) / 256 * 256;
}

static ggml_type parse_type(equip_options & opts, const char * key) {
    static const ggml_type types[] = {
        GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL,
    };

    const std::string word = opts.get_word(key, "f16");
    std::string known;
    for (const ggml_type type : types) {
        if (word == ggml_type_name(type)) {
            return type;
        }
        known += (known.empty() ? "" : ", ") + std::string(ggml_type_name(type));
    }
    equip_fail(EQUIP_ERR_USAGE, "the cache type '%s' is unknown: use one of %s", word.c_str(), known.c_str());
}

static llama_flash_attn_type parse_flash_attn(equip_options & opts) {
    const std::string word = opts.get_word("flash_attn", "auto");
    if (word != "auto" && word != "on" && word != "off") {
        equip_fail(EQUIP_ERR_USAGE, "the option flash_attn is '%s', but it must be auto, on or off", word.c_str());
    }
    return word == "auto" ? LLAMA_FLASH_ATTN_TYPE_AUTO : word == "on" ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
}

// upstream checks the block size with flash attention only, and asserts otherwise
static void check_types(const equip_model_state & m, const llama_context_params & cparams) {
    if (ggml_is_quantized(cparams.type_v) && cparams.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        equip_fail(EQUIP_ERR_USAGE, "a V cache of type %s needs flash attention: drop -fa off, or use -ctv f16", ggml_type_name(cparams.type_v));
    }

    for (const auto & layer : m.layers) {
        if (layer.n_head_kv <= 0) {
            continue;
        }
        const struct { const char * name; ggml_type type; int64_t n; } rows[] = {
            { "K", cparams.type_k, layer.n_embd_k / layer.n_head_kv },
            { "V", cparams.type_v, layer.n_embd_v / layer.n_head_kv },
        };
        for (const auto & row : rows) {
            if (row.n % ggml_blck_size(row.type) != 0) {
                equip_fail(EQUIP_ERR_UNSUPPORTED, "a %s cache of type %s stores blocks of %lld values, which does not fit this model's head_dim of %lld: use f16",
                        row.name, ggml_type_name(row.type), (long long) ggml_blck_size(row.type), (long long) row.n);
            }
        }
    }
}

// upstream's shift of quantised keys undoes a Hadamard rotation, also where there was none: with heads of other widths
static void check_shift(const equip_model_state & m, ggml_type type_k) {
    const char * off   = getenv("LLAMA_ATTN_ROT_DISABLE");
    int64_t      first = 0;
    for (const auto & layer : m.layers) {
        const int64_t n = layer.n_head_kv > 0 ? layer.n_embd_k / layer.n_head_kv : 0;
        first = first == 0 ? n : first;
        if (n > 0 && ggml_is_quantized(type_k) && (n % 64 != 0 || n != first || (off && atoi(off) != 0))) {
            equip_fail(EQUIP_ERR_UNSUPPORTED, "llama.cpp cannot shift a K cache of type %s with this model's head_dim of %lld: use -ctk f16",
                    ggml_type_name(type_k), (long long) n);
        }
    }
}

// "NAME:key=value,..." of the environment, when the caller leaves the policy open
static std::string policy_from_environment(bool is_explicit) {
    const char * env = getenv("LLAMA_KV_POLICY");
    if (!env || !*env) {
        return "";
    }
    if (is_explicit) {
        static std::atomic<bool> told { false };
        if (!told.exchange(true)) {
            fprintf(stderr, "LLAMA_KV_POLICY=%s is ignored: the options of this program win\n", env);
        }
        return "";
    }
    if (const char * sentence = llama_kv_policy_check(env)) {
        equip_fail(EQUIP_ERR_USAGE, "LLAMA_KV_POLICY: %s", sentence);
    }
    return env;
}

static void check_budget(const equip_model_state & m, const equip_session_params & p, bool takes_recent) {
    if (p.budget < 0) {
        equip_fail(EQUIP_ERR_BUDGET, "the budget is %lld, but it must be a number of tokens, or 0 for the trained context (%d)",
                (long long) p.budget, llama_model_n_ctx_train(m.model));
    }
    if (p.budget > MAX_TOKENS) {
        equip_fail(EQUIP_ERR_BUDGET, "the budget of %lld tokens is too large: use at most %lld, or 0 for the trained context (%d)",
                (long long) p.budget, (long long) MAX_TOKENS, llama_model_n_ctx_train(m.model));
    }
    if (p.sinks < 0 || p.sinks > MAX_TOKENS || p.recent < 0 || p.recent > MAX_TOKENS) {
        equip_fail(EQUIP_ERR_USAGE, "sinks and recent are numbers of tokens, not %lld", (long long) (p.sinks < 0 || p.sinks > MAX_TOKENS ? p.sinks : p.recent));
    }

    // one recent token at least, and the one that is being written
    const int64_t needed = p.sinks + (takes_recent ? p.recent : 1) + 1;
    if (p.budget < needed) {
        equip_fail(EQUIP_ERR_BUDGET, "the budget of %lld tokens cannot hold %lld sinks, %lld recent tokens and the new one: use --budget %lld or more",
                (long long) p.budget, (long long) p.sinks, (long long) (takes_recent ? p.recent : 1), (long long) needed);
    }
}

// the policy part: the options of the call, or the environment's text
static void parse_policy(const equip_model_state & m, equip_options & opts, equip_session_params & p) {
    const bool        is_explicit = opts.has("policy");
    const std::string env         = policy_from_environment(is_explicit);
    const size_t      colon       = env.find(':');

    equip_options   env_opts(env.empty() || colon == std::string::npos ? "" : env.c_str() + colon + 1);
    equip_options & from = env.empty() ? opts : env_opts;

    p.policy = env.empty() ? opts.get_word("policy", "none") : env.substr(0, colon);

    const bool        has_budget = from.has("budget");
    const bool        has_recent = from.has("recent");
    const std::string positions  = from.get_word("positions", "");
    p.scope  = from.get_word ("scope",  "");
    p.update = from.get_word ("update", "");
    p.budget = from.get_count("budget", 0);
    p.sinks  = from.get_count("sinks",  4);
    p.recent = from.get_count("recent", 0);

    // a number of threads that was asked for stays; what the environment says of it comes first
    const bool        adapts = opts.get_bool("adapt_threads", opts.get_int("n_threads", 0, 0, GGML_MAX_N_THREADS) == 0);
    const std::string threads = equip_format("adapt_threads=%d", adapts ? 1 : 0);

    // as the policy reads them
    std::string numbers;
    for (const char * key : { "rotate_every", "score_queries", "evict_every", "page_size", "cpu_attn" }) {
        const std::string value = from.get_word(key, "");
        numbers += value.empty() ? "" : std::string(",") + key + "=" + value;
    }

    if (p.policy == "none") {
        // the other settings describe a policy; without one there is nothing for them to change
        const std::string cpu_attn = from.get_word("cpu_attn", "");
        p.spec = "none:" + threads + (cpu_attn.empty() ? "" : ",cpu_attn=" + cpu_attn);
        if (const char * sentence = llama_kv_policy_check(p.spec.c_str())) {
            equip_fail(EQUIP_ERR_USAGE, "%s", sentence);
        }
        return;
    }

    bool takes_recent = false;
    for (const auto & desc : equip_policy_registry()) {
        for (const auto & param : desc.params) {
            // what another policy takes is handed on too, and refused by name
            const std::string value = from.get_word(param.name, "");
            const std::string item  = std::string(",") + param.name + "=" + value;
            if (!value.empty() && (numbers + ",").find(item + ",") == std::string::npos) {
                numbers += item;
            }
            if (desc.name == p.policy && !value.empty() && strtod(value.c_str(), nullptr) != param.def) {
                p.params.emplace_back(param.name, strtod(value.c_str(), nullptr));
            }
        }
        if (desc.name == p.policy) {
            takes_recent = desc.takes_recent;
            p.scope  = p.scope.empty()  && !desc.scopes.empty()  ? desc.scopes.front()  : p.scope;
            p.update = p.update.empty() && !desc.updates.empty() ? desc.updates.front() : p.update;
        }
    }

    // names and words before numbers: an unknown policy is the first thing to be told about
    p.spec = p.policy + ":scope=" + (p.scope.empty() ? "token" : p.scope) + ",update=" + (p.update.empty() ? "inplace" : p.update) +
             (positions.empty() ? "" : ",positions=" + positions) + numbers + "," + threads;
    if (const char * sentence = llama_kv_policy_check(p.spec.c_str())) {
        equip_fail(EQUIP_ERR_USAGE, "%s", sentence);
    }
    if (has_recent && !takes_recent) {
        equip_fail(EQUIP_ERR_USAGE, "--recent has no place with the policy %s: everything that is neither sink nor pinned is recent, up to the budget", p.policy.c_str());
    }

    const int64_t n_train = llama_model_n_ctx_train(m.model);
    if (!has_budget) {
        p.budget = std::min<int64_t>(n_train, 4096);
    } else if (p.budget == 0) {
        p.budget = n_train;
    }
    if (takes_recent && !has_recent) {
        p.recent = std::max<int64_t>(16, p.budget / 4);
    }
    check_budget(m, p, takes_recent);

    if (!env.empty()) {
        // may hold more than this library reads
        p.spec = env + (env_opts.has("adapt_threads") ? "" : (colon == std::string::npos ? ":" : ",") + threads);
        return;
    }
    p.spec += equip_format(",budget=%lld,sinks=%lld", (long long) p.budget, (long long) p.sinks);
    if (takes_recent) {
        p.spec += equip_format(",recent=%lld", (long long) p.recent);
    }
}

equip_session_params equip_parse_session(const equip_model_state & m, const char * options) {
    equip_session_params p;
    equip_options        opts(options);

    p.cparams = llama_context_default_params();
    auto & c = p.cparams;

    parse_policy(m, opts, p);

    const int64_t n_train    = llama_model_n_ctx_train(m.model);
    const bool    is_bounded = p.policy != "none";

    int64_t n_ctx = opts.get_int("n_ctx", 0, 0, MAX_TOKENS);
    if (is_bounded) {
        // not what the cache holds, but what upstream chooses its RoPE factors by where positions are true ones (LongRoPE)
        // (and the sliding-window cache must hold a window and a chunk)
        const int64_t n_swa = llama_kv_policy_n_swa(m.model);
        n_ctx = std::max({ n_ctx > 0 ? n_ctx : n_train, pad256(p.budget), n_swa > 0 ? pad256(n_swa + 512) : 0 });
    } else if (n_ctx == 0) {
        n_ctx = n_train;
    }
    if (n_ctx == 0) {
        equip_fail(EQUIP_ERR_USAGE, "the model does not say how long a context it was trained on: give -c");
    }

    const int64_t n_batch  = opts.get_int("n_batch",  0, 0, 1 << 20);
    const int64_t n_ubatch = opts.get_int("n_ubatch", 0, 0, 1 << 16);

    c.n_ctx    = (uint32_t) n_ctx;
    c.n_ubatch = (uint32_t) (n_ubatch ? n_ubatch : is_bounded ? std::min<int64_t>(512, std::max<int64_t>(64, p.budget / 4)) : 512);
    c.n_batch  = (uint32_t) (n_batch ? n_batch : std::max<uint32_t>(2048, c.n_ubatch));
    c.n_ubatch = std::min({ c.n_ubatch, c.n_batch, c.n_ctx }); // as upstream does

    c.n_seq_max     = 1;
    c.kv_unified    = true;
    // the output buffers need not hold a whole chunk
    c.n_outputs_max = (uint32_t) std::min<int64_t>(opts.get_int("n_outputs", 1, 1, 1 << 16), c.n_ubatch);
    c.swa_full      = false;
    c.no_perf       = false; // counts the reused graphs
    c.offload_kqv   = p.offload_kv = opts.get_bool("offload_kv", true);
    p.context_shift = opts.get_bool("context_shift", false);
    p.rope_upstream = opts.get_bool("rope_upstream", false);
    if (p.context_shift && (is_bounded || p.sinks < 0 || p.sinks > n_ctx - 2)) {
        equip_fail(EQUIP_ERR_USAGE, "a context shift is for the policy none, and keeps less than n_ctx - 1 sinks");
    }

    const int64_t n_threads = opts.get_int("n_threads",       0, 0, GGML_MAX_N_THREADS);
    const int64_t n_tbatch  = opts.get_int("n_threads_batch", 0, 0, GGML_MAX_N_THREADS);
    c.n_threads       = (int32_t) (n_threads ? n_threads : equip_default_threads());
    c.n_threads_batch = (int32_t) (n_tbatch  ? n_tbatch  : c.n_threads);

    c.flash_attn_type = parse_flash_attn(opts);
    c.type_k          = parse_type(opts, "type_k");
    c.type_v          = parse_type(opts, "type_v");

    // on a CPU f32 rows are read faster without flash attention, by up to half (docs/attention.md), and no prompt casts them to f16
    if (c.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO && c.type_k == GGML_TYPE_F32 && c.type_v == GGML_TYPE_F32 && m.n_gpu_layers == 0 && !opts.has("cpu_attn")) {
        c.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }

    for (const char * key : { "policy", "budget", "sinks", "recent", "scope", "positions", "rotate_every", "update", "score_queries", "evict_every", "page_size", "cpu_attn" }) {
        opts.get_word(key, ""); // where the environment was read instead
    }
    opts.finish();

    check_types(m, c);
    if (p.context_shift) {
        check_shift(m, c.type_k);
    }

    p.n_slots     = pad256(is_bounded ? p.budget + c.n_ubatch : n_ctx);
    p.n_swa_slots = std::min(pad256(n_ctx), pad256(llama_kv_policy_n_swa(m.model) + c.n_ubatch));

    return p;
}
