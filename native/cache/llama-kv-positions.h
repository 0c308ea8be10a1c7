#pragma once

#include "llama-kv-backend.h"
#include "llama-kv-cache.h"
#include "llama-kv-frame.h"
#include "llama-kv-pool.h"
#include "llama-kv-rope.h"
#include "llama-kv-scores.h"
#include "llama-kv-sinks.h"

#include <memory>
#include <vector>

// positions `cache` and `auto`: the model sees each kept token at its rank, and stored keys are rotated so that they stand there
//
// - which keys, by how much, and when, says the frame of the sequence (llama-kv-frame.h)
// - how the model rotates its keys is read off its own graphs; a graph whose keys were not all seen has no answer that is right
// - protected tokens are rotated from their originals: nodes of the model's graph keep these when the tokens come, and may rewrite the sinks
// - update `gather` rotates all keys from a copy of its own: then positions are set here, and only the sliding window is rotated
//
// a method that rotates waits for the context's graphs first
class llama_kv_positions {
public:
    struct params {
        llama_kv_frame::rule frame;

        bool is_gather = false;

        // the Hadamard matrices that K may be multiplied with, of this cache and of the sliding-window one
        std::vector<float> had;
        std::vector<float> had_swa;

        std::vector<llama_kv_layer> layers_swa;
    };

    // kv_swa: the sliding-window cache beside this one, or nullptr: it follows when the positions are re-based
    // n_slots: of a sequence; where: they lie in the cache; scores: or nullptr
    llama_kv_positions(params p, const llama_context & lctx, const std::vector<llama_kv_layer> & layers, const llama_kv_cache * kv_swa,
            const llama_kv_where & where, uint32_t n_slots, uint32_t n_seq, llama_kv_scores * scores);

    // learn how the keys of a layer are rotated, of this cache or of the sliding-window one; k_cur: [n_embd_head, n_head_kv, n_tokens]
    // false if they are changed after their rotation
    bool observe(const ggml_tensor * k_cur, int32_t il);

    // all layers were observed: room for the originals of n_protect tokens per stream; throws, and then nothing is prepared
    bool is_prepared() const { return prepared; }
    void prepare(uint32_t n_protect);

    //
    // one ubatch
    //

    void begin(const llama_ubatch & ubatch);

    // the ledger has placed the tokens [i_tok, i_tok + slots.size()) of the ubatch: rotate what has to be rotated before it is computed,
    //   and set the positions that the model sees; throws std::runtime_error if the rotations failed
    llama_kv_frame::plan place(uint32_t seq, const llama_kv_ledger & ledger, llama_pos pos0, const std::vector<uint32_t> & slots, uint32_t i_tok,
            const llama_ubatch & ubatch);

    // the same for one token whose victim the ledger will be told later, see llama_kv_frame; then its slot
    bool can_place_ahead(uint32_t seq, const llama_kv_ledger & ledger, llama_pos pos0, uint32_t n_ahead);
    // (returns whether the units' keys were rotated by what their victims so far, and those of this token, have left them)
    bool place_ahead(uint32_t seq, const llama_kv_ledger & ledger, llama_pos pos0, uint32_t n_ahead, uint32_t i_tok, const llama_ubatch & ubatch);
    void arrive(uint32_t seq, const llama_kv_ledger & ledger, uint32_t slot, llama_pos pos, bool rotated) { frames[seq].arrive(ledger, slot, pos, rotated); }

