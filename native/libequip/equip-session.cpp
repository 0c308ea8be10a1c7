#include "equip-internal.h"

#include "json.h"

// one session is one llama_context with one sequence, number 0

equip_session::~equip_session() {
    sampler.reset();
    if (ctx) {
        equip_log_scope log;
        llama_free(ctx);
    }
    if (batch.token) {
        llama_batch_free(batch);
    }
}

// the choice of a policy holds for one context
struct next_policy {
    explicit next_policy(const std::string & spec) {
        llama_kv_policy_set_next(spec.c_str());
    }
    ~next_policy() {
        llama_kv_policy_set_next(nullptr);
    }
};

static bool on_abort(void * data) {
    auto * s = (equip_session *) data;
    return s->may_abort.load(std::memory_order_relaxed) && s->cancelled.load(std::memory_order_relaxed);
}

[[noreturn]] static void fail_create(const equip_session_params & params, const equip_log_scope & log) {
    // the log tells whether it was this context that the policy refused, or an earlier one of this thread
    const char * sentence = llama_kv_policy_error();
    if (sentence && log.mentions(sentence)) {
        equip_fail(equip_status_of(llama_kv_policy_error_status()), "%s", sentence);
    }
    if (log.mentions("bad_alloc") || log.mentions("allocate")) {
        equip_fail(EQUIP_ERR_MEMORY, "the session's %lld slots could not be allocated (%.0f MB are free): try a smaller %s, type_k=q8_0 and type_v=q8_0, or a smaller n_ubatch%s",
                (long long) params.n_slots, llama_kv_policy_memory_free() / 1048576.0, params.policy == "none" ? "n_ctx" : "budget", log.quote().c_str());
    }
    equip_fail(EQUIP_ERR_UNSUPPORTED, "this model cannot run with these settings%s", log.quote().c_str());
}

int equip_session_create(equip_session ** out, equip_model * model, const char * policy, const char * options) {
    return equip_guard_status([&]() -> int {
        if (!out || !model) {
            equip_fail(EQUIP_ERR_USAGE, "no model is given");
        }
        *out = nullptr;

        const auto & m = *model->state;
        if (!m.has_weights) {
            equip_fail(EQUIP_ERR_USAGE, "the model was loaded without its weights (vocab_only), so it cannot run");
        }
        const std::string why = m.cannot_generate();
        if (!why.empty()) {
            equip_fail(EQUIP_ERR_UNSUPPORTED, "%s", why.c_str());
        }

        auto s = std::make_unique<equip_session>();
        s->model  = model->state;
        s->params = equip_parse_session(m, policy, options);
        equip_check_session_memory(m, s->params);

        s->params.cparams.abort_callback      = on_abort;
        s->params.cparams.abort_callback_data = s.get();

        {
            equip_log_scope   log;
            equip_abort_scope asserts;
            next_policy       next(s->params.spec);

            s->ctx = llama_init_from_model(m.model, s->params.cparams);
            if (!s->ctx) {
                fail_create(s->params, log);
            }
        }
        if (!llama_get_memory(s->ctx)) {
            equip_fail(EQUIP_ERR_UNSUPPORTED, "the model (%s) keeps no cache: it does not generate text token by token", m.arch.c_str());
        }

        if (s->params.update == "shift") {
            s->shift = equip_make_shift(s->params);
        } else {
            s->params.policy = llama_kv_policy_name(s->ctx);
        }

        if (s->params.context_shift && !llama_memory_can_shift(llama_get_memory(s->ctx))) {
            equip_fail(EQUIP_ERR_UNSUPPORTED, "llama.cpp cannot shift this model's context: leave context_shift out");
        }

        s->n_ctx    = (int32_t) llama_n_ctx(s->ctx);
        s->n_ubatch = (int32_t) llama_n_ubatch(s->ctx);
        s->batch    = llama_batch_init(s->n_ubatch, /*embd =*/ 0, /*n_seq_max =*/ 1);

        *out = s.release();
        return EQUIP_OK;
    });
}

