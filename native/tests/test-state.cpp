// states of a bounded memory: what is restored goes on as what was saved, to the bit; what cannot be restored is refused as a whole
// usage: test-state MODEL.gguf exact POLICY [fa=0|1] [type_k=T] [type_v=T] [n_seq=N]   (several: separated by "/")
//        test-state MODEL.gguf refuse POLICY OTHER.gguf
//        test-state MODEL.gguf mutate POLICY N SEED FILE [fa=0|1]
//        test-state MODEL.gguf loop   POLICY FILE                    save two states in turn until killed
//        test-state MODEL.gguf verify POLICY FILE                    prints the number of tokens of the file's state

#include "test-session.h"

#include <cinttypes>
#include <memory>
#include <random>

#ifndef _WIN32
#    include <sys/resource.h>
#endif

using bytes = std::vector<uint8_t>;

static constexpr int N_UBATCH = 32;

struct config {
    std::string policy;
    int         n_seq    = 1;
    int         n_ubatch = N_UBATCH;
    bool        fa       = false;
    ggml_type   type_k   = GGML_TYPE_F16;
    ggml_type   type_v   = GGML_TYPE_F16;
};

static std::unique_ptr<session> make(llama_model * model, const config & c) {
    auto res = std::make_unique<session>(model, c.policy.c_str(), c.n_ubatch, c.n_seq, c.fa, false, 4096*c.n_seq, c.type_k, c.type_v);
    if (!res->ctx) {
        die(c.policy + ": " + (llama_kv_policy_error() ? llama_kv_policy_error() : "no context"));
    }
    return res;
}

// the policy external: a caller who sets scores of tokens that are there, and of some to come
static void set_scores(session & s, int pos, int n, int seq) {
    if (std::string(llama_kv_policy_name(s.ctx)) != "external") {
        return;
    }

    // the first layer under the policy, and its last head
    int32_t               il = -1;
    llama_kv_policy_layer layer;
    do {
        CHECK(llama_kv_policy_get_layer(llama_get_model(s.ctx), ++il, &layer), "no layer under the policy");
    } while (n_fail == 0 && (layer.is_swa || layer.n_embd_k == 0));

    const int32_t i_head = layer.n_head_kv - 1;

    for (int i = std::max(0, pos - 5); i < pos + n + 7; i += 2) {
        const llama_pos p      = i;
        const float     score = (float) ((i*7919 + pos*31) % 101);
        CHECK(llama_kv_policy_set_scores(s.ctx, seq, i % 3 ? -1 : il, i % 5 ? -1 : i_head, &p, &score, 1) >= 0, "%s", llama_kv_policy_error());
    }
}

// text `t` in sequence `seq`
static int decode(session & s, int pos, int n, int seq, int t = 0) {
    set_scores(s, pos, n, seq);

    s.batch.n_tokens = n;
    for (int i = 0; i < n; ++i) {
        s.batch.token[i]     = s.text(pos + i, t);
        s.batch.pos[i]       = pos + i;
        s.batch.n_seq_id[i]  = 1;
        s.batch.seq_id[i][0] = seq;
        s.batch.logits[i]    = i == n - 1;
    }
    return llama_decode(s.ctx, s.batch);
}

static bytes save_seq(session & s, int seq, llama_state_seq_flags flags = 0) {
    bytes res(llama_state_seq_get_size_ext(s.ctx, seq, flags));
    const size_t n = llama_state_seq_get_data_ext(s.ctx, res.data(), res.size(), seq, flags);
    CHECK(n == res.size(), "a state of %zu bytes was to have %zu", n, res.size());
    return res;
}

static bytes save_all(session & s) {
    bytes res(llama_state_get_size(s.ctx));
    const size_t n = llama_state_get_data(s.ctx, res.data(), res.size());
    CHECK(n == res.size(), "a state of %zu bytes was to have %zu", n, res.size());
    return res;
}

static const char * sentence() {
    const char * res = nullptr;
    llama_kv_policy_state_status(&res);
    return res ? res : "(nothing is wrong)";
}

// ---- a text with everything that leaves traces ----

struct op { char kind; int n; }; // 'd': decode n tokens at once; 'r': take back the last n

static std::vector<op> script(bool can_rewind) {
    std::vector<op> res = { { 'd', 20 }, { 'd', 1 }, { 'd', 1 }, { 'd', 5 }, { 'd', 32 }, { 'd', 32 } }; // a chunk beyond the budget
    const auto steps = [&](int n) { res.insert(res.end(), n, { 'd', 1 }); };
    steps(7);
    if (can_rewind) {
        res.push_back({ 'r', 2 });
        steps(3);
    }
    res.push_back({ 'd', 3 });
    steps(40);
    res.push_back({ 'd', 32 });
    if (can_rewind) {
        res.push_back({ 'r', 20 }); // a draft that is mostly rejected, before its evictions are carried out
    }
    steps(12);
    return res;
}

