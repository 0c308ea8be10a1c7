// property tests of the ledger against a model that is too simple to be wrong: a sorted list of positions
// runs under ASan and UBSan; no ggml, no llama.cpp

#include "llama-kv-frame.h"
#include "llama-kv-ledger.h"
#include "test-check.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>

// what the rule says must be kept, with no idea of slots
struct reference {
    int  budget;
    int  n_protect;
    int  n_recent;
    bool random; // else the oldest

    std::vector<int> kept; // positions, ascending
    int first   = -1;
    int last    = -1;
    int evicted = -1; // newest evicted position
    int evictor = -1; // newest position that caused an eviction

    static uint64_t drawn(int pos) {
        uint64_t z = ((uint64_t) pos + 1)*0x9e3779b97f4a7c15ull;
        z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27))*0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }

    // by: the newest position
    void evict(int by) {
        size_t best = kept.size();
        for (size_t i = 0; i < kept.size(); ++i) {
            if (kept[i] - first >= n_protect && kept[i] <= by - n_recent && (best == kept.size() || (random && drawn(kept[i]) < drawn(kept[best])))) {
                best = i;
            }
        }
        CHECK(best < kept.size(), "nothing can go at %d", by);
        evicted = std::max(evicted, kept[best]);
        evictor = std::max(evictor, by);
        kept.erase(kept.begin() + best);
    }

    void place(int n) {
        if (first < 0) {
            first = 0;
        }
        if (n == 1 && (int) kept.size() == budget) {
            evict(last + 1);
        }
        for (int i = 0; i < n; ++i) {
            kept.push_back(++last);
        }
    }

    void commit() {
        while ((int) kept.size() > budget) {
            evict(last);
        }
    }

    void truncate(int p0) {
        if (p0 <= 0) {
            *this = { budget, n_protect, n_recent, random, {}, -1, -1, -1, -1 };
            return;
        }
        while (!kept.empty() && kept.back() >= p0) {
            kept.pop_back();
        }
        last = std::min(last, p0 - 1);
    }
};

static void compare(const llama_kv_ledger & ledger, const reference & ref, const char * what) {
    std::vector<int> kept;
    for (const uint32_t slot : ledger.kept()) {
        kept.push_back(ledger.pos_of(slot));
    }

    CHECK(ledger.check(), "%s: broken invariant at position %d", what, ref.last);
    CHECK(kept == ref.kept, "%s: kept set differs at position %d (%zu against %zu tokens)", what, ref.last, kept.size(), ref.kept.size());
    CHECK(ledger.pos_last() == ref.last, "%s: last %d against %d", what, ledger.pos_last(), ref.last);
    CHECK(ledger.evicted_max() == ref.evicted, "%s: newest evicted %d against %d", what, ledger.evicted_max(), ref.evicted);
    CHECK(ledger.gap() == (ref.last < 0 ? 0 : ref.last + 1 - (int) ref.kept.size()), "%s: gap %d", what, ledger.gap());

    // protected tokens are never evicted
    for (int i = 0; i < std::min(ref.n_protect, ref.last + 1); ++i) {
        CHECK(ledger.slot_of_first(i) >= 0 && ledger.pos_of(ledger.slot_of_first(i)) == i, "%s: protected token %d is gone", what, i);
    }
}

// replays the copies on a table of positions: what the cache would hold
struct table {
    std::map<uint32_t, int> at;

    void move(const std::vector<llama_kv_ledger::move> & moves) {
        for (const auto & m : moves) {
            CHECK(at.count(m.src) == 1 && at.count(m.dst) == 0, "move %u -> %u", m.src, m.dst);
            at[m.dst] = at[m.src];
            at.erase(m.src);
        }
    }

    void place(const llama_kv_ledger & ledger, const std::vector<uint32_t> & slots, const std::vector<uint32_t> & victims,
            const std::vector<llama_kv_ledger::move> & moves) {
        for (const uint32_t slot : victims) {
            CHECK(at.count(slot) == 1, "victim slot %u was empty", slot);
            at.erase(slot);
        }
        move(moves);

        std::set<uint32_t> unique(slots.begin(), slots.end());
        CHECK(unique.size() == slots.size(), "a slot occurs twice in one ubatch");

        for (const uint32_t slot : slots) {
            CHECK(at.count(slot) == 0, "slot %u is taken", slot);
            at[slot] = ledger.pos_of(slot);
        }
    }

