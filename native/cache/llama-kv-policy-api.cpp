#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <typeinfo>

//
// llama_kv_policy_scope
//

namespace {

// the policy that the next context of this thread asks for
struct choice_t {
    bool        is_set = false;
    std::string spec;
};

thread_local choice_t    choice;
thread_local std::string last_error;
thread_local std::string last_check;
thread_local bool        has_error = false;

// the policy of the context under construction
struct active_t {
    bool                 is_set = false;
    llama_kv_policy_spec spec;
    uint32_t             budget   = 0;
    uint32_t             n_ubatch = 0;
};

thread_local active_t active;

[[noreturn]] void fail(const std::string & sentence, bool from_env) {
    last_error = sentence;
    has_error  = true;

    // a program that was never written for a policy may have silenced the log
    if (from_env) {
        fprintf(stderr, "LLAMA_KV_POLICY: %s\n", sentence.c_str());
    }

    throw std::runtime_error(sentence);
}

// the property that rules out positions by rank, as far as it shows before a graph is built; empty if there is none
std::string why_no_ranks(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (hparams.use_alibi) {
        return "ALiBi distances in place of rotary positions";
    }
    if (model.pos_embd) {
        return "learned positions";
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return "no rotary positions";
    }
    if (hparams.n_pos_per_embd() > 1) {
        return "M-RoPE positions (several per token)";
    }
    if (llm_arch_is_hybrid(model.arch)) {
        return "recurrent layers beside attention";
    }
    if (hparams.is_mla() && hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        return "latent attention beside sliding windows";
    }
    if (model.arch == LLM_ARCH_HUNYUAN_DENSE || model.arch == LLM_ARCH_HUNYUAN_MOE || model.arch == LLM_ARCH_MAINCODER) {
        return "keys that are normalised after their rotation";
    }
    return "";
}

// one sentence: what keeps the policy from choosing by its rule with this model and budget (-1: any); empty if nothing does
std::string why_no_rule(const llama_kv_policy_spec & spec, const llama_model & model, int64_t budget) {
    if (!spec.has_rule()) {
        return "";
    }

    const auto & hparams = model.hparams;
    const auto   needs   = spec.make_rule()->needs();

    const std::string name  = spec.desc->name;
    const std::string scope = spec.get_scope();

    if ((llm_arch_is_hybrid(model.arch) || llm_arch_is_recurrent(model.arch)) && (needs.weights || scope != "token")) {
        return "this model has layers without softmax attention, which the policy " + name + " with scope=" + scope + " chooses by: use streaming, or random with scope=token.";
    }
    if (hparams.use_alibi && scope != "token") {
        return "this model has ALiBi distances in place of rotary positions, and they are the same for all heads: use scope=token, or the policy random or streaming.";
    }
    if (hparams.is_mla() && (scope != "token" || needs.v_l1 || needs.v_l2 || needs.v_rows)) {
        return "this model has latent attention, one row for keys and values of all heads: use a policy that reads attention weights only, with scope=token.";
    }

    if (hparams.is_n_embd_v_gqa_variable() && (scope != "token" || needs.v_rows)) {
        return "this model has values of another size in some layers, which are stored with padding: use scope=token, or the policy random or streaming.";
    }

    if (spec.desc->pages && budget >= 0) {
        const int64_t page = spec.page_size > 0 ? spec.page_size : spec.desc->evict_every;
        const int64_t need = spec.sinks + spec.n_recent((uint32_t) budget) + 2*page - 1;

        if (budget % page != 0) {
            return "the budget of " + std::to_string(budget) + " tokens is not a multiple of the page size of " + std::to_string(page) + ": use " +
                std::to_string(budget/page*page) + " or " + std::to_string((budget/page + 1)*page) + ".";
        }
        if (budget < need) {
            return "the budget of " + std::to_string(budget) + " tokens is too small for pages of " + std::to_string(page) + ": a whole page beside sinks and recent tokens is certain from " +
                std::to_string((need + page - 1)/page*page) + " on.";
        }
    }

    return "";
}

// the property that makes upstream's K-shift wrong, or crash
std::string why_no_shift(const llama_model & model, const llama_cparams & cparams, ggml_type type_k) {
    const auto & hparams = model.hparams;

    switch (model.arch) {
        case LLM_ARCH_SMOLLM3:
        case LLM_ARCH_MAPLE:
        case LLM_ARCH_MUSE_GLIMMER:
        case LLM_ARCH_COHERE2:
        case LLM_ARCH_COHERE2MOE:
        case LLM_ARCH_EXAONE_MOE:
        case LLM_ARCH_SMALLTHINKER:
        case LLM_ARCH_LLAMA4:
        case LLM_ARCH_AFMOE:
            return "layers without rotary positions, which llama.cpp's K-shift rotates all the same";
        default:
            break;
    }

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il) || !hparams.has_rope(il)) {
            continue;
        }

        const float scale = model.get_rope_freq_scale(cparams, il);
        const float mag   = cparams.yarn_attn_factor*(cparams.yarn_ext_factor != 0.0f ? 1.0f + 0.1f*logf(1.0f/scale) : 1.0f);

        if (fabsf(mag - 1.0f) > 1e-4f) {
            return "a RoPE magnitude factor of " + std::to_string(mag) + ", which llama.cpp's K-shift multiplies every key by, each time";
        }
        if (!ggml_is_quantized(type_k)) {
            continue;
        }
        if (hparams.n_embd_head_k(il) % 64 != 0) {
            return "a head_dim of " + std::to_string(hparams.n_embd_head_k(il)) + ", for which llama.cpp's K-shift of a quantised cache crashes (no multiple of 64)";
        }
        if (hparams.n_rot(il) != hparams.n_embd_head_k(il) || hparams.is_mla()) {
            return "partial rotary keys, which llama.cpp's K-shift of a quantised cache is not made for";
        }
    }
    return "";
}

}

