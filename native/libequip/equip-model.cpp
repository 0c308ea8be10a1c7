#include "equip-internal.h"

#include "json.h"

#include <algorithm>
#include <climits>
#include <cstdlib>

equip_model_state::~equip_model_state() {
    chat.reset();
    llama_model_free(model);
}

std::string equip_model_state::meta(const std::string & key) const {
    const std::string name = key[0] == '.' ? arch + key : key;

    // the first call only asks for the length
    const int32_t n = llama_model_meta_val_str(model, name.c_str(), nullptr, 0);
    if (n <= 0) {
        return "";
    }
    std::string res(n, '\0');
    llama_model_meta_val_str(model, name.c_str(), &res[0], res.size() + 1);
    return res;
}

std::string equip_model_state::cannot_generate() const {
    const std::string pooling = meta(".pooling_type");

    // -1 is "unspecified", written as an unsigned number
    const bool pools = !pooling.empty() && pooling != "0" && pooling != "-1" && pooling != "4294967295";

    if (llama_model_has_encoder(model)) {
        return equip_format("the model (%s) has an encoder: only decoder models generate text here", arch.c_str());
    }
    if (llama_model_is_diffusion(model)) {
        return equip_format("the model (%s) is a diffusion model: it does not generate text token by token", arch.c_str());
    }
    if (meta(".attention.causal") == "false" || pools || !llama_model_has_decoder(model)) {
        return equip_format("the model (%s) is an embedding model: it does not generate text", arch.c_str());
    }
    return "";
}

int64_t equip_model_state::slot_bytes(ggml_type type_k, ggml_type type_v, bool swa) const {
    int64_t res = 0;
    for (const auto & layer : layers) {
        if (layer.is_swa == swa) {
            res += layer.n_embd_k * (int64_t) ggml_type_size(type_k) / ggml_blck_size(type_k);
            res += layer.n_embd_v * (int64_t) ggml_type_size(type_v) / ggml_blck_size(type_v);
        }
    }
    return res;
}

struct progress_state {
    equip_progress callback;
    void *         user_data;
    bool           stopped;
};

static bool on_progress(float progress, void * user_data) {
    auto * state = (progress_state *) user_data;
    if (state->callback && !state->callback(progress, state->user_data)) {
        state->stopped = true;
    }
    return !state->stopped;
}

// turns upstream's refusal to load into a sentence
[[noreturn]] static void fail_load(const std::string & path, const equip_file_info & info, const equip_log_scope & log) {
    if (log.mentions("unknown model architecture")) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "this llama.cpp does not know the architecture '%s' of %s", info.arch.c_str(), path.c_str());
    }
    if (log.mentions("CLIP cannot be used")) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "%s is the vision part of a model: give its text part", path.c_str());
    }
    if (log.mentions("bad_alloc") || log.mentions("failed to allocate") || log.mentions("unable to allocate")) {
        int n_gpu = 0;
        const uint64_t gpu = equip_gpu_memory_free(&n_gpu);
        equip_fail(EQUIP_ERR_MEMORY, "the model needs about %.0f MB, which could not be allocated (%.0f MB are free%s): try a smaller quantisation%s%s",
                info.file_bytes / 1048576.0, llama_kv_policy_memory_free() / 1048576.0,
                n_gpu > 0 ? equip_format(", %.0f MB on devices", gpu / 1048576.0).c_str() : "", n_gpu > 0 ? " or a smaller -ngl" : "", log.quote().c_str());
    }
    equip_fail(EQUIP_ERR_MODEL_FILE, "%s is cut short or damaged: download it again%s", path.c_str(), log.quote().c_str());
}

int equip_model_load(equip_model ** out, const char * path, const char * options, equip_progress progress, void * user_data) {
    return equip_guard_status([&]() -> int {
        if (!out || !path || !*path) {
            equip_fail(EQUIP_ERR_USAGE, "no model file is given");
        }
        *out = nullptr;
        equip_init();

        equip_options opts(options);
        const int32_t n_gpu_layers = (int32_t) opts.get_int("n_gpu_layers", -1, -1, INT_MAX);
        const bool    use_mmap     = opts.get_bool("use_mmap", true);
        const bool    vocab_only   = opts.get_bool("vocab_only", false);
        opts.finish();

        const equip_file_info info = equip_inspect_file(path);

        if (info.n_tensors == 0 && !vocab_only) {
            equip_fail(EQUIP_ERR_MODEL_FILE, "%s holds a vocabulary and no weights", path);
        }

        int n_gpu = 0;
        equip_gpu_memory_free(&n_gpu);
        const bool use_gpu = n_gpu > 0 && n_gpu_layers != 0;

        if (!vocab_only) {
            equip_check_model_memory(info.file_bytes, use_gpu);
        }

        progress_state state = { progress, user_data, false };

        auto mparams = llama_model_default_params();
        mparams.n_gpu_layers                = use_gpu ? n_gpu_layers : 0;
        mparams.load_mode                   = use_mmap ? LLAMA_LOAD_MODE_AUTO : LLAMA_LOAD_MODE_NONE;
        mparams.progress_callback           = on_progress;
        mparams.progress_callback_user_data = &state;
        if (vocab_only && info.n_tensors > 0) {
            // unlike upstream's vocab_only this reads the hyperparameters too, and still no weights
            mparams.no_alloc  = true;
            mparams.load_mode = LLAMA_LOAD_MODE_NONE;
        } else {
            mparams.vocab_only = vocab_only;
        }

        auto res = std::make_shared<equip_model_state>();
        {
            equip_log_scope   log;
            equip_abort_scope asserts;
            res->model = llama_model_load_from_file(path, mparams);
            if (!res->model) {
                if (state.stopped) {
                    equip_fail(EQUIP_ERR_CANCELLED, "loading %s was cancelled", path);
                }
                fail_load(path, info, log);
            }
        }

        res->vocab        = llama_model_get_vocab(res->model);
        res->path         = path;
        res->arch         = info.arch;
        res->file_bytes   = info.file_bytes;
        res->has_hparams  = info.n_tensors > 0;
        res->has_weights  = !vocab_only;
        if (res->has_hparams) {
            const int32_t n_layer = llama_model_n_layer(res->model);
            res->n_gpu_layers = !use_gpu ? 0 : n_gpu_layers < 0 ? n_layer : std::min(n_gpu_layers, n_layer);

            llama_kv_policy_layer layer;
            for (int32_t il = 0; llama_kv_policy_get_layer(res->model, il, &layer); ++il) {
                res->layers.push_back(layer);
            }
        }

        *out = new equip_model{ std::move(res) };
        return EQUIP_OK;
    });
}

