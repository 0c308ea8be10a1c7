#pragma once

#include "llama-kv-victim.h"

#include <cstdint>
#include <memory>
#include <vector>

// the key in a slot has to be rotated by so many positions
struct llama_kv_rotation {
    uint32_t slot;
    int32_t  delta;

    // equal deltas side by side: they share a row of the cos/sin table; and in the order of the cache within
    bool operator<(const llama_kv_rotation & other) const { return delta != other.delta ? delta < other.delta : slot < other.slot; }
};

// which token of one sequence sits in which slot (token scope: one answer for all layers and heads)
//
// - slots [0, budget) hold the kept tokens between ubatches, slots [budget, n_slots) are headroom for one chunk
// - the first n_protect tokens of the sequence (sinks and pinned) are never victims, nor are the newest n_recent positions
// - compact: the kept tokens are copied together after each eviction, so that a token's slot is its rank (update `gather`)
// - the kept tokens form a list ordered by position; every operation is O(1) per token, but for the free-slot heap, O(log budget)
//
// no dependency on ggml or llama.cpp, so that its tests run under sanitizers in a second
class llama_kv_ledger {
public:
    struct move { uint32_t src; uint32_t dst; };

    static constexpr int32_t none = -1;

    // no token stands at a later position: room for sums of a position and a number of tokens in 32 bits
    static constexpr int32_t pos_end = INT32_MAX - (1 << 20);

    // no rule: the oldest token that is not protected goes; n_recent >= 1
    llama_kv_ledger(uint32_t n_slots, uint32_t budget, uint32_t n_protect, uint32_t n_recent = 1,
            std::unique_ptr<llama_kv_victim> rule = nullptr, bool compact = false);


    // the sequence becomes empty
    void reset();

    // protect the first n tokens; the sequence must be empty and n + n_recent + 1 <= budget
    bool set_protect(uint32_t n);

    //
    // one ubatch: place -> (compute) -> commit, or place -> (failure) -> truncate(pos0)
    //

    // choose the slots of the tokens at positions [pos0, pos0 + n); nothing is placed and false is returned if they do not fit
    // - n == 1 and the budget is reached: the victim goes first, and its slot is the one written; it is pushed to victims
    //   (compact: the copies that close the gap are pushed to moves, and the token goes behind them)
    // - n  > 1: free slots first, then headroom; eviction waits for commit()
    bool place(int32_t pos0, uint32_t n, std::vector<uint32_t> & slots, std::vector<uint32_t> & victims, std::vector<move> & moves);

    // the ubatch was computed, and what it brought is final: evict down to the budget, then list the copies that bring the survivors of
    //   the headroom below the budget
    // victims: freed slots, moves: in ascending order of src; a destination is free or the source of an earlier move
    void commit(std::vector<uint32_t> & victims, std::vector<move> & moves);

    // the slots of the next victims, in this order: in place of a rule
    void set_victims(std::vector<uint32_t> slots);

    // evict down to n tokens now, and bring the survivors of the slots >= n below them; see commit()
    void shrink(uint32_t n, std::vector<uint32_t> & victims, std::vector<move> & moves);

    // another budget, where no token lies beyond it
    void resize(uint32_t budget, uint32_t n_recent);

    // copies that bring all tokens below n_used
    void pack(std::vector<move> & moves);

    // drop the tokens at positions >= p0 (a rewind, or a ubatch that failed); the freed slots are pushed to freed
    // what is left of a ubatch still waits for commit()
    void truncate(int32_t p0, std::vector<uint32_t> & freed);

    //
    // queries
    //

    bool     empty()       const { return n_used_ == 0 && pos_last_ == none; }
    uint32_t n_used()      const { return n_used_; }
    uint32_t n_slots()     const { return (uint32_t) pos_.size(); }
    uint32_t budget()      const { return budget_; }
    uint32_t n_protect()   const { return n_protect_; }
    uint32_t n_recent()    const { return n_recent_; }
    int64_t  n_evicted()   const { return n_evicted_; }
    int64_t  n_interior()  const { return n_interior_; } // evictions of a token younger than another evictable one
    bool     is_compact()  const { return compact_; }

    int32_t  pos_of(uint32_t slot)      const { return pos_[slot]; }
    int32_t  slot_of_first(uint32_t i)  const { return protect_[i]; } // slot of the i-th protected token, or none

