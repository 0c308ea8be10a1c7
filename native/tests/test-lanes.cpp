// property tests of kept sets per layer or KV head, beside the ledger that they follow; under ASan and UBSan; no ggml, no llama.cpp
// the reference has no slots: a sorted list of positions per lane, and how far each key has to have turned

#include "llama-kv-lanes.h"
#include "test-check.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>

struct lane_reference {
    std::vector<int>   kept;   // positions, ascending
    std::map<int, int> turned; // by how far the key of each has been rotated

    // where it belongs: as many positions up as younger tokens are gone
    int target(int pos, int last) const {
        const int n_younger = (int) (kept.end() - std::upper_bound(kept.begin(), kept.end(), pos));
        return last - pos - n_younger;
    }
};

struct world {
    std::mt19937 rng;

    int n_lane;
    int budget;
    int n_chunk;
    int n_protect;
    int n_recent;
    bool compact;

    llama_kv_ledger ledger;
    llama_kv_lanes  lanes;

    std::vector<lane_reference>        ref;
    std::vector<std::map<int, int>>    rows; // [lane] slot -> position: what a copy of the rows would have
    int last    = -1;
    int evicted = -1; // newest position that any lane has lost

    int draw(int a, int b) { return a + (int) (rng() % (unsigned) (b - a + 1)); }

    world(unsigned seed) : rng(seed), n_lane(draw(1, 4)), budget(draw(8, 24)), n_chunk(draw(2, 8)), n_protect(draw(0, 3)), n_recent(draw(1, 3)),
        compact(draw(0, 3) == 0), ledger(budget + n_chunk, budget, n_protect, n_recent, nullptr, compact), lanes(n_lane, budget + n_chunk, compact),
        ref(n_lane), rows(n_lane) {
        lanes.set_recording(true);
    }

    // n random victims of each lane, by slot: [n_lane][n]
    std::vector<uint32_t> choose(int n, int pos_last) {
        std::vector<uint32_t> res;
        for (int l = 0; l < n_lane; ++l) {
            std::vector<uint32_t> slots;
            for (const auto & [slot, pos] : rows[l]) {
                if (pos >= n_protect && pos <= pos_last - n_recent) {
                    slots.push_back((uint32_t) slot);
                }
            }
            std::shuffle(slots.begin(), slots.end(), rng);
            CHECK((int) slots.size() >= n, "%zu candidates for %d victims", slots.size(), n);
            res.insert(res.end(), slots.begin(), slots.begin() + n);
        }
        return res;
    }

    void forget(const std::vector<uint32_t> & victims, int n) {
        for (int l = 0; l < n_lane; ++l) {
            for (int i = 0; i < n; ++i) {
                const int pos = rows[l].at((int) victims[(size_t) l*n + i]);
                evicted = std::max(evicted, pos);
                rows[l].erase((int) victims[(size_t) l*n + i]);
                ref[l].kept.erase(std::find(ref[l].kept.begin(), ref[l].kept.end(), pos));
                ref[l].turned.erase(pos);
            }
        }
    }

    void copy(const llama_kv_lanes::moves & moves) {
        for (int l = 0; l < n_lane; ++l) {
            for (const auto & m : moves[l]) {
                CHECK(rows[l].count((int) m.src) && !rows[l].count((int) m.dst), "lane %d: a copy from %u to %u", l, m.src, m.dst);
                rows[l][(int) m.dst] = rows[l][(int) m.src];
                rows[l].erase((int) m.src);
            }
        }
    }

    std::vector<uint32_t> first_lane(const std::vector<uint32_t> & victims, int n) const { return { victims.begin(), victims.begin() + n }; }

    void compare(const char * what) {
        CHECK(ledger.check(), "%s: the ledger", what);
        CHECK(lanes.n_used() == ledger.n_used(), "%s: %u tokens per lane, %u in the ledger", what, lanes.n_used(), ledger.n_used());

        for (int l = 0; l < n_lane; ++l) {
            std::vector<int> kept;
            for (uint32_t slot = 0; slot < lanes.n_slots(); ++slot) {
                const int pos = lanes.pos(l)[slot];
                const auto it = rows[l].find((int) slot);

                CHECK((pos == llama_kv_lanes::none) == (it == rows[l].end()) && (it == rows[l].end() || it->second == pos), "%s: lane %d, slot %u", what, l, slot);
                if (pos != llama_kv_lanes::none) {
                    CHECK(slot < lanes.n_used(), "%s: lane %d: slot %u of %u is used", what, l, slot, lanes.n_used());
                    CHECK(!compact || kept.empty() || kept.back() < pos, "%s: lane %d is out of order", what, l);
                    CHECK(l > 0 || ledger.pos_of(slot) == pos, "%s: the ledger has %d in slot %u, the first lane %d", what, ledger.pos_of(slot), slot, pos);
                    kept.push_back(pos);
                }
            }
            std::sort(kept.begin(), kept.end());
            CHECK(kept == ref[l].kept, "%s: kept set of lane %d", what, l);
        }
    }

