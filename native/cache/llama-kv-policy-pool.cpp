#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-move.h"

#include <algorithm>
#include <stdexcept>

// sequences that share one cache: how large each may be, and where it lies

void llama_kv_policy::set_allotment(uint32_t seq, uint32_t n) {
    pool->allot(seq, n);
    evicted_pool[seq] = n > 0 ? evicted_pool[seq] : 0;

    // a sequence that holds nothing counts as one of any size
    const uint32_t b = n > 0 ? n : budget;

    ledgers[seq].resize(b, n_recent_of(seq, b));

    // chosen when it was full
    if (scores) {
        scores->forget_choice(seq);
    }
}

uint32_t llama_kv_policy::n_recent_of(uint32_t seq, uint32_t allotment) const {
    return spec.desc->takes_recent ? llama_kv_pool::n_recent(spec.n_recent(budget), allotment) : ledgers[seq].n_recent();
}

void llama_kv_policy::count_evictions(uint32_t seq, size_t n) {
    evicted_pool[seq] += ledgers[seq].budget() < budget ? (int64_t) n : 0;
}

void llama_kv_policy::make_room(uint32_t seq, uint32_t n) {
    const auto & ledger = ledgers[seq];

    const uint32_t page = llama_kv_pool::PAGE;
    const uint32_t low  = least(seq);

    // it counts among those that hold something, and what it must have it gets
    if (pool->allotment(seq) == 0) {
        while (pool->n_unallotted() < low) {
            if (!take_from_richest(seq)) {
                throw std::runtime_error("the pool has no room for one more sequence");
            }
        }
        set_allotment(seq, low);
    }

    if (is_given[seq]) {
        return;
    }

    const uint32_t want = (uint32_t) std::min<uint64_t>(budget, (uint64_t) llama_kv_pool::pages(ledger.n_used() + n)*page);

    uint32_t have = pool->allotment(seq);
    while (have < want) {
        const uint32_t more = std::min(want, (have/page + 1)*page) - have;

        if (pool->n_unallotted() < more) {
            if (have + more > pool->share(seq) || !take_from_richest(seq)) {
                break;
            }
            continue;
        }

        have += more;
        pool->allot(seq, have);
    }
    if (have != ledger.budget()) {
        set_allotment(seq, have);
    }

    // what a chunk has brought too much goes back before pages are short
    if (pool->n_pages_free() < llama_kv_pool::pages(n) + 1) {
        settle_all();
    }
}

bool llama_kv_policy::allot(uint32_t seq, uint32_t n) {
    const uint32_t have = pool->allotment(seq);
    if (n < least(seq) || n > budget || (n > have && n - have > pool->n_unallotted())) {
        return false;
    }
    is_given[seq] = true;

    if (n < have) {
        shrink(seq, n);
    } else if (n > have) {
        set_allotment(seq, n);
    }

    return true;
}

bool llama_kv_policy::take_from_richest(uint32_t seq) {
    const uint32_t other = pool->richest(seq);
    if (other == llama_kv_pool::none || least(other) >= pool->allotment(other)) {
        return false;
    }
    shrink(other, std::max(least(other), pool->without_a_page(other)));

    return true;
}

void llama_kv_policy::shrink(uint32_t seq, uint32_t n) {
    auto & ledger = ledgers[seq];

    // nobody can go on with it: all of it goes
    if (conditions[seq].lost) {
        drop_lost(seq);
        return;
    }

    settle((llama_seq_id) seq);

    if (ledger.n_used() > 0) {
        std::vector<uint32_t>              victims;
        std::vector<llama_kv_ledger::move> moves;

        // what goes wrong on the way leaves the books ahead of the data
        conditions[seq].lost = true;

        ggml_backend_sched_synchronize(lctx->get_sched());

        // as many are recent as may be with the new allotment
        ledger.resize(ledger.budget(), n_recent_of(seq, n));

        const uint32_t n_over = ledger.n_used() - std::min(ledger.n_used(), n);

        unit_moves.clear();
        if (scores && n_over > 0) {
            if (!scores->choose(seq, n_over, candidates(seq, ledger.pos_last()), true)) {
                throw std::runtime_error("there are fewer tokens that may go than have to");
            }
            const auto & slots = scores->get_choice(seq).slots;

            ledger.set_victims({ slots.begin(), slots.begin() + n_over });
        }

        ledger.shrink(n, victims, moves);
        evicted_pool[seq] += (int64_t) victims.size();

        for (const uint32_t slot : victims) {
            kv.v_cells[where.stream_of(seq)].rm(where.of(seq, slot));
        }

        bool any = !moves.empty();
        if (scores) {
            any = scores->units(seq).evict(scores->get_choice(seq).slots, n_over, n, unit_moves) || any;
            scores->forget_choice(seq);
        }
        if (any) {
            if (!copy_rows(seq, moves, ledger.n_used())) {
                throw std::runtime_error("failed to move the kept rows");
            }
            move_cells(seq, moves);
        }

        conditions[seq].lost = false;
    }

    set_allotment(seq, n);
    keep_pages(seq);
}

