#include "llama-kv-units.h"

#include <algorithm>

void llama_kv_units::reset() {
    std::fill(pos_.begin(), pos_.end(), none);

    for (auto & gone : gone_) {
        gone.clear();
    }
    evicted_max_ = none;
    n_used_      = 0;
}

void llama_kv_units::leave(uint32_t unit, uint32_t slot) {
    evicted_max_ = std::max(evicted_max_, at(unit)[slot]);

    if (recording_) {
        gone_[unit].push_back(at(unit)[slot]);
    }

    at(unit)[slot] = none;
}

void llama_kv_units::put(int32_t pos0, const std::vector<uint32_t> & slots) {
    for (uint32_t unit = 0; unit < n_unit_; ++unit) {
        for (size_t i = 0; i < slots.size(); ++i) {
            at(unit)[slots[i]] = pos0 + (int32_t) i;
        }
    }
    n_used_ += (uint32_t) slots.size();
}

void llama_kv_units::replace(int32_t pos, const std::vector<uint32_t> & victims, std::vector<uint32_t> & slots, moves & res) {
    res.assign(n_unit_, {});
    slots.resize(n_unit_);
    left_.resize(n_unit_);

    evicted_before_ = evicted_max_;

    for (uint32_t unit = 0; unit < n_unit_; ++unit) {
        uint32_t slot = victims[unit];

        left_[unit] = at(unit)[slot];
        leave(unit, slot);

        if (compact_) {
            for (; slot + 1 < n_slots_ && at(unit)[slot + 1] != none; ++slot) {
                at(unit)[slot] = at(unit)[slot + 1];
                res[unit].push_back({ slot + 1, slot });
            }
        }

        at(unit)[slot] = pos;
        slots[unit] = slot;
    }
}

void llama_kv_units::undo_replace(const std::vector<uint32_t> & slots, const std::vector<bool> & undone) {
    evicted_max_ = evicted_before_;

    for (uint32_t unit = 0; unit < n_unit_; ++unit) {
        if (!undone[unit]) {
            evicted_max_ = std::max(evicted_max_, left_[unit]);
            continue;
        }
        at(unit)[slots[unit]] = left_[unit];
        if (recording_) {
            gone_[unit].pop_back();
        }
    }
}

void llama_kv_units::pack(uint32_t unit, uint32_t from, std::vector<move> & res) {
    int32_t * p = at(unit);

    uint32_t dst = 0;
    for (uint32_t src = from; src < n_slots_; ++src) {
        if (p[src] == none) {
            continue;
        }

        while (dst < src && p[dst] != none) {
            dst++;
        }
        if (dst < src) {
            p[dst] = p[src];
            p[src] = none;
            res.push_back({ src, dst });
        }
    }
}

bool llama_kv_units::evict(const std::vector<uint32_t> & victims, uint32_t n, uint32_t limit, moves & res) {
    res.assign(n_unit_, {});
    n_used_ -= n;

    bool any = false;

    for (uint32_t unit = 0; unit < n_unit_; ++unit) {
        for (uint32_t i = 0; i < n; ++i) {
            leave(unit, victims[(size_t) unit*n + i]);
        }

        pack(unit, compact_ ? 0 : limit, res[unit]);

        any = any || !res[unit].empty();
    }

    return any;
}

bool llama_kv_units::truncate(int32_t p0, uint32_t n_left, bool is_packed, moves & res, int32_t pos_free) {
    res.assign(n_unit_, {});
    n_used_ = n_left;

    bool any = false;

    for (uint32_t unit = 0; unit < n_unit_; ++unit) {
        std::vector<std::pair<int32_t, uint32_t>> left; // (position, slot)

        for (uint32_t slot = 0; slot < n_slots_; ++slot) {
            if (at(unit)[slot] >= p0) {
                at(unit)[slot] = none;
            } else if (at(unit)[slot] != none) {
                left.push_back({ at(unit)[slot], slot });
            }
        }

        if (left.size() > n_left) {
            std::sort(left.begin(), left.end());

            auto it = std::lower_bound(left.begin(), left.end(), std::make_pair(pos_free, 0u));
            for (size_t n = left.size() - n_left; n > 0 && it != left.end(); --n, ++it) {
                leave(unit, it->second);
            }
        }

        if (is_packed) {
            pack(unit, n_left, res[unit]);
        }

        any = any || !res[unit].empty();
    }

    return any;
}

