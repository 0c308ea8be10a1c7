// what a caller of llama.h may do to a bounded memory of any kind (plain, sliding window, hybrid), and may not: nothing aborts, nothing is
// half done, and no sequence answers from a text that its caller does not expect
// usage: test-memory MODEL.gguf [sequences | budget]
//   sequences: sixteen of them under some policies, and nothing else; budget: the trained context as budget, which is too large

#include "test-session.h"

#include <cstdio>
#include <random>
#include <set>

#if defined(__linux__)
#    include <sys/resource.h>
#    include <unistd.h>
#endif

static bool is_hybrid = false;

static bool all_finite(const std::vector<float> & x) {
    return std::all_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); });
}

static void check_books(const session & s, const char * what) {
    const auto kept = s.kept();
    const auto st   = s.stats();

    CHECK(st.n_used <= st.budget && (int) kept.size() == st.n_used, "%s: %zu tokens kept, %d slots used, budget %d", what, kept.size(), st.n_used, st.budget);
    CHECK(std::set<int>(kept.begin(), kept.end()).size() == kept.size(), "%s: a position occurs twice", what);
    CHECK(kept.empty() || kept.back() == llama_memory_seq_pos_max(s.mem(), 0), "%s: the newest token is not kept", what);
}

// the sequence is empty, and neither a rewind nor a decode in the middle lets its caller believe otherwise
static void check_poisoned(session & s, int seq, const char * what) {
    CHECK(llama_memory_seq_pos_max(s.mem(), seq) == -1 && llama_memory_seq_pos_min(s.mem(), seq) == -1 && s.kept(seq).empty(), "%s: not empty", what);
    CHECK(!llama_memory_seq_rm(s.mem(), seq, 5, -1),  "%s: a rewind to 5 is accepted", what);
    CHECK(!llama_memory_seq_rm(s.mem(),  -1, 5, -1),  "%s: a rewind of all sequences to 5 is accepted", what);
    CHECK(s.decode(5, 3, seq) < 0 && s.decode(5, 1, seq) < 0, "%s: tokens at position 5 are accepted", what);
    CHECK(llama_memory_seq_pos_max(s.mem(), seq) == -1, "%s: not empty after a refused decode", what);
}

static void check_usable(session & s, llama_model * model, const char * policy, int seq, const char * what) {
    CHECK(llama_memory_seq_rm(s.mem(), seq, -1, -1), "%s: cannot be cleared", what);
    CHECK(s.decode(0, 20, seq) == 0, "%s: a new text is not accepted", what);

    session fresh(model, policy);
    fresh.decode_as(0, 20, seq);
    CHECK(diff(s.logits(), fresh.logits()) < 1e-4, "%s: a new text differs by %g", what, diff(s.logits(), fresh.logits()));
}

// a cancelled chunk is taken back whole; where that cannot be (a recurrent state), the sequence is empty and says so
static void test_cancelled_chunk(llama_model * model, const char * policy) {
    for (const int at : { 0, 3, 9, 20, 41 }) {
        session a(model, policy);
        session b(model, policy);

        int pos = 0;
        for (; pos < 160; pos += 32) {
            CHECK(a.decode(pos, 32) == 0 && b.decode(pos, 32) == 0, "prompt at %d", pos);
        }

        for (int i = 0; i < 3; ++i) {
            n_left = at;
            const int rc = a.decode(pos, 32);
            n_left = -1;

            CHECK(rc == 2, "cancelled at node %d: llama_decode gives %d", at, rc);
            check_books(a, policy);

            if (is_hybrid) {
                CHECK(llama_memory_seq_pos_max(a.mem(), 0) == -1, "%s: a torn recurrent state was kept", policy);
                break;
            }
            CHECK(llama_memory_seq_pos_max(a.mem(), 0) == pos - 1, "%s: the cancelled chunk left traces", policy);
        }

        if (is_hybrid) {
            check_poisoned(a, 0, policy);
            CHECK(a.decode(0, 32) == 0, "%s: the text cannot be read again", policy);
            session c(model, policy);
            c.decode(0, 32);
            CHECK(diff(a.logits(), c.logits()) < 1e-5, "%s: the text read again differs by %g", policy, diff(a.logits(), c.logits()));
            pos = 32;
        }
        for (const int end = pos + 100; pos < end; ++pos) {
            CHECK(a.decode(pos, 1) == 0, "step at %d", pos);
        }
        check_books(a, policy);
        CHECK(all_finite(a.logits()), "%s: a logit is no number", policy);
    }
}