void llama_kv_policy::drop_lost(uint32_t seq) {
    auto & cells = kv.v_cells[where.stream_of(seq)];

    for (uint32_t slot = 0; slot < ledgers[seq].n_slots(); ++slot) {
        if (pool->has_page(seq, slot)) {
            const uint32_t row = where.of(seq, slot);
            if (!cells.is_empty(row) && cells.seq_has(row, (llama_seq_id) seq)) {
                cells.rm(row);
            }
        }
    }

    ledgers[seq].reset();
    if (scores) {
        scores->units(seq).reset();
        scores->forget_queries(seq, 0);
        scores->forget_to_come(seq);
    }
    set_allotment(seq, 0);
    keep_pages(seq);
}

void llama_kv_policy::settle_all() {
    for (uint32_t seq = 0; seq < n_seq(); ++seq) {
        settle((llama_seq_id) seq);
    }
}

void llama_kv_policy::take_pages(uint32_t seq, const std::vector<uint32_t> & slots) {
    for (const uint32_t slot : slots) {
        if (!pool->take(seq, slot)) {
            throw std::runtime_error("the pool has no page left");
        }
    }
}

void llama_kv_policy::take_pages_of(uint32_t seq, const std::vector<llama_kv_ledger::move> & moves) {
    for (const auto & m : moves) {
        take_pages(seq, { m.dst });
    }
}

void llama_kv_policy::keep_pages(uint32_t seq) {
    pool->keep(seq, ledgers[seq].kept());
}

std::vector<llama_kv_ledger::move> llama_kv_policy::row_moves(uint32_t seq, const std::vector<llama_kv_ledger::move> & moves) const {
    auto res = moves;
    for (auto & m : res) {
        m = { where.of(seq, m.src), where.of(seq, m.dst) };
    }

    return res;
}

void llama_kv_policy::restore_room(uint32_t seq, uint32_t n, const std::vector<uint32_t> & slots) {
    set_allotment(seq, 0);

    while (pool->n_unallotted() < n) {
        if (!take_from_richest(seq)) {
            throw std::runtime_error("the pool has no room for " + std::to_string(n) + " tokens of sequence " + std::to_string(seq));
        }
    }
    settle_all();

    set_allotment(seq, n);
    take_pages(seq, slots);
}

bool llama_kv_policy::copy_pages(uint32_t src, uint32_t dst) {
    // the source may itself have to give way
    while (pool->n_unallotted() < ledgers[src].budget() && take_from_richest(dst)) {
    }

    const auto slots = ledgers[src].kept();

    try {
        restore_room(dst, ledgers[src].budget(), slots);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        set_allotment(dst, 0);
        keep_pages(dst);
        return false;
    }

    auto & cells = kv.v_cells[where.stream_of(src)];

    std::vector<llama_kv_ledger::move> moves;
    for (const uint32_t slot : slots) {
        const uint32_t from = where.of(src, slot);
        const uint32_t to   = where.of(dst, slot);

        cells.pos_set(to, cells.pos_get(from));
        cells.ext_set(to, cells.ext_get(from));
        cells.seq_add(to, (llama_seq_id) dst);

        moves.push_back({ from, to });
    }

    if (!llama_kv_move(*backends, layers, where.stream_of(src), moves, kv.v_trans)) {
        throw std::runtime_error("failed to copy the kept rows");
    }

    return true;
}
