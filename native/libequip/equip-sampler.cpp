#include "equip-internal.h"

#include "grammar-check.h"
#include "json-schema-to-grammar.h"
#include "json.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

static const size_t N_HISTORY = EQUIP_N_HISTORY;

void equip_remember(equip_session & s, llama_token token) {
    if (s.history.size() >= 2 * N_HISTORY) {
        s.history.erase(s.history.begin(), s.history.end() - N_HISTORY);
    }
    s.history.push_back(token);
}

void equip_make_sampler(equip_session & s) {
    s.sampler.reset(common_sampler_init(s.model->model, s.sampling));

    for (size_t i = s.history.size() - std::min(s.history.size(), N_HISTORY); i < s.history.size(); ++i) {
        common_sampler_accept(s.sampler.get(), s.history[i], /*is_generated =*/ false);
    }
}

// upstream samples from the context's own logits: where others have used it since, theirs make room meanwhile
struct swapped_logits {
    explicit swapped_logits(equip_session & s) : s(s) {
        if (!s.logits.empty()) {
            equip_log_scope log;
            row = llama_get_logits_ith(s.ctx, -1);
            if (!row) {
                equip_fail(EQUIP_ERR_BACKEND, "the last step of this pool has failed: evaluate a token of one of its sessions first");
            }
            std::swap_ranges(s.logits.begin(), s.logits.end(), row);
        }
    }
    ~swapped_logits() {
        if (row) {
            std::swap_ranges(s.logits.begin(), s.logits.end(), row);
        }
    }

    int32_t index() const { return row ? -1 : s.i_logits; }

  private:
    equip_session & s;
    float *         row = nullptr;
};

llama_token equip_sample(equip_session & s) {
    swapped_logits    logits(s);
    const llama_token token = common_sampler_sample(s.sampler.get(), s.ctx, logits.index());

    // upstream would hand on a token that its own grammar forbids, and abort when that one is accepted
    const auto * cur = common_sampler_get_candidates(s.sampler.get(), /*do_sort =*/ false);
    if (cur->selected < 0 || cur->selected >= (int64_t) cur->size || !(cur->data[cur->selected].logit > -INFINITY)) {
        if (s.sampling.grammar.empty()) {
            equip_fail(EQUIP_ERR_BACKEND, "the model computed no usable logits");
        }
        equip_fail(EQUIP_ERR_UNSUPPORTED, "the grammar cannot be continued with any token of this model");
    }

    common_sampler_accept(s.sampler.get(), token, /*is_generated =*/ true);
    return token;
}

// what the model's file recommends (general.sampling.*), as llama.cpp's own programs take it over
static double recommended(const equip_session & s, llama_model_meta_key key, double fallback, double min, double max) {
    char buf[64] = { 0 };
    if (llama_model_meta_val_str(s.model->model, llama_model_meta_key_str(key), buf, sizeof(buf)) <= 0) {
        return fallback;
    }
    char * end = nullptr;
    const double value = strtod(buf, &end);
    return end != buf && value >= min && value <= max ? value : fallback;
}

static std::string schema_to_grammar(const char * json_schema) {
    equip_check_json_depth(json_schema, "the JSON schema is");
    try {
        return json_schema_to_grammar(common_json::parse(json_schema));
    } catch (const std::exception & err) {
        equip_fail(EQUIP_ERR_USAGE, "the JSON schema cannot be used: %s", err.what());
    }
}