// speculation: a draft is read as a chunk, and what is rejected is dropped, past the budget, at any scope, however long the draft is
// is_exact: the sums of the queries that are dropped do not count, so that it is as if the chunk had been shorter
static void test_drafts(llama_model * model, const char * policy, bool is_exact) {
    session a(model, policy);
    session b(model, policy); // the same text in chunks of what is accepted

    std::mt19937 rng(7);

    int pos = 0;
    for (; pos < 128; pos += 32) {
        CHECK(a.decode(pos, 32) == 0 && b.decode(pos, 32) == 0, "prompt at %d", pos);
    }

    for (int i = 0; i < 60; ++i) {
        const int n_draft  = 2 + (int) (rng() % 28);
        const int n_accept = 2 + (int) (rng() % (unsigned) (n_draft - 1));

        CHECK(a.decode(pos, n_draft, 0) == 0, "%s: draft at %d", policy, pos);
        CHECK(llama_memory_seq_pos_min(a.mem(), 0) <= pos + n_accept, "%s: pos_min %d, but the draft begins at %d", policy, llama_memory_seq_pos_min(a.mem(), 0), pos);
        CHECK(llama_memory_seq_rm(a.mem(), 0, pos + n_accept, -1), "%s: %d of %d drafted tokens cannot be dropped", policy, n_draft - n_accept, n_draft);

        CHECK(b.decode(pos, n_accept) == 0, "chunk at %d", pos);
        pos += n_accept;
        CHECK(llama_memory_seq_pos_max(a.mem(), 0) == pos - 1, "%s: ends at %d", policy, llama_memory_seq_pos_max(a.mem(), 0));
        check_books(a, policy);

        if (is_exact) {
            CHECK(a.kept() == b.kept(), "%s: another kept set with drafts", policy);
        }
    }

    CHECK(a.decode(pos, 1) == 0 && b.decode(pos, 1) == 0, "the last step");
    CHECK(all_finite(a.logits()), "%s: a logit is no number", policy);
    if (is_exact) {
        CHECK(diff(a.logits(), b.logits()) < 1e-4, "%s: logits with drafts differ by %g", policy, diff(a.logits(), b.logits()));
    }
}

// ids that the context does not have are empty sequences, and touch no other one
static void test_foreign_ids(llama_model * model, const char * policy) {
    session a(model, policy, 32, 1, false, true);
    session b(model, policy, 32, 1, false, true);

    for (int pos = 0; pos < 128; pos += 32) {
        CHECK(a.decode(pos, 32) == 0 && b.decode(pos, 32) == 0, "prompt at %d", pos);
    }
    const auto kept = a.kept();

    for (const int id : { 1, 63, 255, 256, 100000 }) {
        CHECK(llama_memory_seq_pos_max(a.mem(), id) == -1 && llama_memory_seq_pos_min(a.mem(), id) == -1, "sequence %d has tokens", id);
        CHECK(llama_memory_seq_rm(a.mem(), id, -1, -1), "sequence %d is empty: nothing to refuse", id);
        llama_memory_seq_add(a.mem(), id, 0, -1, 5);
        llama_memory_seq_div(a.mem(), id, 0, -1, 2);
        llama_memory_seq_cp (a.mem(), 0, id, -1, -1);
        CHECK(a.decode(128, 1, id) != 0, "a token for sequence %d", id);
        CHECK(a.kept() == kept, "an operation on sequence %d reached sequence 0", id);
    }
    llama_memory_seq_keep(a.mem(), 0);
    CHECK(a.kept() == kept, "seq_keep(0)");

    CHECK(a.decode(128, 1) == 0 && b.decode(128, 1) == 0 && diff(a.logits(), b.logits()) == 0.0, "the logits differ by %g", diff(a.logits(), b.logits()));

    llama_memory_seq_cp(a.mem(), 7, 0, -1, -1);
    check_poisoned(a, 0, "a copy of a sequence that is not there");

    llama_memory_seq_keep(a.mem(), 1);
    CHECK(a.kept().empty() && a.decode(0, 20) == 0, "seq_keep of another one");
}