// one sentence: why a context that the environment would bound is left alone, as nobody generates a long text with it; or empty
static std::string why_left_alone(const llama_model & model, const llama_cparams & cparams) {
    if (cparams.embeddings || cparams.pooling_type != LLAMA_POOLING_TYPE_NONE) {
        return "this context is made for embeddings";
    }
    if (!cparams.causal_attn) {
        return "this context's attention is not causal";
    }
    return llama_model_has_encoder(&model) ? "this model has an encoder" : "";
}

llama_kv_policy_scope::llama_kv_policy_scope(const llama_model & model, const llama_cparams & cparams, llama_memory_params & params,
        const llama_context * ctx_other) {
    const char * env = getenv("LLAMA_KV_POLICY");

    const bool from_env = !choice.is_set;

    active    = {};
    has_error = false;

    const std::string text = !from_env ? choice.spec : env && *env ? env : "none";

    try {
        active.spec = llama_kv_policy_parse(text);
    } catch (const std::exception & err) {
        fail(err.what(), from_env);
    }

    auto & spec = active.spec;

    // draft and other helper contexts are not what the user asked to bound
    if (!spec.desc || cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || ctx_other) {
        return;
    }
    if (from_env) {
        const std::string why = why_left_alone(model, cparams);
        if (!why.empty()) {
            LLAMA_LOG_WARN("%s: %s: LLAMA_KV_POLICY leaves it alone\n", __func__, why.c_str());
            return;
        }
    }

    const auto & hparams = model.hparams;

    if (cparams.kv_unified && cparams.n_seq_max > 1) {
        fail("a bounded cache holds one sequence per stream, but " + std::to_string(cparams.n_seq_max) +
             " sequences share one: start with -np 1, or with -np N --no-kv-unified.", from_env);
    }

    const std::string why = why_no_ranks(model);

    if (spec.positions == LLAMA_KV_POSITIONS_DEFAULT) {
        const bool ranks = strcmp(spec.desc->positions[0], "cache") == 0;

        spec.positions = !why.empty() ? LLAMA_KV_POSITIONS_TRUE : ranks ? LLAMA_KV_POSITIONS_CACHE : LLAMA_KV_POSITIONS_AUTO;
    } else if (spec.positions == LLAMA_KV_POSITIONS_AUTO && !why.empty()) {
        LLAMA_LOG_WARN("%s: this model has %s: positions=auto stays with true\n", __func__, why.c_str());
        spec.positions = LLAMA_KV_POSITIONS_TRUE;
    } else if (spec.positions == LLAMA_KV_POSITIONS_CACHE && !why.empty()) {
        fail("this model has " + why + ", so positions=cache is not possible: use positions=true.", from_env);
    }

    if (spec.update == LLAMA_KV_UPDATE_SHIFT) {
        if (from_env) {
            fail("update=shift is made of calls that only equip's own programs make: use update=inplace.", from_env);
        }
        const std::string why_shift = !why.empty() ? why : why_no_shift(model, cparams, params.type_k);
        if (!why_shift.empty()) {
            fail("update=shift is not possible, this model has " + why_shift + ": use update=inplace or update=gather.", from_env);
        }
    }

    int64_t budget = spec.budget;
    if (budget <= 0) {
        budget = budget == 0 ? hparams.n_ctx_train : std::min<int64_t>(hparams.n_ctx_train, 4096);
    }

    // a sequence never grows past n_ctx, so more slots than that would stay empty
    std::string lowered;
    if (budget > cparams.n_ctx_seq) {
        LLAMA_LOG_WARN("%s: the budget of %lld tokens is lowered to the context size of %u\n", __func__, (long long) budget, cparams.n_ctx_seq);
        lowered = ", which is the context size,";
        budget  = cparams.n_ctx_seq;
    }

    // slot arithmetic is done in 32 bits
    if (budget + (int64_t) cparams.n_ubatch > llama_kv_policy_spec::MAX_TOKENS) {
        fail("the budget of " + std::to_string(budget) + " tokens is too large: beside a chunk of " + std::to_string(cparams.n_ubatch) + " tokens it can be " +
             std::to_string(std::max<int64_t>(0, llama_kv_policy_spec::MAX_TOKENS - cparams.n_ubatch)) + " at most.", from_env);
    }

    const int64_t recent = spec.n_recent((uint32_t) budget);

    if (budget < spec.sinks + recent + 1) {
        fail("the budget of " + std::to_string(budget) + " tokens" + lowered + " is too small: " + std::to_string(spec.sinks) + " sinks and " +
             std::to_string(recent) + " recent tokens beside the new one need at least " + std::to_string(spec.sinks + recent + 1) + ".", from_env);
    }

    const std::string why_rule = why_no_rule(spec, model, budget);
    if (!why_rule.empty()) {
        fail(why_rule, from_env);
    }

    active.is_set   = true;
    active.budget   = (uint32_t) budget;
    active.n_ubatch = cparams.n_ubatch;

    // a full-size sliding-window cache would grow with n_ctx
    params.swa_full = false;
}

