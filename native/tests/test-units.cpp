// property tests of kept sets per layer or KV head, beside the ledger that they follow; under ASan and UBSan; no ggml, no llama.cpp
// the reference has no slots: a sorted list of positions per unit, and by how much each key has to have been rotated

#include "llama-kv-units.h"
#include "test-check.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>

struct unit_reference {
    std::vector<int>   kept;   // positions, ascending
    std::map<int, int> rotated; // by how far the key of each has been rotated

    // where it belongs: as many positions up as younger tokens are gone
    int target(int pos, int last) const {
        const int n_younger = (int) (kept.end() - std::upper_bound(kept.begin(), kept.end(), pos));
        return last - pos - n_younger;
    }
};

struct world {
    std::mt19937 rng;

    int n_unit;
    int budget;
    int n_chunk;
    int n_protect;
    int n_recent;
    bool compact;
    bool filters; // units but the first one leave single tokens out, with which nothing is rotated

    llama_kv_ledger ledger;
    llama_kv_units  units;

    std::vector<unit_reference>        ref;
    std::vector<std::map<int, int>>    rows; // [unit] slot -> position: what a copy of the rows would have
    int last    = -1;
    int evicted = -1; // newest position that any unit has lost

    int draw(int a, int b) { return a + (int) (rng() % (unsigned) (b - a + 1)); }

    world(unsigned seed) : rng(seed), n_unit(draw(1, 4)), budget(draw(8, 24)), n_chunk(draw(2, 8)), n_protect(draw(0, 3)), n_recent(draw(1, 3)),
        compact(draw(0, 3) == 0), filters(draw(0, 2) == 0 && !compact), ledger(budget + n_chunk, budget, n_protect, n_recent, nullptr, compact), units(n_unit, budget + n_chunk, compact),
        ref(n_unit), rows(n_unit) {
        units.set_recording(!filters);
    }

