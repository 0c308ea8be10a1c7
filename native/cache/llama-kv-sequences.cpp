#include "llama-kv-policy-impl.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <typeinfo>

// llama.h's functions for sequences and states, where a policy bounds a part of the memory: all parts answer as one, or nothing changes

// a bounded memory; the exact types: what is derived from these kinds keeps more beside them
struct parts {
    llama_kv_policy        * policy = nullptr; // nullptr: it is not bounded
    llama_kv_cache         * base   = nullptr; // what a policy could bound: the layers with full attention
    llama_kv_cache         * swa    = nullptr;
    llama_memory_recurrent * recr   = nullptr;

    explicit parts(llama_memory_i * memory) {
        if (!memory) {
            return;
        }

        const auto & type = typeid(*memory);

        llama_kv_cache_iswa * iswa = nullptr;

        if (type == typeid(llama_kv_cache)) {
            base = static_cast<llama_kv_cache *>(memory);
        } else if (type == typeid(llama_kv_cache_iswa)) {
            iswa = static_cast<llama_kv_cache_iswa *>(memory);
        } else if (type == typeid(llama_memory_hybrid)) {
            base = static_cast<llama_memory_hybrid *>(memory)->get_mem_attn();
            recr = static_cast<llama_memory_hybrid *>(memory)->get_mem_recr();
        } else if (type == typeid(llama_memory_hybrid_iswa)) {
            iswa = static_cast<llama_memory_hybrid_iswa *>(memory)->get_mem_attn();
            recr = static_cast<llama_memory_hybrid_iswa *>(memory)->get_mem_recr();
        }

        if (iswa) {
            base = iswa->get_base();
            swa  = iswa->get_swa();
        }

        policy = base ? base->get_policy() : nullptr;
    }

    // the state of a recurrent layer goes back as far as its snapshots reach
    bool can_rm_recurrent(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
        if (!recr || (uint32_t) seq_id >= recr->size || recr->cells[seq_id].tail < 0) {
            return true;
        }

        const llama_pos pos = recr->cells[recr->cells[seq_id].tail].pos;

        const bool is_tail = 0 < p0 && p0 <= pos && (p1 < 0 || p1 > pos);

        return !is_tail || (recr->rs_idx[seq_id] == 0 && pos - (p0 - 1) <= (llama_pos) recr->n_rs_seq);
    }

    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
        if (!policy->can_rm(seq_id, p0, p1)) {
            return false;
        }

        const llama_pos pos_max = policy->seq_pos_max(seq_id);

        p0 = std::max(p0, 0);

        if (p0 > pos_max || (p1 >= 0 && p1 <= pos_max)) {
            return true; // nothing there, or the policy would have refused
        }
        if (p0 > 0 && swa && p0 < policy->seq_pos_min_iswa(seq_id, swa->seq_pos_min(seq_id)) && p0 < policy->pos_placed_or(seq_id, INT32_MAX)) {
            return false;
        }

        return p0 == 0 || can_rm_recurrent(seq_id, p0, p1);
    }
};

llama_kv_cache * llama_kv_policy_base(llama_memory_i * memory) {
    return parts(memory).base;
}

llama_kv_cache * llama_kv_policy_swa(llama_memory_i * memory) {
    return parts(memory).swa;
}

llama_kv_policy * llama_kv_policy_of(llama_memory_i * memory) {
    return parts(memory).policy;
}

llama_memory_recurrent * llama_kv_policy_recr(llama_memory_i * memory) {
    return parts(memory).recr;
}

static void refuse(const char * op, const std::string & why) {
    LLAMA_LOG_ERROR("llama_memory_%s: does nothing on a bounded cache: %s\n", op, why.c_str());
}

// the sequence is empty, in every part, and nobody is led to believe anything else
static void empty_and_poison(llama_memory_i * memory, llama_kv_policy & policy, llama_seq_id seq_id) {
    memory->seq_rm(seq_id, -1, -1);
    policy.poison(seq_id);
}

bool llama_kv_policy_seq_rm(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const parts p(memory);

    if (!p.policy) {
        return memory->seq_rm(seq_id, p0, p1);
    }

    std::vector<llama_seq_id> ids;
    for (llama_seq_id s = 0; p.policy->has_seq(s); ++s) {
        if (seq_id < 0 || seq_id == s) {
            ids.push_back(s);
        }
    }

    bool res = true;

    for (const llama_seq_id s : ids) {
        if (!p.can_rm(s, p0, p1)) {
            return false;
        }
    }

    for (const llama_seq_id s : ids) {
        res = memory->seq_rm(s, p0, p1) && res;
    }

    return res;
}