bool llama_kv_policy_scope::cpu_attn(const llama_model & model) const {
    const char * env = getenv("EQUIP_CPU_ATTN");

    // with a device beside the CPU, attention may be moved there
    if ((env && strcmp(env, "0") == 0) || model.n_devices() > 0) {
        return false;
    }

    return active.spec.cpu_attn < 0 ? active.is_set : active.spec.cpu_attn > 0;
}

bool llama_kv_policy_scope::adapt_threads() const {
    return active.spec.adapt_threads < 0 ? active.is_set : active.spec.adapt_threads > 0;
}

uint32_t llama_kv_policy_scope::n_ctx_rope(const llama_model & model) const {
    const uint32_t n_orig = model.hparams.n_ctx_orig_yarn;

    // by rank, no two tokens are further apart than a full cache and a chunk
    const bool is_short = active.is_set && active.spec.positions == LLAMA_KV_POSITIONS_CACHE && active.budget + active.n_ubatch <= n_orig;

    return is_short ? n_orig : 0;
}

llama_kv_policy_scope::~llama_kv_policy_scope() {
    active = {};
}

void llama_kv_policy_scope::attach(llama_memory_i * memory, const llama_context & lctx) const {
    if (!active.is_set) {
        return;
    }

    const auto & spec = active.spec;

    if (!memory) {
        LLAMA_LOG_WARN("%s: the policy %s is ignored: this model has no KV cache\n", __func__, spec.desc->name);
        return;
    }

    if (spec.update == LLAMA_KV_UPDATE_SHIFT) {
        if (!llama_kv_policy_base(memory) || !memory->get_can_shift() || llama_kv_policy_swa(memory)) {
            fail(std::string("update=shift is not possible, llama.cpp cannot shift ") + (llama_kv_policy_swa(memory) ? "the sliding-window layers of this model" : "this model's cache") +
                    ": use update=inplace or update=gather.", !choice.is_set);
        }
        return;
    }

    llama_kv_policy * policy = llama_kv_policy_of(memory);

    if (!policy) {
        fail("this model's memory (recurrent or sparse attention) cannot be bounded yet: use the policy none.", !choice.is_set);
    }

    policy->attach(lctx, llama_kv_policy_swa(memory));

    if (spec.is_interior() && policy->is_rotating() && spec.update == LLAMA_KV_UPDATE_INPLACE && policy->has_quantized_keys() &&
            policy->rotate_every() < spec.default_rotate_every(true)) {
        LLAMA_LOG_WARN("%s: quantised keys are rounded anew by each rotation, and rotate_every=%u means many of them: %u or more is better\n", __func__,
                policy->rotate_every(), spec.default_rotate_every(true));
    }

    // a warning, so that a program that hides information shows it
    LLAMA_LOG_WARN("%s: KV cache bounded: policy %s, scope %s, budget %u tokens, sinks %d, positions %s\n", __func__,
            spec.desc->name, spec.get_scope().c_str(), active.budget, (int) spec.sinks, policy->positions_name());
}

