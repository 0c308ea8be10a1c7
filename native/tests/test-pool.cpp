// many sequences in one bounded cache: no row has two owners, nobody reads another's text, all room is used and given back, and each
// keeps what the policy would keep of it alone with the same allotment
// usage: test-pool MODEL.gguf [quick | seed operations]
//   quick: a third of the policies

#include "test-session.h"

#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <set>

static const int N_UBATCH = 32;

// a batch of several sequences, so many tokens of each
struct part {
    int seq;
    int pos;
    int n;
    int text; // whose text it is
};

static int decode(session & s, const std::vector<part> & parts) {
    int n = 0;
    for (const auto & p : parts) {
        for (int i = 0; i < p.n; ++i, ++n) {
            s.batch.token[n]     = s.text(p.pos + i, p.text);
            s.batch.pos[n]       = p.pos + i;
            s.batch.n_seq_id[n]  = 1;
            s.batch.seq_id[n][0] = p.seq;
            s.batch.logits[n]    = i == p.n - 1;
        }
    }
    s.batch.n_tokens = n;
    return llama_decode(s.ctx, s.batch);
}

static std::string pool(const char * policy, int n, int budget) {
    return std::string(policy) + (strchr(policy, ':') ? "," : ":") + "budget=" + std::to_string(budget) + ",pool=" + std::to_string(n);
}

// streaming keeps the first tokens and the newest
static void check_streaming(const session & s, int seq, int n_sinks) {
    const auto kept = s.kept(seq);
    const auto st   = s.stats(seq);

    CHECK((int) kept.size() <= st.budget, "sequence %d keeps %zu of %d", seq, kept.size(), st.budget);
    for (size_t i = 0; i < kept.size(); ++i) {
        const int want = (int) i < n_sinks ? (int) i : kept.back() - (int) (kept.size() - 1 - i);
        CHECK(kept[i] == want, "sequence %d keeps %d as its token %zu, not %d", seq, kept[i], i, want);
    }
}

static bool is_on_device() {
    return getenv("EQUIP_TEST_RPC") || getenv("EQUIP_TEST_BACKEND");
}

static bool is_scored(const char * policy) {
    return strncmp(policy, "streaming", 9) != 0 && strncmp(policy, "random", 6) != 0;
}

// what the heads of a sequence have seen of its tokens, in two contexts
static double weights_differ(const session & a, int seq_a, const session & b, int seq_b, int n_layer, int n_head_kv) {
    double res = 0.0;
    for (int il = 0; il < n_layer; ++il) {
        for (int h = 0; h < n_head_kv; ++h) {
            std::vector<int>   pos(512);
            std::vector<float> wa(512), wb(512);
            const int n = llama_kv_policy_get_head(a.ctx, seq_a, il, h, pos.data(), wa.data(), 512);
            const int m = llama_kv_policy_get_head(b.ctx, seq_b, il, h, pos.data(), wb.data(), 512);
            if (n != m) {
                return INFINITY;
            }
            for (int i = 0; i < n; ++i) {
                res = std::max(res, (double) fabsf(wa[i] - wb[i])/(1.0 + fabsf(wb[i])));
            }
        }
    }
    return res;
}

