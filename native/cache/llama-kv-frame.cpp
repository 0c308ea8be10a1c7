#include "llama-kv-frame.h"

#include <algorithm>
#include <cstdlib>

llama_kv_frame::llama_kv_frame(uint32_t n_slots, const rule & r) : rule_(r), at_(n_slots) {
    reset();
}

void llama_kv_frame::reset() {
    ranks_ = rule_.ranks;
    dirty_ = false;
    base_  = 0;

    origin_       = 0;
    delta_pinned_ = 0;
    n_interior_   = 0;
    n_batches_    = 0;
}

llama_kv_frame::plan llama_kv_frame::place(const llama_kv_ledger & ledger, int32_t pos0, const std::vector<uint32_t> & slots, bool no_rotations, bool every_victim) {
    plan res;

    const int32_t n_protect = (int32_t) ledger.n_protect();

    if (pos0 == ledger.pos_first()) {
        reset();
        origin_ = pos0;
    }

    if (!ranks_ && rule_.is_auto && (uint32_t) (ledger.pos_last() - ledger.pos_oldest()) >= rule_.n_ctx_train) {
        ranks_ = true;
        dirty_ = true;
        res.switched = true;
    }

    // not while the protected tokens come in: the originals of all of them stand in one frame
    // (a budget above rebase_at must not mean a re-base at every step)
    if (ranks_ && pos0 - base_ - origin_ >= rule_.rebase_at + (int32_t) ledger.n_used() && pos0 - ledger.pos_first() >= n_protect) {
        res.rebased = first(ledger) - origin_;
        base_ += res.rebased;
        dirty_ = dirty_ || res.rebased != 0;
    }

    for (size_t i = 0; i < slots.size(); ++i) {
        at_[slots[i]] = pos0 + (int32_t) i - base_;
    }

    if (!ranks_) {
        return res;
    }

    const uint32_t n_first = (uint32_t) std::min(pos0 - ledger.pos_first(), n_protect); // protected tokens of earlier ubatches

    res.delta = delta(ledger);

    // the oldest debt decides
    const bool    has_pinned = n_first > rule_.n_sinks;
    const int64_t n_interior = every_victim ? ledger.n_evicted() : ledger.n_interior();
    const int64_t debt       = std::max<int64_t>(n_interior - n_interior_, has_pinned ? std::abs(res.delta - delta_pinned_) : 0);

    const bool apply = dirty_ || debt >= rule_.rotate_every;

    if (res.delta != 0 || apply) {
        res.n_sinks = std::min(n_first, rule_.n_sinks);
    }

    if (has_pinned && apply) {
        res.pinned    = true;
        delta_pinned_ = res.delta;
    }

    res.rotating = apply;

    if (apply) {
        const std::vector<int32_t> owed = no_rotations ? std::vector<int32_t>() : debts(ledger);

        for (uint32_t slot = 0; slot < owed.size(); ++slot) {
            if (owed[slot] != 0) {
                res.rotations.push_back({ slot, owed[slot] });
            }
        }
        settle(ledger);

        std::sort(res.rotations.begin(), res.rotations.end());

        dirty_      = false;
        n_interior_ = n_interior;
    }

    n_batches_ += res.pinned || !res.rotations.empty() || (every_victim && apply && ledger.n_evicted() > 0);

    return res;
}