void llama_kv_policy_refuse(const std::string & sentence) {
    fail(sentence, !choice.is_set);
}

int64_t llama_kv_policy_n_learned(const llama_model & model) {
    return model.pos_embd ? model.pos_embd->ne[1] : 0;
}

bool llama_kv_policy_from_env() {
    const char * env = getenv("LLAMA_KV_POLICY");

    try {
        return env && *env && llama_kv_policy_parse(env).desc;
    } catch (const std::exception &) {
        return true; // no context will be made with it
    }
}

void llama_kv_policy_score(const llama_memory_context_i * mctx, ggml_context * ctx, ggml_cgraph * gf, int32_t il, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * kq, ggml_tensor * flash, ggml_tensor * mask, ggml_tensor * sinks, float scale) {
    if (!mctx) {
        return;
    }

    const auto & type = typeid(*mctx);

    // a hybrid memory is refused where weights are read
    const auto * cur =
        type == typeid(llama_kv_cache_context)      ? static_cast<const llama_kv_cache_context      *>(mctx) :
        type == typeid(llama_kv_cache_iswa_context) ? static_cast<const llama_kv_cache_iswa_context *>(mctx)->get_base() : nullptr;

    if (cur && cur->get_policy()) {
        cur->get_policy()->score(ctx, gf, il, q, k, kq, flash, mask, sinks, scale);
    }
}

uint32_t llama_kv_policy_n_nodes(llama_memory_i * memory, uint32_t n_tokens) {
    const auto * policy = llama_kv_policy_of(memory);

    return policy ? policy->n_nodes(n_tokens) : 0;
}