// room for all: each sequence is as it would be alone
// victims at near-ties may differ by the rounding of a batch: without flash attention, in f32, none do here but those of knorm, whose text
// has tokens twice; else the weights are compared until the first one goes
static void test_alone(llama_model * model, const char * policy, bool fa, ggml_type type, double tolerance) {
    const int n_seq = 5;

    session all(model, pool(policy, 5*128, 128).c_str(), N_UBATCH, n_seq, fa, true, 4096, type, type);

    std::vector<std::unique_ptr<session>> alone;
    for (int i = 0; i < n_seq; ++i) {
        alone.push_back(std::make_unique<session>(model, (std::string(policy) + (strchr(policy, ':') ? "," : ":") + "budget=128").c_str(), N_UBATCH, 1, fa, false, 4096, type, type));
    }

    std::vector<int> pos(n_seq, 0);
    std::mt19937     rng(7);

    int n_weights = 0;

    for (int step = 0; step < 200; ++step) {
        // some of them, in any order: one token each, or chunks as long
        std::vector<part> parts;
        const int n = rng() % 3 == 0 ? 1 + (int) (rng() % 6) : 1;
        for (int i = 0; i < n_seq; ++i) {
            if (rng() % 4 != 0) {
                parts.push_back({ i, pos[i], step < 2 ? 6 : n, i });
            }
        }
        std::shuffle(parts.begin(), parts.end(), rng);
        if (parts.empty()) {
            continue;
        }
        CHECK(decode(all, parts) == 0, "%s: step %d", policy, step);
        CHECK(llama_kv_policy_is_sound(all.ctx), "%s: the books after step %d", policy, step);

        int i_last = -1;
        for (const auto & p : parts) {
            i_last += p.n;
            CHECK(alone[p.seq]->decode_as(p.pos, p.n, p.text) == 0, "%s: sequence %d alone", policy, p.seq);
            if (is_scored(policy)) {
                // a window starts over whenever the allotment is nearly full
                const bool has_window = strncmp(policy, "snapkv", 6) == 0 || strncmp(policy, "rkv", 3) == 0;
                if (all.stats(p.seq).n_evicted == 0 && !has_window && step % 3 == 0) {
                    const double w = weights_differ(all, p.seq, *alone[p.seq], 0, llama_model_n_layer(model), llama_model_n_head_kv(model));
                    CHECK(w < (type == GGML_TYPE_Q8_0 ? 6e-2 : fa ? 2e-2 : 1e-4), "%s: %s, fa %d: step %d, sequence %d: weights differ by %g", policy, ggml_type_name(type), fa, step, p.seq, w);
                    n_weights++;
                }
                if (fa || strncmp(policy, "knorm", 5) == 0) {
                    pos[p.seq] += p.n;
                    continue;
                }
            }
            const double d = diff(all.logits(i_last), alone[p.seq]->logits());
            CHECK(d < tolerance, "%s: %s, fa %d: step %d, sequence %d differs by %g", policy, ggml_type_name(type), fa, step, p.seq, d);
            CHECK(all.kept(p.seq) == alone[p.seq]->kept(), "%s: step %d, sequence %d keeps other tokens (%s, fa %d)", policy, step, p.seq, ggml_type_name(type), fa);
            pos[p.seq] += p.n;
        }
    }
    CHECK(!is_scored(policy) || strncmp(policy, "snapkv", 6) == 0 || strncmp(policy, "rkv", 3) == 0 || n_weights > 40, "%s: weights were compared %d times", policy, n_weights);
    for (int i = 0; i < n_seq; ++i) {
        CHECK(all.stats(i).n_evicted > 50, "%s: sequence %d has evicted %lld", policy, i, (long long) all.stats(i).n_evicted);
    }
}

// a crowd: what the others read makes no difference, how much they read does
static void test_others_text(llama_model * model, const char * policy, double tolerance) {
    const int n_seq = 6;

    session a(model, pool(policy, 6*128, 512).c_str(), N_UBATCH, n_seq, false, true);
    session b(model, pool(policy, 6*128, 512).c_str(), N_UBATCH, n_seq, false, true);

    std::vector<int> pos(n_seq, 0);
    std::mt19937     rng(11);

    bool was_small = false;

    for (int step = 0; step < 160; ++step) {
        std::vector<part> parts, others;
        const int n = rng() % 4 == 0 ? 2 + (int) (rng() % 4) : 1;
        for (int i = 0; i < n_seq; ++i) {
            if (i == 0 || (step > 20*i && rng() % 2)) {
                const int m = i == 0 && step < 30 ? 20 : n;
                parts .push_back({ i, pos[i], m, i });
                others.push_back({ i, pos[i], m, i == 0 ? 0 : i + 100 });
            }
        }
        CHECK(decode(a, parts) == 0 && decode(b, others) == 0, "%s: step %d", policy, step);
        CHECK(llama_kv_policy_is_sound(a.ctx), "%s: the books after step %d", policy, step);

        const int    i0 = parts[0].n - 1;
        const double d  = diff(a.logits(i0), b.logits(i0));
        CHECK(d < tolerance, "%s: step %d: sequence 0 differs by %g with other texts beside it", policy, step, d);
        for (const auto & p : parts) {
            CHECK(a.kept(p.seq) == b.kept(p.seq), "%s: step %d", policy, step);
            pos[p.seq] += p.n;
        }
        was_small = was_small || (pos[0] > 400 && a.stats(0).budget < 400);
    }
    CHECK(was_small, "%s: sequence 0 never had to give way", policy);
}

