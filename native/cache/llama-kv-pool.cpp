#include "llama-kv-pool.h"

#include <algorithm>
#include <functional>
#include <numeric>

uint64_t llama_kv_pool::n_rows(uint64_t n_tokens, uint32_t n_ubatch, uint32_t n_seq) {
    return ((n_tokens + PAGE - 1)/PAGE + pages(n_ubatch) + n_seq)*PAGE;
}

llama_kv_pool::llama_kv_pool(uint32_t n_tokens, uint32_t n_ubatch, uint32_t n_seq, uint32_t n_slots) :
    n_tokens(n_tokens), allotments(n_seq), tables(n_seq, std::vector<uint32_t>(pages(n_slots), none)), free((size_t) (n_rows(n_tokens, n_ubatch, n_seq)/PAGE)) {
    clear();
}

void llama_kv_pool::clear() {
    for (auto & table : tables) {
        for (auto & page : table) {
            if (page != none) {
                free.push_back(page);
                page = none;
            }
        }
    }

    // ascending order is a valid min-heap
    std::iota(free.begin(), free.end(), 0);

    std::fill(allotments.begin(), allotments.end(), 0);
    n_allotted = 0;
    n_live     = 0;
}

std::vector<uint32_t> llama_kv_pool::rows(uint32_t seq, const std::vector<uint32_t> & slots) const {
    std::vector<uint32_t> res;
    rows(seq, slots.data(), (uint32_t) slots.size(), res);

    return res;
}

void llama_kv_pool::rows(uint32_t seq, const uint32_t * slots, uint32_t n, std::vector<uint32_t> & res) const {
    res.resize(n);
    for (uint32_t i = 0; i < n; ++i) {
        res[i] = row(seq, slots[i]);
    }
}

bool llama_kv_pool::take(uint32_t seq, uint32_t slot) {
    auto & page = tables[seq][slot/PAGE];

    if (page == none) {
        if (free.empty()) {
            return false;
        }
        std::pop_heap(free.begin(), free.end(), std::greater<uint32_t>());
        page = free.back();
        free.pop_back();
    }

    return true;
}

void llama_kv_pool::keep(uint32_t seq, const std::vector<uint32_t> & slots) {
    auto & table = tables[seq];

    std::vector<bool> used(table.size(), false);
    for (const uint32_t slot : slots) {
        used[slot/PAGE] = true;
    }

    for (size_t i = 0; i < table.size(); ++i) {
        if (table[i] != none && !used[i]) {
            free.push_back(table[i]);
            std::push_heap(free.begin(), free.end(), std::greater<uint32_t>());
            table[i] = none;
        }
    }
}

void llama_kv_pool::allot(uint32_t seq, uint32_t n) {
    n_allotted += n - allotments[seq];
    n_live     += (n > 0) - (allotments[seq] > 0);

    allotments[seq] = n;
}

uint32_t llama_kv_pool::richest(uint32_t but) const {
    uint32_t res = none;

    for (uint32_t seq = 0; seq < allotments.size(); ++seq) {
        if (seq != but && allotments[seq] > share(but) && (res == none || allotments[seq] > allotments[res])) {
            res = seq;
        }
    }

    return res;
}

bool llama_kv_pool::check() const {
    std::vector<uint32_t> seen = free;
    for (const auto & table : tables) {
        for (const uint32_t page : table) {
            if (page != none) {
                seen.push_back(page);
            }
        }
    }

    // each page is free, or belongs to one slot range of one sequence
    std::sort(seen.begin(), seen.end());
    for (uint32_t i = 0; i < seen.size(); ++i) {
        if (seen[i] != i) {
            return false;
        }
    }

    uint64_t sum  = 0;
    uint32_t live = 0;
    for (const uint32_t n : allotments) {
        sum  += n;
        live += n > 0;
    }

    return sum == n_allotted && sum <= n_tokens && live == n_live && std::is_heap(free.begin(), free.end(), std::greater<uint32_t>());
}
