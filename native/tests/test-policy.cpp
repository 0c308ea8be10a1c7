// what a caller of llama.h meets under a policy: failed and cancelled steps, several sequences, refused operations
// usage: test-policy MODEL.gguf

#include "test-session.h"

// the attention weights of a query that was cancelled stay: victims may be others later
static bool is_exact(const std::string & policy) {
    return policy.find("h2o") == std::string::npos && policy.find("vatp") == std::string::npos;
}

// a step that fails counts as an eviction: its slot is masked, and it is the first one written next
static void test_cancelled_step(llama_model * model, const char * policy) {
    for (const int at : { 0, 3, 11, 25 }) {
        session a(model, policy);
        session b(model, policy);

        int pos = 0;
        for (; pos < 100; pos += 20) {
            CHECK(a.decode(pos, 20) == 0 && b.decode(pos, 20) == 0, "prompt at %d", pos);
        }
        for (; pos < 150; ++pos) {
            CHECK(a.decode(pos, 1) == 0 && b.decode(pos, 1) == 0, "step %d", pos);
        }

        const auto before = a.stats();

        n_left = at;
        const int rc = a.decode(pos, 1);
        n_left = -1;

        CHECK(rc == 2, "cancelled at node %d: llama_decode gives %d", at, rc);
        const int n_used = before.n_used - (before.n_used == before.budget); // pages leave room for tokens to come
        CHECK(a.stats().n_used == n_used, "%d slots used after a cancelled step, %d before", a.stats().n_used, before.n_used);
        CHECK(llama_memory_seq_pos_max(a.mem(), 0) == pos - 1, "the cancelled token is still there");

        // the retry takes the free slot and evicts nobody: the same kept set as a run that was never cancelled
        CHECK(a.decode(pos, 1) == 0 && b.decode(pos, 1) == 0, "retry at %d", pos);
        CHECK(a.kept() == b.kept(), "another kept set after the retry");
        CHECK(diff(a.logits(), b.logits()) < 1e-5, "logits differ by %g after the retry", diff(a.logits(), b.logits()));

        for (++pos; pos < 200; ++pos) {
            CHECK(a.decode(pos, 1) == 0 && b.decode(pos, 1) == 0, "step %d", pos);
        }
        CHECK(!is_exact(policy) || diff(a.logits(), b.logits()) < 1e-5, "logits differ by %g later", diff(a.logits(), b.logits()));
    }
}

// a chunk that fails is removed whole, also when it holds the sinks
static void test_cancelled_chunk(llama_model * model, const char * policy) {
    for (const int at : { 0, 5, 17 }) {
        for (const int pos0 : { 0, 20, 100 }) {
            session a(model, policy);
            session b(model, policy);

            int pos = 0;
            for (; pos < pos0; pos += 20) {
                CHECK(a.decode(pos, 20) == 0 && b.decode(pos, 20) == 0, "prompt at %d", pos);
            }

            const auto kept = a.kept();

            n_left = at;
            const int rc = a.decode(pos, 20);
            n_left = -1;

            CHECK(rc == 2, "cancelled at node %d: llama_decode gives %d", at, rc);
            CHECK(a.kept() == kept, "the cancelled chunk left traces");

            for (; pos < pos0 + 100; pos += 20) {
                CHECK(a.decode(pos, 20) == 0 && b.decode(pos, 20) == 0, "chunk at %d", pos);
            }
            CHECK(a.kept().size() == b.kept().size(), "%zu tokens are kept, not %zu", a.kept().size(), b.kept().size());
            CHECK(!is_exact(policy) || a.kept() == b.kept(), "another kept set");
            CHECK(!is_exact(policy) || diff(a.logits(), b.logits()) < 1e-5, "logits differ by %g", diff(a.logits(), b.logits()));
        }
    }
}

// upstream places every ubatch of a batch before anything is computed: a batch of four ubatches equals four calls
static void test_batch_of_ubatches(llama_model * model, const char * policy) {
    session a(model, policy);
    session b(model, policy);

    for (int pos = 0; pos < 512; pos += 128) {
        CHECK(a.decode(pos, 128) == 0, "batch at %d", pos);
        for (int i = 0; i < 4; ++i) {
            CHECK(b.decode(pos + 32*i, 32) == 0, "call at %d", pos + 32*i);
        }
        CHECK(a.kept() == b.kept(), "another kept set at %d", pos);
        CHECK(diff(a.logits(), b.logits()) == 0.0, "logits differ by %g at %d", diff(a.logits(), b.logits()), pos);
    }
}

