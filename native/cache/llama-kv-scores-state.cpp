#include "llama-kv-scores.h"

#include "llama-kv-state-rows.h"

#include <algorithm>
#include <cmath>

// saved states: the kept sets of the units, the next victims, sums, norms and the window's queries
// drawn numbers follow from the positions

void llama_kv_scores::state_write(llama_kv_state_writer & out, uint32_t seq, const std::vector<uint32_t> & slots) const {
    const uint32_t strm = where.stream_of(seq);

    const auto & c = choices[seq];

    const uint32_t n_unit = units_[seq].n_unit();

    const auto im = units_[seq].get_image(slots);

    out.num(im.evicted_max);
    out.num((uint8_t) im.is_recording);
    for (uint32_t unit = 0; unit < n_unit; ++unit) {
        out.nums(im.pos[unit]);
        out.num((uint32_t) im.gone[unit].size());
        out.nums(im.gone[unit]);
    }

    out.num(c.n_left());
    for (uint32_t unit = 0; unit < n_unit; ++unit) {
        out.bytes(c.slots.data() + (size_t) unit*c.n + c.i, c.n_left()*sizeof(uint32_t));
    }

    if (needs.window > 0) {
        out.num (n_counted[seq]);
        out.nums(query_pos[seq]);
    }

    // a number per (unit, or KV head; slot)
    const auto write_numbers = [&](const auto & numbers, uint32_t n) {
        for (uint32_t i = 0; i < n; ++i) {
            for (const uint32_t slot : slots) {
                out.num(numbers[(size_t) i*n_slots + slot]);
            }
        }
    };
    if (needs.k_unrotated) {
        write_numbers(stands[seq], n_unit);
    }
    if (!kept_state.empty()) {
        write_numbers(kept_state[seq], heads.back());
    }

    const auto rows = query_rows(query_pos[seq]);

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & l = *states[i];

        if (l.queries) {
            llama_kv_state_write_rows(out, l.queries, seq*l.queries->nb[2], rows);
        }
        for (const plane * pl : { &l.weights, &l.k_norm, &l.v_norm }) {
            if (pl->t) {
                llama_kv_state_write_cols(out, pl->t, strm*pl->t->nb[2], layers[i].n_head_kv, n_rows, where.of(seq, slots));
            }
        }
    }
}

// of the queries that are there
std::vector<uint32_t> llama_kv_scores::query_rows(const std::vector<int32_t> & pos) {
    std::vector<uint32_t> res;
    for (size_t i = 0; i < pos.size(); ++i) {
        if (pos[i] != llama_kv_units::none) {
            res.push_back((uint32_t) i);
        }
    }
    return res;
}

