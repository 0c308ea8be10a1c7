#include "equip-internal.h"

#include "json.h"

#include <algorithm>

// a session is a sequence of a llama_context: number 0 of its own one, or one of a pool's

equip_session::~equip_session() {
    sampler.reset();
    if (pool && seq < (llama_seq_id) pool->sessions.size()) {
        const auto own = lock();
        if (pool->sessions.size() > 1) {
            equip_clear(*this);
            if (params.policy != "none") {
                llama_kv_policy_pin(ctx, seq, 0);
            }
        }
        pool->sessions[seq] = nullptr;
    }
}

equip_pool_state::~equip_pool_state() {
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
    const auto * s = ((equip_pool_state *) data)->may_abort.load(std::memory_order_relaxed);
    return s && s->cancelled.load(std::memory_order_relaxed);
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

static std::shared_ptr<equip_pool_state> make_context(equip_model * model, const char * policy, const char * options, bool is_pool) {
    if (!model) {
        equip_fail(EQUIP_ERR_USAGE, "no model is given");
    }

    const auto & m = *model->state;
    if (!m.has_weights) {
        equip_fail(EQUIP_ERR_USAGE, "the model was loaded without its weights (vocab_only), so it cannot run");
    }
    const std::string why = m.cannot_generate();
    if (!why.empty()) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "%s", why.c_str());
    }

    equip_check_fork();

    auto res = std::make_shared<equip_pool_state>();
    res->model  = model->state;
    res->params = equip_parse_session(m, policy, options, is_pool);
    res->sessions.resize(res->params.n_sessions);
    equip_check_session_memory(m, res->params);

    auto & p = res->params;

    p.cparams.abort_callback      = on_abort;
    p.cparams.abort_callback_data = res.get();

    {
        equip_log_scope   log;
        equip_abort_scope asserts;
        next_policy       next(p.spec);

        res->ctx = llama_init_from_model(m.model, p.cparams);
        if (!res->ctx) {
            fail_create(p, log);
        }
    }
    auto * mem = llama_get_memory(res->ctx);
    if (!mem) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "the model (%s) keeps no cache: it does not generate text token by token", m.arch.c_str());
    }
    if (p.context_shift && !llama_memory_can_shift(mem)) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "llama.cpp cannot shift this model's context: leave context_shift out");
    }

    if (p.update != "shift") {
        p.policy = llama_kv_policy_name(res->ctx);
    }
    res->batch = llama_batch_init((int32_t) std::max<uint32_t>(llama_n_ubatch(res->ctx), p.n_sessions), /*embd =*/ 0, /*n_seq_max =*/ 1);

    return res;
}

// on a sequence that nobody has
static equip_session * make_session(const std::shared_ptr<equip_pool_state> & pool) {
    const auto own = pool->lock();

    const auto it = std::find(pool->sessions.begin(), pool->sessions.end(), nullptr);
    if (it == pool->sessions.end()) {
        equip_fail(EQUIP_ERR_USAGE, "all %zu sessions of this pool are in use: free one of them, or make a pool of more", pool->sessions.size());
    }

    auto s = std::make_unique<equip_session>();
    s->pool     = pool;
    s->model    = pool->model;
    s->params   = pool->params;
    s->ctx      = pool->ctx;
    s->seq      = (llama_seq_id) (it - pool->sessions.begin());
    s->n_ctx    = (int32_t) (pool->sessions.size() > 1 ? llama_n_ctx_seq(s->ctx) : llama_n_ctx(s->ctx));
    s->n_ubatch = (int32_t) llama_n_ubatch(s->ctx);
    if (pool->sessions.size() > 1 && s->params.policy == "none") {
        s->n_ctx = (int32_t) (llama_n_ctx(s->ctx) / pool->sessions.size()); // what one may take of the cache that they share
    }
    if (s->params.update == "shift") {
        s->shift = equip_make_shift(s->params);
    }

    *it = s.get();
    return s.release();
}