// a sequence in a crowd against one alone that is given the same allotments, when it was given them
static void test_given_allotments(llama_model * model, const char * policy, double tolerance) {
    const int n_seq = 6;

    session crowd(model, pool(policy, n_seq*128, 512).c_str(), N_UBATCH, n_seq, false, true);
    session alone(model, pool(policy, n_seq*128, 512).c_str(), N_UBATCH, 1,     false, true);

    std::vector<int> pos(n_seq, 0);
    std::mt19937     rng(13);

    int have = 0, n_shrunk = 0, n_grown = 0;

    for (int step = 0; step < 260; ++step) {
        std::vector<part> parts;
        const int n = step >= 180 ? 8 : rng() % 4 == 0 ? 2 + (int) (rng() % 4) : 1;
        for (int i = 0; i < n_seq; ++i) {
            if (i == 0 ? step < 30 || rng() % 3 : step > 15*i + 15 && step < 180 && rng() % 2) {
                parts.push_back({ i, pos[i], i == 0 && step < 30 ? 20 : n, i });
                pos[i] += parts.back().n;
            }
        }
        // later the others leave one after the other
        if (step >= 180 && step % 10 == 0 && (step - 180)/10 + 1 < n_seq) {
            CHECK(llama_memory_seq_rm(crowd.mem(), (step - 180)/10 + 1, -1, -1), "%s: removal", policy);
        }
        if (parts.empty()) {
            continue;
        }
        CHECK(decode(crowd, parts) == 0, "%s: step %d", policy, step);

        // a page at a time, as it was taken
        const int now = crowd.stats(0).budget;
        while (have != now) {
            n_shrunk += now < have;
            n_grown  += now > have && n_shrunk > 0;
            have = now < have ? std::max(now, (have + 63)/64*64 - 64) : now;
            CHECK(llama_kv_policy_allot(alone.ctx, 0, have), "%s: step %d: an allotment of %d", policy, step, have);
        }
        if (parts[0].seq == 0) {
            const auto & p = parts[0];
            CHECK(alone.decode(p.pos, p.n) == 0, "%s: step %d", policy, step);
            const double d = diff(crowd.logits(p.n - 1), alone.logits());
            CHECK(d < tolerance, "%s: step %d: differs by %g from a sequence alone", policy, step, d);
        }
        CHECK(crowd.kept(0) == alone.kept() && crowd.stats(0).n_evicted == alone.stats().n_evicted, "%s: step %d: other tokens are kept (allotment %d)", policy, step, have);
    }
    CHECK(n_shrunk > 3 && n_grown > 3, "%s: sequence 0 has given %d pages and got %d back", policy, n_shrunk, n_grown);
    CHECK(!llama_kv_policy_allot(alone.ctx, 0, 513) && !llama_kv_policy_allot(alone.ctx, 0, 5) && !llama_kv_policy_allot(alone.ctx, 1, 128), "%s: an allotment that cannot be", policy);
}

