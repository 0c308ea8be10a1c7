#include "equip-internal.h"

#include <algorithm>
#include <cctype>
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
        equip_fail(EQUIP_ERR_USAGE, "a V cache of type %s needs flash attention: use flash_attn=on, or type_v=f16", ggml_type_name(cparams.type_v));
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
                equip_fail(EQUIP_ERR_UNSUPPORTED, "a %s cache of type %s stores blocks of %lld values, which does not fit this model's head_dim of %lld: use type_%c=f16",
                        row.name, ggml_type_name(row.type), (long long) ggml_blck_size(row.type), (long long) row.n, tolower(row.name[0]));
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
            equip_fail(EQUIP_ERR_UNSUPPORTED, "llama.cpp cannot shift a K cache of type %s with this model's head_dim of %lld: use type_k=f16",
                    ggml_type_name(type_k), (long long) n);
        }
    }
}

// the text that the caller gives, else the environment's, else "none"
static std::string policy_text(const char * policy) {
    const char * env = getenv("LLAMA_KV_POLICY");
    if (!env || !*env) {
        return policy ? policy : "none";
    }
    if (policy) {
        static std::atomic<bool> told { false };
        if (!told.exchange(true)) {
            fprintf(stderr, "LLAMA_KV_POLICY=%s is ignored: the options of this program win\n", env);
        }
        return policy;
    }
    return env;
}

int equip_status_of(llama_kv_policy_status status) {
    switch (status) {
        case LLAMA_KV_POLICY_OK:          return EQUIP_OK;
        case LLAMA_KV_POLICY_USAGE:       return EQUIP_ERR_USAGE;
        case LLAMA_KV_POLICY_BUDGET:      return EQUIP_ERR_BUDGET;
        case LLAMA_KV_POLICY_UNSUPPORTED: return EQUIP_ERR_UNSUPPORTED;
        case LLAMA_KV_POLICY_MEMORY:      return EQUIP_ERR_MEMORY;
    }
    return EQUIP_ERR_UNSUPPORTED;
}

// the policy part; c: what of the context decides about it
static void resolve_policy(const equip_model_state & m, equip_options & opts, const char * policy, llama_context_params & c, equip_session_params & p) {
    std::string text = policy_text(policy);

    // what the text says itself comes first; a number of threads that was asked for stays
    const auto add = [&](const char * key, bool value) {
        if (text.find(std::string(key) + "=") == std::string::npos) {
            text += (text.find(':') == std::string::npos ? ":" : ",") + std::string(key) + "=" + (value ? "1" : "0");
        }
    };
    const bool adapts   = opts.get_bool("adapt_threads", opts.get_int("n_threads", 0, 0, GGML_MAX_N_THREADS) == 0);
    const bool cpu_attn = opts.get_bool("cpu_attn", true);
    add("adapt_threads", adapts);
    if (opts.has("cpu_attn")) {
        add("cpu_attn", cpu_attn);
    }

    const char * env    = getenv("LLAMA_KV_POLICY");
    const bool   is_env = !policy && env && *env;

    llama_kv_policy_resolved res = {};
    if (const auto status = llama_kv_policy_resolve(m.model, &c, text.c_str(), &res); status != LLAMA_KV_POLICY_OK) {
        equip_fail(equip_status_of(status), "%s%s", is_env ? "LLAMA_KV_POLICY: " : "", llama_kv_policy_error());
    }

    p.policy   = res.name;
    p.spec     = res.text;
    p.budget   = res.budget;
    p.n_slots  = res.n_slots;
    c.n_ubatch = res.n_ubatch;

    const size_t  colon = p.spec.find(':');
    equip_options all(colon == std::string::npos ? "" : p.spec.c_str() + colon + 1);
    p.scope  = all.get_word ("scope",  "");
    p.update = all.get_word ("update", "");
    p.pool   = all.get_count("pool",   0);
    p.sinks  = all.get_count("sinks",  0);
    p.recent = all.get_count("recent", 0);

    // numbers of the text that are not the formula's
    for (const char * key : { "filter", "filter_layers", "filter_warmup" }) {
        if (all.has(key)) {
            p.params.emplace_back(key, all.get_float(key, 0.0, 0.0, MAX_TOKENS));
        }
    }
    for (const auto & desc : equip_policy_registry()) {
        for (const auto & param : desc.params) {
            const double value = all.get_float(param.name, param.def, param.min, param.max);
            if (desc.name == p.policy && value != param.def) {
                p.params.emplace_back(param.name, value);
            }
        }
    }
}

