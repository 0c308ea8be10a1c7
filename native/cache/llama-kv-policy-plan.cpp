#include "llama-kv-policy-plan.h"

#include "llama-kv-memory-free.h"
#include "llama-kv-policy.h"
#include "llama-kv-pool.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

llama_kv_policy_shape::llama_kv_policy_shape(const llama_context_params & params) :
    n_ctx(params.n_ctx), n_ubatch(params.n_ubatch), n_batch(params.n_batch), n_seq_max(std::max(1u, params.n_seq_max)), unified(params.kv_unified),
    offload(params.offload_kqv), type_k(params.type_k), type_v(params.type_v) {
}

std::string llama_kv_policy_why_no_ranks(const llama_model & model) {
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

std::string llama_kv_policy_why_no_formula(const llama_kv_policy_spec & spec, const llama_model & model) {
    if (!spec.has_formula()) {
        return "";
    }

    const auto & hparams = model.hparams;
    const auto   needs   = spec.make_formula()->needs();

    const std::string name  = spec.desc->name;
    const std::string scope = spec.get_scope();

    if ((llm_arch_is_hybrid(model.arch) || llm_arch_is_recurrent(model.arch)) && (needs.weights || needs.k_unrotated || scope != "token")) {
        return "this model has layers without softmax attention, which the policy " + name + " with scope=" + scope + " chooses by: use streaming, or random with scope=token";
    }
    if (hparams.use_alibi && scope != "token") {
        return "this model has ALiBi distances in place of rotary positions, and they are the same for all heads: use scope=token, or the policy random or streaming";
    }
    if (hparams.is_mla() && (scope != "token" || needs.v_l1 || needs.v_l2 || needs.v_rows)) {
        return "this model has latent attention, one row for keys and values of all heads: use a policy that reads attention weights only, with scope=token";
    }

    if (needs.k_unrotated && (hparams.is_mla() || hparams.n_pos_per_embd() > 1)) {
        return std::string("this model has ") + (hparams.is_mla() ? "latent attention, one row for the keys of all heads" : "M-RoPE positions (several per token)") +
            ", and the policy " + name + " reads keys without their rotation: use another policy";
    }

    if (hparams.is_n_embd_v_gqa_variable() && (scope != "token" || needs.v_rows)) {
        return "this model has values of another size in some layers, which are stored with padding: use scope=token, or the policy random or streaming";
    }

    return "";
}

// the property that makes upstream's K-shift wrong, or crash
static std::string why_no_shift(const llama_model & model, const llama_cparams & cparams, ggml_type type_k) {
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

//
// sizes
//

static uint32_t default_ubatch(int64_t budget) {
    return (uint32_t) std::min<int64_t>(512, std::max<int64_t>(64, budget/4));
}

// bytes of one slot of one stream on each device; nullptr: the host
using device_bytes = std::map<ggml_backend_dev_t, int64_t>;

static device_bytes bytes_per_slot(const llama_model & model, const llama_kv_policy_shape & shape, bool swa) {
    device_bytes res;

    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        llama_kv_policy_layer layer;
        if (!llama_kv_policy_get_layer(&model, il, &layer) || layer.is_swa != swa || layer.n_embd_k == 0) {
            continue;
        }
        ggml_backend_dev_t dev = shape.offload && model.n_devices() > 0 && !model.hparams.vocab_only ? model.dev_layer(il) : nullptr;
        if (dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            dev = nullptr;
        }
        // rows of a type whose blocks do not fit are refused elsewhere
        res[dev] += (int64_t) (layer.n_embd_k*ggml_type_size(shape.type_k)/ggml_blck_size(shape.type_k) +
                               layer.n_embd_v*ggml_type_size(shape.type_v)/ggml_blck_size(shape.type_v));
    }

    return res;
}

// the trained context, at most 4096 tokens, lowered to what fits half of the memory that is free where the cache will lie, but not below 256
static int64_t default_budget(const llama_model & model, const llama_kv_policy_shape & shape, const llama_kv_policy_spec & spec) {
    const uint32_t n_stream = shape.unified ? 1 : shape.n_seq_max;

    int64_t res = std::max<int64_t>(1, model.hparams.n_ctx_train > 0 ? std::min<int64_t>(model.hparams.n_ctx_train, llama_kv_policy_spec::DEFAULT_BUDGET) : llama_kv_policy_spec::DEFAULT_BUDGET);

    for (const auto & [dev, bytes] : bytes_per_slot(model, shape, false)) {
        const int64_t free = llama_kv_memory_free(dev);

        const auto needed = [&](int64_t budget) {
            return (int64_t) GGML_PAD(budget + (shape.n_ubatch > 0 ? shape.n_ubatch : default_ubatch(budget)), 256)*bytes*n_stream;
        };
        // a device that does not tell is left to its driver
        while (free > 0 && res > 256 && needed(res) > free/2) {
            res = std::max<int64_t>(256, res/2/256*256);
        }
    }

    const int64_t page = spec.desc ? spec.get_page_size() : 1;

    return std::max<int64_t>(1, res/page)*page;
}

// one sentence: why these settings and this model have no pool, or empty
static std::string why_no_pool(const llama_model & model, const llama_kv_policy_spec & spec) {
    return llm_arch_is_hybrid(model.arch) ? "this model has recurrent layers beside attention, which share nothing: leave pool out" : spec.why_no_pool();
}

static uint32_t least_pool(const llama_kv_policy_spec & spec, const llama_kv_policy_shape & shape) {
    return (uint32_t) llama_kv_pool::n_tokens_min((uint32_t) std::min(spec.sinks, spec.budget), spec.desc->page_size() > 0 ? (uint32_t) spec.get_page_size() : 0, shape.n_seq_max);
}

// a budget for every sequence, or as many whole pages as fit half of the memory that is free where the cache will lie
static int64_t default_pool(const llama_model & model, const llama_kv_policy_shape & shape, const llama_kv_policy_spec & spec, uint32_t n_ubatch) {
    int64_t res = (int64_t) llama_kv_pool::pages((uint32_t) std::min(spec.budget, llama_kv_policy_spec::MAX_TOKENS))*llama_kv_pool::PAGE*shape.n_seq_max;

    const int64_t n_more = (int64_t) llama_kv_pool::n_rows(0, n_ubatch, shape.n_seq_max);

    for (const auto & [dev, bytes] : bytes_per_slot(model, shape, false)) {
        if (const int64_t free = llama_kv_memory_free(dev); free > 0) {
            res = std::min(res, free/2/bytes - n_more);
        }
    }
    res = std::min(res, llama_kv_policy_spec::MAX_TOKENS - n_more);

    return std::max<int64_t>(res/llama_kv_pool::PAGE*llama_kv_pool::PAGE, least_pool(spec, shape));
}

// what filter needs of a model and a context, and its defaults
static void plan_filter(const llama_model & model, const llama_kv_policy_shape & shape, llama_kv_policy_spec & spec) {
    const auto refuse = [](const std::string & sentence) { throw llama_kv_policy_refusal(LLAMA_KV_POLICY_UNSUPPORTED, sentence); };

    if (shape.n_seq_max > 1) {
        refuse("filter is for one sequence, and this context has room for " + std::to_string(shape.n_seq_max) + ": start with -np 1, or leave filter out");
    }

    int64_t n_layers = 0;
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        llama_kv_policy_layer layer;
        n_layers += llama_kv_policy_get_layer(&model, il, &layer) && !layer.is_swa && layer.n_embd_k > 0;
    }
    if (n_layers < 2) {
        refuse("this model has " + std::to_string(n_layers) + " layers of full attention, and filter needs one that sees every token before those that leave some out: leave filter out");
    }
    if (spec.filter_layers >= n_layers) {
        refuse("filter_layers is " + std::to_string(spec.filter_layers) + ": this model has " + std::to_string(n_layers) + " layers of full attention, of which the first sees every token: give " +
                std::to_string(n_layers - 1) + " or less");
    }

    spec.positions     = LLAMA_KV_POSITIONS_TRUE;
    spec.filter_layers = spec.filter_layers < 0 ? n_layers/2 : spec.filter_layers;
    spec.filter_warmup = spec.filter_warmup < 0 ? llama_kv_policy_spec::DEFAULT_WARMUP : spec.filter_warmup;
}