    // the nodes that keep the originals of protected tokens, and rewrite the sinks where that is done in the graph
    void build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, int32_t il);

    // most nodes of build(), for all layers
    uint32_t n_nodes() const;

    // false while the graph of this ubatch, or the one built last, captures; or if they rewrite other sinks
    bool can_reuse() const;

    // false: the graph of this ubatch has stored keys that build() was not shown
    bool is_complete() const { return (n_seen == 0 && captures.empty()) || n_seen == n_rope_layers; }

    size_t get_n_seen()        const { return n_seen; }
    size_t get_n_rope_layers() const { return n_rope_layers; }

    //
    // sequences
    //

    void clear();
    void copy(uint32_t src, uint32_t dst);

    // the ledger has moved a token, or dropped the newest ones
    void move(uint32_t seq, uint32_t src, uint32_t dst) { frames[seq].move(src, dst); }
    void truncate(uint32_t seq) { frames[seq].truncate(); }

    // there is no room for the originals of n_protect tokens; resize() forgets those that are there
    llama_kv_traffic get_traffic() const { return sinks ? sinks->get_traffic() : llama_kv_traffic(); }

    bool is_short(uint32_t n_protect) const { return sinks && n_protect > sinks->get_n(); }
    bool resize(uint32_t n_protect); // false if it does not fit into memory

    // saved states; slots: the occupied ones, ascending
    // reserve: room for the originals; throws, and those that are there stay
    // read: throws if no sequence with this ledger can ever look like that; is_check: nothing is changed; returns is_ranks()
    void state_reserve(uint32_t n_protect);
    void state_write(llama_kv_state_writer & out, uint32_t seq, const llama_kv_ledger::image & ledger, const std::vector<uint32_t> & slots) const;
    bool state_read (llama_kv_state_reader & in,  uint32_t seq, const llama_kv_ledger::image & ledger, const std::vector<uint32_t> & slots, bool is_check);

    //
    // queries
    //

    bool    is_ranks (uint32_t seq) const { return frames[seq].is_ranks(); }
    int32_t base     (uint32_t seq) const { return frames[seq].base(); }
    int64_t n_batches(uint32_t seq) const { return frames[seq].n_batches(); }

    int32_t delta(uint32_t seq, const llama_kv_ledger & ledger) const { return frames[seq].delta(ledger); }
    int32_t first(uint32_t seq, const llama_kv_ledger & ledger) const { return frames[seq].first(ledger); }

    // [n_slots] by how much the keys have to be rotated; 0: protected, or no token
    std::vector<int32_t> debts(uint32_t seq, const llama_kv_ledger & ledger) const { return frames[seq].debts(ledger); }

    // of the layers with full attention
    llama_kv_rope & get_rope() { return rope; }

private:
    struct tokens { uint32_t seq; uint32_t i_tok; uint32_t rank; uint32_t n; };

    bool rotate          (uint32_t seq, const llama_kv_ledger & ledger, const llama_kv_frame::plan & plan, llama_pos pos0);
    bool rotate_window   (uint32_t seq, int32_t delta);
    bool rotate_units    (uint32_t seq, const llama_kv_ledger & ledger, const llama_kv_frame::plan & plan, llama_pos pos0);
    bool rotate_protected(uint32_t seq, const llama_kv_ledger & ledger, const llama_kv_frame::plan & plan);

    void set_positions(uint32_t seq, int32_t gap, uint32_t i_tok, uint32_t n, const llama_ubatch & ubatch) const;

    bool has_stands() const { return scores && scores->has_stands(); }

    // any eviction may leave debts: units differ, or a device has chosen one that the host does not know yet
    bool is_any_interior() const { return scores && (scores->is_per_head() || !(is_gather || scores->is_on_cpu())); }

    // every unit has ranks of its own, and its keys are rotated where they lie
    bool is_per_head() const { return scores && scores->is_per_head() && !is_gather; }

    const llama_kv_frame::rule rule;
    const bool                 is_gather;

    const llama_context & lctx;

    const std::vector<llama_kv_layer> & layers;
    const std::vector<llama_kv_layer>   layers_swa;

    const llama_kv_cache * kv_swa;
    llama_kv_scores      * scores;

    const llama_kv_where & where;

    const uint32_t n_seq;

    std::vector<llama_kv_frame> frames; // [n_seq]

    llama_kv_rope rope;
    llama_kv_rope rope_swa;

    // one for each kind of graph: ggml-vulkan crashed where kinds took turns on one backend (software driver, f16 and q8_0 keys)
    llama_kv_backends backends_pins;      // originals rotated into the cache
    llama_kv_backends backends_rotations; // stored keys rotated

    std::unique_ptr<llama_kv_sinks> sinks; // not with `gather`

    std::vector<tokens> captures; // protected tokens in the current ubatch
    std::vector<tokens> rewrites; // sinks that its graph rewrites

    // of the graph that was built last, which a later ubatch may be given again
    struct { bool captures = false; std::vector<tokens> rewrites; } built;

    bool prepared = false;

    size_t n_rope_layers = 0; // whose keys a ubatch's graph has to show to build()
    size_t n_seen        = 0; // since begin(): 0 if the graph was reused
};