// true positions in a crowd, against a cache without a policy from which the same tokens were removed
static void test_true_positions(llama_model * model) {
    const int n_seq = 4;

    session all(model, pool("streaming:positions=true", 4*192, 512).c_str(), N_UBATCH, n_seq, false, true);
    session one(model, "none", N_UBATCH);

    std::vector<int> pos(n_seq, 0);
    std::set<int>    there;

    for (int step = 0; step < 400; ++step) {
        std::vector<part> parts;
        for (int i = 0; i < n_seq; ++i) {
            if (i == 0 || step > 60*i) {
                parts.push_back({ i, pos[i]++, 1, i });
            }
        }
        CHECK(decode(all, parts) == 0, "step %d", step);
        check_streaming(all, 0, 4);

        // what the step has evicted was not read by it
        const auto kept = all.kept(0);
        there.insert(parts[0].pos);
        const std::set<int> now(kept.begin(), kept.end());
        for (auto it = there.begin(); it != there.end();) {
            if (!now.count(*it)) {
                CHECK(llama_memory_seq_rm(one.mem(), 0, *it, *it + 1), "step %d", step);
                it = there.erase(it);
            } else {
                ++it;
            }
        }
        CHECK(one.decode(parts[0].pos, 1) == 0, "step %d", step);
        const double d = diff(all.logits(0), one.logits());
        CHECK(d < 1e-4, "step %d: true positions differ by %g", step, d);
    }
    CHECK(all.stats(0).n_evicted > 150, "%lld evicted", (long long) all.stats(0).n_evicted);
}

// shares: whoever comes gets one, and who was there first gives; what is given back is there for the others again
static void test_shares(llama_model * model) {
    const int n_seq = 4, n_pool = 1024;

    session s(model, pool("streaming", n_pool, 1024).c_str(), N_UBATCH, n_seq, false, true);

    int pos = 0;
    for (; pos < 1200; pos += 30) {
        CHECK(decode(s, { { 0, pos, 30, 0 } }) == 0, "at %d", pos);
    }
    CHECK(s.stats(0).budget == n_pool && s.stats(0).n_used >= n_pool, "alone: %d of %d", s.stats(0).n_used, s.stats(0).budget);

    std::vector<int> at(n_seq, 0);
    at[0] = pos;
    for (int step = 0; step < 400; ++step) {
        std::vector<part> parts;
        for (int i = 0; i < n_seq; ++i) {
            parts.push_back({ i, at[i]++, 1, i });
        }
        CHECK(decode(s, parts) == 0, "step %d", step);
    }
    CHECK(llama_kv_policy_is_sound(s.ctx), "the books");
    int sum = 0;
    for (int i = 0; i < n_seq; ++i) {
        check_streaming(s, i, 4);
        CHECK(abs(s.stats(i).budget - n_pool/n_seq) <= 64, "sequence %d has %d", i, s.stats(i).budget);
        sum += s.stats(i).budget;
    }
    CHECK(sum <= n_pool, "%d tokens are allotted of %d", sum, n_pool);

    // two leave
    CHECK(llama_memory_seq_rm(s.mem(), 1, -1, -1) && llama_memory_seq_rm(s.mem(), 2, -1, -1), "removal");
    for (int step = 0; step < 600; ++step) {
        CHECK(decode(s, { { 0, at[0]++, 1, 0 }, { 3, at[3]++, 1, 3 } }) == 0, "step %d", step);
    }
    CHECK(s.stats(0).budget + s.stats(3).budget > n_pool - 128, "%d and %d tokens after two have left", s.stats(0).budget, s.stats(3).budget);
    CHECK(llama_kv_policy_is_sound(s.ctx), "the books");
}