// all parts of a memory change, or none
static void test_all_or_nothing(llama_model * model, const char * policy) {
    const int n_seq = 2;

    session a(model, policy, 32, n_seq);
    session b(model, policy, 32, n_seq);

    for (session * s : { &a, &b }) {
        CHECK(s->decode(0, 32, 0) == 0, "the short sequence");
        for (int pos = 0; pos < 320; pos += 32) {
            CHECK(s->decode(pos, 32, 1) == 0, "prompt at %d", pos);
        }
    }

    const auto same = [&](const char * what) {
        for (int s = 0; s < n_seq; ++s) {
            CHECK(a.kept(s) == b.kept(s), "%s: kept set of sequence %d", what, s);
            CHECK(llama_memory_seq_pos_max(a.mem(), s) == llama_memory_seq_pos_max(b.mem(), s), "%s: end of sequence %d", what, s);
            CHECK(llama_memory_seq_pos_min(a.mem(), s) == llama_memory_seq_pos_min(b.mem(), s), "%s: beginning of sequence %d", what, s);
        }
    };

    // sequence 0 could go back to 20, sequence 1 cannot
    CHECK(!llama_memory_seq_rm(a.mem(), -1, 20, -1), "%s: a rewind of both to 20", policy);
    same("seq_rm(-1, 20)");
    CHECK(!llama_memory_seq_rm(a.mem(), 1, 20, -1), "%s: a rewind into what was evicted", policy);
    CHECK(!llama_memory_seq_rm(a.mem(), 1, 300, 310), "%s: a hole", policy);
    same("seq_rm");

    llama_memory_seq_add(a.mem(), 1, 200, -1, -50);
    llama_memory_seq_div(a.mem(), 1, 200, -1, 2);
    llama_memory_seq_add(a.mem(), 0, 10, 20, 5);
    same("seq_add, seq_div");

    CHECK(a.decode(320, 1, 1) == 0 && b.decode(320, 1, 1) == 0 && diff(a.logits(), b.logits()) == 0.0, "%s: the logits differ by %g", policy, diff(a.logits(), b.logits()));

    // the caller is told nothing: what is no copy must not pass for one
    llama_memory_seq_cp(a.mem(), 1, 0, 0, 100);
    check_poisoned(a, 0, "a copy of a part");
    CHECK(a.decode(321, 1, 1) == 0 && b.decode(321, 1, 1) == 0 && diff(a.logits(), b.logits()) == 0.0, "%s: the source has changed", policy);
    check_usable(a, model, policy, 0, "after a refused copy");

    llama_memory_seq_cp(a.mem(), 1, 0, -1, -1);
    if (!is_hybrid) {
        CHECK(a.kept(0) == a.kept(1) && a.decode_same(322, 0, 1) == 0 && diff(a.logits(0), a.logits(1)) < 1e-5, "%s: a copy of the whole", policy);
    }

    llama_memory_seq_keep(a.mem(), 1);
    CHECK(a.kept(0).empty() && !a.kept(1).empty(), "%s: seq_keep", policy);

    CHECK(llama_memory_seq_rm(a.mem(), -1, -1, -1) && a.kept(0).empty() && a.kept(1).empty(), "%s: removal of everything", policy);
    CHECK(a.decode(0, 32, 0) == 0 && a.decode(0, 32, 1) == 0, "%s: new texts", policy);
}

static std::vector<uint8_t> state_of(session & s, llama_state_seq_flags flags) {
    std::vector<uint8_t> res(llama_state_seq_get_size_ext(s.ctx, 0, flags));
    res.resize(llama_state_seq_get_data_ext(s.ctx, res.data(), res.size(), 0, flags));
    return res;
}

