#include "llama-kv-policy-impl.h"
#include "llama-kv-policy-plan.h"

#include "llama-context.h"
#include "llama-ext.h"
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
struct settings_t {
    bool        is_set = false;
    std::string text;
};

thread_local settings_t  settings;
thread_local std::string last_error;
thread_local std::string last_check;
thread_local bool        has_error = false;
thread_local int         last_status = LLAMA_KV_POLICY_OK;

// the policy of the context under construction
struct active_t {
    bool                 is_set = false;
    llama_kv_policy_plan plan;
};

thread_local active_t active;

void remember(const llama_kv_policy_refusal & err) {
    last_error  = err.what();
    last_status = err.status;
    has_error   = true;
}

[[noreturn]] void fail(const llama_kv_policy_refusal & err, bool from_env) {
    remember(err);

    // a program that was never written for a policy may have silenced the log
    if (from_env) {
        fprintf(stderr, "LLAMA_KV_POLICY: %s\n", err.what());
    }

    throw err;
}

[[noreturn]] void fail(const std::string & sentence, bool from_env) {
    fail(llama_kv_policy_refusal(LLAMA_KV_POLICY_UNSUPPORTED, sentence), from_env);
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
    const char * env      = getenv("LLAMA_KV_POLICY");
    const bool   from_env = !settings.is_set;

    active    = {};
    has_error = false;

    try {
        active.plan.spec = llama_kv_policy_parse(!from_env ? settings.text : env && *env ? env : "none");

        auto & spec = active.plan.spec;

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
            if (spec.update == LLAMA_KV_UPDATE_SHIFT) {
                throw llama_kv_policy_refusal(LLAMA_KV_POLICY_UNSUPPORTED, "update=shift is made of calls that only equip's own programs make: use update=inplace");
            }
        }

        llama_kv_policy_shape shape;
        shape.n_ctx     = cparams.n_ctx_seq;
        shape.n_ubatch  = cparams.n_ubatch;
        shape.n_seq_max = cparams.n_seq_max;
        shape.unified   = cparams.kv_unified;
        shape.offload   = cparams.offload_kqv;
        shape.type_k    = params.type_k;
        shape.type_v    = params.type_v;
        shape.cparams   = &cparams;

        active.plan = llama_kv_policy_make_plan(model, shape, spec);
    } catch (const llama_kv_policy_refusal & err) {
        fail(err, from_env);
    }

    for (const auto & note : active.plan.notes) {
        LLAMA_LOG_WARN("%s: %s\n", __func__, note.c_str());
    }

    active.is_set = true;

    // a full-size sliding-window cache would grow with n_ctx
    params.swa_full = false;
}

bool llama_kv_policy_scope::cpu_attn(const llama_model & model) const {
    const char * env = getenv("EQUIP_CPU_ATTN");

    // with a device beside the CPU, attention may be moved there
    if ((env && strcmp(env, "0") == 0) || model.n_devices() > 0) {
        return false;
    }

    return active.plan.spec.cpu_attn < 0 ? active.is_set : active.plan.spec.cpu_attn > 0;
}

bool llama_kv_policy_scope::adapt_threads() const {
    return active.plan.spec.adapt_threads < 0 ? active.is_set : active.plan.spec.adapt_threads > 0;
}

uint32_t llama_kv_policy_scope::n_ctx_rope(const llama_model & model) const {
    const uint32_t n_orig = model.hparams.n_ctx_orig_yarn;

    // by rank, no two tokens are further apart than a full cache and a chunk
    const bool is_short = active.is_set && active.plan.spec.positions == LLAMA_KV_POSITIONS_CACHE && active.plan.n_tokens() <= n_orig;

    return is_short ? n_orig : 0;
}

llama_kv_policy_scope::~llama_kv_policy_scope() {
    active = {};
}

void llama_kv_policy_scope::attach(llama_memory_i * memory, const llama_context & lctx) const {
    if (!active.is_set) {
        return;
    }

    const auto & spec = active.plan.spec;

    if (!memory) {
        LLAMA_LOG_WARN("%s: the policy %s is ignored: this model has no KV cache\n", __func__, spec.desc->name);
        return;
    }

    if (spec.update == LLAMA_KV_UPDATE_SHIFT) {
        if (!llama_kv_policy_base(memory) || !memory->get_can_shift() || llama_kv_policy_swa(memory)) {
            fail(std::string("update=shift is not possible, llama.cpp cannot shift ") + (llama_kv_policy_swa(memory) ? "the sliding-window layers of this model" : "this model's cache") +
                    ": use update=inplace or update=gather", !settings.is_set);
        }
        return;
    }

    llama_kv_policy * policy = llama_kv_policy_of(memory);

    if (!policy) {
        fail("this model's memory (recurrent or sparse attention) cannot be bounded yet: use the policy none", !settings.is_set);
    }

    policy->attach(lctx, llama_kv_policy_swa(memory));

    if (spec.is_interior() && policy->is_rotating() && spec.update == LLAMA_KV_UPDATE_INPLACE && policy->has_quantized_keys() &&
            policy->rotate_every() < spec.default_rotate_every(true)) {
        LLAMA_LOG_WARN("%s: quantised keys are rounded anew by each rotation, and rotate_every=%u means many of them: %u or more is better\n", __func__,
                policy->rotate_every(), spec.default_rotate_every(true));
    }

    // a warning, so that a program that hides information shows it
    const std::string pool = spec.pool > 0 ? ", a pool of " + std::to_string(spec.pool) : "";
    LLAMA_LOG_WARN("%s: KV cache bounded: policy %s, scope %s, budget %u tokens%s, sinks %d, positions %s\n", __func__,
            spec.desc->name, spec.get_scope().c_str(), active.plan.budget(), pool.c_str(), (int) spec.sinks, policy->positions_name());
}