// any operations: the books stay sound, texts stay apart, and what was refused changed nothing
static void test_random(llama_model * model, const char * policy, int seed, int n_ops) {
    const int n_seq = 5;

    session s(model, pool(policy, 5*192, 320).c_str(), N_UBATCH, n_seq, false, true);

    std::mt19937     rng(seed);
    std::vector<int> pos(n_seq, 0);
    std::vector<int> text(n_seq, 0); // whose text it is

    int n_text = 0;

    std::map<int, std::pair<std::vector<uint8_t>, std::pair<int, int>>> saved;

    const auto check = [&](const char * what, int op) {
        CHECK(llama_kv_policy_is_sound(s.ctx), "%s: the books after %s (operation %d of seed %d)", policy, what, op, seed);
        for (int i = 0; i < n_seq; ++i) {
            if (strncmp(policy, "streaming", 9) == 0) {
                check_streaming(s, i, 4);
            }
            CHECK(llama_memory_seq_pos_max(s.mem(), i) == pos[i] - 1, "%s: sequence %d ends at %d, not %d, after %s (operation %d of seed %d)", policy, i,
                    llama_memory_seq_pos_max(s.mem(), i), pos[i] - 1, what, op, seed);
        }
    };

    for (int op = 0; op < n_ops; ++op) {
        const int kind = rng() % 20;
        const int seq  = rng() % n_seq;

        if (kind < 12) {
            std::vector<part> parts;
            const int n = rng() % 3 == 0 ? 1 + (int) (rng() % 40) : 1;
            for (int i = 0; i < n_seq; ++i) {
                if (i == seq || rng() % 3 == 0) {
                    if (pos[i] == 0) {
                        text[i] = ++n_text;
                    }
                    parts.push_back({ i, pos[i], rng() % 2 ? n : 1, text[i] });
                }
            }
            std::shuffle(parts.begin(), parts.end(), rng);
            CHECK(decode(s, parts) == 0, "%s: operation %d of seed %d", policy, op, seed);
            for (const auto & p : parts) {
                pos[p.seq] += p.n;
            }
            check("a batch", op);
        } else if (kind < 14) {
            CHECK(llama_memory_seq_rm(s.mem(), seq, -1, -1), "removal");
            pos[seq] = 0;
            check("a removal", op);
        } else if (kind < 16 && pos[seq] > 0) {
            const int p0 = std::max<int>(0, pos[seq] - 1 - (int) (rng() % 24));
            if (llama_memory_seq_rm(s.mem(), seq, p0, -1)) {
                pos[seq] = p0;
            }
            check("a rewind", op);
        } else if (kind == 16) {
            const int dst = (int) (rng() % n_seq);
            if (dst != seq) {
                llama_memory_seq_cp(s.mem(), seq, dst, -1, -1);
                if (llama_memory_seq_pos_max(s.mem(), dst) >= 0) {
                    pos[dst] = pos[seq];
                    text[dst] = text[seq];
                    CHECK(pos[dst] == 0 || s.stats(dst).n_used <= s.stats(dst).budget, "a copy");
                } else {
                    pos[dst] = 0;
                    CHECK(llama_memory_seq_rm(s.mem(), dst, -1, -1), "a refused copy");
                }
                check("a copy", op);
            }
        } else if (kind == 17 && pos[seq] > 0) {
            std::vector<uint8_t> data(llama_state_seq_get_size(s.ctx, seq));
            CHECK(llama_state_seq_get_data(s.ctx, data.data(), data.size(), seq) == data.size(), "a state");
            saved[rng() % 3] = { data, { pos[seq], text[seq] } };
            check("saving", op);
        } else if (kind == 18 && !saved.empty()) {
            const auto & [data, what] = std::next(saved.begin(), rng() % saved.size())->second;
            if (llama_state_seq_set_data(s.ctx, data.data(), data.size(), seq) == data.size()) {
                pos[seq]  = what.first;
                text[seq] = what.second;
            } else {
                pos[seq] = 0;
                CHECK(llama_memory_seq_rm(s.mem(), seq, -1, -1), "a refused state");
            }
            check("restoring", op);
        } else if (op % 97 == 0) {
            llama_memory_clear(s.mem(), true);
            std::fill(pos.begin(), pos.end(), 0);
            check("clearing", op);
        }
    }
}