bool llama_kv_frame::plan_ahead(const llama_kv_ledger & ledger, int32_t pos0, uint32_t n_ahead, bool every_victim, bool may_rotate, plan & res) const {
    if (!ranks_) {
        // (the oldest token is at least as old as the ledger knows)
        return !rule_.is_auto || (uint32_t) (pos0 - ledger.pos_oldest()) < rule_.n_ctx_train;
    }

    const int32_t n_used    = (int32_t) ledger.n_used();
    const int32_t n_protect = (int32_t) ledger.n_protect();

    if (dirty_ || pos0 - base_ - origin_ >= rule_.rebase_at + n_used) {
        return false;
    }

    res.delta = pos0 - base_ - (n_used - 1) - origin_;

    const bool has_pinned = (uint32_t) n_protect > rule_.n_sinks;

    // where victims are told apart, each may be one of the interior
    const int64_t n_interior = (every_victim ? ledger.n_evicted() : ledger.n_interior()) + n_ahead;
    const int64_t debt       = std::max<int64_t>(n_interior - n_interior_, has_pinned ? std::abs(res.delta - delta_pinned_) : 0);

    res.rotating = debt >= rule_.rotate_every;
    res.pinned   = res.rotating && has_pinned;

    if (res.delta != 0 || res.rotating) {
        res.n_sinks = std::min((uint32_t) n_protect, rule_.n_sinks);
    }

    return !res.rotating || (every_victim && may_rotate);
}

void llama_kv_frame::place_ahead(const llama_kv_ledger & ledger, uint32_t n_ahead, const plan & res) {
    if (res.pinned) {
        delta_pinned_ = res.delta;
    }
    if (res.rotating) {
        n_interior_ = ledger.n_evicted() + n_ahead;
        n_batches_++;
    }
}

void llama_kv_frame::arrive(const llama_kv_ledger & ledger, uint32_t slot, int32_t pos, bool rotated) {
    at_[slot] = pos - base_;

    if (rotated) {
        settle(ledger);
    }
}

void llama_kv_frame::settle(const llama_kv_ledger & ledger) {
    int32_t target = first(ledger);

    for (const uint32_t slot : ledger.kept()) {
        at_[slot] = target++;
    }
}

std::vector<int32_t> llama_kv_frame::debts(const llama_kv_ledger & ledger) const {
    std::vector<int32_t> res(at_.size(), 0);

    int32_t target = first(ledger);

    for (const uint32_t slot : ranks_ ? ledger.kept() : std::vector<uint32_t>()) {
        const bool is_protected = ledger.pos_of(slot) - ledger.pos_first() < (int32_t) ledger.n_protect();

        res[slot] = is_protected ? 0 : target - at_[slot];
        target++;
    }

    return res;
}

llama_kv_frame::image llama_kv_frame::get_image(const std::vector<uint32_t> & slots) const {
    image res = { ranks_, dirty_, base_, origin_, delta_pinned_, n_interior_, n_batches_, {} };

    for (const uint32_t slot : slots) {
        res.at.push_back(at_[slot]);
    }

    return res;
}

void llama_kv_frame::set_image(const std::vector<uint32_t> & slots, const image & im) {
    ranks_        = im.ranks;
    dirty_        = im.dirty;
    base_         = im.base;
    origin_       = im.origin;
    delta_pinned_ = im.delta_pinned;
    n_interior_   = im.n_interior;
    n_batches_    = im.n_batches;

    for (size_t i = 0; i < slots.size(); ++i) {
        at_[slots[i]] = im.at[i];
    }
}

bool llama_kv_frame::is_possible(const llama_kv_ledger::image & ledger, const image & im) const {
    // differences of two of these fit 32 bits
    const auto is_near = [](int32_t x) { return std::abs((int64_t) x) <= llama_kv_ledger::pos_end/2; };

    if (ledger.pos_first == llama_kv_ledger::none) {
        return true;
    }

    return (im.ranks || !rule_.ranks) && (!im.ranks || rule_.ranks || rule_.is_auto) && im.base >= 0 && im.base <= ledger.pos_last - ledger.pos_first + 1 &&
        im.origin == ledger.pos_first && is_near(im.delta_pinned) && im.n_interior >= 0 && im.n_interior <= ledger.n_evicted && im.n_batches >= 0 &&
        std::all_of(im.at.begin(), im.at.end(), [&](int32_t at) { return at >= -llama_kv_ledger::pos_end/2 && at <= ledger.pos_last; });
}