static int apply(session & s, const op & o, int & pos, int seq) {
    if (o.kind == 'r') {
        pos -= o.n;
        return llama_memory_seq_rm(llama_get_memory(s.ctx), seq, pos, -1) ? 0 : 1;
    }
    pos += o.n;
    return decode(s, pos - o.n, o.n, seq);
}

struct moment {
    int                pos = 0; // of the next token
    std::vector<float> logits;  // empty after a rewind
    bytes              state;
};

// the logits, and the state, after each step; without a save on the way (then state is empty), or with one at each step
static std::vector<moment> run(llama_model * model, const config & c, const std::vector<op> & ops, bool saves) {
    auto s = make(model, c);

    std::vector<moment> res;
    moment m;
    for (size_t i = 0; i < ops.size(); ++i) {
        const int rc = apply(*s, ops[i], m.pos, 0);
        CHECK(rc == 0, "%s: step %zu gives %d", c.policy.c_str(), i, rc);

        m.logits = ops[i].kind == 'd' ? s->logits() : std::vector<float>();
        if (saves) {
            m.state = save_seq(*s, 0);
            CHECK(!m.state.empty(), "%s: no state after step %zu: %s", c.policy.c_str(), i, sentence());
        }
        res.push_back(m);
    }
    return res;
}

static bool same_heads(session & a, int seq_a, session & b, int seq_b, int n_layer) {
    std::vector<llama_pos> pos_a(512), pos_b(512);
    std::vector<float>     w_a(512), w_b(512);
    for (int il = 0; il < n_layer; ++il) {
        for (int h = 0;; ++h) {
            const int n = llama_kv_policy_get_head(a.ctx, seq_a, il, h, pos_a.data(), w_a.data(), 512);
            const int m = llama_kv_policy_get_head(b.ctx, seq_b, il, h, pos_b.data(), w_b.data(), 512);
            if (n != m || (n > 0 && (!std::equal(pos_a.begin(), pos_a.begin() + n, pos_b.begin()) || memcmp(w_a.data(), w_b.data(), n*sizeof(float)) != 0))) {
                return false;
            }
            if (n < 0) {
                break;
            }
        }
    }
    return true;
}

// the fields of a state that name its sequence, and the checksum behind, are not compared
static bool same_state(bytes a, bytes b) {
    const auto blank = [](bytes & x) {
        if (x.size() > 12) {
            std::fill(x.begin() + 4, x.begin() + 8, 0);
            std::fill(x.end() - 4, x.end(), 0);
        }
    };
    blank(a);
    blank(b);
    return a == b;
}