uint32_t llama_kv_policy_n_slots(uint32_t kv_size, llama_swa_type swa_type, bool shared) {
    if (!active.is_set || swa_type != LLAMA_SWA_TYPE_NONE || shared) {
        return kv_size;
    }

    return GGML_PAD(active.budget + active.n_ubatch, 256u);
}

std::unique_ptr<llama_kv_policy> llama_kv_policy_make(llama_kv_cache & kv) {
    if (!active.is_set || active.spec.update == LLAMA_KV_UPDATE_SHIFT || !llama_kv_policy::is_boundable(kv)) {
        return nullptr;
    }

    return std::make_unique<llama_kv_policy>(kv, active.spec, active.budget);
}

//
// C API
//

static llama_kv_policy * get_policy(const llama_context * ctx) {
    return ctx ? llama_kv_policy_of(ctx->get_memory()) : nullptr;
}

static bool seq_ok(const llama_context * ctx, llama_seq_id seq_id) {
    return ctx && seq_id >= 0 && (uint32_t) seq_id < ctx->get_cparams().n_seq_max;
}

// no exception crosses the boundary: out of memory
template <typename T, typename F>
static T guarded(T def, F && f) {
    try {
        return f();
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("llama_kv_policy: %s\n", err.what());
        return def;
    }
}

// the policy with what this sequence really keeps: the evictions that its last chunk owes are carried out
static llama_kv_policy * get_settled(const llama_context * ctx, llama_seq_id seq_id) {
    auto * policy = get_policy(ctx);

    if (policy && seq_ok(ctx, seq_id)) {
        policy->settle(seq_id);
    }

    return policy;
}

void llama_kv_policy_set_next(const char * spec) {
    choice.is_set = spec != nullptr;
    choice.spec   = spec ? spec : "";
}

static std::string join(const std::vector<const char *> & names) {
    std::string res;
    for (const char * name : names) {
        res += (res.empty() ? "" : "|") + std::string(name);
    }
    return res;
}

bool llama_kv_policy_get_param(int32_t i, int32_t j, llama_kv_policy_param * param) {
    const auto & registry = llama_kv_policy_registry();
    if (i < 0 || (size_t) i >= registry.size() || !registry[i].rule || j < 0 || !param) {
        return false;
    }

    const auto rule   = registry[i].rule();
    const auto params = rule->params();
    if ((size_t) j >= params.size()) {
        return false;
    }

    const auto & p = params[j];
    *param = { p.name, p.type == llama_kv_rule_param::REAL ? "real" : p.type == llama_kv_rule_param::ODD ? "odd" : "count", *p.value, p.published, p.min, p.max, p.help };

    return true;
}

const char * llama_kv_policy_describe(int32_t i) {
    static const std::vector<std::string> text = [] {
        std::vector<std::string> res;
        for (const auto & desc : llama_kv_policy_registry()) {
            res.push_back(std::string(desc.name) + ":scope=" + join(desc.scopes) + ",positions=" + join(desc.positions) +
                    ",update=" + join(desc.updates) + ",recent=" + (desc.takes_recent ? "1" : "0") + ",scores=" + (desc.reads_weights() ? "1" : "0") +
                    ",pages=" + (desc.pages ? "1" : "0") + ",evict_every=" + std::to_string(desc.rule ? desc.evict_every : 0));
        }
        return res;
    }();

    return i >= 0 && (size_t) i < text.size() ? text[i].c_str() : nullptr;
}

int32_t llama_kv_policy_n_pos_max(const llama_model * model) {
    return model ? (int32_t) llama_kv_policy_n_learned(*model) : 0;
}

int32_t llama_kv_policy_n_swa(const llama_model * model) {
    return model ? (int32_t) model->hparams.n_swa : 0;
}

