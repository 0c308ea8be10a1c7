#pragma once

#include "llama-kv-ledger.h"

#include <cstdint>
#include <vector>

// the kept sets of one sequence where layers or KV heads choose victims of their own
// a unit is a set of heads that keeps one set of tokens: those of a layer (scope `layer`), or one head (scope `head`); at scope `token` there is one unit
//
// - all units keep equally many tokens, and at scope `layer` and `head` in the same slots, so that one mask serves all of them: only
//   which token sits in which slot differs; the first unit is that of the ledger, which is the authority on everything else
// - compact: slot = rank in every unit (update `gather`)
//
// no dependency on ggml or llama.cpp
class llama_kv_units {
public:
    using move  = llama_kv_ledger::move;
    using moves = std::vector<std::vector<move>>; // [n_unit]

    using rotation = llama_kv_rotation;

    static constexpr int32_t none = llama_kv_ledger::none;

    llama_kv_units(uint32_t n_unit, uint32_t n_slots, bool compact) : n_unit_(n_unit), n_slots_(n_slots), compact_(compact),
        pos_((size_t) n_unit*n_slots, none), gone_(n_unit) {}

    // the sequence becomes empty
    void reset();

    // tokens from pos0 on are written to these slots of every unit
    void put(int32_t pos0, const std::vector<uint32_t> & slots);

    // the token at pos is written over the victim of each unit; slots: [n_unit] where it went
    // compact: the tokens behind the victim move up, and the new one goes behind them; the copies are in res
    void replace(int32_t pos, const std::vector<uint32_t> & victims, std::vector<uint32_t> & slots, moves & res);

    // of the last replace(), which was not compact: these units keep their victims after all, and have not got the token
    void undo_replace(const std::vector<uint32_t> & slots, const std::vector<bool> & undone);

    // victims: [n_unit][n]; they go, and tokens in slots >= limit move to free slots below it, both in ascending order
    // compact: all gaps are closed; returns true if anything is to be copied
    bool evict(const std::vector<uint32_t> & victims, uint32_t n, uint32_t limit, moves & res);

    // the tokens at positions >= p0 go: none of them may be older than evicted_max(). n_left: how many are left in the first unit; where
    //   a unit has more of them, since it has not got all tokens, its oldest ones from pos_free on are evicted too
    // is_packed: what is left is moved into the slots [0, n_left), as the ledger's pack() does; returns true if anything is to be copied
    bool truncate(int32_t p0, uint32_t n_left, bool is_packed, moves & res, int32_t pos_free = 0);

    // newest position that any unit has evicted, or none
    int32_t evicted_max() const { return evicted_max_; }

    uint32_t n_unit()  const { return n_unit_; }
    uint32_t n_slots() const { return n_slots_; }
    uint32_t n_used()  const { return n_used_; } // of each unit

    const int32_t * pos(uint32_t unit) const { return pos_.data() + (size_t) unit*n_slots_; } // [n_slots]

    // positions by rank: by how much the keys of a unit have to be rotated since the last call: +1 for each victim that was younger, and
    //   -rebased for all; tokens at positions < pos_min (the protected ones) and >= pos0 (of this ubatch) are left out
    std::vector<rotation> rotations(uint32_t unit, int32_t pos_min, int32_t pos0, int32_t rebased);

    // what they would be, at each slot: [n_slots], 0 for the protected ones and where nothing lies
    void debts(uint32_t unit, int32_t pos_min, std::vector<int32_t> & res) const;

    // all keys have been rotated by somebody else
    void forget_gone();

    // the same when the unit's tokens stand at their true positions, the rank of the newest token being its position
    std::vector<rotation> rotations_from_true(uint32_t unit, int32_t pos_min, int32_t pos_last);

    //
    // saved states: the positions of the tokens in these slots (ascending), and what else is known
    //

    struct image {
        int32_t evicted_max  = none;
        bool    is_recording = false;

        std::vector<std::vector<int32_t>> pos;  // [n_unit][n slots]
        std::vector<std::vector<int32_t>> gone; // [n_unit]
    };

    image get_image(const std::vector<uint32_t> & slots) const;
    void  set_image(const std::vector<uint32_t> & slots, const image & im);

    // record the victims for rotations() from now on, or not
    void set_recording(bool on) { recording_ = on; }

private:
    int32_t * at(uint32_t unit) { return pos_.data() + (size_t) unit*n_slots_; }

    void leave(uint32_t unit, uint32_t slot);

    // bring the tokens in slots >= from down into the empty ones, in order
    void pack(uint32_t unit, uint32_t from, std::vector<move> & res);

    uint32_t n_unit_;
    uint32_t n_slots_;
    bool     compact_;
    bool     recording_ = false;
    uint32_t n_used_    = 0;

    int32_t evicted_max_ = none;

    std::vector<int32_t> pos_; // [n_unit, n_slots] position of the token in the slot, or none

    std::vector<std::vector<int32_t>> gone_; // [n_unit] positions of the victims since the last rotations()

    // of the last replace(): [n_unit] positions of its victims, and evicted_max() before it
    std::vector<int32_t> left_;
    int32_t              evicted_before_ = none;
};