// all of it saved, and restored into another context: each sequence goes on as it would have
static void test_state(llama_model * model, const char * policy) {
    const int n_seq = 4;

    const std::string text = pool(policy, 4*160, 256);

    session a(model, text.c_str(), N_UBATCH, n_seq, false, true);
    session b(model, text.c_str(), N_UBATCH, n_seq, false, true);

    std::vector<int> pos(n_seq, 0);
    std::mt19937     rng(5);

    const auto some = [&]() {
        std::vector<part> parts;
        for (int i = 0; i < n_seq; ++i) {
            if (rng() % 3 != 0) {
                parts.push_back({ i, pos[i], 1, i });
            }
        }
        if (parts.empty()) {
            parts.push_back({ 1, pos[1], 1, 1 });
        }
        return parts;
    };

    for (int step = 0; step < 90; ++step) {
        auto parts = some();
        for (auto & p : parts) {
            p.n = step < 20 ? 12 : 1;
            pos[p.seq] += p.n;
        }
        CHECK(decode(a, parts) == 0, "%s: step %d", policy, step);
    }
    // something else is there before
    CHECK(decode(b, { { 2, 0, 20, 9 }, { 0, 0, 20, 8 } }) == 0, "%s", policy);

    std::vector<uint8_t> data(llama_state_get_size(a.ctx));
    CHECK(llama_state_get_data(a.ctx, data.data(), data.size()) == data.size(), "%s: saving", policy);
    CHECK(llama_state_set_data(b.ctx, data.data(), data.size()) == data.size(), "%s: restoring", policy);
    CHECK(llama_kv_policy_is_sound(b.ctx), "%s: the books", policy);

    for (int step = 0; step < 40; ++step) {
        const auto parts = some();
        if (decode(a, parts) != 0 || decode(b, parts) != 0) {
            CHECK(false, "%s: step %d after it", policy, step);
            return;
        }
        for (size_t i = 0; i < parts.size(); ++i) {
            const double d = diff(a.logits((int) i), b.logits((int) i));
            CHECK(d < 1e-4, "%s: step %d after it: sequence %d differs by %g", policy, step, parts[i].seq, d);
            CHECK(a.kept(parts[i].seq) == b.kept(parts[i].seq), "%s: step %d after it: sequence %d keeps other tokens", policy, step, parts[i].seq);
            pos[parts[i].seq]++;
        }
    }
    CHECK(llama_kv_policy_is_sound(b.ctx), "%s: the books", policy);
}

// a step that is cancelled half way: nobody else is touched, and the books stay sound
static void test_cancelled(llama_model * model, const char * policy) {
    const int n_seq = 4;

    session s(model, pool(policy, 4*128, 256).c_str(), N_UBATCH, n_seq, false, true);

    std::vector<int> pos(n_seq, 0);

    int n_cancelled = 0;

    for (int round = 0; round < 60; ++round) {
        const int n = round % 3 == 0 ? 7 : 1;

        std::vector<part> parts;
        for (int i = 0; i < n_seq; ++i) {
            if ((round + i) % 4 != 0 || round < 8) {
                parts.push_back({ i, pos[i], n, i });
            }
        }
        n_left = round % 2 ? -1 : (round*13) % 60;
        const int rc = decode(s, parts);
        n_left = -1;

        CHECK(rc == 0 || rc == 2, "%s: round %d: llama_decode gives %d", policy, round, rc);
        CHECK(llama_kv_policy_is_sound(s.ctx), "%s: the books after round %d, which gave %d", policy, round, rc);
        n_cancelled += rc == 2;

        for (const auto & p : parts) {
            const int last = llama_memory_seq_pos_max(s.mem(), p.seq);
            CHECK(rc == 2 ? last == -1 || last == p.pos - 1 || last == p.pos + p.n - 1 : last == p.pos + p.n - 1, "%s: round %d: sequence %d ends at %d", policy, round,
                    p.seq, last);
            pos[p.seq] = last + 1;
            if (last < 0) {
                CHECK(llama_memory_seq_rm(s.mem(), p.seq, -1, -1), "removal");
            }
        }
    }
    // a device computes a graph as a whole
    CHECK(n_cancelled > (is_on_device() ? 0 : 10), "%s: %d steps were cancelled", policy, n_cancelled);
}