std::vector<llama_kv_units::rotation> llama_kv_units::rotations(uint32_t unit, int32_t pos_min, int32_t pos0, int32_t rebased) {
    std::vector<rotation> res;

    auto & gone = gone_[unit];
    std::sort(gone.begin(), gone.end());

    const int32_t * p = pos(unit);

    // what is younger than all victims has not moved
    const int32_t pos_end = rebased != 0 ? pos0 : gone.empty() ? INT32_MIN : gone.back();

    for (uint32_t slot = 0; slot < n_slots_; ++slot) {
        if (p[slot] < pos_min || p[slot] >= pos_end) {
            continue;
        }

        const int32_t delta = (int32_t) (gone.end() - std::upper_bound(gone.begin(), gone.end(), p[slot])) - rebased;

        if (delta != 0) {
            res.push_back({ slot, delta });
        }
    }

    gone.clear();

    return res;
}

void llama_kv_units::debts(uint32_t unit, int32_t pos_min, std::vector<int32_t> & res) const {
    auto gone = gone_[unit];
    std::sort(gone.begin(), gone.end());

    const int32_t * p = pos(unit);

    res.assign(n_slots_, 0);
    for (uint32_t slot = 0; slot < n_slots_ && !gone.empty(); ++slot) {
        if (p[slot] != none && p[slot] >= pos_min) {
            res[slot] = (int32_t) (gone.end() - std::upper_bound(gone.begin(), gone.end(), p[slot]));
        }
    }
}

void llama_kv_units::forget_gone() {
    for (auto & gone : gone_) {
        gone.clear();
    }
}

std::vector<llama_kv_units::rotation> llama_kv_units::rotations_from_true(uint32_t unit, int32_t pos_min, int32_t pos_last) {
    std::vector<rotation> kept;

    const int32_t * p = pos(unit);

    for (uint32_t slot = 0; slot < n_slots_; ++slot) {
        if (p[slot] != none) {
            kept.push_back({ slot, 0 });
        }
    }

    std::sort(kept.begin(), kept.end(), [p](const rotation & a, const rotation & b) { return p[a.slot] > p[b.slot]; });

    std::vector<rotation> res;
    for (size_t i = 0; i < kept.size(); ++i) {
        const uint32_t slot = kept[i].slot;

        const int32_t delta = pos_last - (int32_t) i - p[slot];

        if (p[slot] >= pos_min && delta != 0) {
            res.push_back({ slot, delta });
        }
    }

    gone_[unit].clear();

    return res;
}

llama_kv_units::image llama_kv_units::get_image(const std::vector<uint32_t> & slots) const {
    image res;

    res.evicted_max  = evicted_max_;
    res.is_recording = recording_;
    res.gone         = gone_;
    res.pos.resize(n_unit_);

    for (uint32_t unit = 0; unit < n_unit_; ++unit) {
        for (const uint32_t slot : slots) {
            res.pos[unit].push_back(pos(unit)[slot]);
        }
    }

    return res;
}

void llama_kv_units::set_image(const std::vector<uint32_t> & slots, const image & im) {
    reset();

    evicted_max_ = im.evicted_max;
    recording_   = im.is_recording;
    gone_        = im.gone;
    n_used_      = (uint32_t) slots.size();

    for (uint32_t unit = 0; unit < n_unit_; ++unit) {
        for (size_t i = 0; i < slots.size(); ++i) {
            at(unit)[slots[i]] = im.pos[unit][i];
        }
    }
}
