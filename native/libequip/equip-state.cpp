#include "equip-internal.h"

#include "json.h"

#include "../src/llama-ext.h"

#include <algorithm>

static equip_session & check(equip_session * session) {
    if (!session) {
        equip_fail(EQUIP_ERR_USAGE, "no session is given");
    }
    return *session;
}

int64_t equip_kv_bytes(llama_context * ctx) {
    int64_t res = 0;
    for (const auto & [buft, mb] : llama_get_memory_breakdown(ctx)) {
        (void) buft;
        res += (int64_t) mb.context;
    }
    return res;
}

// the tokens that go are the newest ones, with the pending one first
static int finish_rewind(equip_session & s, int32_t p0, int kind) {
    const size_t n_gone = (size_t) (s.n_past - p0) + (s.pending != LLAMA_TOKEN_NULL ? 1 : 0);
    s.history.resize(s.history.size() - std::min(s.history.size(), n_gone));
    s.pending    = LLAMA_TOKEN_NULL;
    s.has_logits = false;
    s.n_shifted  = p0 > 0 ? s.n_shifted : 0;
    s.is_lost    = s.is_lost && p0 > 0;
    equip_resync(s);

    if (s.sampler) {
        equip_make_sampler(s); // penalties forget what is gone, and a grammar starts over
    }
    return kind;
}

// what the policy in libllama knows; with update=shift there is none, and the session's own ledger does
static bool get_stats(const equip_session & s, llama_kv_policy_stats & stats) {
    if (!s.shift) {
        return llama_kv_policy_get_stats(s.ctx, s.seq, &stats);
    }
    stats.n_evicted = s.shift->n_evicted();
    stats.n_used    = (int32_t) s.shift->n_used();
    stats.n_slots   = (int32_t) s.shift->n_slots();
    stats.budget    = (int32_t) s.shift->budget();
    stats.n_protect = (int32_t) s.shift->n_protect();
    stats.is_ranks  = true;
    stats.score_queries = -1;
    return true;
}

int equip_session_rewind(equip_session * session, int32_t p0) {
    return equip_guard_status([&]() -> int {
        auto &     s   = check(session);
        const auto own = s.lock();
        if (p0 < 0) {
            equip_fail(EQUIP_ERR_USAGE, "the position %d is negative", p0);
        }
        s.is_lost = s.is_lost && p0 > 0;
        if (p0 > s.n_past || (p0 == s.n_past && s.pending == LLAMA_TOKEN_NULL)) {
            return LLAMA_KV_REWIND_EXACT;
        }

        if (s.shift) {
            return finish_rewind(s, p0, equip_shift_rewind(s, p0));
        }

        if (s.n_shifted > 0 && p0 > 0) {
            equip_fail(EQUIP_ERR_REWIND, "position %d cannot be gone back to once the context was shifted: rewind to 0", p0);
        }

        auto *       mem     = llama_get_memory(s.ctx);
        const int    pos_min = llama_memory_seq_pos_min(mem, s.seq);
        const int    n_swa   = llama_kv_policy_n_swa(s.model->model);
        const auto   kind    = llama_kv_policy_rewind_kind(s.ctx, s.seq, p0);

        // the token at p0 looks back over a whole window; upstream would silently go on with a shorter one
        // (a bounded cache has counted it)
        const bool window_gone = !equip_is_bounded(s) && n_swa > 0 && p0 > 0 && p0 < s.n_past && pos_min > std::max(0, p0 - n_swa + 1);

        if (kind == LLAMA_KV_REWIND_IMPOSSIBLE || window_gone) {
            equip_fail(EQUIP_ERR_REWIND, "position %d cannot be gone back to: what is needed before it has been evicted; rewind to %d or later, or to 0",
                    p0, std::max(pos_min, window_gone ? pos_min + n_swa - 1 : 0));
        }
        if (p0 < s.n_past && !llama_memory_seq_rm(mem, s.seq, p0, -1)) {
            equip_fail(EQUIP_ERR_REWIND, "this model's memory cannot go back to position %d: rewind to 0", p0);
        }

        return finish_rewind(s, p0, kind);
    });
}

int32_t equip_session_kept(equip_session * session, int32_t * pos, int32_t * slot, int32_t n_max) {
    return equip_guard_status([&]() -> int {
        auto &     s   = check(session);
        const auto own = s.lock();
        if (n_max < 0 || (n_max > 0 && (!pos || !slot))) {
            equip_fail(EQUIP_ERR_USAGE, "no room for the positions or the slots is given");
        }
        if (s.shift) {
            return equip_shift_kept(s, pos, slot, n_max);
        }
        const int32_t n = llama_kv_policy_get_kept(s.ctx, s.seq, pos, slot, n_max);
        for (int32_t i = 0; s.n_shifted > 0 && i < std::min(n, n_max); ++i) {
            pos[i] += i < (int32_t) s.params.sinks ? 0 : s.n_shifted; // as they were before the shifts
        }
        return n;
    });
}

int32_t equip_session_head(equip_session * session, int32_t il, int32_t i_head, int32_t * pos, float * weight, int32_t n_max) {
    return equip_guard_status([&]() -> int {
        auto &     s   = check(session);
        const auto own = s.lock();
        if (n_max < 0 || (n_max > 0 && (!pos || !weight))) {
            equip_fail(EQUIP_ERR_USAGE, "no room for the positions or the weights is given");
        }
        if (!equip_is_bounded(s) || s.shift) {
            equip_fail(EQUIP_ERR_USAGE, "the kept set of a head is known under a policy with update inplace or gather only");
        }
        const int32_t n = llama_kv_policy_get_head(s.ctx, s.seq, il, i_head, pos, weight, n_max);
        if (n < 0) {
            equip_fail(EQUIP_ERR_USAGE, "layer %d has no KV head %d under the policy", il, i_head);
        }
        return n;
    });
}