static void test_refusals(llama_model * model) {
    const auto refused = [&](const char * policy, int n_seq, bool unified, const char * word) {
        session s(model, policy, N_UBATCH, n_seq, false, unified);
        const char * said = llama_kv_policy_error();
        CHECK(!s.ctx && said && strstr(said, word), "%s: %s", policy, s.ctx ? "accepted" : said ? said : "nothing said");
    };

    refused("streaming:budget=128,pool=256",      4, true,  "too small for 4 sequences: give pool=512 or more");
    refused("streaming:budget=128,pool=1024",     4, false, "start with --kv-unified");
    refused("streaming:budget=128",               4, true,  "give them a pool (pool=auto)");
    refused("streaming:pool=auto,update=gather",  4, true,  "4 sequences share one: start with -np 1");
    refused("pagedeviction:budget=192,pool=2048,page_size=24", 4, true, "does not divide the pages of a pool");
    refused("streaming:pool=1024,update=gather",  4, true,  "update=inplace");
    refused("streaming:pool=0",                   4, true,  "pool");

    // a pool where there can be one, and a budget of room for each
    const auto has_text = [&](const char * policy, int n_seq, bool unified, const char * word) {
        llama_context_params params = llama_context_default_params();
        params.n_seq_max  = n_seq;
        params.kv_unified = unified;

        llama_kv_policy_resolved res = {};
        CHECK(llama_kv_policy_resolve(model, &params, policy, &res) == LLAMA_KV_POLICY_OK, "%s: %s", policy, llama_kv_policy_error());
        CHECK(strstr(res.text, word), "%s: %s", policy, res.text);
        CHECK((strstr(res.text, "pool=") != nullptr) == (strstr(word, "pool=") != nullptr), "%s: %s", policy, res.text);
    };
    has_text("h2o:budget=200,pool=auto", 4, true,  "budget=200,pool=1024,");
    has_text("h2o:budget=200,pool=auto", 4, false, "budget=200,sinks");
    has_text("h2o:budget=200,pool=auto", 1, true,  "budget=200,sinks");

    // a token of two sequences
    session s(model, "streaming:budget=128,pool=1024", N_UBATCH, 4, false, true);
    llama_batch both = llama_batch_init(1, 0, 2);
    both.n_tokens     = 1;
    both.token[0]     = 1;
    both.pos[0]       = 0;
    both.n_seq_id[0]  = 2;
    both.seq_id[0][0] = 0;
    both.seq_id[0][1] = 1;
    both.logits[0]    = true;
    CHECK(llama_decode(s.ctx, both) != 0, "a token of two sequences is accepted");
    llama_batch_free(both);
    CHECK(llama_kv_policy_is_sound(s.ctx) && decode(s, { { 0, 0, 4, 0 }, { 1, 0, 4, 1 } }) == 0, "nothing has changed");
}

int main(int argc, char ** argv) {
    const bool is_quick = argc == 3 && strcmp(argv[2], "quick") == 0;
    if (argc != 2 && argc != 4 && !is_quick) {
        fprintf(stderr, "usage: %s MODEL.gguf [quick | seed operations]\n", argv[0]);
        return 2;
    }

    llama_model * model = load_model(argv[1]);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    const std::vector<const char *> policies = { "streaming:positions=cache", "streaming:positions=true", "streaming:positions=auto",
        "random:scope=token,recent=20,positions=cache", "h2o:recent=20,positions=cache,rotate_every=4", "h2o:recent=20,positions=true,scope=token",
        "tova:recent=20,positions=auto", "a2sf:recent=20,positions=true,scope=head", "snapkv:recent=20,positions=cache", "vatp:recent=20,positions=true",
        "caote:recent=20,positions=true", "knorm:recent=20,positions=cache", "keydiff:recent=20,positions=true,scope=layer",
        "pagedeviction:recent=20,positions=true", "rkv:recent=20,positions=true,evict_every=8" };

    if (argc != 4) {
        test_refusals(model);
        test_shares(model);
        test_true_positions(model);
    }
    for (size_t i = 0; i < policies.size(); ++i) {
        const char * policy = policies[i];
        if (is_quick && i % 3 != 0) {
            continue;
        }
        if (argc == 4) {
            test_random(model, policy, atoi(argv[2]), atoi(argv[3]));
            continue;
        }
        test_alone(model, policy, false, GGML_TYPE_F32,  1e-4);
        test_alone(model, policy, true,  i % 2 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16, 2e-2);
        test_others_text(model, policy, 1e-4);
        test_given_allotments(model, policy, 1e-4);
        test_cancelled(model, policy);
        test_state(model, policy);
        test_random(model, policy, 1, is_scored(policy) ? 100 : 300);
    }

    llama_model_free(model);

    printf("%s\n", n_fail ? "FAILED" : "OK");

    return n_fail ? EXIT_FAILURE : EXIT_SUCCESS;
}
