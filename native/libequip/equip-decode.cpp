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

int equip_decode_chunk(equip_session & s, const int32_t * tokens, int32_t n, int32_t n_logits) {
    s.has_logits = false;

    if (s.is_lost) {
        return equip_set_error(EQUIP_ERR_BACKEND, "a failed step, or a state that was refused, has cost this session all that it had read: reset it and read the text again");
    }
    if ((s.params.context_shift && !equip_shift_context(s, n)) || !has_room(s, n)) {
        return report_full(s);
    }

    std::vector<uint32_t> ranks;
    if (s.shift && !equip_shift_place(s, n, ranks)) {
        return report_full(s);
    }

    for (int32_t i = 0; i < n; ++i) {
        s.batch.token   [i]    = tokens[i];
        s.batch.pos     [i]    = s.shift ? (llama_pos) ranks[i] : s.n_past - s.n_shifted + i;
        s.batch.n_seq_id[i]    = 1;
        s.batch.seq_id  [i][0] = 0;
        s.batch.logits  [i]    = i >= n - n_logits;
    }
    s.batch.n_tokens = n;

    // a single token is finished rather than torn: a torn step costs a kept token, and it is over soon
    // recurrent states have no way back out of a torn chunk
    s.may_abort = n > 1 && !llama_model_is_hybrid(s.model->model) && !llama_model_is_recurrent(s.model->model);

    equip_log_scope log;
    rope_scope      rope(s);
    const int32_t rc = llama_decode(s.ctx, s.batch);

    s.may_abort = false;

    if (rc == 0) {
        if (s.shift) {
            equip_shift_commit(s);
        }
        s.n_past    += n;
        s.has_logits = n_logits > 0;
        return EQUIP_OK;
    }

    if (s.shift) {
        equip_shift_fail(s);
    }

    // upstream has dropped the chunk; under a policy some older tokens may be gone with it, or all of them
    const int32_t n_before = s.n_past;
    equip_resync(s);
    s.is_lost = s.n_past == 0 && n_before > 0;

    switch (rc) {
        case 1:  return report_full(s);
        case 2:  return report_cancel(s);
        default: return equip_set_error(EQUIP_ERR_BACKEND, equip_format("llama.cpp could not evaluate %d tokens (code %d)%s", n, rc, log.quote_first().c_str()));
    }
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
        auto & s = *session;
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
        auto & s = *session;

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
        return llama_get_logits_ith(session->ctx, -1);
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
        auto & s = *session;
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
            const double first = nll_of(llama_get_logits_ith(s.ctx, -1), n_vocab, chunk[0]);

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
        auto & s = *session;

        int rc = equip_flush_pending(s);
        if (rc == EQUIP_OK && n > 0) {
            if (equip_is_bounded(s) || s.n_shifted > 0 || !llama_kv_policy_fill(s.ctx, 0, n)) {
                equip_fail(EQUIP_ERR_UNSUPPORTED, "rows can be copied into a plain cache of policy none that has room for %d more tokens: read tokens instead", n);
            }
            s.has_logits = false;
            equip_resync(s);
        }
        return rc;
    });
}

int equip_session_time_decode(equip_session * session, int32_t n, int rewind, int64_t * ns, int64_t * ns_host) {
    return equip_guard_status([&]() -> int {
        if (!session || n < 0 || (n > 0 && (!ns || !ns_host))) {
            equip_fail(EQUIP_ERR_USAGE, "no session or no room for the times is given");
        }
        auto & s = *session;
        if (rewind && (equip_is_bounded(s) || s.params.context_shift)) {
            equip_fail(EQUIP_ERR_USAGE, "a bounded cache keeps its size by itself: time it without rewind");
        }

        int rc = equip_flush_pending(s);

        const llama_token bos   = llama_vocab_bos(s.model->vocab);
        const llama_token token = bos >= 0 ? bos : 0; // which one does not matter for the time

        for (int32_t i = 0; rc == EQUIP_OK && i < n; ++i) {
            if (s.cancelled) {
                rc = report_cancel(s);
                break;
            }
            const int64_t t0     = now_ns();
            const int64_t graph0 = llama_kv_policy_graph_us(s.ctx);

            rc = equip_decode_chunk(s, &token, 1, /*n_logits =*/ 1);
            llama_synchronize(s.ctx);

            ns[i]      = now_ns() - t0;
            ns_host[i] = ns[i] - 1000 * (llama_kv_policy_graph_us(s.ctx) - graph0);

            // outside the timed part: upstream's removal visits every cell
            if (rc == EQUIP_OK && rewind) {
                if (!llama_memory_seq_rm(llama_get_memory(s.ctx), 0, s.n_past - 1, -1)) {
                    equip_fail(EQUIP_ERR_UNSUPPORTED, "this model's memory cannot drop its last token");
                }
                equip_resync(s);
            }
        }
        s.has_logits = false; // of a token that nobody wrote
        return rc;
    });
}
