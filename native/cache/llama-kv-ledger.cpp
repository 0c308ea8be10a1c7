#include "llama-kv-ledger.h"

#include <algorithm>
#include <functional>

static constexpr uint32_t nil = UINT32_MAX;

llama_kv_ledger::llama_kv_ledger(uint32_t n_slots, uint32_t budget, uint32_t n_protect, uint32_t n_recent,
        std::unique_ptr<llama_kv_victim> rule, bool compact) :
    budget_(budget), n_protect_(n_protect), n_recent_(n_recent), compact_(compact), rule_(std::move(rule)),
    pos_(n_slots), prev_(n_slots), next_(n_slots) {
    reset();
}

void llama_kv_ledger::reset() {
    std::fill(pos_.begin(), pos_.end(), none);
    protect_.assign(n_protect_, none);

    // ascending order is a valid min-heap
    free_.resize(budget_);
    for (uint32_t i = 0; i < budget_; ++i) {
        free_[i] = i;
    }

    head_   = nil;
    tail_   = nil;
    recent_ = nil;

    if (rule_) {
        rule_->clear();
    }

    given_.clear();
    i_given_ = 0;

    n_used_      = 0;
    n_high_      = 0;
    n_evicted_   = 0;
    n_interior_  = 0;
    pos_first_   = none;
    pos_last_    = none;
    evicted_max_ = none;
    evictor_max_ = none;
    pos_commit_  = none;
}

bool llama_kv_ledger::set_protect(uint32_t n) {
    if (!empty() || (uint64_t) n + n_recent_ + 1 > budget_) {
        return false;
    }

    n_protect_ = n;
    protect_.assign(n_protect_, none);

    return true;
}

bool llama_kv_ledger::is_evictable(uint32_t slot) const {
    return (uint32_t) (pos_[slot] - pos_first_) >= n_protect_ && (recent_ == nil || pos_[slot] < pos_[recent_]);
}

void llama_kv_ledger::update_recent() {
    if (!rule_) {
        return;
    }

    const int64_t pos_old = (int64_t) pos_last_ - n_recent_; // the youngest position that is not recent

    while (recent_ != nil && pos_[recent_] <= pos_old) {
        rule_->add(recent_, pos_[recent_]);
        recent_ = next_[recent_];
    }

    for (uint32_t slot = recent_ == nil ? tail_ : prev_[recent_]; slot != nil && pos_[slot] > pos_old; slot = prev_[slot]) {
        rule_->remove(slot, pos_[slot]);
        recent_ = slot;
    }
}

void llama_kv_ledger::relocate(uint32_t src, uint32_t dst) {
    const uint32_t rank = (uint32_t) (pos_[src] - pos_first_);

    if (rank < n_protect_) {
        protect_[rank] = (int32_t) dst;
    } else {
        if (rule_ && is_evictable(src)) {
            rule_->remove(src, pos_[src]);
            rule_->add   (dst, pos_[src]);
        }

        // take the place of src in the list
        prev_[dst] = prev_[src];
        next_[dst] = next_[src];

        (prev_[dst] == nil ? head_ : next_[prev_[dst]]) = dst;
        (next_[dst] == nil ? tail_ : prev_[next_[dst]]) = dst;

        if (recent_ == src) {
            recent_ = dst;
        }
    }

    pos_[dst] = pos_[src];
    pos_[src] = none;
    n_high_  += (dst >= budget_) - (src >= budget_);
}

void llama_kv_ledger::close_gaps(std::vector<move> & moves) {
    const std::vector<uint32_t> slots = kept();

    for (uint32_t i = 0; i < slots.size(); ++i) {
        if (slots[i] != i) {
            relocate(slots[i], i);
            moves.push_back({ slots[i], i });
        }
    }

    // ascending order is a valid min-heap
    free_.clear();
    for (uint32_t i = n_used_; i < budget_; ++i) {
        free_.push_back(i);
    }
}