bool llama_kv_policy_get_layer(const llama_model * model, int32_t il, llama_kv_policy_layer * layer) {
    if (!model || !layer || il < 0 || il >= (int32_t) model->hparams.n_layer_all) {
        return false;
    }

    const auto & hparams = model->hparams;
    const bool   has_kv  = hparams.has_kv(il) && !hparams.is_recr(il) && hparams.n_head_kv(il) > 0;

    layer->n_embd_k  = has_kv ? hparams.n_embd_k_gqa(il) : 0;
    layer->n_embd_v  = has_kv && !hparams.is_mla() ? hparams.n_embd_v_gqa(il) : 0;
    layer->n_head_kv = has_kv ? hparams.n_head_kv(il) : 0;
    layer->is_swa    = hparams.is_swa(il);

    return true;
}

const char * llama_kv_policy_check(const char * spec) {
    try {
        llama_kv_policy_parse(spec ? spec : "");
    } catch (const std::exception & err) {
        last_check = err.what();
        return last_check.c_str();
    }

    return nullptr;
}

const char * llama_kv_policy_why_not(const llama_model * model, const char * spec) {
    try {
        last_check = model ? why_no_rule(llama_kv_policy_parse(spec ? spec : ""), *model, -1) : "";
    } catch (const std::exception & err) {
        last_check = err.what();
    }

    return last_check.empty() ? nullptr : last_check.c_str();
}

const char * llama_kv_policy_error(void) {
    return has_error ? last_error.c_str() : nullptr;
}

const char * llama_kv_policy_name(const llama_context * ctx) {
    const auto * policy = get_policy(ctx);

    return policy ? policy->get_spec().desc->name : "none";
}

bool llama_kv_policy_get_stats(const llama_context * ctx, llama_seq_id seq_id, llama_kv_policy_stats * stats) {
    return guarded(false, [&]() {
        const auto * policy = get_settled(ctx, seq_id);

        if (!policy || !stats || !seq_ok(ctx, seq_id)) {
            return false;
        }

        const auto & l = policy->ledger(seq_id);

        stats->n_evicted = l.n_evicted();
        stats->n_used    = (int32_t) l.n_used();
        stats->n_slots   = (int32_t) l.n_slots();
        stats->budget    = (int32_t) l.budget();
        stats->n_protect = (int32_t) l.n_protect();
        stats->rotate_every = policy->is_rotating() ? (int32_t) policy->rotate_every() : 0;
        stats->n_rotations = policy->n_rotations(seq_id);
        stats->is_ranks    = policy->is_ranks(seq_id);

        const auto * scores = policy->get_scores();

        stats->evict_every   = scores ? (int32_t) policy->evict_every() : 0;
        stats->page_size     = scores && scores->get_params().pages ? stats->evict_every : 0;
        stats->score_queries = scores && policy->get_spec().desc->reads_weights() ? (int32_t) policy->score_queries() : -1;
        stats->score_bytes   = scores ? (int64_t) scores->n_bytes() : 0;
        stats->ledger_bytes  = scores ? (int64_t) scores->n_bytes_ledger() : 0;

        stats->t_host_us = policy->t_host_us;
        stats->n_steps   = policy->n_steps;

        return true;
    });
}

int32_t llama_kv_policy_get_kept(const llama_context * ctx, llama_seq_id seq_id, llama_pos * pos, int32_t * slot, int32_t n_max) {
    return guarded((int32_t) 0, [&]() {
        if (!seq_ok(ctx, seq_id)) {
            return 0;
        }

        get_settled(ctx, seq_id);

        const auto * kv = llama_kv_policy_base(ctx->get_memory());

        if (!kv) {
            return 0;
        }

        int32_t n = 0;
        for (const auto & [p, i] : kv->get_cells(seq_id).seq_pos_get(seq_id)) {
            if (n < n_max) {
                if (pos) {
                    pos[n] = p;
                }
                if (slot) {
                    slot[n] = (int32_t) i;
                }
            }
            n++;
        }

        return n;
    });
}