int equip_session_create(equip_session ** out, equip_model * model, const char * policy, const char * options) {
    return equip_guard_status([&]() -> int {
        if (!out) {
            equip_fail(EQUIP_ERR_USAGE, "no place for the session is given");
        }
        *out = nullptr;
        *out = make_session(make_context(model, policy, options, /*is_pool =*/ false));
        return EQUIP_OK;
    });
}

int equip_pool_create(equip_pool ** out, equip_model * model, const char * policy, const char * options) {
    return equip_guard_status([&]() -> int {
        if (!out) {
            equip_fail(EQUIP_ERR_USAGE, "no place for the pool is given");
        }
        *out = nullptr;
        *out = new equip_pool { make_context(model, policy, options, /*is_pool =*/ true) };
        return EQUIP_OK;
    });
}

void equip_pool_free(equip_pool * pool) {
    if (!equip_is_cut_off()) {
        delete pool;
    }
}

const char * equip_pool_info(equip_pool * pool) {
    return equip_guard((const char *) nullptr, [&] {
        if (!pool) {
            equip_fail(EQUIP_ERR_USAGE, "no pool is given");
        }
        const auto & state = *pool->state;
        const auto & p     = state.params;

        const auto own = pool->state->lock();

        return equip_return(common_json({
            { "text",       p.spec                                                                                                  },
            { "policy",     p.policy                                                                                                },
            { "budget",     p.budget                                                                                                },
            { "pool",       p.pool                                                                                                  },
            { "n_sessions", p.n_sessions                                                                                            },
            { "n_open",     state.sessions.size() - std::count(state.sessions.begin(), state.sessions.end(), nullptr)               },
            { "n_slots",    p.n_slots                                                                                               },
            { "n_ubatch",   llama_n_ubatch(state.ctx)                                                                               },
            { "kv_bytes",   equip_kv_bytes(state.ctx)                                                                               },
        }).dump_safe());
    });
}

int equip_pool_session(equip_session ** out, equip_pool * pool) {
    return equip_guard_status([&]() -> int {
        if (!out || !pool) {
            equip_fail(EQUIP_ERR_USAGE, "no pool, or no place for the session, is given");
        }
        *out = nullptr;
        *out = make_session(pool->state);
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
    if (!equip_is_cut_off()) {
        delete session;
    }
}

bool equip_is_bounded(const equip_session & s) {
    return s.params.policy != "none";
}

void equip_resync(equip_session & s) {
    s.n_past = (s.shift ? s.shift->pos_last() : llama_memory_seq_pos_max(llama_get_memory(s.ctx), s.seq)) + 1;
    s.n_past = s.n_past > 0 ? s.n_past + s.n_shifted : 0;
}

void equip_clear(equip_session & s) {
    auto * mem = llama_get_memory(s.ctx);
    if (s.pool->sessions.size() == 1) {
        llama_memory_clear(mem, /*data =*/ false);
    } else {
        llama_memory_seq_rm(mem, s.seq, -1, -1);
    }
}

int equip_session_reset(equip_session * session) {
    return equip_guard_status([&]() -> int {
        if (!session) {
            equip_fail(EQUIP_ERR_USAGE, "no session is given");
        }
        auto &     s   = *session;
        const auto own = s.lock();

        equip_clear(s);
        s.n_shifted = 0;
        s.is_lost   = false;
        if (s.shift) {
            s.shift->reset();
            s.shift->set_protect((uint32_t) s.params.sinks);
        }
        equip_resync(s);
        if (equip_is_bounded(s) && !s.shift) {
            llama_kv_policy_pin(s.ctx, s.seq, 0); // the policy itself would keep the pins for the next text
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
        auto &     s   = *session;
        const auto own = s.lock();

        if (s.n_past > 0) {
            equip_fail(EQUIP_ERR_USAGE, "tokens can be pinned before the first one is evaluated only: reset the session first");
        }
        if (!equip_is_bounded(s)) {
            return EQUIP_OK; // nothing is ever evicted
        }
        const bool ok = s.shift ? s.shift->set_protect((uint32_t) std::max<int64_t>(n, s.params.sinks)) : llama_kv_policy_pin(s.ctx, s.seq, n);
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