// a restore that is refused leaves an empty sequence and not another conversation
static void test_refused_restore(llama_model * model, const char * policy) {
    session none(model, "none");
    for (int pos = 0; pos < 96; pos += 32) {
        CHECK(none.decode(pos, 32) == 0, "prompt at %d", pos);
    }
    const auto seq_state = state_of(none, 0);
    std::vector<uint8_t> state(llama_state_get_size(none.ctx));
    state.resize(llama_state_get_data(none.ctx, state.data(), state.size()));
    CHECK(!seq_state.empty() && !state.empty(), "the state of an unbounded context");

    const std::string file = "test-memory.state.tmp";
    const llama_token some[] = { 1, 2, 3 };
    CHECK(llama_state_seq_save_file(none.ctx, file.c_str(), 0, some, 3) > 0, "the file of an unbounded context");

    const auto fill = [&](session & s) {
        for (int pos = 0; pos < 160; pos += 32) {
            CHECK(s.decode(pos, 32, 0) == 0, "prompt at %d", pos);
        }
    };

    llama_token tokens[8];
    size_t      n_tokens = 0;

    for (int kind = 0; kind < 6; ++kind) {
        session a(model, policy);
        fill(a);

        size_t got = 0;
        switch (kind) {
            case 0: got = llama_state_seq_set_data(a.ctx, seq_state.data(), seq_state.size(), 0);      break;
            case 1: got = llama_state_set_data    (a.ctx, state.data(), state.size());                 break;
            case 2: got = llama_state_seq_set_data(a.ctx, seq_state.data(), 20, 0);                    break;
            case 3: got = llama_state_seq_set_data(a.ctx, state.data(), state.size(), 0);              break;
            case 4: got = llama_state_seq_load_file(a.ctx, file.c_str(), 0, tokens, 8, &n_tokens);     break;
            case 5: got = llama_state_load_file(a.ctx, file.c_str(), tokens, 8, &n_tokens) ? 1 : 0;    break;
        }
        CHECK(got == 0, "%s: a restore of kind %d gives %zu", policy, kind, got);
        check_poisoned(a, 0, "a refused restore");
        check_usable(a, model, policy, 0, "after a refused restore");
    }

    // nothing is not taken for a state
    {
        session a(model, policy);
        fill(a);
        uint8_t nothing = 0;
        CHECK(llama_state_seq_set_data(a.ctx, &nothing, 0, 0) != 0, "%s: nothing was restored, and that is a success", policy);
        check_poisoned(a, 0, "a restore of nothing");
        CHECK(llama_state_set_data(a.ctx, &nothing, 0) != 0, "%s: nothing was restored, and that is a success", policy);
    }

    // a refused save leaves the file as it is; asking for the tokens of a file changes nothing
    {
        session a(model, policy);
        fill(a);
        const auto kept = a.kept();
        CHECK(llama_state_seq_load_file(a.ctx, file.c_str(), 0, nullptr, 0, &n_tokens) > 0 && n_tokens == 3, "%s: the tokens of a file", policy);
        CHECK(a.kept() == kept, "%s: looking at a file has changed the sequence", policy);

        llama_state_seq_set_data(a.ctx, seq_state.data(), seq_state.size(), 0);
        CHECK(llama_state_seq_get_size(a.ctx, 0) == 0 && llama_state_get_size(a.ctx) == 0, "%s: a poisoned sequence has a state", policy);
        CHECK(llama_state_seq_save_file(a.ctx, file.c_str(), 0, some, 3) == 0, "%s: a poisoned sequence was saved", policy);
        CHECK(!llama_state_save_file(a.ctx, file.c_str(), some, 3), "%s: a poisoned sequence was saved", policy);
        CHECK(llama_state_seq_load_file(a.ctx, file.c_str(), 0, nullptr, 0, &n_tokens) > 0 && n_tokens == 3, "%s: the file was overwritten by a refused save", policy);
    }
    remove(file.c_str());
}

// checkpoints, as llama-server takes and restores them: parts that cannot go back, which under a policy is all of the sequence
static void test_checkpoint(llama_model * model, const char * policy) {
    const llama_state_seq_flags flags = LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;

    for (const int at : { 32, 160 }) { // without evictions before it, and with
        session a(model, policy);
        session b(model, policy);
        for (int pos = 0; pos < at; pos += 32) {
            CHECK(a.decode(pos, 32) == 0 && b.decode(pos, 32) == 0, "prompt at %d", pos);
        }

        const auto state = state_of(a, flags);
        for (int pos = at; pos < 320; pos += 32) {
            CHECK(a.decode(pos, 32) == 0, "prompt at %d", pos);
        }

        CHECK(llama_state_seq_set_data_ext(a.ctx, state.data(), state.size(), 0, flags) == state.size(), "%s: a checkpoint was refused", policy);

        // the server counts on this removal
        CHECK(llama_memory_seq_rm(a.mem(), 0, at, -1), "%s: the removal after a checkpoint was refused", policy);
        CHECK(llama_memory_seq_pos_max(a.mem(), 0) == at - 1 && a.kept() == b.kept(), "%s: another kept set after a checkpoint", policy);

        for (const int n : { 32, 1, 1 }) {
            const int pos = llama_memory_seq_pos_max(a.mem(), 0) + 1;
            CHECK(a.decode(pos, n) == 0 && b.decode(pos, n) == 0 && a.logits() == b.logits(), "%s: after a checkpoint: %g", policy, diff(a.logits(), b.logits()));
        }
    }
}

