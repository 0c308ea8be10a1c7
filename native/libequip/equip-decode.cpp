#include "equip-internal.h"

#include <algorithm>
#include <chrono>
#include <cmath>

static int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static int report_cancel(equip_session & s) {
    s.cancelled = false;
    return equip_set_error(EQUIP_ERR_CANCELLED, "cancelled");
}

// room for sums of a position and a number of tokens in 32 bits
static constexpr int32_t MAX_PAST = llama_kv_ledger::pos_end;

static int report_full(const equip_session & s) {
    if (s.n_past >= MAX_PAST - s.n_ubatch) {
        return equip_set_error(EQUIP_ERR_CONTEXT_FULL, equip_format("a sequence ends after %d tokens: start anew", MAX_PAST));
    }
    if (equip_is_bounded(s)) {
        return equip_set_error(EQUIP_ERR_CONTEXT_FULL, equip_format("the model has learned positions for %d tokens, and no cache changes that: start anew",
                llama_kv_policy_n_pos_max(s.model->model)));
    }
    return equip_set_error(EQUIP_ERR_CONTEXT_FULL,
            equip_format("the cache of %d tokens is full: bound it with policy=streaming, or give a larger n_ctx", s.n_ctx));
}

// upstream would search its cells and fail as well, but only after it has tried to make room
static bool has_room(const equip_session & s, int32_t n) {
    if ((int64_t) s.n_past + n > MAX_PAST) {
        return false;
    }
    const int32_t n_pos_max = llama_kv_policy_n_pos_max(s.model->model);
    if (n_pos_max > 0 && (int64_t) s.n_past + n > n_pos_max) {
        return false;
    }
    return equip_is_bounded(s) || llama_model_is_recurrent(s.model->model) || (int64_t) s.n_past - s.n_shifted + n <= s.n_ctx;
}

// update=shift with upstream's RoPE kernel: while a graph is computed
struct rope_scope {
    explicit rope_scope(equip_session & s) : s(s) {
        if (s.params.rope_upstream) {
            equip_set_rope_upstream(true);
        }
    }
    ~rope_scope() {
        if (s.params.rope_upstream) {
            llama_synchronize(s.ctx);
            equip_set_rope_upstream(false);
        }
    }

  private:
    equip_session & s;
};

// a copy of what others are about to overwrite
static void keep_logits(equip_session & s) {
    if (s.logits.empty()) {
        const float * logits = llama_get_logits_ith(s.ctx, s.i_logits);
        s.logits.assign(logits, logits + llama_vocab_n_tokens(s.model->vocab));
    }
}

// the context's outputs are about to be those of these sessions; what the others have there they keep
static void keep_logits_of_others(equip_pool_state & pool, const std::vector<equip_part> & parts) {
    for (auto * other : pool.sessions) {
        const bool is_part = std::any_of(parts.begin(), parts.end(), [&](const auto & part) { return part.session == other; });

        if (other && !is_part && other->has_logits) {
            keep_logits(*other);
        }
    }
}

// room for n more tokens; ranks: their positions where update=shift decides about them
static int make_room(equip_session & s, int32_t n, std::vector<uint32_t> & ranks) {
    if (s.is_lost) {
        return equip_set_error(EQUIP_ERR_BACKEND, "a failed step, or a state that was refused, has cost this session all that it had read: reset it and read the text again");
    }
    if ((s.params.context_shift && !equip_shift_context(s, n)) || !has_room(s, n)) {
        return report_full(s);
    }
    return s.shift && !equip_shift_place(s, n, ranks) ? report_full(s) : EQUIP_OK;
}