// each sequence has its own slots, its own ledger and its own sinks
// returns how far a sequence in a batch of three is from the same one alone (another matrix shape rounds differently)
static double test_streams(llama_model * model, const char * policy, double tolerance) {
    const int n_seq = 3;

    session all(model, policy, 32, n_seq);
    CHECK(all.ctx, "three streams: %s", llama_kv_policy_error());

    std::vector<session *> one;
    for (int s = 0; s < n_seq; ++s) {
        one.push_back(new session(model, policy));
    }

    // prompts of different lengths
    const auto text_one = [&](int s, int pos, int n) {
        auto & x = *one[s];
        x.batch.n_tokens = n;
        for (int i = 0; i < n; ++i) {
            x.batch.token[i]     = x.text(pos + i, s);
            x.batch.pos[i]       = pos + i;
            x.batch.n_seq_id[i]  = 1;
            x.batch.seq_id[i][0] = 0;
            x.batch.logits[i]    = i == n - 1;
        }
        return llama_decode(x.ctx, x.batch);
    };

    const int n_prompt = 30;
    for (int s = 0; s < n_seq; ++s) {
        CHECK(all.decode(0, n_prompt, s) == 0 && text_one(s, 0, n_prompt) == 0, "prompt of sequence %d", s);
    }

    double max = 0.0;
    for (int pos = n_prompt; pos < 200; ++pos) {
        CHECK(all.decode_all(pos, n_seq) == 0, "step %d", pos);
        for (int s = 0; s < n_seq; ++s) {
            CHECK(text_one(s, pos, 1) == 0, "step %d of sequence %d", pos, s);
            max = std::max(max, diff(one[s]->logits(), all.logits(s)));
        }
    }
    CHECK(max <= tolerance, "a sequence differs by %g from the same one alone", max);

    for (int s = 0; s < n_seq; ++s) {
        CHECK(all.kept(s) == one[s]->kept(), "kept set of sequence %d", s);
        delete one[s];
    }

    // a copy of a whole sequence goes on like the original, sinks included
    llama_memory_seq_cp(all.mem(), 2, 1, -1, -1);
    CHECK(all.kept(1) == all.kept(2), "kept set of a copied sequence");
    CHECK(all.decode_same(200, 1, 2) == 0, "decode after a copy");
    CHECK(diff(all.logits(0), all.logits(1)) <= tolerance, "a copied sequence is %g away from the original", diff(all.logits(0), all.logits(1)));

    // dropping one leaves the others alone
    const auto kept = all.kept(2);
    CHECK(llama_memory_seq_rm(all.mem(), 1, 0, -1) && all.kept(1).empty() && all.kept(2) == kept, "seq_rm of one sequence");

    return max;
}

static void test_unified_refused(llama_model * model) {
    session a(model, "streaming:budget=64", 32, 4, false, true);

    CHECK(!a.ctx, "a unified cache with four sequences was made");
    CHECK(llama_kv_policy_error() && std::string(llama_kv_policy_error()).find("--no-kv-unified") != std::string::npos, "no remedy: %s", llama_kv_policy_error());
    a.ctx = nullptr;
}

static void test_sequence_operations(llama_model * model) {
    session a(model, "streaming:budget=64");

    for (int pos = 0; pos < 100; pos += 20) {
        CHECK(a.decode(pos, 20) == 0, "prompt at %d", pos);
    }

    const auto kept = a.kept();

    CHECK(kept.size() == 64 && kept[3] == 3 && kept[4] == 40, "kept %zu, %d, %d", kept.size(), kept[3], kept[4]);
    CHECK(llama_memory_seq_pos_min(a.mem(), 0) == 40 && llama_memory_seq_pos_max(a.mem(), 0) == 99, "tail [%d, %d]",
            llama_memory_seq_pos_min(a.mem(), 0), llama_memory_seq_pos_max(a.mem(), 0));

    CHECK(!llama_memory_can_shift(a.mem()), "can_shift");

    llama_memory_seq_add(a.mem(), 0, 50, -1, -10);
    llama_memory_seq_div(a.mem(), 0, 50, -1, 2);
    CHECK(a.kept() == kept, "seq_add or seq_div moved positions");

    CHECK(!llama_memory_seq_rm(a.mem(), 0,  2, -1), "a rewind into the evicted positions");
    CHECK(!llama_memory_seq_rm(a.mem(), 0, 50, 60), "a hole in the tail");
    CHECK(!llama_memory_seq_rm(a.mem(), 0,  0, 60), "a range that ends before the newest token");
    CHECK( llama_memory_seq_rm(a.mem(), 0, 100, -1), "a rewind to the end is a no-op");
    CHECK(a.kept() == kept, "a refused operation changed the cache");

    CHECK(llama_state_get_size(a.ctx) > 0, "a state with evictions cannot be saved");
    CHECK(llama_state_seq_get_size(a.ctx, 0) > 0, "a sequence state with evictions cannot be saved");

    CHECK(llama_kv_policy_rewind_kind(a.ctx, 0, 99) == LLAMA_KV_REWIND_SHORTENED, "kind at 99");
    CHECK(llama_kv_policy_rewind_kind(a.ctx, 0, 39) == LLAMA_KV_REWIND_IMPOSSIBLE, "kind at 39");
    CHECK(llama_memory_seq_rm(a.mem(), 0, 90, -1), "a rewind by ten tokens");
    CHECK(a.kept().size() == 54 && a.kept().back() == 89, "kept %zu after the rewind", a.kept().size());
    CHECK(a.decode(90, 1) == 0, "decode after a rewind");

    // the edge: nothing but the sinks is left, and the positions go on where they were
    CHECK(llama_memory_seq_rm(a.mem(), 0, 40, -1), "a rewind to the newest evicted position + 1");
    CHECK(a.kept().size() == 4 && llama_memory_seq_pos_max(a.mem(), 0) == 39, "kept %zu", a.kept().size());
    CHECK(a.decode(40, 20) == 0, "decode after a rewind to the edge");

    CHECK(llama_memory_seq_rm(a.mem(), 0, 0, -1) && a.kept().empty() && llama_memory_seq_pos_min(a.mem(), 0) == -1, "complete removal");
    CHECK(a.stats().n_evicted == 0, "the ledger was not reset");

    session fresh(model, "streaming:budget=64");
    for (int pos = 0; pos < 100; pos += 20) {
        CHECK(a.decode(pos, 20) == 0 && fresh.decode(pos, 20) == 0, "second text at %d", pos);
    }
    CHECK(diff(a.logits(), fresh.logits()) == 0.0, "a cleared cache differs from a new one by %g", diff(a.logits(), fresh.logits()));

    llama_memory_clear(a.mem(), false);
    CHECK(a.kept().empty() && a.decode(0, 20) == 0, "llama_memory_clear");
}