void llama_kv_ledger::link(uint32_t slot) {
    prev_[slot] = tail_;
    next_[slot] = nil;

    (tail_ == nil ? head_ : next_[tail_]) = slot;
    tail_ = slot;

    if (recent_ == nil) {
        recent_ = slot;
    }
}

void llama_kv_ledger::unlink(uint32_t slot) {
    if (rule_ && is_evictable(slot)) {
        rule_->remove(slot, pos_[slot]);
    }
    if (recent_ == slot) {
        recent_ = next_[slot];
    }

    (prev_[slot] == nil ? head_ : next_[prev_[slot]]) = next_[slot];
    (next_[slot] == nil ? tail_ : prev_[next_[slot]]) = prev_[slot];
}

uint32_t llama_kv_ledger::take_free() {
    std::pop_heap(free_.begin(), free_.end(), std::greater<uint32_t>());

    const uint32_t slot = free_.back();
    free_.pop_back();

    return slot;
}

void llama_kv_ledger::give_free(uint32_t slot) {
    // the headroom is not tracked: it is empty between ubatches
    if (slot < budget_) {
        free_.push_back(slot);
        std::push_heap(free_.begin(), free_.end(), std::greater<uint32_t>());
    }
}

void llama_kv_ledger::put(uint32_t slot, int32_t pos) {
    pos_[slot] = pos;
    n_used_++;
    n_high_ += slot >= budget_;

    const uint32_t rank = (uint32_t) (pos - pos_first_);

    if (rank < n_protect_) {
        protect_[rank] = (int32_t) slot;
    } else {
        link(slot);
    }
}

void llama_kv_ledger::drop(uint32_t slot) {
    const uint32_t rank = (uint32_t) (pos_[slot] - pos_first_);

    if (rank < n_protect_) {
        protect_[rank] = none;
    } else {
        unlink(slot);
    }

    pos_[slot] = none;
    n_used_--;
    n_high_ -= slot >= budget_;
}

void llama_kv_ledger::evict(uint32_t slot, int32_t evictor) {
    evicted_max_ = std::max(evicted_max_, pos_[slot]);
    evictor_max_ = std::max(evictor_max_, evictor);
    n_evicted_++;
    n_interior_ += slot != head_;
    i_given_    += i_given_ < given_.size();

    drop(slot);
}

void llama_kv_ledger::set_victims(std::vector<uint32_t> slots) {
    given_   = std::move(slots);
    i_given_ = 0;
}

bool llama_kv_ledger::place(int32_t pos0, uint32_t n, std::vector<uint32_t> & slots, std::vector<uint32_t> & victims, std::vector<move> & moves) {
    slots.clear();

    if (n == 0 || pos0 < 0 || n > (uint32_t) pos_end || pos0 > pos_end - (int32_t) n || (pos_last_ != none && pos0 != pos_last_ + 1)) {
        return false;
    }

    const bool in_place = n == 1 && n_used_ == budget_;

    if (!in_place && n > free_.size() + (n_slots() - budget_)) {
        return false;
    }

    if (pos_first_ == none) {
        pos_first_ = pos0;
    }

    pos_commit_ = pos0;

    if (in_place) {
        pos_last_ = pos0; // the new token counts among the recent ones
        update_recent();

        const uint32_t slot = victim();

        evict(slot, pos0);
        give_free(slot);
        victims.push_back(slot);

        if (compact_) {
            close_gaps(moves);
        }
    }

    uint32_t headroom = budget_;

    for (uint32_t i = 0; i < n; ++i) {
        const uint32_t slot = free_.empty() ? headroom++ : take_free();

        pos_last_ = pos0 + (int32_t) i;
        put(slot, pos_last_);
        slots.push_back(slot);
    }

    return true;
}