int equip_decode_parts(const std::vector<equip_part> & parts, int32_t n_logits) {
    auto & pool  = *parts[0].session->pool;
    auto & batch = pool.batch;

    std::vector<uint32_t> ranks; // of one session alone
    for (const auto & part : parts) {
        if (const int rc = make_room(*part.session, part.n, ranks); rc != EQUIP_OK) {
            return rc;
        }
    }
    keep_logits_of_others(pool, parts);

    batch.n_tokens = 0;
    for (const auto & part : parts) {
        auto & s = *part.session;

        s.has_logits = false;
        s.logits.clear();

        for (int32_t i = 0; i < part.n; ++i) {
            const int32_t j = batch.n_tokens++;

            batch.token   [j]    = part.tokens[i];
            batch.pos     [j]    = s.shift ? (llama_pos) ranks[i] : s.n_past - s.n_shifted + i;
            batch.n_seq_id[j]    = 1;
            batch.seq_id  [j][0] = s.seq;
            batch.logits  [j]    = i >= part.n - n_logits;
        }
        // by a session alone others ask for its outputs by their number from the end
        s.i_logits = parts.size() == 1 ? -1 : batch.n_tokens - 1;
    }

    auto & s = *parts[0].session;

    // a single token is finished rather than torn: a torn step costs a kept token, and it is over soon
    // recurrent states have no way back out of a torn chunk; and what one session cancels others go on with
    if (parts.size() == 1 && parts[0].n > 1 && !llama_model_is_hybrid(s.model->model) && !llama_model_is_recurrent(s.model->model)) {
        pool.may_abort = &s;
    }

    equip_log_scope log;
    rope_scope      rope(s);
    const int32_t rc = llama_decode(s.ctx, batch);

    pool.may_abort = nullptr;

    if (rc == 0) {
        for (const auto & part : parts) {
            if (part.session->shift) {
                equip_shift_commit(*part.session);
            }
            part.session->n_past    += part.n;
            part.session->has_logits = n_logits > 0;
        }
        return EQUIP_OK;
    }

    for (const auto & part : parts) {
        if (part.session->shift) {
            equip_shift_fail(*part.session);
        }
        // upstream has dropped the chunk; under a policy some older tokens may be gone with it, or all of them
        const int32_t n_before = part.session->n_past;
        equip_resync(*part.session);
        part.session->is_lost = part.session->n_past == 0 && n_before > 0;
    }

    switch (rc) {
        case 1:  return report_full(s);
        case 2:  return report_cancel(s);
        default: return equip_set_error(EQUIP_ERR_BACKEND, equip_format("llama.cpp could not evaluate %d tokens (code %d)%s", batch.n_tokens, rc, log.quote_first().c_str()));
    }
}

int equip_decode_chunk(equip_session & s, const int32_t * tokens, int32_t n, int32_t n_logits) {
    // in a pool there is always a row of logits, in whose place a session can put its own (equip_sample)
    return equip_decode_parts({ { &s, tokens, n } }, s.pool->sessions.size() > 1 ? std::max(1, n_logits) : n_logits);
}

const float * equip_logits(const equip_session & s) {
    return s.logits.empty() ? llama_get_logits_ith(s.ctx, s.i_logits) : s.logits.data();
}

int equip_flush_pending(equip_session & s) {
    if (s.pending == LLAMA_TOKEN_NULL) {
        return EQUIP_OK;
    }
    const llama_token token = s.pending;
    const int rc = equip_decode_chunk(s, &token, 1, /*n_logits =*/ 1);
    if (rc == EQUIP_OK) {
        s.pending = LLAMA_TOKEN_NULL;
    }
    return rc;
}

static void check_tokens(const equip_session & s, const int32_t * tokens, int32_t n) {
    const int32_t n_vocab = llama_vocab_n_tokens(s.model->vocab);
    for (int32_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || tokens[i] >= n_vocab) {
            equip_fail(EQUIP_ERR_USAGE, "token %d of the input is %d, outside the vocabulary of %d", i, tokens[i], n_vocab);
        }
    }
}

// the token is in the cache, and the sampler did not make it
static void note_read(equip_session & s, llama_token token) {
    equip_remember(s, token);
    if (s.sampler) {
        common_sampler_accept(s.sampler.get(), token, /*is_generated =*/ false);
    }
}