void llama_kv_scores::state_read(llama_kv_state_reader & in, uint32_t seq, const llama_kv_ledger::image & ledger, uint32_t n_recent, uint32_t budget,
        const std::vector<uint32_t> & slots, bool may_record, bool is_check) {
    const uint32_t strm   = where.stream_of(seq);
    const uint32_t n_unit = units_[seq].n_unit();
    const size_t   n      = slots.size();

    const int32_t pos_free = ledger.pos_first + (int32_t) std::min<int64_t>(ledger.n_protect, (int64_t) ledger.pos_last - ledger.pos_first + 1);

    // a position that a victim can have, or have had
    const auto is_free = [&](int32_t pos) { return pos >= pos_free && pos <= ledger.pos_last; };

    // [n] position in the slots of the first unit, which is the ledger's
    std::vector<int32_t> pos_ledger(n_slots, llama_kv_units::none);
    for (size_t i = 0; i < n; ++i) {
        pos_ledger[ledger.slots[i]] = ledger.pos[i];
    }

    // heads of their own: the kept tokens fill the first slots
    if (is_per_head() && n > 0 && slots.back() != n - 1) {
        llama_kv_state_corrupt("slots");
    }

    llama_kv_units::image im;

    im.evicted_max  = in.num<int32_t>();
    im.is_recording = in.flag();

    if ((im.evicted_max != llama_kv_units::none && !is_free(im.evicted_max)) || (im.is_recording && !may_record)) {
        llama_kv_state_corrupt("evictions of the heads");
    }

    std::vector<int32_t> sorted;

    for (uint32_t unit = 0; unit < n_unit; ++unit) {
        auto pos = in.nums<int32_t>(n);

        bool ok = true;
        for (size_t i = 0; i < n; ++i) {
            const bool is_protected = pos_ledger[slots[i]] < pos_free;

            ok = ok && (unit == 0 || is_protected ? pos[i] == pos_ledger[slots[i]] : is_free(pos[i]));
        }

        sorted = pos;
        if (!p.compact) {
            std::sort(sorted.begin(), sorted.end()); // compact: slot = rank
        }
        for (size_t i = 1; i < n; ++i) {
            ok = ok && sorted[i] > sorted[i - 1];
        }

        const uint32_t n_gone = in.num<uint32_t>();

        auto gone = in.nums<int32_t>(n_gone);

        ok = ok && (gone.empty() || im.is_recording) && std::all_of(gone.begin(), gone.end(), is_free);
        if (!ok) {
            llama_kv_state_corrupt("tokens of a head");
        }

        im.pos .push_back(std::move(pos));
        im.gone.push_back(std::move(gone));
    }

    choice c;
    c.n = in.num<uint32_t>();

    if (c.n > 0 && (n != budget || c.n > budget)) {
        llama_kv_state_corrupt("victims");
    }

    std::vector<bool> seen;

    c.slots = in.nums<uint32_t>((size_t) c.n*n_unit);
    for (uint32_t unit = 0; unit < n_unit && c.n > 0; ++unit) {
        seen.assign(n_slots, false);

        for (uint32_t i = 0; i < c.n; ++i) {
            const uint32_t slot = c.slots[(size_t) unit*c.n + i];

            const auto it = std::lower_bound(slots.begin(), slots.end(), slot);
            if (it == slots.end() || *it != slot || seen[slot]) {
                llama_kv_state_corrupt("victims");
            }
            seen[slot] = true;

            // as candidates() says for the token that comes next
            const int32_t pos = im.pos[unit][it - slots.begin()];
            if (!is_free(pos) || (int64_t) pos > (int64_t) ledger.pos_last + 1 - (int64_t) n_recent) {
                llama_kv_state_corrupt("victims");
            }
        }
    }

    uint32_t             counted = 0;
    std::vector<int32_t> queries;

    if (needs.window > 0) {
        counted = in.num<uint32_t>();
        queries = in.nums<int32_t>(needs.window);

        bool ok = true;
        for (size_t i = 0; i < queries.size(); ++i) {
            const int32_t pos = queries[i];
            ok = ok && (pos == llama_kv_units::none || (pos >= ledger.pos_first && pos <= ledger.pos_last && (uint32_t) pos % needs.window == i));
        }
        if (!ok) {
            llama_kv_state_corrupt("queries");
        }
    }

    const auto stood = in.nums<int32_t>(needs.k_unrotated ? n_unit*n : 0);
    if (std::any_of(stood.begin(), stood.end(), [](int32_t pos) { return pos < -llama_kv_ledger::pos_end || pos > llama_kv_ledger::pos_end; })) {
        llama_kv_state_corrupt("where keys stand");
    }

    const auto numbers = in.nums<float>(!kept_state.empty() ? heads.back()*n : 0);
    if (needs.given && std::any_of(numbers.begin(), numbers.end(), [](float x) { return std::isinf(x); })) {
        llama_kv_state_corrupt("scores");
    }

    const auto rows = query_rows(queries);

    for (size_t i = 0; i < layers.size(); ++i) {
        auto & l = *states[i];

        if (l.queries) {
            llama_kv_state_read_rows(in, l.queries, seq*l.queries->nb[2], rows, is_check);
        }
        for (plane * pl : { &l.weights, &l.k_norm, &l.v_norm }) {
            if (pl->t) {
                llama_kv_state_read_cols(in, pl->t, strm*pl->t->nb[2], layers[i].n_head_kv, n_rows, is_check ? slots : where.of(seq, slots), is_check);
            }
        }
    }

    if (is_check) {
        return;
    }

    forget_choice(seq);

    units_ [seq].set_image(slots, im);
    choices[seq] = std::move(c);

    if (needs.window > 0) {
        n_counted[seq] = counted;
        query_pos[seq] = std::move(queries);
    }
    for (size_t i = 0; i < stood.size(); ++i) {
        stands[seq][i/n*n_slots + slots[i % n]] = stood[i];
    }
    for (size_t i = 0; i < numbers.size(); ++i) {
        kept_state[seq][i/n*n_slots + slots[i % n]] = numbers[i];
    }
    if (needs.drawn) {
        for (uint32_t unit = 0; unit < n_unit; ++unit) {
            for (const uint32_t slot : slots) {
                save_drawn(seq, unit, slot, units_[seq].pos(unit)[slot]);
            }
        }
    }
}
