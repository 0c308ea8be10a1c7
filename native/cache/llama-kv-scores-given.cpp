#include "llama-kv-scores.h"

#include "llama-kv-state-io.h"

#include <algorithm>
#include <cmath>

// scores that the caller sets: of tokens that are kept, where they lie beside what formulas remember, and of tokens to come

uint32_t llama_kv_scores::set_given(uint32_t seq, int32_t i_layer, int32_t i_head, const int32_t * pos, const float * value, uint32_t n, int32_t pos_last) {
    const auto is_meant = [&](size_t i, uint32_t h) { return (i_layer < 0 || (size_t) i_layer == i) && (i_head < 0 || (uint32_t) i_head == h); };

    std::vector<bool> is_held(n, false);

    for (uint32_t j = 0; j < n; ++j) {
        if (pos[j] <= pos_last) {
            continue;
        }
        auto & row = to_come[seq][pos[j]];
        row.resize(heads.back(), NAN);

        for (size_t i = 0; i < layers.size(); ++i) {
            for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
                row[heads[i] + h] = is_meant(i, h) ? value[j] : row[heads[i] + h];
            }
        }
        is_held[j] = true;
    }

    // (position, slot) of what a unit keeps
    std::vector<std::pair<int32_t, uint32_t>> kept;
    uint32_t unit_kept = UINT32_MAX;

    for (size_t i = 0; i < layers.size(); ++i) {
        for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
            if (!is_meant(i, h)) {
                continue;
            }
            if (unit_of(i, h) != unit_kept) {
                unit_kept = unit_of(i, h);
                kept.clear();

                const int32_t * p = units_[seq].pos(unit_kept);
                for (uint32_t slot = 0; slot < n_slots; ++slot) {
                    if (p[slot] != llama_kv_units::none) {
                        kept.push_back({ p[slot], slot });
                    }
                }
                std::sort(kept.begin(), kept.end());
            }

            float * row = kept_state[seq].data() + (size_t) (heads[i] + h)*n_slots;

            for (uint32_t j = 0; j < n; ++j) {
                const auto it = std::lower_bound(kept.begin(), kept.end(), std::make_pair(pos[j], 0u));
                if (it != kept.end() && it->first == pos[j]) {
                    row[it->second] = value[j];
                    is_held[j] = true;
                    forget_choice(seq); // made by what it had before
                }
            }
        }
    }

    return (uint32_t) std::count(is_held.begin(), is_held.end(), true);
}

void llama_kv_scores::take_to_come(const seq_step & st) {
    auto & rows = to_come[st.seq];

    const auto end = rows.lower_bound(st.pos0 + (int32_t) st.n);

    for (auto it = rows.lower_bound(st.pos0); it != end; ++it) {
        for (size_t i = 0; i < layers.size(); ++i) {
            for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
                const uint32_t slot = st.unit_slots.empty() ? st.slots[it->first - st.pos0] : st.unit_slots[unit_of(i, h)];

                kept_state[st.seq][(size_t) (heads[i] + h)*n_slots + slot] = it->second[heads[i] + h];
            }
        }
    }

    rows.erase(rows.begin(), end);
}

void llama_kv_scores::forget_to_come(uint32_t seq) {
    if (needs.given) {
        to_come[seq].clear();
    }
}

void llama_kv_scores::state_write_to_come(llama_kv_state_writer & out, uint32_t seq) const {
    out.num((uint32_t) to_come[seq].size());
    for (const auto & [pos, row] : to_come[seq]) {
        out.num(pos);
        out.nums(row);
    }
}

void llama_kv_scores::state_read_to_come(llama_kv_state_reader & in, uint32_t seq, int32_t pos_last, bool is_check) {
    std::map<int32_t, std::vector<float>> res;

    const uint32_t n = in.num<uint32_t>();
    for (uint32_t j = 0; j < n; ++j) {
        const int32_t pos = in.num<int32_t>();
        if (pos <= pos_last || pos >= llama_kv_ledger::pos_end) {
            llama_kv_state_corrupt("scores of tokens to come");
        }
        pos_last = pos;

        auto & row = res[pos] = in.nums<float>(heads.back());
        if (std::any_of(row.begin(), row.end(), [](float x) { return std::isinf(x); })) {
            llama_kv_state_corrupt("scores of tokens to come");
        }
    }

    if (!is_check) {
        to_come[seq] = std::move(res);
    }
}