void equip_model_free(equip_model * model) {
    if (!equip_is_cut_off()) {
        delete model;
    }
}

static const char * rope_name(enum llama_rope_type type) {
    switch (type) {
        case LLAMA_ROPE_TYPE_NONE:   return "none";
        case LLAMA_ROPE_TYPE_NORM:   return "norm";
        case LLAMA_ROPE_TYPE_NEOX:   return "neox";
        case LLAMA_ROPE_TYPE_MROPE:  return "mrope";
        case LLAMA_ROPE_TYPE_IMROPE: return "imrope";
        case LLAMA_ROPE_TYPE_VISION: return "vision";
    }
    return "unknown";
}

// what a session may ask for; llama_kv_policy.cpp has the last word when the context is made
static common_json supports(const equip_model_state & m) {
    std::vector<std::string> policies;
    std::vector<std::string> scopes;
    std::vector<std::string> positions;

    const auto add = [](std::vector<std::string> & to, const std::string & word) {
        if (std::find(to.begin(), to.end(), word) == to.end()) {
            to.push_back(word);
        }
    };

    if (m.has_hparams && m.cannot_generate().empty()) {
        policies  = { "none" };
        scopes    = { "token" };
        positions = { "true" };

        const bool can_bound  = !llama_model_is_recurrent(m.model);
        const bool can_rotate = !llama_kv_policy_no_ranks(m.model);

        for (const auto & desc : can_bound ? equip_policy_registry() : std::vector<equip_policy_desc>()) {
            for (const auto & word : desc.scopes) {
                if (!llama_kv_policy_why_not(m.model, (desc.name + ":scope=" + word).c_str())) {
                    add(policies, desc.name);
                    add(scopes, word);
                }
            }
            for (const auto & word : desc.positions) {
                if (word == "true" || can_rotate) {
                    add(positions, word);
                }
            }
        }
    }

    return { { "policies", policies }, { "scopes", scopes }, { "positions", positions } };
}

const char * equip_model_info(equip_model * model) {
    return equip_guard((const char *) nullptr, [&] {
        if (!model) {
            equip_fail(EQUIP_ERR_USAGE, "no model is given");
        }
        const auto & m = *model->state;

        // the layer that stands for the model: the first one that a policy would bound, else the first with a cache
        const llama_kv_policy_layer * layer = nullptr;
        common_json swa_layers = common_json::array();
        for (size_t il = 0; il < m.layers.size(); ++il) {
            const auto & l = m.layers[il];
            if (l.is_swa) {
                swa_layers.push_back(il);
            }
            if (l.n_embd_k > 0 && l.n_head_kv > 0 && (!layer || (layer->is_swa && !l.is_swa))) {
                layer = &l;
            }
        }

        const bool has_bos = llama_vocab_bos(m.vocab) != LLAMA_TOKEN_NULL;

        common_json res = {
            { "arch",              m.arch                                                  },
            { "name",              m.meta("general.name")                                  },
            { "n_params",          m.has_hparams ? llama_model_n_params(m.model)       : 0 },
            { "n_layer",           m.has_hparams ? llama_model_n_layer(m.model)        : 0 },
            { "n_embd",            m.has_hparams ? llama_model_n_embd(m.model)         : 0 },
            { "n_head",            m.has_hparams ? llama_model_n_head(m.model)         : 0 },
            { "n_head_kv",         layer ? layer->n_head_kv                            : 0 },
            { "head_dim",          layer ? layer->n_embd_k / layer->n_head_kv          : 0 },
            { "n_ctx_train",       m.has_hparams ? llama_model_n_ctx_train(m.model)    : 0 },
            { "n_vocab",           llama_vocab_n_tokens(m.vocab)                           },
            { "rope",              m.has_hparams ? rope_name(llama_model_rope_type(m.model)) : "unknown" },
        };

        const std::string base = m.meta(".rope.freq_base");
        res["rope_freq_base"]     = base.empty() ? 10000.0 : std::atof(base.c_str());
        res["n_swa"]              = m.has_hparams ? llama_kv_policy_n_swa(m.model) : 0;
        res["swa_layers"]         = swa_layers;
        res["file_bytes"]         = m.file_bytes;
        res["has_chat_template"]  = llama_model_chat_template(m.model, nullptr) != nullptr;
        res["is_recurrent"]       = llama_model_is_recurrent(m.model);
        res["is_hybrid"]          = llama_model_is_hybrid(m.model);
        res["bos"]                = llama_vocab_bos(m.vocab);
        res["eos"]                = llama_vocab_eos(m.vocab);
        res["add_bos"]            = has_bos && llama_vocab_get_add_bos(m.vocab);
        res["kv_bytes_per_token"] = m.slot_bytes(GGML_TYPE_F16, GGML_TYPE_F16, false);
        res["supports"]           = supports(m);

        return equip_return(res.dump_safe());
    });
}