// token by token after a clear: the graph of the last step must not be reused for the ubatch that holds the sinks
static void test_capture_after_clear(llama_model * model) {
    session a(model, "streaming:budget=64");
    session b(model, "streaming:budget=64");

    for (int pos = 0; pos < 80; ++pos) {
        CHECK(a.decode(pos, 1) == 0, "first text at %d", pos);
    }
    llama_memory_clear(a.mem(), true);

    double max = 0.0;
    for (int pos = 0; pos < 150; ++pos) {
        CHECK(a.decode(pos, 1, 0) == 0 && b.decode(pos, 1, 0) == 0, "step %d", pos);
        max = std::max(max, diff(a.logits(), b.logits()));
    }
    CHECK(max == 0.0, "differs by %g from a cache that was never used", max);
}

static void test_pin(llama_model * model) {
    session a(model, "streaming:budget=64");

    CHECK(!llama_kv_policy_pin(a.ctx, 0, 63), "63 pinned tokens in a budget of 64");
    CHECK( llama_kv_policy_pin(a.ctx, 0, 20), "20 pinned tokens");

    for (int pos = 0; pos < 160; pos += 20) {
        CHECK(a.decode(pos, 20) == 0, "prompt at %d", pos);
    }
    const auto kept = a.kept();
    CHECK(kept[19] == 19 && kept[20] == 116, "kept %d, %d", kept[19], kept[20]);
    CHECK(!llama_kv_policy_pin(a.ctx, 0, 10), "a pin on a sequence that is not empty");
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 2;
    }

    llama_model * model = load_model(argv[1]);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    // only the CPU stops between two nodes of a graph
    const bool can_cancel = !ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU) && !ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_IGPU);

    const double rounding = test_streams(model, "none", 1e-2);

    for (const char * policy : {
            "streaming:budget=64",
            "streaming:budget=64,positions=true",
            "random:budget=64,recent=8,positions=cache,rotate_every=1",
            "random:budget=64,recent=8,positions=cache,rotate_every=1,scope=head",
            "h2o:budget=64,recent=8,positions=true",
            "h2o:budget=64,recent=8,positions=cache,rotate_every=1",
            "h2o:budget=64,recent=8,positions=cache,rotate_every=1,scope=token",
            "vatp:budget=64,recent=8,positions=true,scope=layer",
            "pagedeviction:budget=64,recent=8,page_size=8,positions=true" }) {
        if (can_cancel) {
            test_cancelled_step (model, policy);
            test_cancelled_chunk(model, policy);
        }
        test_batch_of_ubatches(model, policy);
        test_streams          (model, policy, 2*rounding + 1e-6);
    }

    test_unified_refused    (model);
    test_sequence_operations(model);
    test_capture_after_clear(model);
    test_pin                (model);

    llama_model_free(model);

    printf("%s\n", n_fail ? "FAILED" : "OK");

    return n_fail ? EXIT_FAILURE : EXIT_SUCCESS;
}
