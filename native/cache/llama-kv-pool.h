#pragma once

#include <cstdint>
#include <vector>

// one cache for many sequences: which rows of it belong to which of them, and how many tokens each may keep
//
// - a sequence counts its slots from 0, as if it were alone; a table maps pages of them to pages of rows, the same for all layers
// - a page is taken when its first slot is written, and given back when its last one is free
// - a sequence's allotment takes the place of the budget: all allotments together are no more than n_tokens, and one that would grow at
//   the cost of others grows up to its share, n_tokens / sequences that hold any
// - beyond that there are rows for one ubatch, and a page per sequence for pages that are not full
//
// no dependency on ggml or llama.cpp
class llama_kv_pool {
public:
    static constexpr uint32_t PAGE = 64;
    static constexpr uint32_t none = UINT32_MAX;

    // n_slots: of a sequence, budget and ubatch
    llama_kv_pool(uint32_t n_tokens, uint32_t n_ubatch, uint32_t n_seq, uint32_t n_slots);

    static uint32_t pages(uint32_t n) { return (n + PAGE - 1)/PAGE; }

    // rows of the cache that it needs
    static uint64_t n_rows(uint64_t n_tokens, uint32_t n_ubatch, uint32_t n_seq);

    // the least that a sequence can do with: what is protected, a few recent tokens and the new one, and, where the policy evicts pages
    //   of its own, one of these; whole pages
    static uint32_t least(uint32_t n_protect, uint32_t page_size) { return pages(n_protect + N_RECENT + 1 + (page_size > 0 ? 2*page_size - 2 : 0))*PAGE; }

    // tokens with which every sequence can have its least, and the one that holds most can give a page away
    static uint64_t n_tokens_min(uint32_t n_protect, uint32_t page_size, uint32_t n_seq) { return (uint64_t) n_seq*(least(n_protect, page_size) + PAGE); }

    // newest tokens that stay where the allotment is b; n: where it is the budget
    static uint32_t n_recent(uint32_t n, uint32_t b) { return n <= N_RECENT || n <= b/4 ? n : b/4 > N_RECENT ? b/4 : N_RECENT; }

    //
    // pages
    //

    // of a slot that has a page
    uint32_t row(uint32_t seq, uint32_t slot) const { return tables[seq][slot/PAGE]*PAGE + slot % PAGE; }

    std::vector<uint32_t> rows(uint32_t seq, const std::vector<uint32_t> & slots) const;

    void rows(uint32_t seq, const uint32_t * slots, uint32_t n, std::vector<uint32_t> & res) const;

    // f(j0, j1) for each run of the sequence's rows within [from, to)
    template <typename F>
    void for_rows(uint32_t seq, uint32_t from, uint32_t to, F && f) const {
        for (const uint32_t page : tables[seq]) {
            if (page == none) {
                continue;
            }
            const uint32_t j0 = page*PAGE > from ? page*PAGE : from;
            const uint32_t j1 = (page + 1)*PAGE < to ? (page + 1)*PAGE : to;
            if (j0 < j1) {
                f(j0, j1);
            }
        }
    }

    bool has_page(uint32_t seq, uint32_t slot) const { return tables[seq][slot/PAGE] != none; }

    // false: there is no page left
    bool take(uint32_t seq, uint32_t slot);

    // pages of the sequence without any of these slots are free again
    void keep(uint32_t seq, const std::vector<uint32_t> & slots);

    uint32_t n_pages_free() const { return (uint32_t) free.size(); }

    //
    // allotments
    //

    uint32_t allotment(uint32_t seq) const { return allotments[seq]; }

    void allot(uint32_t seq, uint32_t n);

    uint32_t n_unallotted() const { return n_tokens - n_allotted; }

    // what each of those that hold tokens may have, this one among them
    uint32_t share(uint32_t seq) const { return n_tokens/(n_live + (allotments[seq] == 0)); }

    // the sequence that holds most, if that is above its share, and another than this one; else none
    uint32_t richest(uint32_t but) const;

    // the largest number of whole pages below the allotment
    uint32_t without_a_page(uint32_t seq) const { return (pages(allotments[seq]) - 1)*PAGE; }

    // nobody holds anything
    void clear();

    // every invariant; for tests
    bool check() const;

private:
    static constexpr uint32_t N_RECENT = 16;

    const uint32_t n_tokens;

    uint32_t n_allotted = 0;
    uint32_t n_live     = 0;

    std::vector<uint32_t>              allotments; // [n_seq]
    std::vector<std::vector<uint32_t>> tables;     // [n_seq] of [pages of slots]: a page of rows, or none
    std::vector<uint32_t>              free;       // min-heap of the pages of rows
};

// where the slots of a sequence lie in the cache's tensors and cells
struct llama_kv_where {
    const llama_kv_pool * pool = nullptr; // without one each sequence has a stream of its own, and its slots are rows

    uint32_t stream_of(uint32_t seq) const { return pool ? 0 : seq; }

    uint32_t of(uint32_t seq, uint32_t slot) const { return pool ? pool->row(seq, slot) : slot; }

    std::vector<uint32_t> of(uint32_t seq, const std::vector<uint32_t> & slots) const { return pool ? pool->rows(seq, slots) : slots; }
};