int equip_session_eval(equip_session * session, const int32_t * tokens, int32_t n_tokens, int32_t * n_done) {
    int32_t done = 0;

    const int rc = equip_guard_status([&]() -> int {
        if (!session || n_tokens < 0 || (n_tokens > 0 && !tokens)) {
            equip_fail(EQUIP_ERR_USAGE, "no session or no tokens are given");
        }
        auto &     s   = *session;
        const auto own = s.lock();
        check_tokens(s, tokens, n_tokens);

        if (n_tokens == 0) {
            return EQUIP_OK;
        }

        const int64_t t0 = now_ns();
        int rc = s.cancelled ? report_cancel(s) : equip_flush_pending(s);

        while (rc == EQUIP_OK && done < n_tokens) {
            if (s.cancelled) {
                s.has_logits = false; // those of an earlier token
                rc = report_cancel(s);
                break;
            }
            // a shift makes room for half of the cache at once
            const int32_t n_max = s.params.context_shift ? std::max(1, (s.n_ctx - (int32_t) s.params.sinks)/2) : s.n_ubatch;
            const int32_t n     = std::min({ n_tokens - done, s.n_ubatch, n_max });

            rc = equip_decode_chunk(s, tokens + done, n, done + n == n_tokens ? 1 : 0);
            if (rc == EQUIP_OK) {
                for (int32_t i = 0; i < n; ++i) {
                    note_read(s, tokens[done + i]);
                }
                done += n;
            }
        }
        llama_synchronize(s.ctx);

        s.prompt_n  += done;
        s.prompt_us += (now_ns() - t0) / 1000;
        return rc;
    });

    if (n_done) {
        *n_done = done;
    }
    return rc;
}

// A step is: sample, hand out, evaluate. The token is handed out before it is evaluated, since the evaluation may fail
// (no room, a backend error) when the sampler has already moved on. It is then kept as `pending`, and the next eval or
// generate evaluates it first: the text in out[] and the cache agree again, and nothing is sampled twice.
// A cancel is looked for between the steps only, where nothing is pending.
int equip_session_generate(equip_session * session, int32_t n, int32_t * out, int32_t * n_out, int * stop) {
    int32_t n_done = 0;
    int     reason = EQUIP_STOP_LENGTH;

    const int rc = equip_guard_status([&]() -> int {
        if (!session || n < 0 || (n > 0 && !out)) {
            equip_fail(EQUIP_ERR_USAGE, "no session or no room for the tokens is given");
        }
        auto &     s   = *session;
        const auto own = s.lock();

        const int64_t t0 = now_ns();
        if (!s.sampler) {
            equip_make_sampler(s);
        }
        int rc = s.cancelled ? report_cancel(s) : equip_flush_pending(s);
        if (rc == EQUIP_OK && n > 0 && !s.has_logits) {
            equip_fail(EQUIP_ERR_USAGE, "there is nothing to continue: evaluate a prompt first");
        }

        while (rc == EQUIP_OK && n_done < n) {
            if (s.cancelled) {
                rc = report_cancel(s);
                break;
            }
            const llama_token token = equip_sample(s);
            equip_remember(s, token);
            out[n_done++] = token;

            if (llama_vocab_is_eog(s.model->vocab, token)) {
                reason = EQUIP_STOP_EOG;
                break;
            }
            s.pending = token;
            rc = equip_flush_pending(s);
        }

        s.predicted_n  += n_done;
        s.predicted_us += (now_ns() - t0) / 1000;
        return rc;
    });

    if (n_out) {
        *n_out = n_done;
    }
    if (stop) {
        *stop = reason;
    }
    return rc;
}