equip_session_params equip_parse_session(const equip_model_state & m, const char * policy, const char * options, bool is_pool) {
    equip_session_params p;
    equip_options        opts(options);

    p.cparams = llama_context_default_params();
    auto & c = p.cparams;

    const int64_t n_train    = llama_model_n_ctx_train(m.model);
    const bool    is_bounded = policy_text(policy).rfind("none", 0) != 0;

    const int64_t n_ctx_given = opts.get_int("n_ctx", 0, 0, MAX_TOKENS);

    c.n_batch         = (uint32_t) opts.get_int("n_batch",  0, 0, 1 << 20);
    c.n_ubatch        = (uint32_t) opts.get_int("n_ubatch", 0, 0, 1 << 16);
    c.n_ctx           = is_bounded || !opts.has("n_ctx") ? 0 : (uint32_t) (n_ctx_given > 0 ? n_ctx_given : n_train);
    // a pool of sessions shares one cache, or each of its sessions has a stream of its own
    p.n_sessions      = is_pool ? (int32_t) opts.get_int("n_sessions", 4, 1, llama_max_parallel_sequences()) : 1;
    c.n_seq_max       = (uint32_t) p.n_sessions;
    c.kv_unified      = !is_pool || (is_bounded ? policy_text(policy).find("pool=") != std::string::npos : opts.get_bool("unified", true));
    c.offload_kqv     = p.offload_kv = opts.get_bool("offload_kv", true);
    c.flash_attn_type = parse_flash_attn(opts);
    c.type_k          = parse_type(opts, "type_k");
    c.type_v          = parse_type(opts, "type_v");

    resolve_policy(m, opts, policy, c, p);

    int64_t n_ctx = p.budget;
    if (!is_bounded) {
        n_ctx = (c.kv_unified ? n_ctx : pad256(n_ctx))*p.n_sessions; // room for as many of each
    }
    if (is_bounded) {
        // not what the cache holds, but what upstream chooses its RoPE factors by where positions are true ones (LongRoPE)
        // (and the sliding-window cache must hold a window and a chunk)
        const int64_t n_swa = llama_kv_policy_n_swa(m.model);
        n_ctx = std::max({ n_ctx_given > 0 ? n_ctx_given : n_train, pad256(p.budget), n_swa > 0 ? pad256(n_swa + 512) : 0 });
        n_ctx = c.kv_unified ? n_ctx : pad256(n_ctx)*p.n_sessions;
    }
    if (n_ctx > MAX_TOKENS) {
        equip_fail(EQUIP_ERR_USAGE, "%d sessions of %lld tokens each are too many", p.n_sessions, (long long) (n_ctx/p.n_sessions));
    }

    c.n_ctx    = (uint32_t) n_ctx;
    // the logits of a call come from one chunk
    const int64_t n_outputs = opts.get_int("n_outputs", 1, 1, 1 << 16);
    if (!opts.has("n_ubatch")) {
        c.n_ubatch = std::max<uint32_t>(c.n_ubatch, n_outputs);
    }

    c.n_batch  = c.n_batch > 0 ? c.n_batch : std::max<uint32_t>(2048, c.n_ubatch);
    c.n_ubatch = std::min({ c.n_ubatch, c.n_batch, c.n_ctx }); // as upstream does

    // the output buffers need not hold a whole chunk
    c.n_outputs_max = (uint32_t) std::max<int64_t>(p.n_sessions, std::min<int64_t>(n_outputs, c.n_ubatch));
    c.swa_full      = false;
    c.no_perf       = false; // counts the reused graphs
    p.context_shift = opts.get_bool("context_shift", false);
    p.rope_upstream = opts.get_bool("rope_upstream", false);

    if (is_pool && (p.context_shift || p.update == "shift")) {
        equip_fail(EQUIP_ERR_USAGE, "a context shift, and update=shift, are baselines for a single session: make one without a pool");
    }
    const int64_t n_keep = opts.get_int("n_keep", 4, 0, MAX_TOKENS);
    if (p.context_shift && (is_bounded || n_keep > n_ctx - 2)) {
        equip_fail(EQUIP_ERR_USAGE, "a context shift is for the policy none, and keeps less than n_ctx - 1 tokens at the beginning, not %lld", (long long) n_keep);
    }
    p.sinks = p.context_shift ? n_keep : p.sinks;

    const int64_t n_threads = opts.get_int("n_threads",       0, 0, GGML_MAX_N_THREADS);
    const int64_t n_tbatch  = opts.get_int("n_threads_batch", 0, 0, GGML_MAX_N_THREADS);
    c.n_threads       = (int32_t) (n_threads ? n_threads : equip_default_threads());
    c.n_threads_batch = (int32_t) (n_tbatch  ? n_tbatch  : c.n_threads);

    // on a CPU f32 rows are read faster without flash attention, by up to half (docs/attention.md), and no prompt casts them to f16
    if (c.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO && c.type_k == GGML_TYPE_F32 && c.type_v == GGML_TYPE_F32 && m.n_gpu_layers == 0 && !opts.has("cpu_attn")) {
        c.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }

    opts.finish();

    check_types(m, c);
    if (p.context_shift) {
        check_shift(m, c.type_k);
    }

    const int64_t n_stream = c.kv_unified ? 1 : p.n_sessions;

    p.n_slots     = is_pool && is_bounded ? p.n_slots*n_stream : pad256(is_bounded ? p.budget + c.n_ubatch : n_ctx);
    p.n_swa_slots = std::min(pad256(n_ctx), pad256(llama_kv_policy_n_swa(m.model) + c.n_ubatch)*n_stream);

    return p;
}