// a context that is smaller than the budget
static void test_small_context(llama_model * model, const char * policy, bool runs) {
    session a(model, policy, 32, 1, false, false, 512);

    CHECK((a.ctx != nullptr) == runs, "%s: %s", policy, runs ? llama_kv_policy_error() : "was made");
    if (!a.ctx) {
        CHECK(llama_kv_policy_error() && std::string(llama_kv_policy_error()).find("512") != std::string::npos, "%s: %s", policy, llama_kv_policy_error());
        return;
    }
    for (int pos = 0; pos < 480; pos += 32) {
        CHECK(a.decode(pos, 32) == 0, "%s: prompt at %d", policy, pos);
    }
    for (int pos = 480; pos < 620; ++pos) {
        CHECK(a.decode(pos, 1) == 0, "%s: step at %d", policy, pos);
    }
    check_books(a, policy);
}

// the graph of many sequences holds what every one of them adds
static void test_many_sequences(llama_model * model, const char * policy) {
    const int n_seq = 16;

    session a(model, policy, 32, n_seq);
    CHECK(a.ctx, "%s: %s", policy, llama_kv_policy_error());

    for (int pos = 0; pos < 80; ++pos) {
        CHECK(a.decode_all(pos, n_seq) == 0, "%s: step %d", policy, pos);
    }
}

static void test_far_positions(llama_model * model, const char * policy) {
    session a(model, policy);

    const int end = INT32_MAX - 100;
    CHECK(a.decode(end, 32) < 0 && a.decode(INT32_MAX - 1, 1) < 0, "%s: positions at the end of 32 bits", policy);
    CHECK(llama_memory_seq_pos_max(a.mem(), 0) == -1, "%s: a refused token was kept", policy);
    CHECK(a.decode(0, 32) == 0, "%s: a text after that", policy);
}

// contexts that nobody generates with are left alone by the environment
static void test_other_contexts(llama_model * model) {
#ifndef _WIN32
    setenv("LLAMA_KV_POLICY", "streaming:budget=64", 1);

    const int n_swa = llama_kv_policy_n_swa(model);

    const auto name_of = [&](void (*change)(llama_context_params &)) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = 512;
        change(params);
        llama_context * ctx = llama_init_from_model(model, params);
        CHECK(ctx, "no context: %s", llama_kv_policy_error());
        const std::string res = ctx ? llama_kv_policy_name(ctx) : "";
        llama_free(ctx);
        return res;
    };

    CHECK(name_of([](llama_context_params &) {}) == "streaming", "a plain context is not bounded");
    CHECK(name_of([](llama_context_params & p) { p.embeddings = true; p.n_seq_max = 4; p.kv_unified = true; }) == "none", "embeddings");
    if (!is_hybrid) {
        CHECK(name_of([](llama_context_params & p) { p.pooling_type = LLAMA_POOLING_TYPE_MEAN; }) == "none", "pooling");
        CHECK(name_of([](llama_context_params & p) { p.attention_type = LLAMA_ATTENTION_TYPE_NON_CAUSAL; }) == "none", "attention to both sides");
    }

    static llama_context * target;
    target = llama_init_from_model(model, llama_context_default_params());
    CHECK(name_of([](llama_context_params & p) { p.ctx_other = target; }) == "none", "a draft's context");
    llama_free(target);

    CHECK(llama_model_n_swa(model) == 0, "n_swa %d under a policy", llama_model_n_swa(model));
    setenv("LLAMA_KV_POLICY", "none:cpu_attn=1", 1);
    CHECK(llama_model_n_swa(model) == n_swa && name_of([](llama_context_params &) {}) == "none", "n_swa %d without one, not %d", llama_model_n_swa(model), n_swa);
    unsetenv("LLAMA_KV_POLICY");