    // n random victims of each unit, by slot: [n_unit][n]
    std::vector<uint32_t> choose(int n, int pos_last) {
        std::vector<uint32_t> res;
        for (int l = 0; l < n_unit; ++l) {
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
        for (int l = 0; l < n_unit; ++l) {
            for (int i = 0; i < n; ++i) {
                const int pos = rows[l].at((int) victims[(size_t) l*n + i]);
                evicted = std::max(evicted, pos);
                rows[l].erase((int) victims[(size_t) l*n + i]);
                ref[l].kept.erase(std::find(ref[l].kept.begin(), ref[l].kept.end(), pos));
                ref[l].rotated.erase(pos);
            }
        }
    }

    void copy(const llama_kv_units::moves & moves) {
        for (int l = 0; l < n_unit; ++l) {
            for (const auto & m : moves[l]) {
                CHECK(rows[l].count((int) m.src) && !rows[l].count((int) m.dst), "unit %d: a copy from %u to %u", l, m.src, m.dst);
                rows[l][(int) m.dst] = rows[l][(int) m.src];
                rows[l].erase((int) m.src);
            }
        }
    }

    std::vector<uint32_t> first_unit(const std::vector<uint32_t> & victims, int n) const { return { victims.begin(), victims.begin() + n }; }

    void compare(const char * what) {
        CHECK(ledger.check(), "%s: the ledger", what);
        CHECK(units.n_used() == ledger.n_used(), "%s: %u tokens per unit, %u in the ledger", what, units.n_used(), ledger.n_used());

        for (int l = 0; l < n_unit; ++l) {
            std::vector<int> kept;
            for (uint32_t slot = 0; slot < units.n_slots(); ++slot) {
                const int pos = units.pos(l)[slot];
                const auto it = rows[l].find((int) slot);

                CHECK((pos == llama_kv_units::none) == (it == rows[l].end()) && (it == rows[l].end() || it->second == pos), "%s: unit %d, slot %u", what, l, slot);
                if (pos != llama_kv_units::none) {
                    CHECK(slot < units.n_used(), "%s: unit %d: slot %u of %u is used", what, l, slot, units.n_used());
                    CHECK(!compact || kept.empty() || kept.back() < pos, "%s: unit %d is out of order", what, l);
                    CHECK(l > 0 || ledger.pos_of(slot) == pos, "%s: the ledger has %d in slot %u, the first unit %d", what, ledger.pos_of(slot), slot, pos);
                    kept.push_back(pos);
                }
            }
            std::sort(kept.begin(), kept.end());
            CHECK(kept == ref[l].kept, "%s: kept set of unit %d", what, l);
        }
    }

    void rotate(int pos0) {
        for (int l = 0; l < n_unit; ++l) {
            for (const auto & t : units.rotations(l, n_protect, pos0, 0)) {
                ref[l].rotated[rows[l].at((int) t.slot)] += t.delta;
            }
            for (const int pos : ref[l].kept) {
                if (pos >= n_protect) {
                    CHECK(ref[l].rotated[pos] == ref[l].target(pos, last), "unit %d: the key at %d was rotated by %d, not %d", l, pos, ref[l].rotated[pos],
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
        llama_kv_units::moves              copies;

        bool replaced = false;

        std::vector<uint32_t> to;       // [n_unit] where the token of a step that replaces went,
        std::vector<int>      before;   // what was there,
        const int             evicted_before = evicted;

        if (n == 1 && (int) ledger.n_used() == budget) {
            if (draw(0, 4) == 0 && budget - n_protect - n_recent >= 3) {
                // several at once, and free slots for the tokens to come
                const auto victims = choose(3, last + 1);
                ledger.set_victims(first_unit(victims, 3));
                ledger.shrink(budget - 3, gone, moves);
                forget(victims, 3);
                units.evict(victims, 3, budget - 3, copies);
                copy(copies);
                compare("shrink");
            } else {
                const auto victims = choose(1, last + 1);
                ledger.set_victims(first_unit(victims, 1));
                CHECK(ledger.place(last + 1, 1, slots, gone, moves), "place");
                for (int l = 0; l < n_unit; ++l) {
                    before.push_back(rows[l].at((int) victims[l]));
                }
                forget(victims, 1);
                units.replace(last + 1, victims, to, copies);
                copy(copies);
                for (int l = 0; l < n_unit; ++l) {
                    rows[l][(int) to[l]] = last + 1;
                }
                CHECK(to[0] == slots[0], "the first unit writes to %u, the ledger to %u", to[0], slots[0]);
                replaced = true;
            }
        }
        if (!replaced) {
            CHECK(ledger.place(last + 1, n, slots, gone, moves), "place");
            units.put(last + 1, slots);
            for (int l = 0; l < n_unit; ++l) {
                for (int i = 0; i < n; ++i) {
                    rows[l][(int) slots[i]] = last + 1 + i;
                }
            }
        }
        for (int l = 0; l < n_unit; ++l) {
            for (int i = 0; i < n; ++i) {
                ref[l].kept.push_back(last + 1 + i);
            }
        }
        last += n;

        if (!filters && draw(0, 6) == 0) {
            rotate(last - n + 1);
        }

        if (draw(0, 9) == 0 && last >= n) {
            rewind(last - n + 1, "failure");
            return;
        }
        if (replaced && filters) {
            std::vector<bool> out;
            evicted = evicted_before;
            for (int l = 0; l < n_unit; ++l) {
                out.push_back(l > 0 && draw(0, 1));
                if (!out[l]) {
                    evicted = std::max(evicted, before[l]);
                    continue;
                }
                rows[l][(int) to[l]] = before[l];
                ref[l].kept.back() = before[l];
                std::sort(ref[l].kept.begin(), ref[l].kept.end());
            }
            units.undo_replace(to, out);
            compare("left out");
        }
        if (n > 1 && draw(0, 3) == 0) {
            rewind(last - draw(0, n - 2), "rejected draft"); // before the chunk's evictions
        }

        const int n_over = std::max(0, (int) ledger.n_used() - budget);
        std::vector<uint32_t> victims;
        if (n_over > 0) {
            victims = choose(n_over, last);
            ledger.set_victims(first_unit(victims, n_over));
        }
        ledger.commit(gone, moves);
        if (n_over > 0) {
            forget(victims, n_over);
            units.evict(victims, n_over, budget, copies);
            copy(copies);
        }
        compare("commit");

        if (draw(0, 3) == 0) {
            // a saved state is taken over by units that were something else
            std::vector<uint32_t> used;
            for (uint32_t slot = 0; slot < units.n_used(); ++slot) {
                used.push_back(slot);
            }
            const auto im = units.get_image(used);
            units.put(0, { units.n_used() });
            units.set_image(used, im);
            CHECK(units.evicted_max() == evicted, "restored: newest evicted position %d, not %d", units.evicted_max(), evicted);
            compare("restored");
        }

        // back as far as every unit has everything
        if (draw(0, 6) == 0 && last > std::max(0, evicted)) {
            rewind(std::max(evicted + 1, last - draw(0, 5)), "rewind");
        }
    }

    void rewind(int p0, const char * what) {
        CHECK(units.evicted_max() == evicted, "newest evicted position %d, not %d", units.evicted_max(), evicted);

        std::vector<uint32_t>              freed;
        std::vector<llama_kv_ledger::move> moves;
        llama_kv_units::moves              copies;

        last = p0 - 1;
        ledger.truncate(p0, freed);
        for (int l = 0; l < n_unit; ++l) {
            for (auto it = rows[l].begin(); it != rows[l].end(); ) {
                it = it->second > last ? rows[l].erase(it) : std::next(it);
            }
            ref[l].kept.erase(std::upper_bound(ref[l].kept.begin(), ref[l].kept.end(), last), ref[l].kept.end());

            // a unit that has left some of them out has more than the first one
            while (ref[l].kept.size() > ledger.n_used()) {
                const auto it = std::lower_bound(ref[l].kept.begin(), ref[l].kept.end(), n_protect);
                rows[l].erase(std::find_if(rows[l].begin(), rows[l].end(), [&](const auto & row) { return row.second == *it; }));
                evicted = std::max(evicted, *it);
                ref[l].kept.erase(it);
            }
        }
        const bool any = units.truncate(p0, ledger.n_used(), true, copies, n_protect);
        copy(copies);
        ledger.pack(moves);
        CHECK(any || moves.empty(), "%s: the ledger moves tokens and no unit does", what);
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