    void commit(const llama_kv_ledger & ledger, const std::vector<uint32_t> & victims, const std::vector<llama_kv_ledger::move> & moves) {
        for (const uint32_t slot : victims) {
            CHECK(at.count(slot) == 1, "victim slot %u was empty", slot);
            at.erase(slot);
        }
        for (const auto & m : moves) {
            CHECK(ledger.is_compact() || (m.src >= ledger.budget() && m.dst < ledger.budget()), "move %u -> %u does not come down from the headroom", m.src, m.dst);
        }
        move(moves);

        std::map<uint32_t, int> now;
        for (const uint32_t slot : ledger.kept()) {
            CHECK(slot < ledger.budget(), "slot %u lies above the budget between ubatches", slot);
            now[slot] = ledger.pos_of(slot);
            CHECK(!ledger.is_compact() || slot == now.size() - 1, "slot %u is not the token's rank", slot);
        }
        CHECK(now == at, "the copies do not lead to what the ledger says");
    }
};

// replays the rotations on a table of angles: what the keys would be rotated to
struct rotator {
    std::map<uint32_t, int> at;       // slot -> position of its key
    std::map<int, int>      original; // rank -> position at which a protected token was written
    int64_t n_due     = 0;            // evictions since the last batch
    int64_t n_rebased = 0;

    void place(const llama_kv_ledger & ledger, const llama_kv_frame & frame, const llama_kv_frame::rule & rule, const llama_kv_frame::plan & plan,
            int pos0, const std::vector<uint32_t> & slots, const std::vector<uint32_t> & victims) {
        for (const uint32_t slot : victims) {
            at.erase(slot);
        }
        for (const auto & t : plan.rotations) {
            CHECK(at.count(t.slot) == 1 && t.delta != 0, "a rotation of slot %u by %d", t.slot, t.delta);
            at[t.slot] += t.delta;
        }
        for (size_t i = 1; i < plan.rotations.size(); ++i) {
            CHECK(plan.rotations[i - 1].delta <= plan.rotations[i].delta, "rotations are not sorted by delta");
        }
        for (uint32_t i = 0; i < ledger.n_protect(); ++i) {
            if (original.count(i) && (i < plan.n_sinks || (plan.pinned && i >= rule.n_sinks))) {
                at[ledger.slot_of_first(i)] = original[i] + plan.delta;
            }
        }
        for (size_t i = 0; i < slots.size(); ++i) {
            at[slots[i]] = pos0 + (int) i - frame.base();
            if (pos0 + i < ledger.n_protect()) {
                original[pos0 + i] = at[slots[i]];
            }
        }

        n_rebased = pos0 == 0 ? 0 : n_rebased + (plan.rebased != 0);
        CHECK(n_rebased*rule.rebase_at <= pos0, "%d re-bases in %d positions", (int) n_rebased, pos0);

        // how far each key is from its place, as the newest token sees it
        const auto kept = ledger.kept();
        n_due += (int64_t) victims.size();
        for (size_t i = 0; i < kept.size(); ++i) {
            const int distance = ledger.pos_last() - frame.base() - at[kept[i]];
            const int want     = frame.is_ranks() ? (int) (kept.size() - 1 - i) : ledger.pos_last() - ledger.pos_of(kept[i]);
            const bool exact   = !frame.is_ranks() || rule.rotate_every == 1 || i < std::min<size_t>(rule.n_sinks, ledger.n_protect()) || !plan.rotations.empty() || plan.pinned;

            CHECK(!exact || distance == want, "rank %zu: the key is %d positions away, not %d", i, distance, want);
            CHECK(distance - want >= 0 && distance - want <= n_due, "rank %zu: a debt of %d after %d evictions", i, distance - want, (int) n_due);
        }
        if (!plan.rotations.empty() || plan.pinned) {
            n_due = 0;
        }
        CHECK(!frame.is_ranks() || pos0 - frame.base() < rule.rebase_at + 1 + (int) kept.size(), "position %d in the frame", pos0 - frame.base());
    }

    void drop(const std::vector<uint32_t> & slots) {
        for (const uint32_t slot : slots) {
            at.erase(slot);
        }
    }

    void move(const std::vector<llama_kv_ledger::move> & moves) {
        for (const auto & m : moves) {
            at[m.dst] = at[m.src];
            at.erase(m.src);
        }
    }
};

static std::vector<uint32_t> ascending(std::vector<uint32_t> slots) {
    std::sort(slots.begin(), slots.end());
    return slots;
}

// a saved state, taken over by a ledger and a frame that were something else, takes their place
static void save_and_restore(llama_kv_ledger & ledger, llama_kv_frame & frame, const llama_kv_ledger & other, const llama_kv_frame & other_frame) {
    const auto im    = ledger.get_image();
    const auto slots = ascending(im.slots);
    const auto f     = frame.get_image(slots);

    llama_kv_ledger to       = other;
    llama_kv_frame  to_frame = other_frame;

    CHECK(to.is_possible(im), "a ledger that is there is called impossible");
    to.set_image(im);
    CHECK(to.check(), "the restored ledger is inconsistent");
    CHECK(to_frame.is_possible(im, f), "positions that are there are called impossible");
    to_frame.set_image(slots, f);

    ledger = to;
    frame  = to_frame;
}