int equip_session_set_sampler(equip_session * session, const char * options, const char * grammar, const char * json_schema) {
    return equip_guard_status([&]() -> int {
        if (!session) {
            equip_fail(EQUIP_ERR_USAGE, "no session is given");
        }
        auto &     s   = *session;
        const auto own = s.lock();

        common_params_sampling params;

        equip_options opts(options);
        const int64_t seed    = opts.get_int("seed", -1, -1, UINT32_MAX);
        params.seed           = seed < 0 ? LLAMA_DEFAULT_SEED : (uint32_t) seed; // the default is a new one each time
        const auto get_float = [&](const char * name, llama_model_meta_key key, float & dst, double min, double max) {
            dst = (float) opts.get_float(name, recommended(s, key, dst, min, max), min, max);
        };
        const auto get_int = [&](const char * name, llama_model_meta_key key, int32_t & dst, int64_t max) {
            dst = (int32_t) opts.get_int(name, (int64_t) recommended(s, key, dst, 0, (double) max), 0, max);
        };
        get_float("temp",           LLAMA_MODEL_META_KEY_SAMPLING_TEMP,           params.temp,           0.0, 1000.0);
        get_int  ("top_k",          LLAMA_MODEL_META_KEY_SAMPLING_TOP_K,          params.top_k,          INT32_MAX);
        get_float("top_p",          LLAMA_MODEL_META_KEY_SAMPLING_TOP_P,          params.top_p,          0.0, 1.0);
        get_float("min_p",          LLAMA_MODEL_META_KEY_SAMPLING_MIN_P,          params.min_p,          0.0, 1.0);
        get_float("repeat_penalty", LLAMA_MODEL_META_KEY_SAMPLING_PENALTY_REPEAT, params.penalty_repeat, 0.01, 100.0);
        get_int  ("repeat_last_n",  LLAMA_MODEL_META_KEY_SAMPLING_PENALTY_LAST_N, params.penalty_last_n, N_HISTORY);
        params.ignore_eos     = opts.get_bool("ignore_eos", false);
        opts.finish();

        const bool has_grammar = grammar && *grammar;
        const bool has_schema  = json_schema && *json_schema;
        if (has_grammar && has_schema) {
            equip_fail(EQUIP_ERR_USAGE, "a grammar and a JSON schema cannot be used together: give one of them");
        }
        if ((has_grammar || has_schema) && params.ignore_eos) {
            equip_fail(EQUIP_ERR_USAGE, "ignore_eos cannot be used with a grammar or a JSON schema, which decide where the text ends");
        }
        if ((has_grammar || has_schema) && llama_vocab_type(s.model->vocab) == LLAMA_VOCAB_TYPE_NONE) {
            equip_fail(EQUIP_ERR_UNSUPPORTED, "the model has no tokenizer, so a grammar means nothing to it");
        }

        if (has_grammar || has_schema) {
            equip_abort_scope asserts;
            const std::string text = has_schema ? schema_to_grammar(json_schema) : grammar;
            try {
                grammar_check(text);
            } catch (const std::invalid_argument & err) {
                equip_fail(EQUIP_ERR_USAGE, "%s", err.what());
            }

            // a first try, since upstream's sampler leaks its chain when the grammar does not parse
            equip_log_scope log;
            llama_sampler * probe = llama_sampler_init_grammar(s.model->vocab, text.c_str(), "root");
            if (!probe) {
                // upstream prints the reasons of its parser itself
                const bool printed = log.last_error() == "failed to parse grammar";
                equip_fail(EQUIP_ERR_USAGE, "the grammar cannot be parsed%s", printed ? ": the lines printed before this one say where" : log.quote().c_str());
            }
            llama_sampler_free(probe);
            params.grammar = common_grammar(COMMON_GRAMMAR_TYPE_USER, text);
        }

        if (params.ignore_eos) {
            for (llama_token id = 0; id < llama_vocab_n_tokens(s.model->vocab); ++id) {
                if (llama_vocab_is_eog(s.model->vocab, id)) {
                    params.logit_bias.push_back({ id, -INFINITY });
                }
            }
        }

        const common_params_sampling old = s.sampling;
        s.sampling = params;
        try {
            equip_make_sampler(s);
        } catch (const std::exception & err) {
            s.sampling = old;
            equip_fail(EQUIP_ERR_USAGE, "the sampler cannot be made: %s", err.what());
        }
        return EQUIP_OK;
    });
}
