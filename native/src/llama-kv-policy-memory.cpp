#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

// what a bounded cache answers to operations on its sequences

bool llama_kv_policy::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (seq_id < 0) {
        for (uint32_t s = 0; s < kv.n_stream; ++s) {
            if (!can_rm((llama_seq_id) s, p0, p1)) {
                return false;
            }
        }
        return true;
    }

    const auto & l = ledger(seq_id);

    p0 = std::max(p0, 0);

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
    if (seq_id < 0) {
        bool res = true;
        for (uint32_t s = 0; s < kv.n_stream; ++s) {
            res = seq_rm((llama_seq_id) s, p0, p1) && res;
        }
        return res;
    }

    if (!can_rm(seq_id, p0, p1)) {
        LLAMA_LOG_DEBUG("%s: refused: [%d, %d) is no end of the sequence, or reaches back to the newest evicted position, %d\n", __func__,
                p0, p1, ledger(seq_id).evicted_max());
        return false;
    }

    const uint32_t strm = kv.seq_to_stream[seq_id];

    auto & ledger = ledgers[strm];

    if (ledger.empty() || p0 > ledger.pos_last() || (p1 >= 0 && p1 <= ledger.pos_last())) {
        return true; // nothing there
    }

    const bool undo = is_per_head() && ledger.pos_placed() != llama_kv_ledger::none && scores->lanes(strm).has_newest();

    std::vector<uint32_t> freed;
    ledger.truncate(std::max(p0, 0), freed);
    if (!frames.empty()) {
        frames[strm].truncate();
    }

    for (const uint32_t slot : freed) {
        // empty if the ubatch failed before upstream took note of it
        if (!kv.v_cells[strm].is_empty(slot)) {
            kv.v_cells[strm].rm(slot);
        }
    }

    inflight.erase(std::remove(inflight.begin(), inflight.end(), seq_id), inflight.end());

    if (!scores) {
        return true;
    }

    scores->forget_choice(strm);
    scores->forget_step();

    if (ledger.empty()) {
        scores->lanes(strm).reset();
    } else if (!undo) {
        scores->lanes(strm).drop(freed);
    } else if (scores->lanes(strm).undo(ledger.n_used() + 1, lane_moves)) {
        // the step that failed has left a hole in each lane, in a slot of its own
        std::vector<llama_kv_ledger::move> moves;
        ledger.pack(moves);

        ggml_backend_sched_synchronize(lctx->get_sched());
        broken = !copy_rows(strm, moves, ledger.n_used()) || broken;

        move_cells(strm, moves, seq_id);
    }

    return true;
}

llama_pos llama_kv_policy::seq_pos_min(llama_seq_id seq_id) const {
    const auto & l = ledger(seq_id);

    if (l.empty()) {
        return -1;
    }

    // heads that keep different tokens cannot go back together: the newest token that was computed is what a caller may count on
    if (is_per_head() && l.n_evicted() > 0) {
        return l.pos_placed() == llama_kv_ledger::none ? l.pos_last() : l.pos_placed() - 1;
    }

    return l.tail_first();
}

llama_pos llama_kv_policy::seq_pos_max(llama_seq_id seq_id) const {
    const auto & l = ledger(seq_id);

    return l.empty() ? -1 : l.pos_last();
}

llama_pos llama_kv_policy::seq_pos_min_iswa(llama_seq_id seq_id, llama_pos pos_swa) const {
    const auto & l = ledger(seq_id);

    if (l.empty()) {
        return -1;
    }

    // a rewind to p0 needs the whole window before p0 in the other cache too
    const llama_pos pos_window = pos_swa <= l.pos_first() ? l.pos_first() : pos_swa + (llama_pos) kv.hparams.n_swa - 1;

    return std::max(seq_pos_min(seq_id), pos_window);
}

llama_kv_rewind llama_kv_policy::rewind_kind(llama_seq_id seq_id, llama_pos p0) const {
    const auto & l = ledger(seq_id);

    if (l.empty() || p0 > l.pos_last() || p0 <= l.pos_first()) {
        return LLAMA_KV_REWIND_EXACT;
    }

    if (is_per_head() && l.n_evicted() > 0) {
        return LLAMA_KV_REWIND_IMPOSSIBLE;
    }

    return !l.can_rewind(p0) ? LLAMA_KV_REWIND_IMPOSSIBLE : l.rewind_exact(p0) ? LLAMA_KV_REWIND_EXACT : LLAMA_KV_REWIND_SHORTENED;
}

bool llama_kv_policy::pin(llama_seq_id seq_id, int32_t n) {
    if (n < 0) {
        return false;
    }

    auto & l = ledgers[kv.seq_to_stream[seq_id]];

    const uint32_t n_protect = std::max((uint32_t) n, (uint32_t) spec.sinks);

    // the originals of all sequences live in one block, which can grow only while none of them is needed
    const bool grow = sinks && n_protect > sinks->get_n();

    if (grow && std::any_of(ledgers.begin(), ledgers.end(), [](const auto & other) { return !other.empty(); })) {
        return false;
    }

    const uint32_t page = scores && scores->get_params().pages ? scores->get_params().evict_every : 0;

    if (page > 0 && (uint64_t) n_protect + l.n_recent() + 2*page - 1 > l.budget()) {
        return false;
    }

    if (!l.set_protect(n_protect)) {
        return false;
    }

    if (grow) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        sinks->resize(n_protect);
    }

    return true;
}

bool llama_kv_policy::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return true;
    }

    const uint32_t s0 = kv.seq_to_stream[seq_id_src];
    const uint32_t s1 = kv.seq_to_stream[seq_id_dst];

    const bool is_gather = spec.update == LLAMA_KV_UPDATE_GATHER;

    if (s0 == s1 || p0 > 0 || p1 >= 0 || is_gather) {
        refuse(is_gather ? "seq_cp with update=gather" : "seq_cp of a part of a sequence");
        return false;
    }

    ggml_backend_sched_synchronize(lctx->get_sched());

    ledgers[s1] = ledgers[s0];
    if (scores) {
        scores->copy(s0, s1);
    }
    if (sinks) {
        frames[s1] = frames[s0];
        sinks->copy(s0, s1);
    }

    return true;
}

void llama_kv_policy::refuse(const char * op) const {
    LLAMA_LOG_ERROR("%s: %s does nothing on a cache that is bounded by the policy %s\n", __func__, op, spec.desc->name);
}

void llama_kv_policy::check_state_write(llama_seq_id seq_id) const {
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if ((seq_id < 0 || kv.seq_to_stream[seq_id] == s) && ledgers[s].n_evicted() > 0) {
            throw std::runtime_error("the state of a sequence with evicted tokens cannot be saved yet: save before the budget is reached, or keep the text and read it again");
        }
    }
}

void llama_kv_policy::check_state_read() const {
    throw std::runtime_error("a state cannot be restored into a bounded cache yet: read the text again");
}