void llama_kv_ledger::commit(std::vector<uint32_t> & victims, std::vector<move> & moves) {
    victims.clear();
    moves.clear();

    if (pos_commit_ == none) {
        return;
    }

    pos_commit_ = none;

    update_recent();

    while (n_used_ > budget_) {
        const uint32_t slot = victim();

        evict(slot, pos_last_);
        give_free(slot);
        victims.push_back(slot);
    }

    settle(budget_, !victims.empty(), moves);
}

void llama_kv_ledger::shrink(uint32_t n, std::vector<uint32_t> & victims, std::vector<move> & moves) {
    victims.clear();
    moves.clear();

    while (n_used_ > n) {
        const uint32_t slot = victim();

        evict(slot, pos_last_ + 1);
        give_free(slot);
        victims.push_back(slot);
    }

    settle(n, !victims.empty(), moves);
}

void llama_kv_ledger::resize(uint32_t budget, uint32_t n_recent) {
    budget_   = budget;
    n_recent_ = n_recent;
    n_high_   = 0;

    // ascending order is a valid min-heap
    free_.clear();
    for (uint32_t i = 0; i < n_slots(); ++i) {
        if (pos_[i] != none) {
            n_high_ += i >= budget_;
        } else if (i < budget_) {
            free_.push_back(i);
        }
    }

    if (pos_last_ != none) {
        update_recent();
    }
}

void llama_kv_ledger::pack(std::vector<move> & moves) {
    moves.clear();

    settle(n_used_, true, moves);
}

void llama_kv_ledger::settle(uint32_t limit, bool has_gaps, std::vector<move> & moves) {
    if (compact_) {
        if (has_gaps) {
            close_gaps(moves);
        }
        return;
    }

    if (limit == budget_ && n_high_ == 0) {
        return;
    }

    for (uint32_t slot = limit; slot < n_slots(); ++slot) {
        if (pos_[slot] == none) {
            continue;
        }

        const uint32_t dst = take_free();

        relocate(slot, dst);
        give_free(slot);
        moves.push_back({ slot, dst });
    }
}

void llama_kv_ledger::truncate(int32_t p0, std::vector<uint32_t> & freed) {
    if (pos_last_ == none || p0 > pos_last_) {
        return;
    }

    pos_commit_ = p0 > pos_commit_ ? pos_commit_ : none;

    const auto release = [&](uint32_t slot) {
        drop(slot);
        give_free(slot);
        freed.push_back(slot);
    };

    while (tail_ != nil && pos_[tail_] >= p0) {
        release(tail_);
    }

    for (uint32_t i = n_protect_; i > 0; --i) {
        const int32_t slot = protect_[i - 1];

        if (slot != none && pos_[slot] >= p0) {
            release((uint32_t) slot);
        }
    }

    if (p0 <= pos_first_) {
        reset();
    } else {
        pos_last_ = p0 - 1;
        update_recent();
    }
}

std::vector<uint32_t> llama_kv_ledger::kept() const {
    std::vector<uint32_t> res;
    res.reserve(n_used_);

    for (const int32_t slot : protect_) {
        if (slot != none) {
            res.push_back((uint32_t) slot);
        }
    }

    for (uint32_t slot = head_; slot != nil; slot = next_[slot]) {
        res.push_back(slot);
    }

    return res;
}

llama_kv_ledger::image llama_kv_ledger::get_image() const {
    image res;

    res.n_protect   = n_protect_;
    res.n_evicted   = n_evicted_;
    res.n_interior  = n_interior_;
    res.pos_first   = pos_first_;
    res.pos_last    = pos_last_;
    res.evicted_max = evicted_max_;
    res.evictor_max = evictor_max_;
    res.pos_placed  = pos_commit_;

    res.slots = kept();
    for (const uint32_t slot : res.slots) {
        res.pos.push_back(pos_[slot]);
    }

    return res;
}