const float * equip_session_logits(equip_session * session) {
    return equip_guard((const float *) nullptr, [&]() -> const float * {
        if (!session || !session->has_logits) {
            equip_fail(EQUIP_ERR_USAGE, "there are no logits: evaluate a token first");
        }
        const auto own = session->lock();
        if (session->pool->sessions.size() > 1) {
            keep_logits(*session); // the context's are others' as soon as one of them takes a step
        }
        return equip_logits(*session);
    });
}

// -log p(token) of a row of logits, in nats
static double nll_of(const float * logits, int32_t n_vocab, llama_token token) {
    const double max = *std::max_element(logits, logits + n_vocab);

    double sum = 0.0;
    for (int32_t i = 0; i < n_vocab; ++i) {
        sum += std::exp(logits[i] - max);
    }
    return max + std::log(sum) - logits[token];
}

int equip_session_nll(equip_session * session, const int32_t * tokens, int32_t n, int32_t n_chunk, double * nll, int32_t * n_done) {
    int32_t done = 0;

    const int rc = equip_guard_status([&]() -> int {
        if (!session || n < 0 || (n > 0 && (!tokens || !nll))) {
            equip_fail(EQUIP_ERR_USAGE, "no session, no tokens or no room for the values are given");
        }
        auto &     s   = *session;
        const auto own = s.lock();
        check_tokens(s, tokens, n);

        if (n_chunk < 1 || n_chunk > (int32_t) s.params.cparams.n_outputs_max) {
            equip_fail(EQUIP_ERR_USAGE, "a chunk of %d tokens cannot be scored: this session gives the logits of 1 to %u tokens per call (n_outputs)",
                    n_chunk, s.params.cparams.n_outputs_max);
        }

        int rc = s.cancelled ? report_cancel(s) : equip_flush_pending(s);
        if (rc == EQUIP_OK && n > 0 && !s.has_logits) {
            equip_fail(EQUIP_ERR_USAGE, "there is nothing to score the first token by: evaluate at least one token before it");
        }

        const int32_t n_vocab = llama_vocab_n_tokens(s.model->vocab);

        while (rc == EQUIP_OK && done < n) {
            if (s.cancelled) {
                rc = report_cancel(s);
                break;
            }
            const int32_t * chunk = tokens + done;
            const int32_t   m     = std::min(n_chunk, n - done);

            // the chunk's first token by the logits of the one before it
            const double first = nll_of(equip_logits(s), n_vocab, chunk[0]);

            rc = equip_decode_chunk(s, chunk, m, /*n_logits =*/ m);
            if (rc == EQUIP_OK) {
                nll[done] = first;
                for (int32_t i = 0; i < m; ++i) {
                    if (i > 0) {
                        nll[done + i] = nll_of(llama_get_logits_ith(s.ctx, i - 1), n_vocab, chunk[i]);
                    }
                    note_read(s, chunk[i]);
                }
                done += m;
            }
        }
        return rc;
    });

    if (n_done) {
        *n_done = done;
    }
    return rc;
}

int equip_session_fill(equip_session * session, int32_t n) {
    return equip_guard_status([&]() -> int {
        if (!session || n < 0) {
            equip_fail(EQUIP_ERR_USAGE, "no session is given, or a negative number of tokens");
        }
        auto &     s   = *session;
        const auto own = s.lock();

        int rc = equip_flush_pending(s);
        if (rc == EQUIP_OK && n > 0) {
            if (equip_is_bounded(s) || s.n_shifted > 0 || !llama_kv_policy_fill(s.ctx, s.seq, n)) {
                equip_fail(EQUIP_ERR_UNSUPPORTED, "rows can be copied into a plain cache of policy none that has room for %d more tokens: read tokens instead", n);
            }
            s.has_logits = false;
            equip_resync(s);
        }
        return rc;
    });
}

int equip_session_time_decode(equip_session * session, int32_t n, int rewind, int64_t * ns, int64_t * ns_host) {
    return equip_pool_time_decode(&session, 1, n, rewind, ns, ns_host);
}