#else
    (void) model;
#endif
}

static void test_null(llama_model * model) {
    CHECK(!llama_kv_policy_flash_attn(nullptr) && llama_kv_policy_graph_us(nullptr) == 0 && llama_kv_policy_get_delta(nullptr, 0) == 0, "no context");
    CHECK(llama_kv_policy_get_kept(nullptr, 0, nullptr, nullptr, 0) == 0 && llama_kv_policy_get_shares(nullptr, 0, nullptr, nullptr, 0) == 0, "no context");
    CHECK(llama_kv_policy_get_head(nullptr, 0, 0, 0, nullptr, nullptr, 0) == -1 && !llama_kv_policy_pin(nullptr, 0, 4), "no context");
    CHECK(!llama_kv_policy_get_stats(nullptr, 0, nullptr) && !llama_kv_policy_fill(nullptr, 0, 1) && llama_kv_policy_attn_kernel(nullptr), "no context");
    CHECK(std::string(llama_kv_policy_name(nullptr)) == "none" && llama_kv_policy_rewind_kind(nullptr, 0, 5) == LLAMA_KV_REWIND_EXACT, "no context");

    // whatever is quoted, a sentence is one line
    for (const char * text : { "stre\naming", "h2o:bud\x1b[31mget=3", "h2o:budget=\n", "h2o:scope=\r\n" }) {
        const auto   status = llama_kv_policy_check(text);
        const char * why    = llama_kv_policy_error();
        CHECK(status == LLAMA_KV_POLICY_USAGE && status == llama_kv_policy_error_status(), "status %d", status);
        CHECK(why && std::none_of(why, why + strlen(why), [](char c) { return (unsigned char) c < 0x20; }), "a sentence of more than one line");
    }

    CHECK(llama_kv_policy_check("streaming:budget=-1") == LLAMA_KV_POLICY_BUDGET && llama_kv_policy_check("h2o") == LLAMA_KV_POLICY_OK && !llama_kv_policy_error(), "statuses");

    llama_context_params     params = llama_context_default_params();
    llama_kv_policy_resolved res    = {};
    CHECK(llama_kv_policy_resolve(nullptr, &params, "h2o", &res) == LLAMA_KV_POLICY_USAGE && llama_kv_policy_resolve(model, nullptr, "h2o", &res) == LLAMA_KV_POLICY_USAGE &&
            llama_kv_policy_resolve(model, &params, "h2o", nullptr) == LLAMA_KV_POLICY_USAGE && llama_kv_policy_error(), "nothing to resolve");
    CHECK(llama_kv_policy_resolve(model, &params, nullptr, &res) == LLAMA_KV_POLICY_OK && std::string(res.text) == "none" && res.n_ubatch == params.n_ubatch, "no text");

    session a(model, "streaming:budget=64");
    for (const int id : { -1, 1, 300 }) {
        CHECK(llama_kv_policy_get_kept(a.ctx, id, nullptr, nullptr, 0) == 0 && !llama_kv_policy_pin(a.ctx, id, 4), "sequence %d", id);
    }
}

// what the policy needs beside the cache does not fit: a sentence, and the sequence goes on as it was
static void test_out_of_memory(llama_model * model) {
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    const char * policy = "streaming:budget=60000";

    bool has_keys = false;
    llama_kv_policy_layer layer;
    for (int32_t il = 0; llama_kv_policy_get_layer(model, il, &layer); ++il) {
        has_keys = has_keys || (layer.n_embd_k > 0 && !layer.is_swa);
    }
    if (!has_keys) {
        return; // no original is kept
    }

    session a(model, policy, 32, 1, false, false, 1 << 17);
    CHECK(a.decode(0, 32) == 0, "the beginning");
    llama_memory_clear(a.mem(), true);

    FILE * f = fopen("/proc/self/statm", "r");
    long   pages = 0;
    CHECK(f && fscanf(f, "%ld", &pages) == 1, "no statm");
    fclose(f);

    struct rlimit before;
    getrlimit(RLIMIT_AS, &before);
    struct rlimit tight = before;
    tight.rlim_cur = (rlim_t) pages*sysconf(_SC_PAGESIZE) + (8 << 20);
    setrlimit(RLIMIT_AS, &tight);
    const bool pinned = llama_kv_policy_pin(a.ctx, 0, 50000);
    setrlimit(RLIMIT_AS, &before);

    CHECK(!pinned, "50,000 originals in 8 MB");
    CHECK(a.stats().n_protect == 4, "%d tokens are protected after a refused pin", a.stats().n_protect);

    session b(model, policy, 32, 1, false, false, 1 << 17);
    CHECK(a.decode(0, 32) == 0 && b.decode(0, 32) == 0 && diff(a.logits(), b.logits()) == 0.0, "a text after a refused pin");
#else
    (void) model;
#endif
}

