#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

// what a bounded cache answers to operations on its sequences

bool llama_kv_policy::has_seq(llama_seq_id seq_id) const {
    return seq_id >= 0 && (uint32_t) seq_id < ledgers.size();
}

llama_pos llama_kv_policy::evicted_max(uint32_t seq) const {
    return std::max(ledgers[seq].evicted_max(), scores ? scores->units(seq).evicted_max() : llama_kv_ledger::none);
}

bool llama_kv_policy::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (!has_seq(seq_id)) {
        return true; // nothing there
    }

    const auto & l = ledger(seq_id);
    const auto & c = conditions[seq_id];

    p0 = std::max(p0, 0);

    if (c.poisoned || c.lost) {
        return p0 == 0 && (p1 < 0 || p1 > l.pos_last());
    }

    if (l.empty() || p0 > l.pos_last()) {
        return true;
    }

    // what was not computed can always go
    if (p1 < 0 && l.pos_placed() != llama_kv_ledger::none && p0 >= l.pos_placed()) {
        return true;
    }

    // a bounded cache drops tokens from the end only
    if (p1 >= 0 && p1 <= l.pos_last()) {
        return p1 <= l.pos_first() || p1 <= p0;
    }

    return rewind_kind(seq_id, p0) != LLAMA_KV_REWIND_IMPOSSIBLE;
}

bool llama_kv_policy::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (!has_seq(seq_id)) {
        return true;
    }

    if (!can_rm(seq_id, p0, p1)) {
        LLAMA_LOG_DEBUG("%s: refused: [%d, %d) is no end of the sequence, or reaches back to the newest evicted position, %d\n", __func__,
                p0, p1, evicted_max((uint32_t) seq_id));
        return false;
    }

    const uint32_t seq = (uint32_t) seq_id;

    auto & ledger = ledgers[seq];

    // all of it, tokens to come included
    if (scores && p0 < 0 && p1 < 0) {
        scores->forget_to_come(seq);
    }

    p0 = std::max(p0, 0);

    if (p1 >= 0 && p1 <= ledger.pos_last()) {
        return true; // nothing there
    }
    if (p0 == 0) {
        conditions[seq] = {};
    }
    if (ledger.empty() || p0 > ledger.pos_last()) {
        return true; // nothing there
    }

    std::vector<uint32_t> freed;
    ledger.truncate(p0, freed);
    if (positions) {
        positions->truncate(seq);
    }

    auto & cells = kv.v_cells[where.stream_of(seq)];

    for (const uint32_t slot : freed) {
        // empty if the ubatch failed before upstream took note of it
        const bool has_row = !is_pool() || pool->has_page(seq, slot);
        if (has_row && !cells.is_empty(where.of(seq, slot))) {
            cells.rm(where.of(seq, slot));
        }
    }

    inflight.erase(std::remove(inflight.begin(), inflight.end(), seq), inflight.end());

    const auto give_back = [&]() {
        if (is_pool()) {
            keep_pages(seq);
        }
        if (is_pool() && ledger.empty()) {
            set_allotment(seq, 0);
        }
        return true;
    };

    if (!scores) {
        return give_back();
    }

    scores->forget_choice(seq);
    scores->forget_step();
    scores->forget_queries(seq, ledger.empty() ? 0 : p0);
    scores->forget_to_come(seq);

    if (ledger.empty() && filter) {
        filter->reset();
    }
    if (ledger.empty()) {
        scores->units(seq).reset();
    } else if (scores->units(seq).truncate(p0, ledger.n_used(), is_per_head(), unit_moves, ledger.pos_first() + (llama_pos) ledger.n_protect())) {
        // the newest tokens sit in slots of their own in each unit: what is left is packed into the same ones
        std::vector<llama_kv_ledger::move> moves;
        ledger.pack(moves);

        ggml_backend_sched_synchronize(lctx->get_sched());
        if (!copy_rows(seq, moves, ledger.n_used())) {
            conditions[seq].lost = true;
        }

        move_cells(seq, moves);
    }

    return give_back();
}

llama_pos llama_kv_policy::seq_pos_min(llama_seq_id seq_id) const {
    if (!has_seq(seq_id) || ledger(seq_id).empty()) {
        return -1;
    }

    const llama_pos newest = evicted_max((uint32_t) seq_id);

    return newest == llama_kv_ledger::none ? ledger(seq_id).pos_first() : newest + 1;
}

llama_pos llama_kv_policy::seq_pos_max(llama_seq_id seq_id) const {
    return !has_seq(seq_id) || ledgers[seq_id].empty() ? -1 : pos_last((uint32_t) seq_id);
}

llama_pos llama_kv_policy::seq_pos_min_iswa(llama_seq_id seq_id, llama_pos pos_swa) const {
    if (!has_seq(seq_id) || ledger(seq_id).empty()) {
        return -1;
    }

    const auto & l = ledger(seq_id);

    // a rewind to p0 needs the whole window before p0 in the other cache too
    const llama_pos pos_window = pos_swa <= l.pos_first() ? l.pos_first() : pos_swa + (llama_pos) kv.hparams.n_swa - 1;

    return std::max(seq_pos_min(seq_id), pos_window);
}