//
// sessions of a pool, together
//

// at least one, none of them twice, all of one pool
static std::vector<equip_session *> check_sessions(equip_session * const * sessions, int32_t n) {
    if (!sessions || n < 1) {
        equip_fail(EQUIP_ERR_USAGE, "no session is given");
    }
    const std::vector<equip_session *> res(sessions, sessions + n);
    for (int32_t i = 0; i < n; ++i) {
        if (!res[i]) {
            equip_fail(EQUIP_ERR_USAGE, "no session is given");
        }
        if (res[i]->pool != res[0]->pool) {
            equip_fail(EQUIP_ERR_USAGE, "sessions of different pools cannot take a step together");
        }
        if (std::find(res.begin(), res.begin() + i, res[i]) != res.begin() + i) {
            equip_fail(EQUIP_ERR_USAGE, "a session is given twice");
        }
    }
    return res;
}

int equip_pool_step(equip_session * const * sessions, int32_t n_sessions, const int32_t * tokens, const int32_t * n_tokens, int32_t * sampled, int32_t * n_done) {
    return equip_guard_status([&]() -> int {
        const auto all = check_sessions(sessions, n_sessions);
        const auto own = all[0]->lock();

        // of each session: what is evaluated, a token that was handed out before first
        struct work {
            std::vector<int32_t> tokens;
            size_t               n_owed = 0;
            size_t               i      = 0; // evaluated already
        };
        std::vector<work> todo(n_sessions);

        const auto samples = [&](int32_t i) { return !n_tokens || n_tokens[i] == 0; };

        // everything is looked at before anything is done
        const int32_t * next = tokens;
        for (int32_t i = 0; i < n_sessions; ++i) {
            const auto &  s = *all[i];
            const int32_t n = n_tokens ? n_tokens[i] : 0;
            if (n < 0 || (n > 0 && !tokens) || (n == 0 && !sampled)) {
                equip_fail(EQUIP_ERR_USAGE, "no tokens, or no room for those that are sampled, are given");
            }
            check_tokens(s, next, n);
            if (n == 0 && !s.has_logits && s.pending == LLAMA_TOKEN_NULL) {
                equip_fail(EQUIP_ERR_USAGE, "there is nothing to continue in session %d: evaluate a prompt first", i);
            }
            if (s.pending != LLAMA_TOKEN_NULL) {
                todo[i].tokens.push_back(s.pending);
                todo[i].n_owed = 1;
            }
            todo[i].tokens.insert(todo[i].tokens.end(), next, next + n);
            next += n;
        }

        for (int32_t i = 0; i < n_sessions; ++i) {
            if (sampled) {
                sampled[i] = LLAMA_TOKEN_NULL;
            }
            if (n_done) {
                n_done[i] = 0;
            }
            if (all[i]->cancelled) {
                return report_cancel(*all[i]);
            }
        }

        const int64_t t0 = now_ns();

        // what there is to evaluate, in chunks; of those that sample only
        const auto evaluate = [&](bool only_samplers) -> int {
            while (true) {
                std::vector<int32_t> of;
                for (int32_t i = 0; i < n_sessions; ++i) {
                    if (todo[i].i < todo[i].tokens.size() && (samples(i) || !only_samplers)) {
                        of.push_back(i);
                    }
                }
                if (of.empty()) {
                    return EQUIP_OK;
                }

                const int32_t n_most = std::max(1, all[0]->n_ubatch / (int32_t) of.size());

                std::vector<equip_part> parts;
                for (const int32_t i : of) {
                    const auto & w = todo[i];
                    parts.push_back({ all[i], w.tokens.data() + w.i, std::min(n_most, (int32_t) (w.tokens.size() - w.i)) });
                }
                if (const int rc = equip_decode_parts(parts, /*n_logits =*/ 1); rc != EQUIP_OK) {
                    return rc;
                }
                for (size_t j = 0; j < parts.size(); ++j) {
                    auto & s = *parts[j].session;
                    auto & w = todo[of[j]];
                    for (int32_t k = 0; k < parts[j].n; ++k, ++w.i) {
                        if (w.i < w.n_owed) {
                            s.pending = LLAMA_TOKEN_NULL;
                            continue;
                        }
                        note_read(s, w.tokens[w.i]);
                        s.prompt_n++;
                        if (n_done) {
                            n_done[of[j]]++;
                        }
                    }
                }
            }
        };

        int rc = evaluate(/*only_samplers =*/ true);

        for (int32_t i = 0; i < n_sessions && rc == EQUIP_OK; ++i) {
            auto & s = *all[i];
            if (!samples(i)) {
                continue;
            }
            if (!s.sampler) {
                equip_make_sampler(s);
            }
            sampled[i] = equip_sample(s);
            equip_remember(s, sampled[i]);
            s.predicted_n++;

            if (!llama_vocab_is_eog(s.model->vocab, sampled[i])) {
                s.pending = sampled[i];
                todo[i]   = { { s.pending }, 1, 0 };
            }
        }
        if (rc == EQUIP_OK) {
            rc = evaluate(/*only_samplers =*/ false);
        }
        llama_synchronize(all[0]->ctx);

        const int64_t us = (now_ns() - t0)/1000;
        for (int32_t i = 0; i < n_sessions; ++i) {
            (samples(i) ? all[i]->predicted_us : all[i]->prompt_us) += us;
        }
        return rc;
    });
}