static void test_exact(llama_model * model, const config & c) {
    const bool is_hybrid = llama_model_is_hybrid(model);
    const auto ops       = script(!is_hybrid);

    const char * name = c.policy.c_str();

    const auto plain = run(model, c, ops, false);
    const auto saved = run(model, c, ops, true);

    for (size_t i = 0; i < ops.size(); ++i) {
        CHECK(plain[i].logits == saved[i].logits, "%s: saving has changed the logits of step %zu by %g", name, i, diff(plain[i].logits, saved[i].logits));
    }

    // restored on top of what other restores have left, in the last sequence; another one is there too, and stays as it is
    auto b = make(model, c);

    const int seq = c.n_seq - 1;
    if (c.n_seq > 1) {
        CHECK(decode(*b, 0, 32, 0, 5) == 0 && decode(*b, 32, 32, 0, 5) == 0 && decode(*b, 64, 32, 0, 5) == 0, "%s: the other sequence", name);
    }
    const bytes beside = c.n_seq > 1 ? save_seq(*b, 0) : bytes();

    const size_t n_next = 10;
    for (size_t i = 0; i < ops.size(); i += i < 16 || i + 14 > ops.size() ? 1 : 5) {
        const size_t got = llama_state_seq_set_data(b->ctx, saved[i].state.data(), saved[i].state.size(), seq);
        CHECK(got == saved[i].state.size(), "%s: the state after step %zu is not taken back: %s", name, i, sentence());
        CHECK(same_state(save_seq(*b, seq), saved[i].state), "%s: the restored state of step %zu is another one", name, i);
        CHECK(llama_memory_seq_pos_max(b->mem(), seq) == saved[i].pos - 1, "%s: step %zu: ends at %d", name, i, llama_memory_seq_pos_max(b->mem(), seq));

        int    pos  = saved[i].pos;
        size_t last = i;
        for (size_t j = i + 1; j < std::min(ops.size(), i + 1 + n_next); ++j) {
            const int rc = apply(*b, ops[j], pos, seq);
            CHECK(rc == 0, "%s: restored after step %zu: step %zu gives %d", name, i, j, rc);
            if (rc != 0) {
                return;
            }
            if (ops[j].kind == 'd') {
                const auto now = b->logits();
                CHECK(now == plain[j].logits, "%s: restored after step %zu: the logits of step %zu differ by %g", name, i, j, diff(plain[j].logits, now));
            }
            last = j;
        }
        CHECK(same_state(save_seq(*b, seq), saved[last].state), "%s: restored after step %zu, the state of step %zu is another one", name, i, last);
    }
    if (c.n_seq > 1) {
        CHECK(same_state(save_seq(*b, 0), beside), "%s: a restore beside it has changed a sequence", name);
    }

    // what each head keeps, and its sums
    auto a = make(model, c);
    int pos = 0;
    for (const auto & o : ops) {
        apply(*a, o, pos, 0);
    }
    CHECK(llama_state_seq_set_data(b->ctx, saved.back().state.data(), saved.back().state.size(), seq) > 0, "%s: %s", name, sentence());
    CHECK(same_heads(*a, 0, *b, seq, llama_model_n_layer(model)), "%s: a head keeps other tokens, or has other sums", name);
    CHECK(a->kept(0) == b->kept(seq) && a->stats(0).n_evicted == b->stats(seq).n_evicted && a->stats(0).n_rotations == b->stats(seq).n_rotations, "%s: the books differ", name);

    // a checkpoint is the whole of it
    const bytes part = save_seq(*a, 0, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    CHECK(same_state(part, save_seq(*a, 0)) && !part.empty(), "%s: a checkpoint of a part", name);
    CHECK(llama_state_seq_set_data_ext(b->ctx, part.data(), part.size(), seq, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == part.size(), "%s: %s", name, sentence());
    CHECK(llama_memory_seq_rm(b->mem(), seq, pos, -1) && same_state(save_seq(*b, seq), part), "%s: the removal behind a checkpoint", name);

    // of nothing
    auto empty = make(model, c);
    const bytes nothing = save_seq(*empty, 0);
    CHECK(llama_state_seq_set_data(b->ctx, nothing.data(), nothing.size(), seq) == nothing.size(), "%s: an empty sequence: %s", name, sentence());
    CHECK(b->kept(seq).empty() && decode(*b, 0, 20, seq) == 0 && b->logits() == plain[0].logits, "%s: a text after an empty state", name);

    // all of it, to memory and to a file
    const bytes all = save_all(*a);
    b = make(model, c);
    CHECK(llama_state_set_data(b->ctx, all.data(), all.size()) == all.size(), "%s: all sequences: %s", name, sentence());
    CHECK(save_all(*b) == all, "%s: the restored state of all sequences is another one", name);
    CHECK(decode(*a, pos, 1, 0) == 0 && decode(*b, pos, 1, 0) == 0 && a->logits() == b->logits(), "%s: the logits after a restore of all", name);
}

// pinned tokens, and another number of them in the sequence beside it
static void test_pinned(llama_model * model, config c) {
    c.n_seq = 2;

    auto a = make(model, c);
    auto b = make(model, c);
    CHECK(llama_kv_policy_pin(a->ctx, 0, 12) && llama_kv_policy_pin(b->ctx, 0, 6), "%s: cannot pin", c.policy.c_str());
    for (int pos = 0; pos < 128; pos += 32) {
        CHECK(decode(*a, pos, 32, 0) == 0 && decode(*b, pos, 32, 0, 3) == 0, "prompt at %d", pos);
    }
    auto r = make(model, c); // as b, and nothing is restored beside it
    llama_kv_policy_pin(r->ctx, 0, 6);
    for (int pos = 0; pos < 128; pos += 32) {
        decode(*r, pos, 32, 0, 3);
    }

    const bytes state = save_seq(*a, 0);
    CHECK(llama_state_seq_set_data(b->ctx, state.data(), state.size(), 1) == state.size(), "%s: %s", c.policy.c_str(), sentence());
    CHECK(b->stats(1).n_protect == 12 && b->stats(0).n_protect == 6, "%d and %d tokens are protected", b->stats(1).n_protect, b->stats(0).n_protect);
    for (int pos = 128; pos < 168; ++pos) {
        CHECK(decode(*a, pos, 1, 0) == 0 && decode(*b, pos, 1, 1) == 0 && a->logits() == b->logits(), "%s: the logits at %d", c.policy.c_str(), pos);
        CHECK(decode(*b, pos, 1, 0, 3) == 0 && decode(*r, pos, 1, 0, 3) == 0 && b->logits() == r->logits(), "%s: beside it, the logits at %d", c.policy.c_str(), pos);
    }
}

// ---- refusals ----

static void check_poisoned(session & s, int seq, const char * what) {
    CHECK(llama_memory_seq_pos_max(s.mem(), seq) == -1 && s.kept(seq).empty(), "%s: not empty", what);
    CHECK(!llama_memory_seq_rm(s.mem(), seq, 5, -1), "%s: a rewind to 5 is accepted", what);
    CHECK(decode(s, 5, 1, seq) < 0, "%s: a token at position 5 is accepted", what);
    CHECK(llama_state_seq_get_size(s.ctx, seq) == 0 && llama_kv_policy_state_status(nullptr) == LLAMA_KV_STATE_SEQUENCE, "%s: a poisoned sequence is saved", what);
    CHECK(llama_memory_seq_rm(s.mem(), seq, -1, -1) && decode(s, 0, 20, seq) == 0, "%s: cannot be used again", what);
}

static void fill(session & s, int seq = 0) {
    for (int pos = 0; pos < 160; pos += 32) {
        CHECK(decode(s, pos, 32, seq) == 0, "prompt at %d", pos);
    }
}

static void refused(llama_model * model, const config & c, const bytes & state, llama_kv_state_status status, const std::string & names, const char * what) {
    auto s = make(model, c);
    fill(*s);
    CHECK(llama_state_seq_set_data(s->ctx, state.data(), state.size(), 0) == 0, "%s: accepted", what);

    const char * why = nullptr;
    CHECK(llama_kv_policy_state_status(&why) == status, "%s: status %d: %s", what, llama_kv_policy_state_status(nullptr), why ? why : "");
    CHECK(why && strstr(why, names.c_str()), "%s: '%s' does not name '%s'", what, why ? why : "", names.c_str());
    if (c.policy != "none") {
        check_poisoned(*s, 0, what);
    }
}

static void test_refusals(llama_model * model, const config & base, llama_model * other) {
    const auto with = [&](auto change) {
        config c = base;
        change(c);
        return c;
    };

    auto s = make(model, base);
    fill(*s);
    const bytes state = save_seq(*s, 0);
    const bytes all   = save_all(*s);

    refused(other, base, state, LLAMA_KV_STATE_MODEL, "another model", "another model");

    struct { std::string from, to, names; } settings[] = {
        { "budget=64", "budget=96", "budget=96" }, { "recent=8", "recent=12", "recent=12" }, { "sinks=4", "sinks=2", "sinks=2" },
        { "h2o", "tova", "policy=tova" }, { "scope=head", "scope=layer", "scope=layer" }, { "positions=cache", "positions=true", "positions=true" },
        { "rotate_every=8", "rotate_every=16", "rotate_every=16" }, { "update=inplace", "update=gather", "update=gather" },
        { "score_queries=8", "score_queries=4", "score_queries=4" }, { "evict_every=1", "evict_every=2", "evict_every=2" },
    };
    for (const auto & change : settings) {
        config c = base;
        const size_t i = c.policy.find(change.from);
        CHECK(i != std::string::npos, "%s has no %s", base.policy.c_str(), change.from.c_str());
        c.policy.replace(i, change.from.size(), change.to);
        refused(model, c, state, LLAMA_KV_STATE_SETTINGS, change.names, change.to.c_str());
    }
    refused(model, with([](config & c) { c.type_k = GGML_TYPE_F32; }), state, LLAMA_KV_STATE_SETTINGS, "type_k=f32", "type of the keys");
    refused(model, with([](config & c) { c.type_v = GGML_TYPE_F32; }), state, LLAMA_KV_STATE_SETTINGS, "type_v=f32", "type of the values");
    refused(model, with([](config & c) { c.fa = true; }),              state, LLAMA_KV_STATE_SETTINGS, "v_layout=rows", "flash attention");
    refused(model, with([](config & c) { c.n_ubatch = 16; }),          state, LLAMA_KV_STATE_SETTINGS, "n_ubatch=16", "n_ubatch");
    refused(model, with([](config & c) { c.n_seq = 2; }),              state, LLAMA_KV_STATE_SETTINGS, "n_stream=2", "streams");

    // numbers of a formula
    const auto a2sf = with([](config & c) { c.policy = "a2sf:budget=64,decay=0.5"; });
    auto decays = make(model, a2sf);
    fill(*decays);
    refused(model, with([](config & c) { c.policy = "a2sf:budget=64,decay=0.75"; }), save_seq(*decays, 0), LLAMA_KV_STATE_SETTINGS, "decay=0.75", "a parameter");

    // without a policy, and back
    const auto none = with([](config & c) { c.policy = "none"; });
    auto unbounded = make(model, none);
    fill(*unbounded);
    const auto upstreams = save_seq(*unbounded, 0);
    refused(model, base, upstreams, LLAMA_KV_STATE_SETTINGS, "without a policy", "an unbounded state");
    refused(model, none, state, LLAMA_KV_STATE_SETTINGS, "policy h2o (budget 64)", "a bounded state without a policy");
    CHECK(llama_state_set_data(unbounded->ctx, all.data(), all.size()) == 0 && llama_kv_policy_state_status(nullptr) == LLAMA_KV_STATE_SETTINGS, "all of a bounded state without a policy");
    CHECK(llama_state_seq_set_data(unbounded->ctx, upstreams.data(), upstreams.size(), 0) == upstreams.size(), "upstream's own state is refused");

    // bytes
    bytes x = state;
    x[12]++;
    refused(model, base, x, LLAMA_KV_STATE_VERSION, "version", "another version");
    for (const size_t n : { state.size() - 1, state.size()/2, (size_t) 40, (size_t) 21, (size_t) 9, (size_t) 3 }) {
        refused(model, base, bytes(state.begin(), state.begin() + n), LLAMA_KV_STATE_CORRUPT, "truncated", "truncated");
    }
    for (const size_t i : { state.size() - 1, state.size()/2, (size_t) 40, (size_t) 2 }) {
        x = state;
        x[i] ^= 4;
        refused(model, base, x, LLAMA_KV_STATE_CORRUPT, "damaged", "a bit has changed");
    }
    refused(model, base, all, LLAMA_KV_STATE_CORRUPT, "damaged", "all sequences as one");

    auto t = make(model, base);

    const auto fails = [&](const char * what, size_t got, llama_kv_state_status status) {
        CHECK(got == 0 || got == SIZE_MAX, "%s: accepted", what);
        CHECK(llama_kv_policy_state_status(nullptr) == status, "%s: status %d: %s", what, llama_kv_policy_state_status(nullptr), sentence());
        check_poisoned(*t, 0, what);
        llama_memory_clear(t->mem(), true);
        fill(*t);
    };
    fill(*t);

    fails("one sequence as all", llama_state_set_data(t->ctx, state.data(), state.size()), LLAMA_KV_STATE_CORRUPT);

    // of a state of size 0, which was saved without looking, 0 bytes read would look like a success
    const size_t got = llama_state_seq_set_data(t->ctx, state.data(), 0, 0);
    CHECK(got != 0, "nothing was restored, and that is a success");
    fails("nothing", got, LLAMA_KV_STATE_CORRUPT);

    // states on the device
    const llama_state_seq_flags on_device = LLAMA_STATE_SEQ_FLAGS_ON_DEVICE;
    CHECK(llama_state_seq_get_size_ext(t->ctx, 0, on_device) == 0 && llama_kv_policy_state_status(nullptr) == LLAMA_KV_STATE_UNSUPPORTED, "a state that stays on the device");
    fails("a state on the device", llama_state_seq_set_data_ext(t->ctx, state.data(), state.size(), 0, on_device), LLAMA_KV_STATE_UNSUPPORTED);

    // sequences that are not there
    for (const int id : { 1, 77, 100000, -2 }) {
        const auto kept = t->kept();
        CHECK(llama_state_seq_get_size(t->ctx, id) == 0 && llama_kv_policy_state_status(nullptr) == LLAMA_KV_STATE_SEQUENCE, "sequence %d is saved", id);
        CHECK(llama_state_seq_set_data(t->ctx, state.data(), state.size(), id) == 0 && t->kept() == kept, "sequence %d is restored", id);
    }

    // buffers that are too small
    bytes small(save_seq(*t, 0).size() - 1);
    CHECK(llama_state_seq_get_data(t->ctx, small.data(), small.size(), 0) == 0 && llama_kv_policy_state_status(nullptr) == LLAMA_KV_STATE_BUFFER, "a buffer that is too small");
    CHECK(llama_state_get_data(t->ctx, small.data(), 16) == 0 && llama_kv_policy_state_status(nullptr) == LLAMA_KV_STATE_BUFFER, "a buffer that is too small");

    // files
    const std::string path = "test-state.refusals.tmp";
    const llama_token some[] = { 1, 2, 3 };
    llama_token tokens[8] = {};
    size_t      n_tokens  = 0;

    const size_t n_file = llama_state_seq_save_file(s->ctx, path.c_str(), 0, some, 3);
    CHECK(n_file > state.size(), "a file of one sequence: %s", sentence());
    CHECK(llama_state_seq_load_file(t->ctx, path.c_str(), 0, nullptr, 0, &n_tokens) > 0 && n_tokens == 3 && !t->kept().empty(), "looking at a file");
    CHECK(llama_state_seq_load_file(t->ctx, path.c_str(), 0, tokens, 8, &n_tokens) == n_file && n_tokens == 3 && tokens[2] == 3, "%s", sentence());
    CHECK(same_state(save_seq(*t, 0), state), "the state of a file is another one");

    fails("too many tokens", llama_state_seq_load_file(t->ctx, path.c_str(), 0, tokens, 2, &n_tokens), LLAMA_KV_STATE_BUFFER);
    fails("one sequence's file as all", llama_state_load_file(t->ctx, path.c_str(), tokens, 8, &n_tokens) ? 1 : 0, LLAMA_KV_STATE_CORRUPT);
    CHECK(llama_state_seq_load_file(unbounded->ctx, path.c_str(), 0, tokens, 8, &n_tokens) == 0 && strstr(sentence(), "policy h2o"), "a file of a bounded state: %s", sentence());

    FILE * f = fopen(path.c_str(), "ab");
    fputc(0, f);
    fclose(f);
    fails("a file that is too long", llama_state_seq_load_file(t->ctx, path.c_str(), 0, tokens, 8, &n_tokens), LLAMA_KV_STATE_CORRUPT);

    CHECK(llama_state_save_file(s->ctx, path.c_str(), some, 3), "a file of all: %s", sentence());
    CHECK(llama_state_load_file(t->ctx, path.c_str(), tokens, 8, &n_tokens) && n_tokens == 3 && save_all(*t) == all, "%s", sentence());
    CHECK(!llama_state_load_file(unbounded->ctx, path.c_str(), tokens, 8, &n_tokens) && strstr(sentence(), "policy h2o"), "a file of a bounded state: %s", sentence());
    fails("all's file as one sequence", llama_state_seq_load_file(t->ctx, path.c_str(), 0, tokens, 8, &n_tokens), LLAMA_KV_STATE_CORRUPT);

    CHECK(llama_state_seq_save_file(unbounded->ctx, path.c_str(), 0, some, 3) > 0, "an unbounded file");
    fails("an unbounded file", llama_state_seq_load_file(t->ctx, path.c_str(), 0, tokens, 8, &n_tokens), LLAMA_KV_STATE_SETTINGS);
    remove(path.c_str());
    fails("no file", llama_state_seq_load_file(t->ctx, path.c_str(), 0, tokens, 8, &n_tokens), LLAMA_KV_STATE_FILE);

    // a save that fails leaves nothing behind, and no file that was there is touched
    CHECK(llama_state_seq_save_file(s->ctx, "no-such-folder/x", 0, some, 3) == 0 && llama_kv_policy_state_status(nullptr) == LLAMA_KV_STATE_FILE, "a folder that is not there");
    CHECK(llama_state_seq_save_file(s->ctx, ".", 0, some, 3) == 0 && llama_kv_policy_state_status(nullptr) == LLAMA_KV_STATE_FILE, "a folder");

    // a step that failed half way
    n_left = 3;
    CHECK(decode(*s, 160, 1, 0) == 2, "not cancelled");
    n_left = -1;
    CHECK(llama_state_seq_get_size(s->ctx, 0) > 0, "a sequence after a cancelled step: %s", sentence());
}

// ---- faults ----

static size_t n_resident() {
#ifndef _WIN32
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (size_t) usage.ru_maxrss*1024;
#else
    return 0;
#endif
}

static uint32_t crc32(const bytes & data, size_t n) {
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < n; ++i) {
        crc ^= data[i];
        for (int k = 0; k < 8; ++k) {
            crc = crc & 1 ? (crc >> 1) ^ 0xedb88320u : crc >> 1;
        }
    }
    return ~crc;
}

static bytes read_file(const std::string & path) {
    FILE * f = fopen(path.c_str(), "rb");
    if (!f) {
        die("cannot read " + path);
    }
    bytes res;
    uint8_t buf[1 << 14];
    for (size_t n; (n = fread(buf, 1, sizeof(buf), f)) > 0;) {
        res.insert(res.end(), buf, buf + n);
    }
    fclose(f);
    return res;
}

static void write_file(const std::string & path, const bytes & data) {
    FILE * f = fopen(path.c_str(), "wb");
    if (!f || fwrite(data.data(), 1, data.size(), f) != data.size()) {
        die("cannot write " + path);
    }
    fclose(f);
}

// i_size: where the envelope's size stands
static bytes mutate(bytes x, std::mt19937_64 & rng, size_t i_size) {
    // behind it the model and the settings, then the books of the sequence
    uint32_t n_tensors, n_text;
    memcpy(&n_tensors, x.data() + i_size + 12, 4);
    const size_t i_text = i_size + 16 + 5*n_tensors;
    memcpy(&n_text, x.data() + i_text, 4);
    const size_t i_books = i_text + 4 + n_text;

    const auto below = [&](uint64_t n) { return (size_t) (rng() % n); };

    // the books stand in front, the rows of K and V behind: most changes are to go to the books
    const auto place = [&]() {
        const size_t i = below(5), from = i < 3 ? std::min(i_books, x.size() - 1) : 0;
        return from + below(std::min<size_t>(x.size() - from, i < 4 ? 64ull << below(8) : x.size()));
    };

    static const uint32_t numbers[] = { 0, 1, 2, 3, 63, 64, 65, 127, 128, 255, 256, 0x7fff, 0xffff, 0x3fffffff, 0x40000000, 0x7ffffffe, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff };

    const int n_changes = 1 + (int) below(below(4) == 0 ? 8 : 2);
    for (int i = 0; i < n_changes && x.size() > 16; ++i) {
        const size_t at = place();
        switch (below(8)) {
            case 0: x[at] ^= (uint8_t) (1u << below(8)); break;
            case 1: x[at]  = (uint8_t) rng();            break;
            case 2:
            case 3: { // a number
                uint32_t v = numbers[below(sizeof(numbers)/sizeof(numbers[0]))];
                memcpy(x.data() + std::min(at, x.size() - 4), &v, 4);
            } break;
            case 4: { // a neighbour of the number that is there
                uint32_t v;
                uint8_t * p = x.data() + std::min(at & ~(size_t) 3, x.size() - 4);
                memcpy(&v, p, 4);
                v += below(2) ? 1 : (uint32_t) -1;
                memcpy(p, &v, 4);
            } break;
            case 5: { // two numbers change places
                uint8_t * p = x.data() + std::min(at & ~(size_t) 3, x.size() - 4);
                uint8_t * q = x.data() + std::min(place() & ~(size_t) 3, x.size() - 4);
                for (int k = 0; k < 4; ++k) {
                    std::swap(p[k], q[k]);
                }
            } break;
            case 6: x.resize(x.size() - std::min(x.size() - 16, below(2) ? below(x.size()) : 1 + below(64))); break;
            case 7: { // a part is there twice, or is missing
                const size_t n = 1 + below(64);
                if (below(2)) {
                    const bytes part(x.begin() + at, x.begin() + std::min(x.size(), at + n));
                    x.insert(x.begin() + at, part.begin(), part.end());
                } else {
                    x.erase(x.begin() + at, x.begin() + std::min(x.size(), at + n));
                }
            } break;
        }
    }
    if (below(2) && x.size() > i_size + 12) {
        const uint64_t n = x.size() - (i_size - 8); // the envelope's own size is right
        memcpy(x.data() + i_size, &n, 8);
    }
    return x;
}

// mutated state files, half of them with a corrected checksum: refused, or equal to the original, or a state of its own that saves as itself
static void test_mutations(llama_model * model, const config & c, int n, uint64_t seed, const std::string & path) {
    const llama_token some[] = { 5, 6, 7, 8 };

    std::mt19937_64 rng(seed);

    const bool is_hybrid = llama_model_is_hybrid(model);
    const auto ops       = script(!is_hybrid);

    auto s = make(model, c);
    auto t = make(model, c);

    int  pos = 0;
    size_t i_op = 0;
    int  n_refused = 0, n_same = 0, n_own = 0;

    size_t n_before = 0;

    for (int i = 0; i < n; ++i) {
        // another moment of the text now and then
        if (i % 16 == 0) {
            for (size_t k = 0; k < 1 + rng() % 24; ++k) {
                if (i_op == ops.size()) {
                    llama_memory_clear(s->mem(), true);
                    pos = 0;
                    i_op = 0;
                }
                CHECK(apply(*s, ops[i_op++], pos, 0) == 0, "the text");
            }
        }
        const bool is_all = rng() % 2;
        if (is_all ? !llama_state_save_file(s->ctx, path.c_str(), some, 4) : llama_state_seq_save_file(s->ctx, path.c_str(), 0, some, 4) == 0) {
            die(sentence());
        }
        const bytes original = read_file(path);

        // magic, version, number of tokens, tokens; of all sequences a text; magic, version, size
        size_t i_size = 12 + 16;
        if (is_all) {
            uint32_t n_text;
            memcpy(&n_text, original.data() + i_size, 4);
            i_size += 4 + n_text;
        }
        i_size += 8;

        bytes x = mutate(original, rng, i_size);

        const bool is_corrected = rng() % 2;
        if (is_corrected && x.size() > 4) {
            const uint32_t crc = crc32(x, x.size() - 4);
            memcpy(x.data() + x.size() - 4, &crc, 4);
        }
        write_file(path, x);

        // something is there that a refusal has to take away
        CHECK(llama_memory_seq_rm(t->mem(), 0, -1, -1) && decode(*t, 0, 9, 0, 2) == 0, "the text before");

        llama_token tokens[16];
        size_t      n_tokens = 0;
        const bool ok = is_all ? llama_state_load_file(t->ctx, path.c_str(), tokens, 16, &n_tokens) : llama_state_seq_load_file(t->ctx, path.c_str(), 0, tokens, 16, &n_tokens) > 0;

        if (i == n/10) {
            n_before = n_resident();
        }

        if (!ok) {
            const char * why = nullptr;
            CHECK(x != original, "mutation %d of seed %" PRIu64 ": the original is refused: %s", i, seed, sentence());
            CHECK(llama_kv_policy_state_status(&why) != LLAMA_KV_STATE_OK && llama_kv_policy_state_status(nullptr) != LLAMA_KV_STATE_MEMORY && why && *why,
                    "mutation %d of seed %" PRIu64 ": no reason: %s", i, seed, why ? why : "");
            CHECK(llama_memory_seq_pos_max(t->mem(), 0) == -1 && decode(*t, 9, 1, 0) < 0, "mutation %d of seed %" PRIu64 ": refused, and not empty and poisoned", i, seed);
            n_refused++;
            continue;
        }
        if (x == original) {
            n_same++;
            continue;
        }
        CHECK(is_corrected, "mutation %d of seed %" PRIu64 ": accepted with a wrong checksum", i, seed);

        const bool saved = is_all ? llama_state_save_file(t->ctx, path.c_str(), tokens, n_tokens) : llama_state_seq_save_file(t->ctx, path.c_str(), 0, tokens, n_tokens) > 0;
        const bytes again = read_file(path);
        size_t at = 0;
        while (at < std::min(x.size(), again.size()) && x[at] == again[at]) {
            at++;
        }
        // (of the model, a state says too which weights this machine has as in their file)
        CHECK(saved && (again == x || again == original), "mutation %d of seed %" PRIu64 ": accepted, and saved as something else: byte %zu of %zu, %zu", i, seed, at, x.size(), again.size());

        // whatever it is, it can be gone on with, or says that it cannot
        int p = llama_memory_seq_pos_max(t->mem(), 0) + 1;
        for (const int m : { 1, 1, 32, 1, 1, 1, 5, 1, 1, 1, 1, 1, 1, 1, 1 }) {
            if (decode(*t, p, m, 0) == 0) {
                p += m;
            }
        }
        llama_memory_seq_rm(t->mem(), 0, p - 2, -1);
        n_own++;
    }

    CHECK(n_resident() < n_before + (64u << 20), "the mutations needed %zu MB", (n_resident() - n_before) >> 20);
    printf("refused %d, equal to the original %d, states of their own %d\n", n_refused, n_same, n_own);
}

static void loop_saves(llama_model * model, const config & c, const std::string & path) {
    std::vector<std::unique_ptr<session>> s;
    std::vector<std::vector<llama_token>> tokens;
    for (const int n : { 96, 160 }) {
        s.push_back(make(model, c));
        for (int pos = 0; pos < n; pos += 32) {
            decode(*s.back(), pos, 32, 0);
        }
        tokens.emplace_back(n, 7);
    }
    for (size_t i = 0;; ++i) {
        if (llama_state_seq_save_file(s[i % 2]->ctx, path.c_str(), 0, tokens[i % 2].data(), tokens[i % 2].size()) == 0) {
            die(sentence());
        }
        if (i == 0) {
            printf("ready\n");
            fflush(stdout);
        }
    }
}

static void verify_file(llama_model * model, const config & c, const std::string & path) {
    auto s = make(model, c);
    std::vector<llama_token> tokens(1024);
    size_t n = 0;
    CHECK(llama_state_seq_load_file(s->ctx, path.c_str(), 0, tokens.data(), tokens.size(), &n) > 0, "%s", sentence());
    CHECK(llama_memory_seq_pos_max(s->mem(), 0) + 1 == (int) n, "%zu tokens, and the newest stands at %d", n, llama_memory_seq_pos_max(s->mem(), 0));
    printf("%zu\n", n);
}

// "POLICY [key=value ...]"
static config parse_config(const std::vector<std::string> & words) {
    config res;
    res.policy = words[0];
    for (size_t i = 1; i < words.size(); ++i) {
        const size_t eq = words[i].find('=');
        const std::string key = words[i].substr(0, eq), value = eq == std::string::npos ? "" : words[i].substr(eq + 1);
        if (key == "fa") {
            res.fa = value == "1";
        } else if (key == "type_k") {
            res.type_k = type_from_name(value);
        } else if (key == "type_v") {
            res.type_v = type_from_name(value);
        } else if (key == "n_seq") {
            res.n_seq = atoi(value.c_str());
        } else {
            die("unknown option " + words[i]);
        }
    }
    return res;
}

int main(int argc, char ** argv) {
    std::vector<std::string> args(argv + std::min(argc, 3), argv + argc);
    if (args.empty()) {
        fprintf(stderr, "usage: %s MODEL.gguf exact|refuse|mutate|loop|verify POLICY ...\n", argv[0]);
        return 2;
    }
    const std::string mode = argv[2];

    llama_model * model = load_model(argv[1]);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    if (mode == "exact") {
        for (size_t i = 0; i < args.size();) {
            const size_t end = std::find(args.begin() + i, args.end(), "/") - args.begin();
            const config c = parse_config({ args.begin() + i, args.begin() + end });
            i = end + 1;
            test_exact(model, c);
            if (c.policy.find("filter=") == std::string::npos) { // which is for one sequence
                test_pinned(model, c);
            }
        }
    } else if (mode == "refuse") {
        llama_model * other = llama_model_load_from_file(args.at(1).c_str(), llama_model_default_params());
        if (!other) {
            die("cannot load the other model");
        }
        test_refusals(model, parse_config({ args[0] }), other);
        llama_model_free(other);
    } else if (mode == "mutate") {
        std::vector<std::string> words = { args[0] };
        words.insert(words.end(), args.begin() + 4, args.end());
        test_mutations(model, parse_config(words), atoi(args.at(1).c_str()), strtoull(args.at(2).c_str(), nullptr, 10), args.at(3));
    } else if (mode == "loop") {
        loop_saves(model, parse_config({ args[0] }), args.at(1));
    } else if (mode == "verify") {
        verify_file(model, parse_config({ args[0] }), args.at(1));
    } else {
        die("unknown mode " + mode);
    }

    llama_model_free(model);

    printf("%s\n", n_fail ? "FAILED" : "OK");

    return n_fail ? EXIT_FAILURE : EXIT_SUCCESS;
}