const char * equip_session_plan(equip_model * model, const char * policy, const char * options) {
    return equip_guard((const char *) nullptr, [&] {
        if (!model) {
            equip_fail(EQUIP_ERR_USAGE, "no model is given");
        }
        const auto & m = *model->state;
        const auto   p = equip_parse_session(m, policy, options);

        return equip_return(common_json({
            { "text",     p.spec                                                                                       },
            { "policy",   p.policy                                                                                     },
            { "budget",   p.budget                                                                                     },
            { "n_slots",  p.n_slots                                                                                    },
            { "n_ctx",    p.cparams.n_ctx                                                                              },
            { "n_ubatch", p.cparams.n_ubatch                                                                           },
            { "kv_bytes", m.slot_bytes(p.cparams.type_k, p.cparams.type_v, false) * p.n_slots +
                          m.slot_bytes(p.cparams.type_k, p.cparams.type_v, true) * p.n_swa_slots                       },
        }).dump_safe());
    });
}

int equip_policy_check(const char * policy) {
    return equip_guard_status([&]() -> int {
        if (const auto status = llama_kv_policy_check(policy ? policy : ""); status != LLAMA_KV_POLICY_OK) {
            equip_fail(equip_status_of(status), "%s", llama_kv_policy_error());
        }
        return EQUIP_OK;
    });
}

void equip_session_free(equip_session * session) {
    delete session;
}

bool equip_is_bounded(const equip_session & s) {
    return s.params.policy != "none";
}

void equip_resync(equip_session & s) {
    s.n_past = (s.shift ? s.shift->pos_last() : llama_memory_seq_pos_max(llama_get_memory(s.ctx), 0)) + 1;
    s.n_past = s.n_past > 0 ? s.n_past + s.n_shifted : 0;
}

int equip_session_reset(equip_session * session) {
    return equip_guard_status([&]() -> int {
        if (!session) {
            equip_fail(EQUIP_ERR_USAGE, "no session is given");
        }
        auto & s = *session;

        llama_memory_clear(llama_get_memory(s.ctx), /*data =*/ false);
        s.n_shifted = 0;
        s.is_lost   = false;
        if (s.shift) {
            s.shift->reset();
            s.shift->set_protect((uint32_t) s.params.sinks);
        }
        equip_resync(s);
        if (equip_is_bounded(s) && !s.shift) {
            llama_kv_policy_pin(s.ctx, 0, 0); // the policy itself would keep the pins for the next text
        }

        s.pending    = LLAMA_TOKEN_NULL;
        s.has_logits = false;
        s.cancelled  = false;
        s.history.clear();
        s.prompt_n = s.prompt_us = s.predicted_n = s.predicted_us = 0;

        if (s.sampler) {
            equip_make_sampler(s); // upstream's reset would leave the grammar where it is
        }
        return EQUIP_OK;
    });
}

int equip_session_pin(equip_session * session, int32_t n) {
    return equip_guard_status([&]() -> int {
        if (!session || n < 0) {
            equip_fail(EQUIP_ERR_USAGE, "the number of pinned tokens must not be negative");
        }
        auto & s = *session;

        if (s.n_past > 0) {
            equip_fail(EQUIP_ERR_USAGE, "tokens can be pinned before the first one is evaluated only: reset the session first");
        }
        if (!equip_is_bounded(s)) {
            return EQUIP_OK; // nothing is ever evicted
        }
        const bool ok = s.shift ? s.shift->set_protect((uint32_t) std::max<int64_t>(n, s.params.sinks)) : llama_kv_policy_pin(s.ctx, 0, n);
        if (!ok) {
            equip_fail(EQUIP_ERR_BUDGET, "the budget of %lld tokens cannot hold %d pinned tokens beside the recent ones: use a larger budget or pin less",
                    (long long) s.params.budget, n);
        }
        return EQUIP_OK;
    });
}

void equip_session_cancel(equip_session * session) {
    if (session) {
        session->cancelled.store(true, std::memory_order_relaxed);
    }
}
