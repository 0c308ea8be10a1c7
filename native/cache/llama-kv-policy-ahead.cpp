#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

// where devices choose the victims (llama-kv-scores-device.cpp), the host goes on without knowing them: what a step needs of the books is that
// the cache is full, and which positions may go. The ledger, the units and the cells follow when somebody asks, by the code of any other step

bool llama_kv_policy::can_run_ahead(const llama_ubatch & ubatch) {
    // masks by distance need the cells' positions
    if (!scores || !scores->is_on_device() || !ubatch.token || ubatch.is_pos_2d() || ubatch.n_seqs_unq != ubatch.n_tokens || kv.hparams.use_alibi) {
        return false;
    }

    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const uint32_t seq    = (uint32_t) ubatch.seq_id_unq[s];
        const auto   & ledger = ledgers[seq];

        if (!scores->is_ahead(seq) || ledger.n_used() != ledger.budget() ||
                (positions && !positions->can_place_ahead(seq, ledger, ubatch.pos[s], (uint32_t) arrivals[seq].size() + 1))) {
            return false;
        }
    }

    return true;
}

void llama_kv_policy::run_ahead(const llama_ubatch & ubatch) {
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const uint32_t  seq = (uint32_t) ubatch.seq_id_unq[s];
        const llama_pos pos = ubatch.pos[s];

        arrival a = { pos, {}, false };
        a.ext.tok = ubatch.token[s];

        arrivals[seq].push_back(a);
        inflight.push_back(seq);

        conditions[seq] = { /*.poisoned =*/ false, /*.lost =*/ true };

        if (positions) {
            arrivals[seq].back().rotated = positions->place_ahead(seq, ledgers[seq], pos, (uint32_t) arrivals[seq].size(), s, ubatch);
        } else {
            warn_far(seq, pos);
        }
        scores->run_ahead(seq);

        llama_kv_scores::seq_step st;
        st.seq   = seq;
        st.pos0  = pos;
        st.n     = 1;
        st.ahead = true;
        st.next  = candidates(seq, pos + 1);
        step.push_back(std::move(st));

        conditions[seq].lost = false;
    }
}

void llama_kv_policy::catch_up(uint32_t seq, bool with_choice) const {
    if (!scores || !(scores->misses_tokens(seq) || (with_choice && scores->misses_choice(seq)))) {
        return;
    }

    auto & self = const_cast<llama_kv_policy &>(*this);

    ggml_backend_sched_synchronize(lctx->get_sched());

    const auto victims = scores->catch_up(seq);
    const auto came    = std::move(self.arrivals[seq]);

    self.arrivals[seq].clear();

    try {
        for (size_t i = 0; i < came.size(); ++i) {
            self.replay(seq, came[i], victims[i]);
        }
    } catch (const std::exception & err) {
        // the books stay behind the data
        LLAMA_LOG_ERROR("%s: sequence %u: %s\n", __func__, seq, err.what());
        scores->forget_choice(seq);
        self.conditions[seq].lost = true;
    }
}

void llama_kv_policy::replay(uint32_t seq, const arrival & a, const std::vector<uint32_t> & victims) {
    auto & ledger = ledgers[seq];
    auto & units  = scores->units(seq);
    auto & cells  = kv.v_cells[where.stream_of(seq)];

    const auto range = candidates(seq, a.pos);

    for (uint32_t unit = 0; unit < units.n_unit(); ++unit) {
        const int32_t pos = victims[unit] < units.n_slots() ? units.pos(unit)[victims[unit]] : llama_kv_units::none;

        if (pos < range.pos_min || pos > range.pos_max) {
            throw std::runtime_error("a device has chosen a token that may not go");
        }
    }

    std::vector<uint32_t>              freed;
    std::vector<llama_kv_ledger::move> moves;

    // the one before it is settled
    ledger.commit(freed, moves);
    ledger.set_victims({ victims[0] });

    std::vector<uint32_t> slots(1);

    if (!ledger.place(a.pos, 1, slots, freed, moves)) {
        throw std::runtime_error("no room for 1 token");
    }
    units.replace(a.pos, victims, slots, unit_moves);
    scores->arrive(seq, slots);
    if (a.rotated) {
        units.forget_gone();
    }

    cells.rm     (slots[0]);
    cells.pos_set(slots[0], a.pos);
    cells.ext_set(slots[0], a.ext);
    cells.seq_add(slots[0], (llama_seq_id) seq);

    if (positions) {
        positions->arrive(seq, ledger, slots[0], a.pos, a.rotated);
    }
}
