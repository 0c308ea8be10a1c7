#include "llama-kv-lanes.h"

#include <algorithm>

void llama_kv_lanes::reset() {
    std::fill(pos_.begin(), pos_.end(), none);

    for (auto & gone : gone_) {
        gone.clear();
    }
    evicted_max_ = none;
    n_used_      = 0;
}

void llama_kv_lanes::leave(uint32_t lane, uint32_t slot) {
    evicted_max_ = std::max(evicted_max_, at(lane)[slot]);

    if (recording_) {
        gone_[lane].push_back(at(lane)[slot]);
    }

    at(lane)[slot] = none;
}

void llama_kv_lanes::put(int32_t pos0, const std::vector<uint32_t> & slots) {
    for (uint32_t lane = 0; lane < n_lane_; ++lane) {
        for (size_t i = 0; i < slots.size(); ++i) {
            at(lane)[slots[i]] = pos0 + (int32_t) i;
        }
    }
    n_used_ += (uint32_t) slots.size();
}

void llama_kv_lanes::replace(int32_t pos, const std::vector<uint32_t> & victims, std::vector<uint32_t> & slots, moves & res) {
    res.assign(n_lane_, {});
    slots.resize(n_lane_);

    for (uint32_t lane = 0; lane < n_lane_; ++lane) {
        uint32_t slot = victims[lane];

        leave(lane, slot);

        if (compact_) {
            for (; slot + 1 < n_slots_ && at(lane)[slot + 1] != none; ++slot) {
                at(lane)[slot] = at(lane)[slot + 1];
                res[lane].push_back({ slot + 1, slot });
            }
        }

        at(lane)[slot] = pos;
        slots[lane] = slot;
    }
}

void llama_kv_lanes::pack(uint32_t lane, uint32_t from, std::vector<move> & res) {
    int32_t * p = at(lane);

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

bool llama_kv_lanes::evict(const std::vector<uint32_t> & victims, uint32_t n, uint32_t limit, moves & res) {
    res.assign(n_lane_, {});
    n_used_ -= n;

    bool any = false;

    for (uint32_t lane = 0; lane < n_lane_; ++lane) {
        for (uint32_t i = 0; i < n; ++i) {
            leave(lane, victims[(size_t) lane*n + i]);
        }

        pack(lane, compact_ ? 0 : limit, res[lane]);

        any = any || !res[lane].empty();
    }

    return any;
}

bool llama_kv_lanes::truncate(int32_t p0, uint32_t n_left, bool is_packed, moves & res) {
    res.assign(n_lane_, {});
    n_used_ = n_left;

    bool any = false;

    for (uint32_t lane = 0; lane < n_lane_; ++lane) {
        for (uint32_t slot = 0; slot < n_slots_; ++slot) {
            if (at(lane)[slot] >= p0) {
                at(lane)[slot] = none;
            }
        }

        if (is_packed) {
            pack(lane, n_left, res[lane]);
        }

        any = any || !res[lane].empty();
    }

    return any;
}

std::vector<llama_kv_lanes::turn> llama_kv_lanes::turns(uint32_t lane, int32_t pos_min, int32_t pos0, int32_t rebased) {
    std::vector<turn> res;

    auto & gone = gone_[lane];
    std::sort(gone.begin(), gone.end());

    const int32_t * p = pos(lane);

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

std::vector<llama_kv_lanes::turn> llama_kv_lanes::turns_from_true(uint32_t lane, int32_t pos_min, int32_t pos_last) {
    std::vector<turn> kept;

    const int32_t * p = pos(lane);

    for (uint32_t slot = 0; slot < n_slots_; ++slot) {
        if (p[slot] != none) {
            kept.push_back({ slot, 0 });
        }
    }

    std::sort(kept.begin(), kept.end(), [p](const turn & a, const turn & b) { return p[a.slot] > p[b.slot]; });

    std::vector<turn> res;
    for (size_t i = 0; i < kept.size(); ++i) {
        const uint32_t slot = kept[i].slot;

        const int32_t delta = pos_last - (int32_t) i - p[slot];

        if (p[slot] >= pos_min && delta != 0) {
            res.push_back({ slot, delta });
        }
    }

    gone_[lane].clear();

    return res;
}

llama_kv_lanes::image llama_kv_lanes::get_image(const std::vector<uint32_t> & slots) const {
    image res;

    res.evicted_max  = evicted_max_;
    res.is_recording = recording_;
    res.gone         = gone_;
    res.pos.resize(n_lane_);

    for (uint32_t lane = 0; lane < n_lane_; ++lane) {
        for (const uint32_t slot : slots) {
            res.pos[lane].push_back(pos(lane)[slot]);
        }
    }

    return res;
}

void llama_kv_lanes::set_image(const std::vector<uint32_t> & slots, const image & im) {
    reset();

    evicted_max_ = im.evicted_max;
    recording_   = im.is_recording;
    gone_        = im.gone;
    n_used_      = (uint32_t) slots.size();

    for (uint32_t lane = 0; lane < n_lane_; ++lane) {
        for (size_t i = 0; i < slots.size(); ++i) {
            at(lane)[slots[i]] = im.pos[lane][i];
        }
    }
}