int32_t llama_kv_policy_get_head(const llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t i_head, llama_pos * pos, float * weight, int32_t n_max) {
    return guarded((int32_t) -1, [&]() {
        auto * policy = get_settled(ctx, seq_id);

        return policy && seq_ok(ctx, seq_id) ? policy->get_head(seq_id, il, i_head, pos, weight, n_max) : -1;
    });
}

int32_t llama_kv_policy_get_shares(const llama_context * ctx, llama_seq_id seq_id, llama_pos * pos, float * share, int32_t n_max) {
    return guarded((int32_t) 0, [&]() {
        if (!ctx || !seq_ok(ctx, seq_id)) {
            return 0;
        }

        const auto * policy = get_settled(ctx, seq_id);

        if (policy && policy->get_scores()) {
            return policy->get_shares(seq_id, pos, share, n_max);
        }

        for (int32_t i = 0; share && i < n_max; ++i) {
            share[i] = 1.0f;
        }

        return llama_kv_policy_get_kept(ctx, seq_id, pos, nullptr, n_max);
    });
}

size_t llama_kv_policy_get_key(const llama_context * ctx, llama_seq_id seq_id, int32_t il, llama_pos pos, void * data, size_t size) {
    return guarded((size_t) 0, [&]() {
        const auto * policy = get_settled(ctx, seq_id);

        return policy && seq_ok(ctx, seq_id) ? policy->get_key(seq_id, il, pos, data, size) : 0;
    });
}

int32_t llama_kv_policy_get_delta(const llama_context * ctx, llama_seq_id seq_id) {
    return guarded((int32_t) 0, [&]() {
        const auto * policy = get_policy(ctx);

        return policy && seq_ok(ctx, seq_id) ? policy->get_delta(seq_id) : 0;
    });
}

enum llama_kv_rewind llama_kv_policy_rewind_kind(const llama_context * ctx, llama_seq_id seq_id, llama_pos p0) {
    const auto * policy = get_policy(ctx);

    if (!policy || !seq_ok(ctx, seq_id)) {
        return LLAMA_KV_REWIND_EXACT;
    }

    return llama_kv_policy_can_rm(ctx->get_memory(), seq_id, p0, -1) ? policy->rewind_kind(seq_id, p0) : LLAMA_KV_REWIND_IMPOSSIBLE;
}

bool llama_kv_policy_pin(llama_context * ctx, llama_seq_id seq_id, int32_t n) {
    return guarded(false, [&]() {
        auto * policy = get_policy(ctx);

        return policy && seq_ok(ctx, seq_id) && policy->pin(seq_id, n);
    });
}

const char * llama_kv_policy_positions(const llama_context * ctx) {
    const auto * policy = get_policy(ctx);

    return policy ? policy->positions_name() : "true";
}

const char * llama_kv_policy_no_ranks(const llama_model * model) {
    last_check = model ? why_no_ranks(*model) : "";

    return last_check.empty() ? nullptr : last_check.c_str();
}

const char * llama_kv_policy_attn_kernel(const llama_context * ctx) {
    return guarded("upstream", [&]() {
        const auto * kv = ctx ? llama_kv_policy_base(ctx->get_memory()) : nullptr;

        if (kv && llama_kv_policy_single_is_ours(ctx->get_cparams(), ctx->get_model().hparams, *kv)) {
            return "equip-cpu";
        }

        return llama_kv_policy_flash_attn(ctx) ? "upstream-fa" : "upstream";
    });
}

bool llama_kv_policy_flash_attn(const llama_context * ctx) {
    return ctx && ctx->get_cparams().flash_attn;
}

int32_t llama_kv_policy_n_threads_now(const llama_context * ctx) {
    return ctx->get_n_threads_now();
}

int64_t llama_kv_policy_graph_us(const llama_context * ctx) {
    return ctx ? ctx->get_graph_us() : 0;
}