llama_kv_policy_plan llama_kv_policy_make_plan(const llama_model & model, const llama_kv_policy_shape & shape, const llama_kv_policy_spec & given) {
    llama_kv_policy_plan res;
    res.spec = given;

    auto & spec = res.spec;

    const auto & hparams = model.hparams;
    const auto   refuse  = [](int status, const std::string & sentence) { throw llama_kv_policy_refusal(status, sentence); };

    if (spec.desc) {
        const std::string why_not = why_no_pool(model, spec);

        if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
            refuse(LLAMA_KV_POLICY_UNSUPPORTED, "this model's layers are divided between devices (--split-mode tensor), and a bounded cache needs each of them whole: use --split-mode layer");
        }
        if (spec.pool == llama_kv_policy_spec::POOL_AUTO && (!shape.unified || shape.n_seq_max == 1 || !why_not.empty())) {
            spec.pool = -1;
        }
        if (spec.pool < 0 && shape.unified && shape.n_seq_max > 1) {
            refuse(LLAMA_KV_POLICY_UNSUPPORTED, "a bounded cache holds one sequence per stream, but " + std::to_string(shape.n_seq_max) +
                    " sequences share one: " + (why_not.empty() ? "give them a pool (pool=auto), or " : "") + "start with -np 1, or with -np N --no-kv-unified");
        }
        if (spec.pool > 0 && !shape.unified && shape.n_seq_max > 1) {
            refuse(LLAMA_KV_POLICY_UNSUPPORTED, "pool=" + std::to_string(spec.pool) + " is one cache for all sequences, but each has a stream of its own: start with --kv-unified");
        }
        if (spec.pool > 0 && !why_not.empty()) {
            refuse(LLAMA_KV_POLICY_UNSUPPORTED, why_not);
        }

        if (spec.filter > 0.0) {
            plan_filter(model, shape, spec);
        }

        const std::string why = llama_kv_policy_why_no_ranks(model);

        if (spec.positions == LLAMA_KV_POSITIONS_DEFAULT) {
            const bool ranks = strcmp(spec.desc->positions[0], "cache") == 0;

            spec.positions = !why.empty() ? LLAMA_KV_POSITIONS_TRUE : ranks || spec.update == LLAMA_KV_UPDATE_SHIFT ? LLAMA_KV_POSITIONS_CACHE : LLAMA_KV_POSITIONS_AUTO;
        } else if (spec.positions == LLAMA_KV_POSITIONS_AUTO && !why.empty()) {
            res.notes.push_back("this model has " + why + ": positions=auto stays with true");
            spec.positions = LLAMA_KV_POSITIONS_TRUE;
        } else if (spec.positions == LLAMA_KV_POSITIONS_CACHE && !why.empty()) {
            refuse(LLAMA_KV_POLICY_UNSUPPORTED, "this model has " + why + ", so positions=cache is not possible: use positions=true");
        }

        if (spec.update == LLAMA_KV_UPDATE_SHIFT) {
            const std::string why_shift = !why.empty() ? why : shape.cparams ? why_no_shift(model, *shape.cparams, shape.type_k) : "";
            if (!why_shift.empty()) {
                refuse(LLAMA_KV_POLICY_UNSUPPORTED, "update=shift is not possible, this model has " + why_shift + ": use update=inplace or update=gather");
            }
        }
    }

    if (spec.budget < 0) {
        spec.budget = !spec.desc && shape.n_ctx > 0 ? shape.n_ctx : default_budget(model, shape, spec);
    } else if (spec.budget == 0) {
        spec.budget = hparams.n_ctx_train;
    }

    // a sequence never grows past n_ctx, so more slots than that would stay empty
    std::string lowered;
    if (shape.n_ctx > 0 && spec.budget > shape.n_ctx) {
        res.notes.push_back("the budget of " + std::to_string(spec.budget) + " tokens is lowered to the context size of " + std::to_string(shape.n_ctx));
        lowered     = ", which is the context size,";
        spec.budget = shape.n_ctx;
    }

    if (spec.pool == llama_kv_policy_spec::POOL_AUTO) {
        spec.pool = default_pool(model, shape, spec, shape.n_ubatch > 0 ? shape.n_ubatch : default_ubatch(spec.budget));
    }
    if (spec.pool > 0 && spec.budget > spec.pool) {
        res.notes.push_back("the budget of " + std::to_string(spec.budget) + " tokens is lowered to the pool of " + std::to_string(spec.pool));
        lowered     = ", which is the pool,";
        spec.budget = spec.pool;
    }

    const int64_t budget = spec.budget;

    res.n_ubatch = shape.n_ubatch > 0 ? shape.n_ubatch : spec.desc ? default_ubatch(budget) : 512;
    if (shape.n_batch > 0) {
        res.n_ubatch = std::min(res.n_ubatch, shape.n_batch);
    }

    // slot arithmetic is done in 32 bits
    if (budget + (int64_t) res.n_ubatch > llama_kv_policy_spec::MAX_TOKENS) {
        refuse(LLAMA_KV_POLICY_BUDGET, "the budget of " + std::to_string(budget) + " tokens is too large: beside a chunk of " + std::to_string(res.n_ubatch) +
                " tokens it can be " + std::to_string(std::max<int64_t>(0, llama_kv_policy_spec::MAX_TOKENS - res.n_ubatch)) + " at most");
    }

    if (spec.pool > 0) {
        const uint64_t least = least_pool(spec, shape);
        const uint64_t most  = llama_kv_policy_spec::MAX_TOKENS - llama_kv_pool::n_rows(0, res.n_ubatch, shape.n_seq_max);
        if ((uint64_t) spec.pool < least || (uint64_t) spec.pool > most) {
            refuse(LLAMA_KV_POLICY_BUDGET, "the pool of " + std::to_string(spec.pool) + " tokens is too " + ((uint64_t) spec.pool < least ? "small" : "large") + " for " +
                    std::to_string(shape.n_seq_max) + " sequences: give pool=" + std::to_string((uint64_t) spec.pool < least ? least : most) + " or " +
                    ((uint64_t) spec.pool < least ? "more" : "less"));
        }
    }

    if (spec.desc) {
        llama_kv_policy_check_budget(spec, budget, lowered);

        const std::string why_formula = llama_kv_policy_why_no_formula(spec, model);
        if (!why_formula.empty()) {
            refuse(LLAMA_KV_POLICY_UNSUPPORTED, why_formula);
        }
        if (spec.desc->takes_recent) {
            spec.recent = spec.n_recent((uint32_t) budget);
        }
        if (spec.rotate_every < 0) {
            spec.rotate_every = spec.default_rotate_every(ggml_is_quantized(shape.type_k));
        }
        if (spec.evict_every < 0) {
            spec.evict_every = spec.desc->evict_every;
        }
    }

    const uint32_t n_stream = shape.unified ? 1 : shape.n_seq_max;

    bool is_host = true;
    res.n_slots  = GGML_PAD(spec.pool > 0 ? (int64_t) llama_kv_pool::n_rows(spec.pool, res.n_ubatch, shape.n_seq_max) : budget + (spec.desc ? res.n_ubatch : 0), 256);
    for (const bool swa : { false, true }) {
        const int64_t n_slots = !swa ? res.n_slots : std::min<int64_t>(res.n_slots, GGML_PAD(hparams.n_swa + res.n_ubatch, 256));
        for (const auto & [dev, bytes] : bytes_per_slot(model, shape, swa)) {
            res.kv_bytes += bytes*n_slots*n_stream;
            is_host = is_host && (swa || !dev);
        }
    }
    if (spec.score_queries < 0) {
        spec.score_queries = is_host ? 0 : llama_kv_policy_spec::SCORE_QUERIES_DEVICE;
    }

    return res;
}