int equip_pool_time_decode(equip_session * const * sessions, int32_t n_sessions, int32_t n, int rewind, int64_t * ns, int64_t * ns_host) {
    return equip_guard_status([&]() -> int {
        const auto all = check_sessions(sessions, n_sessions);
        if (n < 0 || (n > 0 && (!ns || !ns_host))) {
            equip_fail(EQUIP_ERR_USAGE, "no room for the times is given");
        }
        auto &     first = *all[0];
        const auto own   = first.lock();

        if (rewind && (equip_is_bounded(first) || first.params.context_shift)) {
            equip_fail(EQUIP_ERR_USAGE, "a bounded cache keeps its size by itself: time it without rewind");
        }

        int rc = EQUIP_OK;
        for (auto * s : all) {
            rc = rc == EQUIP_OK ? equip_flush_pending(*s) : rc;
        }

        const llama_token bos   = llama_vocab_bos(first.model->vocab);
        const llama_token token = bos >= 0 ? bos : 0; // which one does not matter for the time

        std::vector<equip_part> parts;
        for (auto * s : all) {
            parts.push_back({ s, &token, 1 });
        }

        for (int32_t i = 0; rc == EQUIP_OK && i < n; ++i) {
            for (auto * s : all) {
                if (s->cancelled) {
                    rc = report_cancel(*s);
                }
            }
            if (rc != EQUIP_OK) {
                break;
            }
            const int64_t t0     = now_ns();
            const int64_t graph0 = llama_kv_policy_graph_us(first.ctx);

            rc = equip_decode_parts(parts, /*n_logits =*/ 1);
            llama_synchronize(first.ctx);

            ns[i]      = now_ns() - t0;
            ns_host[i] = ns[i] - 1000 * (llama_kv_policy_graph_us(first.ctx) - graph0);

            // outside the timed part: upstream's removal visits every cell
            for (auto * s : all) {
                if (rc == EQUIP_OK && rewind) {
                    if (!llama_memory_seq_rm(llama_get_memory(s->ctx), s->seq, s->n_past - 1, -1)) {
                        equip_fail(EQUIP_ERR_UNSUPPORTED, "this model's memory cannot drop its last token");
                    }
                    equip_resync(*s);
                }
            }
        }
        for (auto * s : all) {
            s->has_logits = false; // of a token that nobody wrote
        }
        return rc;
    });
}