bool llama_kv_policy_can_rm(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    return parts(memory).can_rm(seq_id, p0, p1);
}

void llama_kv_policy_seq_cp(llama_memory_i * memory, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    const parts p(memory);

    if (!p.policy) {
        memory->seq_cp(src, dst, p0, p1);
        return;
    }
    if (src == dst || !p.policy->has_seq(dst)) {
        if (src != dst) {
            refuse("seq_cp", "this context has no such sequence");
        }
        return;
    }

    const bool is_whole = p0 <= std::max(0, p.policy->has_seq(src) ? p.policy->ledger(src).pos_first() : 0) &&
        (p1 < 0 || p1 > p.policy->seq_pos_max(src));

    memory->seq_rm(dst, -1, -1);

    if (p.policy->seq_pos_max(src) < 0 && p.policy->has_seq(src) && !p.policy->is_poisoned(src)) {
        return; // a copy of nothing
    }

    bool ok = is_whole && p.policy->has_seq(src);
    try {
        ok = ok && p.policy->seq_cp(src, dst);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        ok = false;
    }

    if (!ok) {
        refuse("seq_cp", !is_whole ? "a part of a sequence cannot be copied" : "this sequence cannot be copied");
        empty_and_poison(memory, *p.policy, dst);
        return;
    }

    memory->seq_cp(src, dst, -1, -1);
}

void llama_kv_policy_seq_keep(llama_memory_i * memory, llama_seq_id seq_id) {
    const parts p(memory);

    if (!p.policy) {
        memory->seq_keep(seq_id);
        return;
    }

    for (llama_seq_id s = 0; p.policy->has_seq(s); ++s) {
        if (s != seq_id) {
            memory->seq_rm(s, -1, -1);
        }
    }
}

// true if there is anything in [p0, p1) to be moved
static bool is_touched(const parts & p, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    return p.policy->has_seq(seq_id) && p.policy->seq_pos_max(seq_id) >= std::max(p0, 0) && (p1 < 0 || (p1 > p0 && p1 > p.policy->ledger(seq_id).pos_first()));
}

void llama_kv_policy_seq_add(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    const parts p(memory);

    if (!p.policy) {
        memory->seq_add(seq_id, p0, p1, shift);
    } else if (shift != 0 && is_touched(p, seq_id, p0, p1)) {
        refuse("seq_add", "the policy sees to the positions (llama_memory_can_shift is false)");
    }
}

void llama_kv_policy_seq_div(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    const parts p(memory);

    if (!p.policy) {
        memory->seq_div(seq_id, p0, p1, d);
    } else if (d != 1 && is_touched(p, seq_id, p0, p1)) {
        refuse("seq_div", "the policy sees to the positions (llama_memory_can_shift is false)");
    }
}

llama_pos llama_kv_policy_seq_pos_min(const llama_memory_i * memory, llama_seq_id seq_id) {
    const parts p(const_cast<llama_memory_i *>(memory));

    return p.policy && !p.policy->has_seq(seq_id) ? -1 : memory->seq_pos_min(seq_id);
}

llama_pos llama_kv_policy_seq_pos_max(const llama_memory_i * memory, llama_seq_id seq_id) {
    const parts p(const_cast<llama_memory_i *>(memory));

    return p.policy && !p.policy->has_seq(seq_id) ? -1 : memory->seq_pos_max(seq_id);
}

void llama_kv_policy_drop(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0) {
    const parts p(memory);

    if (!p.policy) {
        memory->seq_rm(seq_id, p0, -1);
        return;
    }

    // a recurrent state has no way back out of a ubatch that was not finished
    const bool is_torn = p.policy->is_lost(seq_id) || (p0 > 0 && p.recr && p.recr->seq_pos_max(seq_id) >= p0);

    if (is_torn || !p.policy->can_rm(seq_id, p0, -1)) {
        LLAMA_LOG_ERROR("%s: a step has failed and cannot be undone: sequence %d is empty now and has to be read again\n", __func__, seq_id);
        empty_and_poison(memory, *p.policy, seq_id);
        return;
    }

    memory->seq_rm(seq_id, p0, -1);
}

void llama_kv_policy_poison(llama_memory_i * memory, llama_seq_id seq_id) {
    const parts p(memory);

    for (llama_seq_id s = 0; p.policy && p.policy->has_seq(s); ++s) {
        if (seq_id == -1 || seq_id == s) {
            empty_and_poison(memory, *p.policy, s);
        }
    }
}