// damaged states: refused, or a ledger that keeps its invariants whatever comes
static void test_damaged(const llama_kv_ledger & ledger, std::mt19937 & rng) {
    const auto draw = [&](int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(rng); };

    auto im = ledger.get_image();

    const auto number = [&](int32_t x) {
        const int32_t some[] = { x, (int32_t) ((uint32_t) x - 1), (int32_t) ((uint32_t) x + 1), -1, 0, 1, INT32_MAX, INT32_MIN, llama_kv_ledger::pos_end, draw(0, 300) };
        return some[draw(0, 9)];
    };

    for (int i = draw(1, 3); i > 0; --i) {
        const size_t at = im.slots.empty() ? 0 : (size_t) draw(0, (int) im.slots.size() - 1);
        switch (draw(0, 11)) {
            case 0:  im.n_protect   = (uint32_t) number((int32_t) im.n_protect); break;
            case 1:  im.n_evicted   = number((int32_t) im.n_evicted);            break;
            case 2:  im.n_interior  = number((int32_t) im.n_interior);           break;
            case 3:  im.pos_first   = number(im.pos_first); break;
            case 4:  im.pos_last    = number(im.pos_last == INT32_MAX ? 0 : im.pos_last);   break;
            case 5:  im.evicted_max = number(0); break;
            case 6:  im.evictor_max = number(0); break;
            case 7:  im.pos_placed  = number(0); break;
            case 8:  if (!im.slots.empty()) { im.slots[at] = (uint32_t) number(0);  } break;
            case 9:  if (!im.slots.empty()) { im.pos[at]   = number(0);             } break;
            case 10: if (!im.slots.empty()) { im.slots.erase(im.slots.begin() + at); im.pos.erase(im.pos.begin() + at); } break;
            case 11: im.slots.push_back((uint32_t) draw(0, 60)); im.pos.push_back(number(0)); break;
        }
    }

    llama_kv_ledger to = ledger;
    if (!to.is_possible(im)) {
        return;
    }
    to.set_image(im);
    CHECK(to.check(), "a damaged ledger was accepted, and is inconsistent");

    std::vector<uint32_t>              slots;
    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;
    for (int i = 0; i < 8; ++i) {
        to.commit(victims, moves);
        CHECK(to.check() && to.n_used() <= to.budget(), "a damaged ledger goes on inconsistently");
        if (to.place(to.pos_last() + 1, (uint32_t) draw(1, 4), slots, victims, moves) && draw(0, 3) == 0) {
            to.truncate(to.pos_last(), slots);
        }
    }
}