// a context length that slots cannot be counted with
static void test_huge_context(llama_model * model) {
    llama_kv_policy_set_next("streaming:budget=0");
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 0;
    llama_context * ctx = llama_init_from_model(model, params);
    llama_kv_policy_set_next(nullptr);

    CHECK(!ctx && llama_kv_policy_error() && strstr(llama_kv_policy_error(), "too large"), "a budget of the trained context, %d", llama_model_n_ctx_train(model));
    llama_free(ctx);
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 2 ? argv[2] : "";
    if (argc < 2 || argc > 3 || !(mode.empty() || mode == "sequences" || mode == "budget")) {
        fprintf(stderr, "usage: %s MODEL.gguf [sequences | budget]\n", argv[0]);
        return 2;
    }

    llama_model * model = load_model(argv[1]);
    is_hybrid = llama_model_is_hybrid(model);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    if (mode == "budget") {
        test_huge_context(model);
    }
    for (const char * policy : { "streaming:budget=64", "h2o:budget=64,recent=8,positions=cache", "random:budget=64,recent=8,update=gather" }) {
        if (mode == "sequences") {
            test_many_sequences(model, policy);
        }
    }
    if (!mode.empty()) {
        llama_model_free(model);
        printf("%s\n", n_fail ? "FAILED" : "OK");
        return n_fail ? EXIT_FAILURE : EXIT_SUCCESS;
    }

    const bool can_cancel = !ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU) && !ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_IGPU);

    for (const char * policy : {
            "streaming:budget=64",
            "streaming:budget=64,positions=true",
            "random:budget=64,recent=8,positions=true",
            "knorm:budget=64,recent=8,positions=true,scope=layer",
            "h2o:budget=64,recent=8,positions=true",
            "h2o:budget=64,recent=8,positions=cache,rotate_every=8",
            "tova:budget=64,recent=8,positions=true,scope=token",
            "snapkv:budget=64,recent=8,positions=auto",
            "pagedeviction:budget=64,recent=8,page_size=8,positions=true",
            "rkv:budget=64,recent=8,positions=true,evict_every=4" }) {
        if (llama_kv_policy_why_not(model, policy) || (is_hybrid && strstr(policy, "positions=cache"))) {
            continue; // the model has layers without what the policy reads
        }
        printf("%s\n", policy);

        const bool is_streaming = strncmp(policy, "streaming", 9) == 0;

        if (can_cancel) {
            test_cancelled_chunk(model, policy);
        }
        if (!is_hybrid) {
            test_drafts(model, policy, is_streaming);
        }
        test_foreign_ids    (model, policy);
        test_all_or_nothing (model, policy);
        test_refused_restore(model, policy);
        test_checkpoint     (model, policy);
        test_many_sequences (model, policy);
        test_far_positions  (model, policy);
    }

    test_small_context(model, "streaming:budget=4096",            true);
    test_small_context(model, "streaming:budget=4096,sinks=600",  false);
    test_small_context(model, "random:budget=4096,recent=700",    false);
    test_small_context(model, "random:budget=4096",               true);
    if (!is_hybrid) {
        test_small_context(model, "h2o:budget=4096,evict_every=8",    true);
        test_small_context(model, "h2o:budget=4096,recent=1024",      false);
        test_small_context(model, "snapkv:budget=4096,recent=500",    true);
        test_small_context(model, "pagedeviction:budget=4096",        true);
        test_small_context(model, "pagedeviction:budget=4000,page_size=400", false);
    }

    test_other_contexts(model);
    test_null(model);
    if (can_cancel && !is_hybrid) {
        test_out_of_memory(model);
    }

    llama_model_free(model);

    printf("%s\n", n_fail ? "FAILED" : "OK");

    return n_fail ? EXIT_FAILURE : EXIT_SUCCESS;
}