    void turn(int pos0) {
        for (int l = 0; l < n_lane; ++l) {
            for (const auto & t : lanes.turns(l, n_protect, pos0, 0)) {
                ref[l].turned[rows[l].at((int) t.slot)] += t.delta;
            }
            for (const int pos : ref[l].kept) {
                if (pos >= n_protect) {
                    CHECK(ref[l].turned[pos] == ref[l].target(pos, last), "lane %d: the key at %d has turned by %d, not %d", l, pos, ref[l].turned[pos],
                            ref[l].target(pos, last));
                }
            }
        }
    }

    void step() {
        const int n = draw(0, 3) ? 1 : draw(2, n_chunk);

        std::vector<uint32_t>              slots;
        std::vector<uint32_t>              gone;
        std::vector<llama_kv_ledger::move> moves;
        llama_kv_lanes::moves              copies;

        bool replaced = false;

        if (n == 1 && (int) ledger.n_used() == budget) {
            if (draw(0, 4) == 0 && budget - n_protect - n_recent >= 3) {
                // several at once, and free slots for the tokens to come
                const auto victims = choose(3, last + 1);
                ledger.set_victims(first_lane(victims, 3));
                ledger.shrink(budget - 3, gone, moves);
                forget(victims, 3);
                lanes.evict(victims, 3, budget - 3, copies);
                copy(copies);
                compare("shrink");
            } else {
                const auto victims = choose(1, last + 1);
                ledger.set_victims(first_lane(victims, 1));
                CHECK(ledger.place(last + 1, 1, slots, gone, moves), "place");
                forget(victims, 1);
                std::vector<uint32_t> to;
                lanes.replace(last + 1, victims, to, copies);
                copy(copies);
                for (int l = 0; l < n_lane; ++l) {
                    rows[l][(int) to[l]] = last + 1;
                }
                CHECK(to[0] == slots[0], "the first lane writes to %u, the ledger to %u", to[0], slots[0]);
                replaced = true;
            }
        }
        if (!replaced) {
            CHECK(ledger.place(last + 1, n, slots, gone, moves), "place");
            lanes.put(last + 1, slots);
            for (int l = 0; l < n_lane; ++l) {
                for (int i = 0; i < n; ++i) {
                    rows[l][(int) slots[i]] = last + 1 + i;
                }
            }
        }
        for (int l = 0; l < n_lane; ++l) {
            for (int i = 0; i < n; ++i) {
                ref[l].kept.push_back(last + 1 + i);
            }
        }
        last += n;

        if (draw(0, 6) == 0) {
            turn(last - n + 1);
        }

        if (draw(0, 9) == 0 && last >= n) {
            rewind(last - n + 1, "failure");
            return;
        }
        if (n > 1 && draw(0, 3) == 0) {
            rewind(last - draw(0, n - 2), "rejected draft"); // before the chunk's evictions
        }

        const int n_over = std::max(0, (int) ledger.n_used() - budget);
        std::vector<uint32_t> victims;
        if (n_over > 0) {
            victims = choose(n_over, last);
            ledger.set_victims(first_lane(victims, n_over));
        }
        ledger.commit(gone, moves);
        if (n_over > 0) {
            forget(victims, n_over);
            lanes.evict(victims, n_over, budget, copies);
            copy(copies);
        }
        compare("commit");

        if (draw(0, 3) == 0) {
            // a saved state is taken over by lanes that were something else
            std::vector<uint32_t> used;
            for (uint32_t slot = 0; slot < lanes.n_used(); ++slot) {
                used.push_back(slot);
            }
            const auto im = lanes.get_image(used);
            lanes.put(0, { lanes.n_used() });
            lanes.set_image(used, im);
            CHECK(lanes.evicted_max() == evicted, "restored: newest evicted position %d, not %d", lanes.evicted_max(), evicted);
            compare("restored");
        }

        // back as far as every lane has everything
        if (draw(0, 6) == 0 && last > std::max(0, evicted)) {
            rewind(std::max(evicted + 1, last - draw(0, 5)), "rewind");
        }
    }

    void rewind(int p0, const char * what) {
        CHECK(lanes.evicted_max() == evicted, "newest evicted position %d, not %d", lanes.evicted_max(), evicted);

        std::vector<uint32_t>              freed;
        std::vector<llama_kv_ledger::move> moves;
        llama_kv_lanes::moves              copies;

        last = p0 - 1;
        ledger.truncate(p0, freed);
        for (int l = 0; l < n_lane; ++l) {
            for (auto it = rows[l].begin(); it != rows[l].end(); ) {
                it = it->second > last ? rows[l].erase(it) : std::next(it);
            }
            ref[l].kept.erase(std::upper_bound(ref[l].kept.begin(), ref[l].kept.end(), last), ref[l].kept.end());
        }
        const bool any = lanes.truncate(p0, ledger.n_used(), true, copies);
        copy(copies);
        ledger.pack(moves);
        CHECK(any || moves.empty(), "%s: the ledger moves tokens and no lane does", what);
        compare(what);
    }
};

int main() {
    for (unsigned seed = 0; seed < 300 && n_fail == 0; ++seed) {
        world w(seed);
        for (int i = 0; i < 300 && n_fail == 0; ++i) {
            w.step();
        }
        if (n_fail) {
            fprintf(stderr, "seed %u\n", seed);
        }
    }

    printf("%s\n", n_fail ? "FAILED" : "OK");

    return n_fail ? EXIT_FAILURE : EXIT_SUCCESS;
}