void llama_kv_policy_refuse(const std::string & sentence) {
    fail(sentence, !settings.is_set);
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

uint32_t llama_kv_policy_n_ctx(const llama_model & model, const llama_context_params & params) {
    constexpr uint64_t n_max = INT32_MAX / 256 * 256;

    // callers give a draft model the context of its target, which in a pool is what one sequence may have
    const auto * target = params.ctx_other ? llama_kv_policy_of(params.ctx_other->get_memory()) : nullptr;
    if (target && target->is_pool() && params.kv_unified && params.n_ctx > 0) {
        return (uint32_t) std::min<uint64_t>((uint64_t) params.n_ctx * std::max(1u, params.n_seq_max), n_max);
    }
    if (params.n_ctx > 0) {
        return params.n_ctx;
    }

    const uint32_t n_train = model.hparams.n_ctx_train;
    const auto     pooling = params.pooling_type == LLAMA_POOLING_TYPE_UNSPECIFIED ? model.hparams.pooling_type : params.pooling_type;

    const bool is_left_alone = params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || params.ctx_other || params.kv_unified || params.embeddings ||
            pooling > LLAMA_POOLING_TYPE_NONE || llama_model_has_encoder(&model);

    try {
        const char * env = getenv("LLAMA_KV_POLICY");
        if (is_left_alone || !llama_kv_policy_parse(settings.is_set ? settings.text : env && *env ? env : "none").desc) {
            return n_train;
        }
    } catch (const std::exception &) {
        return n_train; // the context will not be made
    }

    // where nothing grows with it, no sequence need get less than the model can do
    return (uint32_t) std::min<uint64_t>((uint64_t) n_train * std::max(1u, params.n_seq_max), n_max);
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

    return (uint32_t) active.plan.n_slots;
}

std::unique_ptr<llama_kv_policy> llama_kv_policy_make(llama_kv_cache & kv) {
    if (!active.is_set || active.plan.spec.update == LLAMA_KV_UPDATE_SHIFT || !llama_kv_policy::is_boundable(kv)) {
        return nullptr;
    }

    return std::make_unique<llama_kv_policy>(kv, active.plan.spec, active.plan.budget(), active.plan.n_ubatch, kv.get_n_seq_max());
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
    settings.is_set = spec != nullptr;
    settings.text   = spec ? spec : "";
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
    if (i < 0 || (size_t) i >= registry.size() || !registry[i].formula || j < 0 || !param) {
        return false;
    }

    const auto formula = registry[i].formula();
    const auto params  = formula->all_params();
    if ((size_t) j >= params.size()) {
        return false;
    }

    const auto & p = params[j];
    *param = { p.name, p.type == llama_kv_formula_param::REAL ? "real" : p.type == llama_kv_formula_param::ODD ? "odd" : "count", *p.value, p.published, p.min, p.max, p.help };

    return true;
}

const char * llama_kv_policy_describe(int32_t i) {
    static const std::vector<std::string> text = [] {
        std::vector<std::string> res;
        for (const auto & desc : llama_kv_policy_registry()) {
            res.push_back(std::string(desc.name) + ":scope=" + join(desc.scopes) + ",positions=" + join(desc.positions) +
                    ",update=" + join(desc.updates) + ",recent=" + (desc.takes_recent ? "1" : "0") + ",scores=" + (desc.reads_weights() ? "1" : "0") +
                    ",pages=" + (desc.page_size() > 0 ? "1" : "0") + ",evict_every=" +
                    std::to_string(!desc.formula ? 0 : desc.page_size() > 0 ? desc.page_size() : desc.evict_every));
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

enum llama_kv_policy_status llama_kv_policy_check(const char * text) {
    has_error = false;
    try {
        llama_kv_policy_parse(text ? text : "");
    } catch (const llama_kv_policy_refusal & err) {
        remember(err);
        return (llama_kv_policy_status) err.status;
    }

    return LLAMA_KV_POLICY_OK;
}

enum llama_kv_policy_status llama_kv_policy_resolve(const llama_model * model, const llama_context_params * params, const char * text, llama_kv_policy_resolved * res) {
    static thread_local std::string complete;

    has_error = false;
    try {
        if (!model || !params || !res) {
            throw llama_kv_policy_refusal(LLAMA_KV_POLICY_USAGE, "no model, no parameters or no place for the answer is given");
        }

        const auto plan = llama_kv_policy_make_plan(*model, llama_kv_policy_shape(*params), llama_kv_policy_parse(text ? text : "none"));

        complete = llama_kv_policy_text(plan.spec);

        res->text     = complete.c_str();
        res->name     = plan.spec.desc ? plan.spec.desc->name : "none";
        res->budget   = plan.budget();
        res->n_slots  = plan.n_slots;
        res->n_ubatch = plan.n_ubatch;
        res->kv_bytes = plan.kv_bytes;
    } catch (const llama_kv_policy_refusal & err) {
        remember(err);
        return (llama_kv_policy_status) err.status;
    } catch (const std::exception & err) {
        remember({ LLAMA_KV_POLICY_MEMORY, err.what() });
        return LLAMA_KV_POLICY_MEMORY;
    }

    return LLAMA_KV_POLICY_OK;
}

enum llama_kv_policy_status llama_kv_policy_error_status(void) {
    return has_error ? (llama_kv_policy_status) last_status : LLAMA_KV_POLICY_OK;
}

const char * llama_kv_policy_why_not(const llama_model * model, const char * spec) {
    try {
        last_check = model ? llama_kv_policy_why_no_formula(llama_kv_policy_parse(spec ? spec : ""), *model) : "";
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
        stats->n_evicted_pool = policy->is_pool() ? policy->n_evicted_pool(seq_id) : 0;
        stats->n_used    = (int32_t) l.n_used();
        stats->n_slots   = (int32_t) l.n_slots();
        stats->budget    = (int32_t) l.budget();
        stats->n_protect = (int32_t) l.n_protect();
        stats->rotate_every = policy->is_rotating() ? (int32_t) policy->rotate_every() : 0;
        stats->n_rotations = policy->n_rotations(seq_id);
        stats->is_ranks    = policy->is_ranks(seq_id);

        const auto * scores = policy->get_scores();

        stats->evict_every   = scores ? (int32_t) policy->evict_every() : 0;
        stats->page_size     = scores ? (int32_t) scores->page_size() : 0;
        stats->score_queries = scores && policy->get_spec().desc->reads_weights() ? (int32_t) policy->score_queries() : -1;
        stats->score_bytes   = scores ? (int64_t) scores->n_bytes() : 0;
        stats->ledger_bytes  = scores ? (int64_t) scores->n_bytes_ledger() : 0;

        const auto traffic = policy->get_traffic();

        stats->n_device_reads  = traffic.n_reads;
        stats->n_device_writes = traffic.n_writes;

        stats->n_filtered   = policy->get_filter() ? policy->get_filter()->n_skipped()  : 0;
        stats->n_filterable = policy->get_filter() ? policy->get_filter()->n_possible() : 0;

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

int32_t llama_kv_policy_set_scores(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t i_head, const llama_pos * pos, const float * score, int32_t n) {
    has_error = false;
    try {
        // what its last chunk owes stays owed: these scores decide it
        auto * policy = get_policy(ctx);
        if (!policy) {
            throw llama_kv_policy_refusal(LLAMA_KV_POLICY_USAGE, "this context has no policy that takes scores: use the policy external");
        }
        if (!seq_ok(ctx, seq_id)) {
            throw llama_kv_policy_refusal(LLAMA_KV_POLICY_USAGE, "there is no sequence " + std::to_string(seq_id));
        }
        return policy->set_scores(seq_id, il, i_head, pos, score, n);
    } catch (const llama_kv_policy_refusal & err) {
        remember(err);
    } catch (const std::exception & err) {
        remember({ LLAMA_KV_POLICY_MEMORY, err.what() });
    }

    return -1;
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

bool llama_kv_policy_is_sound(const llama_context * ctx) {
    const auto * policy = get_policy(ctx);

    return !policy || policy->check();
}

bool llama_kv_policy_allot(llama_context * ctx, llama_seq_id seq_id, int32_t n) {
    return guarded(false, [&]() {
        auto * policy = get_policy(ctx);

        return policy && policy->is_pool() && seq_ok(ctx, seq_id) && n > 0 && policy->allot((uint32_t) seq_id, (uint32_t) n);
    });
}

enum llama_kv_rewind llama_kv_policy_rewind_kind(const llama_context * ctx, llama_seq_id seq_id, llama_pos p0) {
    const auto * policy = get_policy(ctx);

    if (!policy || !seq_ok(ctx, seq_id)) {
        return LLAMA_KV_REWIND_EXACT;
    }

    return llama_kv_policy_can_rm(ctx->get_memory(), seq_id, p0, -1) ? policy->rewind_kind(seq_id, p0) : LLAMA_KV_REWIND_IMPOSSIBLE;
}

int32_t llama_kv_policy_n_rewind(const llama_context * ctx) {
    const auto * policy = get_policy(ctx);

    return policy ? policy->n_rewind() : INT32_MAX;
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
    last_check = model ? llama_kv_policy_why_no_ranks(*model) : "";

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
