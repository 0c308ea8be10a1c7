#pragma once

#include "llama-kv-ledger.h"

#include <cstdint>
#include <vector>

// positions `cache`: a token's position is its rank among the kept tokens (arXiv 2309.17453, section 3.2)
//
// Attention sees differences of positions alone, so the newest token may keep its own position p, less a base, and a token
//   that is d ranks older stands at p - base - d. An eviction then moves the older tokens only, by +1; the protected ones
//   under `streaming`, and nothing else. What the key of a slot is rotated to, and what it should be, differ by the debt.
//
// - sinks: rotated from their originals before every step
// - pinned tokens: from their originals, once rotate_every tokens were evicted
// - the others: by their debt, once rotate_every of them were evicted from the middle; all debts at once
// - the base grows by whole blocks of the stream, since float32 angles lose about 1e-7 of the position
// - `auto`: ranks are used from the step on that would put a kept token further away than n_ctx_train
//
// no dependency on ggml or llama.cpp
class llama_kv_frame {
public:
    using rotation = llama_kv_rotation;

    struct plan {
        bool     switched = false; // `auto` goes over to ranks with this ubatch
        int32_t  rebased  = 0;     // every key that is not in `rotations` or protected stands this many positions too far
        int32_t  delta    = 0;     // of the protected tokens, from their originals
        uint32_t n_sinks  = 0;     // the first n protected tokens have to be written
        bool     pinned   = false; // and the other protected ones too
        bool     rotating = false; // and all the others: see rotations, or llama_kv_units

        std::vector<rotation> rotations; // the others: by how much, 0 left out
    };

    struct rule {
        bool     ranks        = false; // from the first token on
        bool     is_auto      = false; // or later
        uint32_t n_ctx_train  = 0;
        uint32_t n_sinks      = 0;
        uint32_t rotate_every = 1;
        int32_t  rebase_at    = 1 << 16; // positions beyond the kept tokens
    };

    llama_kv_frame(uint32_t n_slots, const rule & r);

    // the sequence becomes empty
    void reset();

    // the ledger has placed n tokens from pos0 on: what has to be rotated before the ubatch is computed
    // the caller does it, or clears the cache
    // no_rotations: all keys are rotated from a copy each time, or units have ranks of their own, so no rotations are listed
    // every_victim: each eviction may leave debts, as the victim of some unit, or one that is not known yet, is no oldest token
    plan place(const llama_kv_ledger & ledger, int32_t pos0, const std::vector<uint32_t> & slots, bool no_rotations = false, bool every_victim = false);

    // the same for one token of a full cache whose victim the ledger will be told later
    // n_ahead: such tokens, this one included; may_rotate: the units' keys can be rotated without it
    // false: that cannot wait, and nothing has changed
    bool plan_ahead(const llama_kv_ledger & ledger, int32_t pos0, uint32_t n_ahead, bool every_victim, bool may_rotate, plan & res) const;
    void place_ahead(const llama_kv_ledger & ledger, uint32_t n_ahead, const plan & res);

    // it was told: the token at pos came to this slot; and the plan was to rotate
    void arrive(const llama_kv_ledger & ledger, uint32_t slot, int32_t pos, bool rotated);

    // [n_slots] by how much the keys have to be rotated; 0: protected, or no token
    std::vector<int32_t> debts(const llama_kv_ledger & ledger) const;

    // the ledger has moved a token
    void move(uint32_t src, uint32_t dst) { at_[dst] = at_[src]; }

    // the ledger has dropped tokens: ranks may have changed in ways that no eviction tells
    void truncate() { dirty_ = true; }

    // saved states; at: [n slots] of the occupied slots
    struct image {
        bool    ranks = false;
        bool    dirty = false;
        int32_t base  = 0;
        int32_t origin       = 0;
        int32_t delta_pinned = 0;
        int64_t n_interior   = 0;
        int64_t n_batches    = 0;

        std::vector<int32_t> at;
    };

    image get_image(const std::vector<uint32_t> & slots) const;
    void  set_image(const std::vector<uint32_t> & slots, const image & im);

    // false: no sequence with this ledger can ever look like that
    bool is_possible(const llama_kv_ledger::image & ledger, const image & im) const;

    bool    is_ranks() const { return ranks_; }
    int32_t base()     const { return base_; }
    int64_t n_batches() const { return n_batches_; }

    // of the protected tokens, from their originals
    int32_t delta(const llama_kv_ledger & ledger) const { return ranks_ ? first(ledger) - origin_ : 0; }

    // where the first kept token of the ledger belongs; the i-th one belongs i positions further
    int32_t first(const llama_kv_ledger & ledger) const { return ledger.pos_last() - base_ - ((int32_t) ledger.n_used() - 1); }

private:
    // every kept key stands where it belongs
    void settle(const llama_kv_ledger & ledger);

    rule rule_;

    bool    ranks_;
    bool    dirty_; // debts are to be applied whatever rotate_every says
    int32_t base_;
    int32_t origin_; // where the originals of the protected tokens stand, less their rank
    int32_t delta_pinned_;
    int64_t n_interior_; // of the ledger, when the debts were last applied
    int64_t n_batches_;

    std::vector<int32_t> at_; // [n_slots] the position that the key is rotated to
};