bool llama_kv_ledger::is_possible(const image & im) const {
    const size_t n = im.slots.size();

    if ((uint64_t) im.n_protect + n_recent_ + 1 > budget_ || im.n_interior < 0 || im.n_evicted < im.n_interior || n != im.pos.size() || n > n_slots()) {
        return false;
    }
    if (im.pos_first == none) {
        return n == 0 && im.pos_last == none && im.evicted_max == none && im.evictor_max == none && im.pos_placed == none && im.n_evicted == 0;
    }

    // positions of the stream, without a sum that overflows
    if (im.pos_first < 0 || im.pos_last < im.pos_first || im.pos_last >= pos_end) {
        return false;
    }

    const int32_t  pos_protect = im.pos_first + (int32_t) std::min<int64_t>(im.n_protect, (int64_t) im.pos_last - im.pos_first + 1); // behind the protected ones
    const uint32_t n_seen      = (uint32_t) (pos_protect - im.pos_first);

    if (im.evicted_max != none && (im.evicted_max < pos_protect || im.evicted_max > im.pos_last)) {
        return false;
    }
    if (im.evictor_max != none && (im.evictor_max < im.pos_first || im.evictor_max > pos_end)) {
        return false;
    }
    if ((im.n_evicted > 0) != (im.evicted_max != none) || (im.n_evicted > 0) != (im.evictor_max != none)) {
        return false;
    }
    if (im.pos_placed != none && (im.pos_placed < im.pos_first || im.pos_placed > im.pos_last)) {
        return false;
    }

    // the headroom holds tokens while a chunk waits for its evictions only
    const uint32_t n_max = im.pos_placed == none ? budget_ : n_slots();

    if (n < n_seen || n > n_max) {
        return false;
    }

    std::vector<bool> seen(n_slots(), false);

    for (size_t i = 0; i < n; ++i) {
        const bool in_order = i < n_seen ? im.pos[i] == im.pos_first + (int32_t) i : im.pos[i] >= pos_protect && (i == 0 || im.pos[i] > im.pos[i - 1]);

        if (!in_order || im.pos[i] > im.pos_last || im.slots[i] >= n_max || seen[im.slots[i]] || (compact_ && im.slots[i] != i)) {
            return false;
        }
        seen[im.slots[i]] = true;
    }

    return true;
}

void llama_kv_ledger::set_image(const image & im) {
    n_protect_ = im.n_protect;
    reset();

    pos_first_ = im.pos_first;
    for (size_t i = 0; i < im.slots.size(); ++i) {
        put(im.slots[i], im.pos[i]);
    }

    // ascending order is a valid min-heap
    free_.clear();
    for (uint32_t i = 0; i < budget_; ++i) {
        if (pos_[i] == none) {
            free_.push_back(i);
        }
    }

    n_evicted_   = im.n_evicted;
    n_interior_  = im.n_interior;
    pos_last_    = im.pos_last;
    evicted_max_ = im.evicted_max;
    evictor_max_ = im.evictor_max;
    pos_commit_  = im.pos_placed;

    update_recent();
}

bool llama_kv_ledger::check() const {
    const std::vector<uint32_t> slots = kept();

    std::vector<bool> seen(n_slots(), false);

    int32_t last = none;
    for (const uint32_t slot : slots) {
        if (slot >= n_slots() || seen[slot] || pos_[slot] <= last) {
            return false;
        }

        seen[slot] = true;
        last = pos_[slot];
    }

    uint32_t n_pos = 0;
    uint32_t n_low = 0;
    for (uint32_t i = 0; i < n_slots(); ++i) {
        n_pos += pos_[i] != none;
        n_low += pos_[i] != none && i < budget_;

        if ((pos_[i] != none) != seen[i]) {
            return false;
        }
    }

    std::vector<bool> is_free(budget_, false);
    for (const uint32_t slot : free_) {
        if (slot >= budget_ || is_free[slot] || pos_[slot] != none) {
            return false;
        }
        is_free[slot] = true;
    }

    return slots.size() == n_used_ && n_pos == n_used_ && n_low + free_.size() == budget_ && last <= pos_last_ &&
        (pos_commit_ != none || n_low == n_used_);
}