int32_t equip_session_set_scores(equip_session * session, int32_t il, int32_t i_head, const int32_t * pos, const float * score, int32_t n) {
    return equip_guard_status([&]() -> int {
        auto &     s   = check(session);
        const auto own = s.lock();
        const int32_t res = llama_kv_policy_set_scores(s.ctx, s.seq, il, i_head, pos, score, n);
        if (res < 0) {
            equip_fail(equip_status_of(llama_kv_policy_error_status()), "%s", llama_kv_policy_error());
        }
        return res;
    });
}

int32_t equip_session_shares(equip_session * session, int32_t * pos, float * share, int32_t n_max) {
    return equip_guard_status([&]() -> int {
        auto &     s   = check(session);
        const auto own = s.lock();
        if (n_max < 0 || (n_max > 0 && (!pos || !share))) {
            equip_fail(EQUIP_ERR_USAGE, "no room for the positions or the shares is given");
        }
        if (!s.shift) {
            return llama_kv_policy_get_shares(s.ctx, s.seq, pos, share, n_max);
        }
        std::fill(share, share + n_max, 1.0f);
        std::vector<int32_t> slot(n_max);
        return equip_shift_kept(s, pos, slot.data(), n_max);
    });
}

const char * equip_session_stats(equip_session * session) {
    return equip_guard((const char *) nullptr, [&] {
        auto & s = check(session);
        const auto & p = s.params;
        const auto own = s.lock();

        llama_kv_policy_stats stats = {};
        const bool bounded = get_stats(s, stats);

        auto params = common_json::object();
        for (const auto & [name, value] : p.params) {
            params[name] = value;
        }

        const int32_t threads_now = llama_kv_policy_n_threads_now(s.ctx);

        const bool flash = llama_kv_policy_flash_attn(s.ctx);
        const bool has_attention = !llama_model_is_recurrent(s.model->model);

        common_json res = {
            { "policy",       p.policy                                                         },
            { "text",         p.spec                                                           },
            { "scope",        bounded ? p.scope  : "token"                                     },
            { "positions",    s.shift ? "cache" : llama_kv_policy_positions(s.ctx)             },
            { "positions_now", stats.is_ranks ? "cache" : "true"                               },
            { "rotate_every", s.shift ? 1 : stats.rotate_every                                 },
            { "n_rotations",  stats.n_rotations                                                },
            { "evict_every",  stats.evict_every                                                },
            { "page_size",    stats.page_size                                                  },
            { "parameters",   params                                                           },
            { "update",       bounded ? p.update : p.context_shift ? "context-shift" : "none"  },
            { "budget",       bounded ? stats.budget : s.n_ctx                                 },
            { "sinks",        bounded || p.context_shift ? p.sinks : 0                         },
            { "recent",       bounded ? (p.recent > 0 ? p.recent : stats.budget - stats.n_protect) : s.n_ctx },
            { "n_ctx",        s.n_ctx                                                          },
            { "n_ubatch",     s.n_ubatch                                                       },
            { "n_batch",      llama_n_batch(s.ctx)                                             },
            { "n_threads",    llama_n_threads(s.ctx)                                           },
            { "n_threads_now", threads_now > 0 ? threads_now : llama_n_threads(s.ctx)          },
            { "flash_attn",   flash                                                            },
            { "type_k",       ggml_type_name(p.cparams.type_k)                                 },
            { "type_v",       ggml_type_name(p.cparams.type_v)                                 },
            { "attn_kernel",  !has_attention ? "none" : llama_kv_policy_attn_kernel(s.ctx)      },
        };

        if (stats.score_queries > 0) {
            res["score_queries"] = stats.score_queries;
        } else {
            res["score_queries"] = bounded && stats.score_queries == 0 ? "all" : "none";
        }

        res["n_past"]       = s.n_past;
        res["n_used"]       = bounded ? stats.n_used  : llama_kv_policy_get_kept(s.ctx, s.seq, nullptr, nullptr, 0);
        res["n_slots"]      = bounded ? stats.n_slots : s.n_ctx;
        res["n_sessions"]   = p.n_sessions;
        res["n_evicted_pool"] = stats.n_evicted_pool;
        res["device_reads"]  = stats.n_device_reads;
        res["device_writes"] = stats.n_device_writes;
        res["n_filtered"]   = stats.n_filtered;
        res["n_filterable"] = stats.n_filterable;
        res["n_evicted"]    = stats.n_evicted + s.n_shifted;
        res["rope_kernel"]  = !s.shift ? "none" : p.rope_upstream ? "upstream" : "cached";
        res["score_bytes"]  = stats.score_bytes;
        res["ledger_bytes"] = stats.ledger_bytes;
        res["kv_bytes"]     = equip_kv_bytes(s.ctx);
        res["graphs_reused"] = llama_perf_context(s.ctx).n_reused;
        res["prompt_n"]     = s.prompt_n;
        res["prompt_us"]    = s.prompt_us;
        res["predicted_n"]  = s.predicted_n;
        res["predicted_us"] = s.predicted_us;
        res["policy_us"]    = stats.t_host_us;
        res["graph_us"]     = llama_kv_policy_graph_us(s.ctx);
        res["n_steps"]      = stats.n_steps;

        return equip_return(res.dump_safe());
    });
}