static void test_random(unsigned seed) {
    std::mt19937 rng(seed);

    const auto draw = [&](int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(rng); };

    const bool random    = draw(0, 1);
    const bool compact   = draw(0, 3) == 0;
    const int  n_protect = draw(0, 6);
    const int  n_recent  = random ? draw(1, 20) : 1;
    const int  budget    = n_protect + n_recent + 1 + draw(0, 40);
    const int  n_ubatch  = draw(1, 60);

    llama_kv_ledger ledger(budget + n_ubatch + draw(0, 5), budget, n_protect, n_recent, random ? llama_kv_victim_random() : nullptr, compact);
    reference       ref = { budget, n_protect, n_recent, random, {}, -1, -1, -1, -1 };
    table           tab;

    llama_kv_frame::rule rule;
    rule.ranks        = draw(0, 1);
    rule.is_auto      = !rule.ranks;
    rule.n_ctx_train  = draw(1, 200);
    rule.n_sinks      = draw(0, n_protect);
    rule.rotate_every = draw(0, 1) ? 1 : draw(1, 20);
    rule.rebase_at    = draw(0, 1) ? 1 << 16 : draw(20, 200);

    llama_kv_frame frame(ledger.n_slots(), rule);
    rotator        keys;

    const llama_kv_ledger other       = ledger; // as they are made
    const llama_kv_frame  other_frame = frame;

    std::vector<uint32_t>              slots;
    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    for (int step = 0; step < 400 && n_fail == 0; ++step) {
        const int what = draw(0, 99);

        if (draw(0, 4) == 0) {
            save_and_restore(ledger, frame, other, other_frame);
            compare(ledger, ref, "restored");
            test_damaged(ledger, rng);
        }

        if (what < 85) {
            const int n = draw(0, 2) ? 1 : draw(1, n_ubatch);

            victims.clear();
            moves.clear();
            const bool ok = ledger.place(ledger.pos_last() + 1, n, slots, victims, moves);
            CHECK(ok, "%d tokens do not fit with %u used", n, ledger.n_used());

            ref.place(n);
            tab.place(ledger, slots, victims, moves);
            compare(ledger, ref, "place");

            if (!compact) {
                const int pos0 = ledger.pos_last() - n + 1;
                keys.place(ledger, frame, rule, frame.place(ledger, pos0, slots), pos0, slots, victims);
            }

            if (draw(0, 3) == 0) {
                // evictions that a chunk owes stay owed
                save_and_restore(ledger, frame, other, other_frame);
                compare(ledger, ref, "restored");
                test_damaged(ledger, rng);
            }

            if (draw(0, 9) == 0) {
                // the ubatch fails: it is removed whole, and what it evicted stays evicted
                const int p0 = ref.last - n + 1;

                CHECK(p0 == 0 || ledger.can_rewind(p0), "a failed ubatch at %d cannot be removed", p0);

                std::vector<uint32_t> freed;
                ledger.truncate(p0, freed);
                for (const uint32_t slot : freed) {
                    tab.at.erase(slot);
                }
                keys.drop(freed);
                frame.truncate();
                ref.truncate(p0);
                compare(ledger, ref, "failure");
            } else {
                ledger.commit(victims, moves);
                ref.commit();
                compare(ledger, ref, "commit");
                tab.commit(ledger, victims, moves);

                keys.drop(victims);
                keys.n_due += (int64_t) victims.size();
                keys.move(moves);
                for (const auto & m : moves) {
                    frame.move(m.src, m.dst);
                }
            }
        } else if (ref.last >= 0) {
            const int p0 = draw(0, 3) ? draw(std::max(0, ref.last - 10), ref.last + 2) : draw(0, ref.last);

            const bool legal = p0 <= 0 || p0 > ref.evicted;

            CHECK(p0 <= 0 || ledger.can_rewind(p0) == legal, "rewind to %d, newest evicted %d", p0, ref.evicted);
            CHECK(ledger.rewind_exact(p0) == (p0 > ref.evictor), "exactness of a rewind to %d", p0);

            if (legal) {
                std::vector<uint32_t> freed;
                ledger.truncate(p0, freed);
                for (const uint32_t slot : freed) {
                    tab.at.erase(slot);
                }
                keys.drop(freed);
                frame.truncate();
                ref.truncate(p0);
                compare(ledger, ref, "rewind");
            }
        }
    }
}

// an unprotected newest token would be evicted at once, and the cache would freeze on the prompt
static void test_newest_survives() {
    llama_kv_ledger ledger(8, 4, 2);

    std::vector<uint32_t>              slots;
    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    for (int p = 0; p < 100; ++p) {
        victims.clear();
        CHECK(ledger.place(p, 1, slots, victims, moves), "position %d", p);
        ledger.commit(victims, moves);
        CHECK(ledger.pos_of(slots[0]) == p, "the token at %d is gone right after its step", p);
    }
}

// a ubatch that is longer than the headroom is refused whole, and nothing changes
static void test_refuses_what_does_not_fit() {
    llama_kv_ledger ledger(10, 6, 1);

    std::vector<uint32_t>              slots;
    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    CHECK(!ledger.place(0, 11, slots, victims, moves) && ledger.empty() && ledger.check(), "11 tokens in 10 slots");
    CHECK( ledger.place(0, 10, slots, victims, moves), "10 tokens in 10 slots");
    ledger.commit(victims, moves);
    CHECK(!ledger.place(10, 5, slots, victims, moves) && ledger.n_used() == 6 && ledger.check(), "5 tokens in 4 slots of headroom");
    CHECK(!ledger.place(12, 1, slots, victims, moves), "positions 10 and 11 are missing");
    CHECK( ledger.place(10, 4, slots, victims, moves), "4 tokens in 4 slots of headroom");
}

static void test_protect() {
    llama_kv_ledger ledger(16, 8, 2);

    std::vector<uint32_t>              slots;
    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    CHECK(!ledger.set_protect(7), "7 protected tokens leave one slot of 8 for the rest");
    CHECK( ledger.set_protect(6), "6 protected tokens leave two slots");
    CHECK( ledger.place(0, 3, slots, victims, moves), "3 tokens");
    CHECK(!ledger.set_protect(5), "the sequence is not empty");
}

int main() {
    for (unsigned seed = 0; seed < 250 && n_fail == 0; ++seed) {
        test_random(seed);
        if (n_fail) {
            fprintf(stderr, "seed %u\n", seed);
        }
    }

    test_newest_survives();
    test_refuses_what_does_not_fit();
    test_protect();

    printf("%s\n", n_fail ? "FAILED" : "OK");

    return n_fail ? EXIT_FAILURE : EXIT_SUCCESS;
}