llama_kv_rewind llama_kv_policy::rewind_kind(llama_seq_id seq_id, llama_pos p0) const {
    const auto & l = ledger(seq_id);

    if (l.empty() || p0 > l.pos_last() || p0 <= l.pos_first()) {
        return LLAMA_KV_REWIND_EXACT;
    }

    return p0 <= evicted_max((uint32_t) seq_id) ? LLAMA_KV_REWIND_IMPOSSIBLE : l.rewind_exact(p0) ? LLAMA_KV_REWIND_EXACT : LLAMA_KV_REWIND_SHORTENED;
}

int32_t llama_kv_policy::n_rewind() const {
    const auto & l = ledgers[0];

    // others may take what is above the least
    const uint32_t b = is_pool() ? least(0) : l.budget();

    // the oldest go: all but one of those beside the protected ones are recent
    uint32_t res = spec.desc->takes_recent ? (is_pool() ? n_recent_of(0, b) : l.n_recent()) : b - l.n_protect() - 1;

    // the window before the first one that goes
    if (kv_swa) {
        res = std::min(res, kv_swa->get_size() - std::min(kv_swa->get_size(), kv.hparams.n_swa));
    }

    return (int32_t) res;
}

bool llama_kv_policy::pin(llama_seq_id seq_id, int32_t n) {
    if (n < 0) {
        return false;
    }

    auto & l = ledgers[seq_id];

    const uint32_t n_protect = std::max((uint32_t) n, (uint32_t) spec.sinks);

    // the originals of all sequences live in one block, which can grow only while none of them is needed
    const bool grow = positions && positions->is_short(n_protect);

    if (grow && std::any_of(ledgers.begin(), ledgers.end(), [](const auto & other) { return !other.empty(); })) {
        return false;
    }

    const uint32_t page = scores ? scores->page_size() : 0;

    if (page > 0 && (uint64_t) n_protect + l.n_recent() + 2*page - 1 > l.budget()) {
        return false;
    }

    if (is_pool() && llama_kv_pool::n_tokens_min(n_protect, scores ? scores->page_size() : 0, n_seq()) > (uint64_t) spec.pool) {
        return false;
    }

    const uint32_t n_before = l.n_protect();

    if (!l.set_protect(n_protect)) {
        return false;
    }

    if (grow && !positions->resize(n_protect)) {
        l.set_protect(n_before);
        return false;
    }

    return true;
}

bool llama_kv_policy::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    const uint32_t s0 = (uint32_t) seq_id_src;
    const uint32_t s1 = (uint32_t) seq_id_dst;

    // cells of a shared window belong to both, and could not be rotated for one of them
    if (s0 == s1 || spec.update == LLAMA_KV_UPDATE_GATHER || (is_pool() && kv_swa) || conditions[s0].lost || conditions[s0].poisoned) {
        return false;
    }

    ggml_backend_sched_synchronize(lctx->get_sched());

    settle(seq_id_src);

    if (is_pool() && !copy_pages(s0, s1)) {
        return false;
    }

    ledgers   [s1] = ledgers   [s0];
    arrivals  [s1].clear();
    conditions[s1] = conditions[s0];
    if (scores) {
        scores->copy(s0, s1);
    }
    if (positions) {
        positions->copy(s0, s1);
    }

    return true;
}

bool llama_kv_policy::check() const {
    std::vector<uint32_t> n_used(kv.n_stream, 0);

    for (uint32_t seq = 0; seq < n_seq(); ++seq) {
        const auto & ledger = this->ledger((llama_seq_id) seq);
        const auto & cells  = kv.v_cells[where.stream_of(seq)];

        if (!ledger.check() || (is_pool() && !ledger.empty() && ledger.budget() != pool->allotment(seq))) {
            return false;
        }
        for (const uint32_t slot : ledger.kept()) {
            if (is_pool() && !pool->has_page(seq, slot)) {
                return false;
            }
            const uint32_t row = where.of(seq, slot);
            if (cells.is_empty(row) || cells.pos_get(row) != ledger.pos_of(slot) || !cells.seq_has(row, (llama_seq_id) seq) || cells.seq_count(row) != 1) {
                return false;
            }
        }
        n_used[where.stream_of(seq)] += ledger.n_used();

        if (scores && !ledger.empty()) {
            catch_up(seq, true);
            if (!scores->check_choice(seq, candidates(seq, ledger.pos_last() + 1))) {
                return false;
            }
        }
    }

    for (uint32_t strm = 0; strm < kv.n_stream; ++strm) {
        if (kv.v_cells[strm].get_used() != n_used[strm]) {
            return false;
        }
    }

    return !is_pool() || pool->check();
}