    int32_t  pos_first()   const { return pos_first_; }   // position of the sequence's first token, or none
    int32_t  pos_oldest()  const { return n_protect_ > 0 || head_ == UINT32_MAX ? pos_first_ : pos_[head_]; } // the oldest kept token
    int32_t  pos_last()    const { return pos_last_; }    // newest position of the sequence (it may be evicted after a rewind), or none
    int32_t  evicted_max() const { return evicted_max_; } // newest evicted position, or none

    int32_t  pos_placed()  const { return pos_commit_; }  // first position of the ubatch that is placed but not committed, or none

    // first position of the gap-free tail: upstream's contract for seq_pos_min
    int32_t  tail_first()  const { return evicted_max_ == none ? pos_first_ : evicted_max_ + 1; }

    // how many positions of the sequence are missing: what a protected token's distance to the query has grown too far by
    int32_t  gap()         const { return pos_last_ == none ? 0 : pos_last_ + 1 - pos_first_ - (int32_t) n_used_; }

    bool     can_rewind(int32_t p0)   const { return p0 > evicted_max_; }
    bool     rewind_exact(int32_t p0) const { return p0 > evictor_max_; }

    //
    // saved states
    //

    // what the ledger knows of a sequence; the rest follows from it
    struct image {
        uint32_t n_protect   = 0;
        int64_t  n_evicted   = 0;
        int64_t  n_interior  = 0;
        int32_t  pos_first   = none;
        int32_t  pos_last    = none;
        int32_t  evicted_max = none;
        int32_t  evictor_max = none;
        int32_t  pos_placed  = none;

        std::vector<uint32_t> slots; // of the kept tokens, by position
        std::vector<int32_t>  pos;   // ascending
    };

    image get_image() const;

    // false: no ledger of this size can ever look like that
    bool is_possible(const image & im) const;

    // is_possible() has said yes
    void set_image(const image & im);

    // every invariant of the data structure; for tests
    bool check() const;

    // slots of the kept tokens ordered by position
    std::vector<uint32_t> kept() const;

private:
    uint32_t victim() const { return i_given_ < given_.size() ? given_[i_given_] : rule_ ? rule_->next() : head_; }

    // the rule knows of this token
    bool is_evictable(uint32_t slot) const;

    // tell the rule of the tokens that are no longer, or are again, among the newest n_recent positions
    void update_recent();

    // the token in src is in dst from now on
    void relocate(uint32_t src, uint32_t dst);

    // bring the tokens in slots >= limit below it, or close all gaps
    void settle(uint32_t limit, bool has_gaps, std::vector<move> & moves);

    // slot = rank: list the copies and carry them out in the books
    void close_gaps(std::vector<move> & moves);

    void link  (uint32_t slot);  // append to the list
    void unlink(uint32_t slot);
    void put   (uint32_t slot, int32_t pos);
    void drop  (uint32_t slot);
    void evict (uint32_t slot, int32_t evictor);

    uint32_t take_free();
    void     give_free(uint32_t slot);

    uint32_t budget_;
    uint32_t n_protect_;
    uint32_t n_recent_;
    bool     compact_;

    llama_kv_victim_ptr rule_; // none: the oldest

    std::vector<uint32_t> given_; // victims
    size_t                i_given_ = 0;

    std::vector<int32_t>  pos_;     // [n_slots] position of the token in the slot, or none
    std::vector<uint32_t> prev_;    // [n_slots] evictable tokens, ordered by position
    std::vector<uint32_t> next_;    // [n_slots]
    std::vector<int32_t>  protect_; // [n_protect] slot of each protected token, or none
    std::vector<uint32_t> free_;    // min-heap of the free slots below the budget

    uint32_t head_;
    uint32_t tail_;
    uint32_t recent_; // the oldest token in the list that the rule does not know of

    uint32_t n_used_;
    uint32_t n_high_; // of them in the headroom
    int64_t  n_evicted_;
    int64_t  n_interior_;
    int32_t  pos_first_;
    int32_t  pos_last_;
    int32_t  evicted_max_; // newest position that was evicted
    int32_t  evictor_max_; // newest position whose arrival evicted something
    int32_t  pos_commit_;  // first position of the ubatch that is placed but not committed, or none
};
